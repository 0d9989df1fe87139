"""What can't work is refused with a reason: when the engine is configured, or with the request."""

from __future__ import annotations

import pytest
from engines import MIXED, Ask, answer, check, engine

SCHEDULE = "2:1/3,4:1/2"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(enable_lora=True), "LoRA"),
        (dict(pipeline_parallel_size=2, distributed_executor_backend="mp"), "pipeline parallel"),
        (dict(disable_hybrid_kv_cache_manager=True), "disable_hybrid_kv_cache_manager"),
        (dict(block_size=48), "block size 48: expected a multiple of 32"),
        (dict(scheduler_cls="vllm.v1.core.sched.scheduler.Scheduler"), "scheduler_cls"),
        (
            dict(kv_transfer_config=dict(kv_connector="ExampleConnector", kv_role="kv_both")),
            "KV connectors",
        ),
        (
            dict(speculative_config=dict(method="ngram_gpu", num_speculative_tokens=2)),
            "speculative method",
        ),
        (dict(additional_config={"adsc_align": "page"}), "adsc_align"),
        (dict(additional_config={"adsc_schedule": "9:1/2"}), "expected 0 to 5"),
        (dict(additional_config={"adsc_schedule": "2:x"}), "at character 3"),
        (dict(additional_config={"adsc_schedule": 3}), "expected text or a mapping"),
        (
            dict(additional_config={"adsc_schedule": {"num_layers": 8, "boundaries": []}}),
            "expected a schedule for 6 layers, got 8",
        ),
        (dict(additional_config={"adsc_schedule": None}), "got none"),
    ],
)
def test_engine_configuration(llava, options, reason):
    with pytest.raises(ValueError, match="(?s)" + reason), engine(llava, SCHEDULE, **options):
        pass


def test_schedule_in_the_checkpoint(llava):
    """Found in config.json without --additional-config."""
    overrides = {
        "architectures": ["AdscLlavaForConditionalGeneration"],
        "adsc_schedule": SCHEDULE,
    }
    none = {"adsc_schedule": None}
    with engine(llava, "", hf_overrides=overrides, additional_config=none) as llm:
        check(llava, SCHEDULE, MIXED, answer(llm, MIXED, 3))


def test_requests(llava):
    """Refused before the engine sees them; the engine goes on."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    bad = (ValueError, VLLMValidationError)
    with engine(llava, SCHEDULE) as llm:
        with pytest.raises(bad, match="expected text behind the last image"):
            answer(llm, [Ask("w1 <image>", (1,))])
        with pytest.raises(bad, match="prompt_logprobs: not supported with ADSC"):
            llm.generate(["w1 w2"], SamplingParams(prompt_logprobs=1), use_tqdm=False)
        with pytest.raises(bad, match=r"(?i)at most 4 image"):
            answer(llm, [Ask("<image> " * 5 + "w1", (1, 2, 3, 4, 5))])
        with pytest.raises(bad, match="maximum context length is 512"):
            answer(llm, [Ask("w1 " * 600)])
        check(llava, SCHEDULE, MIXED, answer(llm, MIXED, 3))


def test_other_vllm(monkeypatch):
    """Under another vLLM nothing is registered, and one line says why."""
    from adsc_kernels.integrations.vllm import plugin

    monkeypatch.setattr(plugin, "version", lambda name: "0.33.1")
    assert plugin.vllm_problem() == "adsc_kernels: expected vLLM 0.32.x, got vllm 0.33.1"
    lines = []
    monkeypatch.setattr(plugin.logger, "error", lambda text, *values: lines.append(text % values))
    plugin.register()
    assert lines == [plugin.vllm_problem() + ": ADSC architectures are not registered"]
