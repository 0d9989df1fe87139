"""Ask a checkpoint about held-out pictures and count exact answers.

python evaluate.py --pictures 40                                    # with transformers, dense
python evaluate.py --pictures 40 --schedule 4:1/4,8:1/4,12:1/4      # with adsc_kernels.llava
python evaluate.py --schedule 4:1/4,8:1/4,12:1/4 --patched          # with transformers, patched
python evaluate.py --schedule 4:1/4,8:1/4,12:1/4 --agree            # how often both say the same
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image

from pictures import KINDS, Painter, Question, held_out_picture, sample_questions, to_rgb
from tokenizer import prompt

PER_PICTURE = {"cell": 4, "count": 4, "largest": 1, "side": 4, "where": 2, "row": 2, "all": 1}
MODEL = Path(__file__).parents[2] / "adsc_kernels" / "checkpoints" / "tiny-llava-digits"

Answer = Callable[[list[str], list[Image.Image]], list[str]]


def held_out(pictures: int, seed: int) -> Iterator[tuple[Image.Image, list[Question]]]:
    """Held-out pictures with questions; the same ``seed`` gives the same ones."""
    painter = Painter("held-out", augment=False)
    for i in range(pictures):
        batch, rng = held_out_picture(painter, seed, i)
        yield to_rgb(batch.pixels[0]), sample_questions(batch.digits[0], rng, PER_PICTURE)


def transformers_answer(
    model: Path, device: str, dtype: torch.dtype, schedule: str | None = None
) -> Answer:
    """Answer with ``transformers`` alone, or with ``apply_adsc`` under a schedule."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(model)
    llava = LlavaForConditionalGeneration.from_pretrained(model, dtype=dtype).to(device).eval()
    if schedule is not None:
        from adsc_kernels import apply_adsc

        apply_adsc(llava, schedule)

    def answer(prompts: list[str], images: list[Image.Image]) -> list[str]:
        inputs = processor(text=prompts, images=images, padding=True, return_tensors="pt")
        inputs = inputs.to(device, dtype)
        with torch.inference_mode():
            out = llava.generate(**inputs, max_new_tokens=12, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        return [t.strip() for t in processor.batch_decode(new, skip_special_tokens=True)]

    return answer


def adsc_answer(model: Path, device: str, dtype: torch.dtype, schedule: str) -> Answer:
    """Answer with ``adsc_kernels.llava`` under a schedule; an empty one drops nothing."""
    from adsc_kernels.llava import Llava

    llava = Llava.from_pretrained(model, schedule, device, dtype)

    def answer(prompts: list[str], images: list[Image.Image]) -> list[str]:
        given = llava.generate(prompts, [[image] for image in images], max_new_tokens=12)
        return [text.strip() for text in given.texts]

    return answer


def ask(
    answer: Answer, pictures: int, seed: int, batch: int = 16
) -> Iterator[tuple[Question, str]]:
    """All questions about the pictures, with what is answered."""
    asked = [(image, q) for image, questions in held_out(pictures, seed) for q in questions]
    for i in range(0, len(asked), batch):
        part = asked[i : i + batch]
        given = answer([prompt(q.text) for _, q in part], [image for image, _ in part])
        yield from zip((q for _, q in part), given, strict=True)


def agreement(one: Answer, other: Answer, pictures: int, seed: int) -> dict[str, object]:
    """How many answers are the same, and those that aren't."""
    pairs = list(zip(ask(one, pictures, seed), ask(other, pictures, seed), strict=True))
    differing = [(q.text, a, b) for (q, a), (_, b) in pairs if a != b]
    return {
        "pictures": pictures,
        "seed": seed,
        "questions": len(pairs),
        "same": len(pairs) - len(differing),
        "differing": differing,
    }


def evaluate(answer: Answer, pictures: int, seed: int) -> dict[str, object]:
    """Exact match by kind and over all questions."""
    right = dict.fromkeys(KINDS, 0)
    total = dict.fromkeys(KINDS, 0)
    start = time.perf_counter()
    for question, text in ask(answer, pictures, seed):
        right[question.kind] += text == question.answer
        total[question.kind] += 1
    count = sum(total.values())
    return {
        "pictures": pictures,
        "seed": seed,
        "questions": count,
        "accuracy": sum(right.values()) / count,
        "by_kind": {k: {"right": right[k], "asked": total[k]} for k in KINDS if total[k]},
        "seconds": round(time.perf_counter() - start, 2),
    }


def main() -> None:
    """Evaluate one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1, help="which held-out pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument(
        "--schedule", help="answer with adsc_kernels.llava under this schedule ('': dense)"
    )
    parser.add_argument(
        "--patched", action="store_true", help="answer with transformers under the schedule"
    )
    parser.add_argument(
        "--agree", action="store_true", help="count answers that transformers patched gives too"
    )
    parser.add_argument("--json", type=Path, help="write the result here too")
    args = parser.parse_args()
    makers = [transformers_answer, adsc_answer]
    if not args.agree:
        makers = makers[:1] if args.schedule is None or args.patched else makers[1:]
    given = args.model, args.device, getattr(torch, args.dtype), args.schedule
    answers = [make(*given) for make in makers]
    if args.agree:
        result = agreement(*answers, args.pictures, args.seed)
        print(f"{result['same']} of {result['questions']} answers are the same")
    else:
        result = evaluate(*answers, args.pictures, args.seed)
        for kind, n in result["by_kind"].items():
            print(f"{kind:8} {n['right'] / n['asked']:7.2%}  {n['right']}/{n['asked']}")
        print(f"{'overall':8} {result['accuracy']:7.2%}  {result['questions']} questions")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
