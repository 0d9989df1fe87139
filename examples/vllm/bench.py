"""Stock vLLM beside ADSC, measured by vLLM's own client (what `vllm bench serve` runs), in turns.

python examples/vllm/bench.py                  # the bundled model
python examples/vllm/bench.py --wide 1024      # random weights, a decoder of this hidden size

Three servers run at once: vLLM's LLaVA, ADSC with an empty schedule, and ADSC with --schedule. The
client asks them one after the other, --rounds times, with other pictures and words in each round,
and another server first.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
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


def ask(url: str, model: Path, load: str, requests: int, seed: int, tokens: int) -> dict:
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
        f"--num-prompts={requests}",
        "--num-warmups=1",
        "--max-concurrency=8",
        f"--random-output-len={tokens}",
        f"--seed={seed}",
        "--temperature=0",
        "--disable-tqdm",
        *LOADS[load],
    ]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        result = main(parser.parse_args(command))
    if result["completed"] != requests:
        raise RuntimeError(f"expected {requests} answers, got {result['completed']}")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wide", type=int, metavar="HIDDEN", help="random weights of this size")
    parser.add_argument("--schedule", default="4:1/4,8:1/4,12:1/4")
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=[*LOADS])
    parser.add_argument("--requests", type=int, default=32, help="of each run")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each model")
    parser.add_argument("--json", type=Path, help="write every run here too")
    args = parser.parse_args()
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(args.threads)}
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    runs = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = wide(Path(folder), args.wide) if args.wide else as_vllm_reads(MODEL, Path(folder))
        urls = {}
        for name, schedule in {"stock": None, "empty": "", "adsc": args.schedule}.items():
            options = {"dtype": "float32", "block_size": 32, "max_model_len": 1024}
            flags = ("--enforce-eager", "--no-enable-prefix-caching")
            urls[name] = stack.enter_context(serving(model, schedule, *flags, **options))
        for seed in range(args.rounds):
            for load in args.loads:
                names = [*urls][seed % len(urls) :] + [*urls][: seed % len(urls)]
                for name in names:
                    result = ask(urls[name], model, load, args.requests, seed, args.tokens)
                    runs.append({"load": load, "server": name, "round": seed, **result})
                    print(json.dumps(runs[-1]), flush=True)
    print(table(runs))
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.write_text(json.dumps({"settings": settings, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
