"""What the host does for a step, stock vLLM beside ADSC: microseconds of each part, on a CPU.

python examples/vllm/host_time.py                                  # 1, 32 and 160 at once
python examples/vllm/host_time.py --at-once 32 --profile schedule  # cProfile of one part

A decoder of 32 layers that never runs: its results are zeros, so that a step is the host's work
alone. A step's parts are timed where vLLM calls them, so that what a KV group costs vLLM itself
(block tables, slots, the backend's metadata) is in them too. Times are the thread's own, of each
part the fastest of 40 steps: other work on the machine is in those of the clock.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints import narrow
from server import ADSC

PARTS = ("schedule", "inputs", "metadata", "output", "step")


class Clock:
    """Times of each part of the steps of one kind, in microseconds."""

    def __init__(self, profile: str | None) -> None:
        self.kind, self.profile = "", profile
        self.times: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.profiler = cProfile.Profile()

    def around(self, owner: Any, name: str, part: str) -> None:
        """Time every call of a method."""
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            profiled = self.profile == part and self.kind.startswith("decode")
            begun = time.thread_time()
            made = self.profiler.runcall(inner, *args, **kwargs) if profiled else None
            made = made if profiled else inner(*args, **kwargs)
            self.times[self.kind, part].append(1e6 * (time.thread_time() - begun))
            return made

        setattr(owner, name, timed)

    def fastest(self) -> dict[str, dict[str, float]]:
        made: dict[str, dict[str, float]] = defaultdict(dict)
        for (kind, part), times in self.times.items():
            if kind:
                made[kind][part] = round(min(times), 1)
        return made


def measure(schedule: str | None, at_once: list[int], profile: str | None) -> dict[str, Any]:
    """Of an engine's steps of each kind, the fastest of each part."""
    import warnings

    warnings.filterwarnings("ignore")
    import torch
    from PIL import Image
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = dict(
        model=str(narrow(Path(tempfile.mkdtemp()))),
        load_format="dummy",
        dtype="float32",
        block_size=32,
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        num_gpu_blocks_override=16384,
        enable_prefix_caching=False,
        async_scheduling=False,
    )
    if schedule is not None:
        options |= dict(hf_overrides=ADSC, additional_config={"adsc_schedule": schedule})
    engine = LLM(**options).llm_engine
    core = engine.engine_core.engine_core
    runner, clock = core.model_executor.driver_worker.worker.model_runner, Clock(profile)
    clock.around(core.scheduler, "schedule", "schedule")
    clock.around(core.scheduler, "update_from_output", "output")
    clock.around(runner, "_prepare_inputs", "inputs")
    clock.around(runner, "_build_attention_metadata", "metadata")
    runner._model_forward = lambda *, inputs_embeds, **inputs: torch.zeros_like(inputs_embeds)
    clock.around(engine, "step", "step")
    picture = Image.frombytes("RGB", (48, 48), bytes(range(256)) * 27)
    prompt = {"prompt": "USER: <image>\nWhat digit is at row 1", "multi_modal_data": {}}
    prompt["multi_modal_data"]["image"] = picture
    for count in at_once:
        for n in range(count):
            params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
            engine.add_request(f"{count}-{n}", prompt, params)
        clock.kind = f"prefill {count}"
        while any(request.num_output_tokens == 0 for request in core.scheduler.running) or (
            core.scheduler.waiting
        ):
            engine.step()
        clock.kind = f"decode {count}"
        for _ in range(40):
            engine.step()
        clock.kind = ""
        engine.abort_request([f"{count}-{n}" for n in range(count)])
        engine.step()
    if profile is not None:
        pstats.Stats(clock.profiler, stream=sys.stderr).sort_stats("tottime").print_stats(25)
    groups = core.scheduler.kv_cache_config.kv_cache_groups
    return {"groups": len(groups), "times": clock.fastest()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedule", default="5:1/3,17:1/3")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 32, 160])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--profile", choices=PARTS, help="of decode steps, to stderr")
    parser.add_argument("--only", choices=("stock", "adsc"), help="this engine, in this process")
    args = parser.parse_args()
    if args.only:
        schedule = None if args.only == "stock" else args.schedule
        print("RESULT", json.dumps(measure(schedule, args.at_once, args.profile)))
        return
    for _ in range(args.rounds):
        for only in ("stock", "adsc"):
            run = subprocess.run(
                [sys.executable, __file__, "--only", only, *sys.argv[1:]],
                env=os.environ
                | {
                    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                    "VLLM_LOGGING_LEVEL": "ERROR",
                    "VLLM_CPU_KVCACHE_SPACE": "4",
                    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                    "OMP_NUM_THREADS": "1",
                },
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            line = next(line for line in run.stdout.splitlines() if line.startswith("RESULT"))
            made = json.loads(line.removeprefix("RESULT"))
            print(f"{only}, {made['groups']} KV groups, us")
            for kind, parts in made["times"].items():
                print(f"  {kind:12}", *(f"{part} {parts.get(part, 0):9.1f}" for part in PARTS))


if __name__ == "__main__":
    main()
