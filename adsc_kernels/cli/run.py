"""``adsc run``: one model answers the same questions twice, dense and compressed."""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adsc_kernels import checks
from adsc_kernels.budget import PRESETS
from adsc_kernels.cli import options, png, report, run_transformers
from adsc_kernels.hub import bundled_checkpoint, read_config
from adsc_kernels.images import load_image
from adsc_kernels.schedule import CONFIG_KEY, CompressionSchedule

if TYPE_CHECKING:
    from PIL.Image import Image

    from adsc_kernels.llava import Generation, Llava

DEFAULT_OUT = "adsc-run.png"


def add_parser(commands: Any) -> None:
    """Add ``run`` and its options to the commands."""
    parser = commands.add_parser(
        "run",
        help="answer questions about pictures, dense and compressed",
        description="Answer questions about pictures twice with the same weights, dense and "
        "compressed, and show tokens, cache bytes, MACs and times side by side. Without arguments: "
        "the bundled model, one of its held-out pictures and the questions that come with it.",
    )
    parser.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        help="a LLaVA-1.5 checkpoint in Hugging Face format: a folder, or an id on the hub such as "
        "llava-hf/llava-1.5-7b-hf (the bundled one)",
    )
    parser.add_argument(
        "--adapter",
        type=Path,
        metavar="FOLDER",
        help="one that `adsc train` made: its schedule, and its weights where compressed",
    )
    parser.add_argument(
        "--engine",
        choices=("thin", "transformers"),
        default="thin",
        help="transformers: any model that apply_adsc serves (thin: our LLaVA-1.5)",
    )
    parser.add_argument(
        "--image",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="the pictures, all of them in every prompt",
    )
    parser.add_argument(
        "--ask",
        action="append",
        metavar="TEXT",
        help="a question; may be repeated. Pictures come before it, or where it says <image>",
    )
    parser.add_argument(
        "--schedule",
        metavar="TEXT|PRESET",
        help=f"such as 8:1/4,16:1/4,24:1/4, or one of {', '.join(PRESETS)} (the checkpoint's own, "
        "else 1/4 at each quarter of the depth)",
    )
    at_least_one = options.integer(1)
    parser.add_argument("--max-new-tokens", type=at_least_one, default=48, metavar="N", help="(48)")
    parser.add_argument(
        "--temperature", type=options.decimal, default=0.0, metavar="T", help="(0: greedy)"
    )
    any_seed = options.integer(-(2**63), checks.INT64_MAX)
    parser.add_argument("--seed", type=any_seed, default=0, metavar="N", help="for sampling (0)")
    parser.add_argument(
        "--prefill-chunk",
        type=at_least_one,
        metavar="N",
        help="run prompts in parts of so many tokens",
    )
    parser.add_argument(
        "--runs",
        type=options.integer(1, 10_000),
        default=3,
        metavar="N",
        help="timed ones, after one to warm up (3)",
    )
    parser.add_argument("--device", metavar="DEVICE", help="(cuda where there is one, else cpu)")
    parser.add_argument(
        "--dtype",
        choices=options.DTYPES,
        help="of weights and cache (float16 on a GPU, else float32)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(DEFAULT_OUT),
        metavar="PNG",
        help=f"where to draw which patches survive ({DEFAULT_OUT})",
    )
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.set_defaults(execute=execute)


@dataclass(frozen=True)
class Question:
    """What is asked, and the right answer where it is known."""

    text: str
    expected: str | None = None


def execute(args: argparse.Namespace) -> None:
    """Print the comparison and draw the picture; ``ValueError`` or ``OSError`` for bad input."""
    # All that can be wrong is looked at before weights are read, and again nothing is written until
    # both models have answered.
    png.check(args.out, "--out")
    bundled = bundled_checkpoint()
    files, questions = _choose(args.image, args.ask, bundled)
    images = [load_image(file) for file in files]
    prompts = [_prompt(question.text, len(images)) for question in questions]
    if args.model is not None and Path(args.model).is_dir():
        read_config(Path(args.model) / "config.json")  # transformers takes seconds to be imported
    device = options.device(args.device)
    import torch

    from adsc_kernels import adapters
    from adsc_kernels.llava import Llava
    from adsc_kernels.llava.config import LlavaConfig
    from adsc_kernels.sampling import check_options

    dtype = options.dtype(args.dtype, device)
    folder = options.model_folder(args.model)
    if args.engine == "transformers":
        run_transformers.check(args)
        asked = [question.text for question in questions]
        run_transformers.execute(args, folder, images, asked, device, dtype)
        return
    config = LlavaConfig.from_folder(folder)
    depth = config.num_layers
    schedule = None
    if args.schedule is not None:
        schedule = options.schedule(args.schedule, num_layers=depth)
    if args.adapter is not None:
        schedule = adapters.agree(args.adapter, schedule, depth)
    elif schedule is None:
        schedule = default_schedule(config.hf, depth)
    settings = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "seed": args.seed,
        "prefill_chunk": args.prefill_chunk,
    }
    try:
        check_options(**settings)
        model = Llava.from_pretrained(folder, None, device, dtype)
        tuned = model
        if args.adapter is not None:
            tuned = Llava.from_pretrained(folder, None, device, dtype, adapter=args.adapter)
        ways = (model.with_schedule(None), tuned.with_schedule(schedule))
        dense, compressed = _both(ways, args.runs, prompts, [images] * len(prompts), settings)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"--device: {device} ran out of memory, which a 16-bit --dtype, --prefill-chunk or "
            f"fewer questions may avoid ({error})"
        ) from None

    picture = report.survivors(images, schedule, compressed, model)
    facts = report.compare(model, schedule, dense, compressed)
    facts["model"]["name"] = folder.name if args.model is None else args.model
    if args.adapter is not None:
        facts["model"]["adapter"] = str(args.adapter)
    facts["images"] = [str(file) for file in files]
    facts["answers"] = [
        {"question": q.text, "expected": q.expected, "dense": a, "compressed": b}
        for q, a, b in zip(questions, dense.texts, compressed.texts, strict=True)
    ]
    png.write(picture, args.out)
    facts["picture"] = str(args.out)
    print(json.dumps(facts, indent=1) if args.json else report.as_text(facts))


def default_schedule(config: Any, num_layers: int) -> CompressionSchedule:
    """The one that the model's config holds, as `adsc merge` wrote it; else keep 1/4 before each
    quarter of the depth but the first: an average of 1/3 of the tokens."""
    kept = getattr(config, CONFIG_KEY, None)
    if kept is not None:
        return CompressionSchedule.of_config(kept, num_layers)
    layers = sorted({num_layers * quarter // 4 for quarter in (1, 2, 3)} - {0})
    return CompressionSchedule.parse(",".join(f"{n}:1/4" for n in layers), num_layers=num_layers)


@dataclass(frozen=True)
class Runs:
    """One way of running: what it answered, and the median times of its runs."""

    generation: Generation
    vision_seconds: list[float]  # of every run: the same work whichever way
    prefill_seconds: float
    seconds_per_token: float | None  # None where every answer was a single token

    @property
    def texts(self) -> list[str]:
        """The answers."""
        return self.generation.texts

    @classmethod
    def of(cls, generations: list[Generation]) -> Runs:
        """From the same prompts, run again and again."""
        last = generations[-1]
        steps = last.decode_steps
        return cls(
            generation=last,
            vision_seconds=[g.vision_seconds for g in generations],
            prefill_seconds=statistics.median(g.prefill_seconds for g in generations),
            seconds_per_token=(
                statistics.median(g.decode_seconds / steps for g in generations) if steps else None
            ),
        )


def _both(
    ways: tuple[Llava, Llava],
    runs: int,
    prompts: list[str],
    images: list[list[Image]],
    settings: dict[str, Any],
) -> tuple[Runs, Runs]:
    """Dense and compressed by turns, on the same machine then; the first pair warms up."""
    done: tuple[list[Generation], list[Generation]] = ([], [])
    for _ in options.progress(range(1 + runs), "runs"):
        for way, generations in zip(ways, done, strict=True):
            generations.append(way.generate(prompts, images, **settings))
    return Runs.of(done[0][1:]), Runs.of(done[1][1:])


def _choose(
    images: list[Path] | None, asked: list[str] | None, bundled: Path
) -> tuple[list[Path], list[Question]]:
    """The picture files and the questions; what is not given comes from the bundled checkpoint."""
    folder = bundled / "pictures"
    known = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    files = [folder / next(iter(known))] if images is None else images
    answers: dict[str, str] = {}
    if len(files) == 1 and files[0].resolve().parent == folder.resolve():
        answers = {q["question"]: q["answer"] for q in known.get(files[0].name, ())}
    if asked is None and not answers:
        raise ValueError(f"--ask: expected a question about {', '.join(map(str, files))}, got none")
    return files, [Question(text, answers.get(text)) for text in asked or answers]


def _prompt(question: str, num_images: int) -> str:
    """LLaVA-1.5's form of a single turn."""
    if not question.strip():
        raise ValueError("--ask: expected a question, got an empty text")
    pictures = "" if "<image>" in question else "<image>\n" * num_images
    return f"USER: {pictures}{question} ASSISTANT:"
