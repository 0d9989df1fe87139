"""vLLM's OpenAI-compatible server, started and stopped by a program."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 300
ADSC = {"architectures": ["AdscLlavaForConditionalGeneration"]}


@contextmanager
def serving(model: Path, schedule: str | None, *flags: str, **options: object) -> Iterator[str]:
    """The address of a server of this model on a free port, while it runs.

    schedule: None is vLLM's own LLaVA. flags: such as "--enforce-eager". options: max_model_len=704
    becomes --max-model-len=704; a mapping becomes JSON. Raises RuntimeError with the end of the
    server's log where it does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options |= {"model": model, "served_model_name": model.name, "host": "127.0.0.1", "port": port}
    if schedule is not None:
        options.setdefault("hf_overrides", ADSC)
        extra = options.get("additional_config", {})
        options["additional_config"] = {"adsc_schedule": schedule, **extra}  # type: ignore[dict-item]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags]
    for name, value in options.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        command.append(f"--{name.replace('_', '-')}={text}")
    with (
        tempfile.NamedTemporaryFile("w+", suffix=".log") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as server,
    ):
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, Path(log.name))
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(60)


def wait_for(health: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(health).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no server:\n{log.read_text()[-3000:]}") from None
            time.sleep(0.5)


def metric(url: str, name: str) -> float:
    """One of vLLM's Prometheus counters or gauges, summed over its labels."""
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    lines = [line for line in text.splitlines() if line.startswith(f"vllm:{name}{{")]
    return sum(float(line.split()[-1]) for line in lines)
