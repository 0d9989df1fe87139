"""Stock vLLM beside ADSC, measured by vLLM's own client (what `vllm bench serve` runs), in turns.

python examples/vllm/bench.py                  # the bundled model
python examples/vllm/bench.py --wide 1024      # random weights, a decoder of this hidden size

Three servers run at once: vLLM's LLaVA, ADSC with an empty schedule, and ADSC with --schedule. The
client asks them one after the other, --rounds times, with other pictures and words in each round,
and another server first. On a GPU: bench_gpu.py.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean

from checkpoints import MODEL, as_vllm_reads, wide
from server import serving

# Keys of the client's result. Times are in ms.
METRICS = ("output_throughput", "request_throughput", "mean_ttft_ms", "median_ttft_ms")
METRICS += ("p99_ttft_ms", "mean_tpot_ms")
LOADS = {
    "image": (
        "--dataset-name=random-mm",
        "--random-mm-base-items-per-request=1",
        "--random-mm-num-mm-items-range-ratio=0",
        "--random-mm-bucket-config={(48, 48, 1): 1.0}",
        "--random-input-len=64",
    ),
    "text": ("--dataset-name=random", "--random-input-len=320"),
}


@dataclass(frozen=True)
class Load:
    """What is asked of a server in one run: `requests` of a kind in LOADS, `at_once` at a time."""

    kind: str
    at_once: int
    requests: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.kind} x {self.at_once}"


def ask(url: str, model: Path, load: Load, seed: int) -> dict:
    """What vLLM's client measures of one server under one load."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    command = [
        f"--base-url={url}",
        "--backend=openai-chat",
        "--endpoint=/v1/chat/completions",
        f"--model={model}",
        f"--served-model-name={model.name}",
        f"--num-prompts={load.requests}",
        "--num-warmups=1",
        f"--max-concurrency={load.at_once}",
        f"--random-output-len={load.tokens}",
        f"--seed={seed}",
        "--temperature=0",
        "--disable-tqdm",
        *LOADS[load.kind],
    ]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        result = main(parser.parse_args(command))
    if result["completed"] != load.requests:
        raise RuntimeError(f"expected {load.requests} answers, got {result['completed']}")
    return {key: round(float(result[key]), 3) for key in METRICS}


def table(runs: Sequence[dict]) -> str:
    """Markdown: the mean of the rounds, and the ratio of output throughput to stock vLLM's."""
    lines = ["| load | server | " + " | ".join(METRICS) + " | ratio |"]
    lines.append("| --- " * (len(METRICS) + 3) + "|")
    for load, server in sorted({(run["load"], run["server"]) for run in runs}):
        means = [average(runs, load, server, key) for key in METRICS]
        ratio = means[0] / average(runs, load, "stock", METRICS[0])
        cells = [load, server, *(f"{value:.4g}" for value in means), f"{ratio:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def average(runs: Sequence[dict], load: str, server: str, key: str) -> float:
    return mean(run[key] for run in runs if (run["load"], run["server"]) == (load, server))


def cpu_options() -> tuple[tuple[str, ...], dict[str, object]]:
    """Of a server on a CPU: eager, with prefix caching off."""
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    flags = ("--enforce-eager", "--no-enable-prefix-caching")
    return flags, {"dtype": "float32", "block_size": 32, "max_model_len": 1024}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wide", type=int, metavar="HIDDEN", help="random weights of this size")
    parser.add_argument("--schedule", default="4:1/4,8:1/4,12:1/4")
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=["image", "text"])
    parser.add_argument("--at-once", nargs="+", type=int, default=[8], help="concurrent requests")
    parser.add_argument("--requests", type=int, default=32, help="of each run")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each model on a CPU")
    parser.add_argument("--json", type=Path, help="write every run here too")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "VLLM_LOGGING_LEVEL": "ERROR"}
    flags, options = cpu_options()
    runs = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = wide(Path(folder), args.wide) if args.wide else as_vllm_reads(MODEL, Path(folder))
        urls = {}
        for name, schedule in {"stock": None, "empty": "", "adsc": args.schedule}.items():
            urls[name] = stack.enter_context(serving(model, schedule, *flags, **options))
        for seed, kind, at_once in product(range(args.rounds), args.loads, args.at_once):
            load = Load(kind, at_once, args.requests, args.tokens)
            for name in [*urls][seed % len(urls) :] + [*urls][: seed % len(urls)]:
                result = ask(urls[name], model, load, seed)
                runs.append({"load": str(load), "server": name, "round": seed, **result})
                print(json.dumps(runs[-1]), flush=True)
    print(table(runs))
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.write_text(json.dumps({"settings": settings, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
