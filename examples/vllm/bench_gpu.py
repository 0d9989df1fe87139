"""Stock vLLM beside ADSC at LLaVA-1.5-7B's shape on a GPU: engines, which work in turns.

python examples/vllm/bench_gpu.py                  # weights made on the device, bfloat16
python examples/vllm/bench_gpu.py --dry            # the bundled model on a CPU, to try this script

Each engine runs as vLLM starts by default (compiled, CUDA graphs), with the same bytes of KV cache,
in a process that steps it: no server, and requests are tokenized and their pictures read before
the clock starts, so that what is timed is the engine. The others wait meanwhile. The schedules have
the same budget, 192 vision tokens a layer; the second one's stages share a divisor.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from checkpoints import MODEL, as_vllm_reads, like_7b
from server import ADSC

SCHEDULES = ("5:1/3,17:1/3", "4:1/3,20:1/3")
WORDS = ("What", "digit", "is", "at", "row", "column", "1", "2", "3")


@dataclass(frozen=True)
class Load:
    """`requests` of so many pictures (576 tokens each), `at_once` of them in the engine."""

    images: int
    at_once: int
    requests: int
    tokens: int

    def __str__(self) -> str:
        return f"{576 * self.images} vision tokens x {self.at_once}"


ALL = 1000  # at once: as many as fit
LOADS = (
    Load(1, 1, 6, 32),
    Load(1, ALL, 160, 48),
    Load(1, 32, 64, 32),
    Load(5, 1, 4, 24),
    Load(5, ALL, 32, 32),
    Load(1, 8, 24, 32),
    Load(5, 8, 16, 24),
    Load(0, 32, 64, 32),
    Load(0, 1, 4, 32),
)
DRY = (Load(1, 1, 1, 4), Load(1, ALL, 3, 4))


class Engine:
    """vLLM's engine in this process, stepped here."""

    def __init__(self, schedule: str | None, kv_bytes: int, dry: bool) -> None:
        from vllm import LLM

        options: dict[str, Any] = dict(
            max_model_len=4096, enable_prefix_caching=False, limit_mm_per_prompt={"image": 5}
        )
        folder = Path(tempfile.mkdtemp())
        if dry:
            options |= dict(dtype="float32", enforce_eager=True, block_size=32)
            options |= dict(model=str(as_vllm_reads(MODEL, folder)), num_gpu_blocks_override=2400)
            options |= dict(max_num_batched_tokens=4096, max_num_seqs=16)
        else:
            options |= dict(dtype="bfloat16", load_format="dummy", kv_cache_memory_bytes=kv_bytes)
            options |= dict(model=str(like_7b(folder)), gpu_memory_utilization=0.2)
            options |= dict(max_num_batched_tokens=16384, max_num_seqs=256)
        if schedule is not None:
            options |= dict(hf_overrides=ADSC, additional_config={"adsc_schedule": schedule})
        self.engine = LLM(disable_log_stats=False, **options).llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.made = 0

    def rendered(self, load: Load, seed: int) -> list[Any]:
        """Requests as a server's other process hands them to its engine."""
        from PIL import Image
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        draw, requests = random.Random(seed), []
        for _ in range(load.requests):
            words = " ".join(draw.choices(WORDS, k=60 if load.images else 300))
            prompt: dict[str, Any] = {
                "prompt": f"USER: {'<image>' * load.images}\n{words} ASSISTANT:"
            }
            pixels = [draw.randbytes(48 * 48 * 3) for _ in range(load.images)]
            if pixels:
                pictures = [Image.frombytes("RGB", (48, 48), some) for some in pixels]
                prompt["multi_modal_data"] = {"image": pictures}
            params = SamplingParams(
                temperature=0,
                max_tokens=load.tokens,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            self.made += 1
            requests.append(
                self.engine.input_processor.process_inputs(
                    f"r{self.made}",
                    prompt,
                    params,
                    supported_tasks=self.engine.get_supported_tasks(),
                )
            )
        return requests

    def run(self, load: Load, requests: Sequence[Any]) -> dict[str, float]:
        """Times in ms. most_running: requests in one step."""
        sent: dict[str, float] = {}
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        waiting, most, begun = list(requests)[::-1], 0, time.perf_counter()
        while len(last) < len(requests):
            while waiting and len(sent) - len(last) < load.at_once:
                request = waiting.pop()
                sent[request.request_id] = time.perf_counter()
                self.engine.add_request(request.request_id, request, request.params)
            outputs = self.engine.step()
            now, most = time.perf_counter(), max(most, len(self.scheduler.running))
            for output in outputs:
                if output.outputs[0].token_ids:
                    first.setdefault(output.request_id, now)
                if output.finished:
                    last[output.request_id] = now
        seconds, count = time.perf_counter() - begun, len(requests)
        waits = sorted(first[name] - sent[name] for name in sent)
        steps = sum(last[name] - first[name] for name in sent) / (load.tokens - 1)
        return {
            "requests_per_s": round(count / seconds, 3),
            "mean_ttft_ms": round(1e3 * sum(waits) / count, 2),
            "median_ttft_ms": round(1e3 * waits[count // 2], 2),
            "ms_per_token": round(1e3 * steps / count, 3),
            "most_running": most,
        }


def serve(turns: Connection, schedule: str | None, kv_bytes: int, dry: bool) -> None:
    """A process: answers each (load, seed) with what was measured, after a warm-up."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    engine = Engine(schedule, kv_bytes, dry)
    for images in (0, 1) if dry else (0, 1, 5):
        load = Load(images, 8, 2 if dry else 8, 8)
        engine.run(load, engine.rendered(load, 0))
    cache = engine.scheduler.kv_cache_config
    groups = [len(group.layer_names) for group in cache.kv_cache_groups]
    turns.send({"blocks": cache.num_blocks, "layers_of_groups": groups})
    while (asked := turns.recv()) is not None:
        load, seed = asked
        turns.send(engine.run(load, engine.rendered(load, seed)))
    os._exit(0)


def table(runs: Sequence[dict]) -> str:
    """Markdown: the mean of the rounds, and requests/s against stock vLLM's."""
    metrics = ("requests_per_s", "mean_ttft_ms", "median_ttft_ms", "ms_per_token", "most_running")
    lines = [f"| load | engine | {' | '.join(metrics)} | ratio |"]
    lines.append("| --- " * (len(metrics) + 3) + "|")
    for load in dict.fromkeys(run["load"] for run in runs):
        stock = 0.0
        for name in dict.fromkeys(run["engine"] for run in runs):
            some = [r for r in runs if (r["load"], r["engine"]) == (load, name)]
            means = [sum(run[key] for run in some) / len(some) for key in metrics]
            stock = stock or means[0]
            cells = [load, name, *(f"{value:.4g}" for value in means), f"{means[0] / stock:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--kv-gib", type=float, default=16, help="KV cache of each engine")
    parser.add_argument("--dry", action="store_true", help="a small model on a CPU")
    parser.add_argument("--json", type=Path, help="write every run here too")
    args = parser.parse_args()
    schedules = {"stock": None, **{schedule: schedule for schedule in args.schedules}}
    spawn, pipes, runs = multiprocessing.get_context("spawn"), {}, []
    for name, schedule in schedules.items():
        pipes[name], theirs = spawn.Pipe()
        given = (theirs, schedule, int(args.kv_gib * 2**30), args.dry)
        spawn.Process(target=serve, args=given, daemon=True).start()
        theirs.close()  # so that an engine that ends is seen here
    engines = {name: pipe.recv() for name, pipe in pipes.items()}
    loads = DRY if args.dry else LOADS
    for seed in range(args.rounds):
        for number, load in enumerate(loads):
            turn = [*pipes] if (seed + number) % 2 == 0 else [*pipes][::-1]
            for name in turn:
                pipes[name].send((load, 1000 * seed + number))
                got = pipes[name].recv()
                runs.append(
                    {"load": str(load), "engine": name, **asdict(load), "round": seed, **got}
                )
                print(json.dumps(runs[-1]), flush=True)
    for pipe in pipes.values():
        pipe.send(None)
    print(table(sorted(runs, key=lambda run: [*pipes].index(run["engine"]))))
    if args.json:
        args.json.write_text(json.dumps({"engines": engines, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
