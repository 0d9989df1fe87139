"""A checkpoint that `adsc merge` wrote is served under the schedule it was trained for."""

from __future__ import annotations

import json

import torch


def test_a_merged_adapter_answers_as_the_thin_model_does(tmp_path):
    from engines import Checkpoint, engine
    from vllm import SamplingParams

    from adsc_kernels.adapters import merge_checkpoint
    from adsc_kernels.hub import bundled_checkpoint
    from adsc_kernels.llava import Llava, load_image

    model = bundled_checkpoint()
    adapter = model / "adapters" / "64"
    schedule = merge_checkpoint(model, adapter, tmp_path / "merged")
    known = json.loads((model / "pictures" / "questions.json").read_text())
    asked = [(name, one) for name, some in known.items() for one in some[:4]]
    prompts = [f"USER: <image>\n{one['question']} ASSISTANT:" for _, one in asked]
    images = [load_image(model / "pictures" / name) for name, _ in asked]
    thin = Llava.from_pretrained(tmp_path / "merged", schedule, "cpu", torch.float32)
    want = thin.generate(prompts, [[image] for image in images], max_new_tokens=12).token_ids
    requests = [
        {"prompt": prompt, "multi_modal_data": {"image": image}}
        for prompt, image in zip(prompts, images, strict=True)
    ]
    greedy = SamplingParams(temperature=0, max_tokens=12)
    with engine(
        Checkpoint(tmp_path / "merged", None, None),
        None,  # the schedule is in the checkpoint
        hf_overrides={"architectures": ["AdscLlavaForConditionalGeneration"]},
        max_model_len=704,
        num_gpu_blocks_override=1600,
    ) as llm:
        outputs = llm.generate(requests, greedy, use_tqdm=False)
    texts = [output.outputs[0].text.strip() for output in outputs]
    assert [list(output.outputs[0].token_ids) for output in outputs] == [list(ids) for ids in want]
    right = sum(text == one["answer"] for text, (_, one) in zip(texts, asked, strict=True))
    assert right > 0.8 * len(asked)
