"""The command line on the bundled model: what it prints, draws, and says about bad input."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adsc_kernels.accounting import ModelShape, account_lengths
from adsc_kernels.cli import main
from adsc_kernels.cli.run import default_schedule
from adsc_kernels.llava import Llava, LlavaConfig, bundled_checkpoint
from adsc_kernels.picture import PANEL
from adsc_kernels.schedule import CompressionSchedule

CHECKPOINT = bundled_checkpoint()
QUESTIONS = json.loads((CHECKPOINT / "pictures" / "questions.json").read_text())
FILE, KNOWN = next(iter(QUESTIONS.items()))
PICTURE = str(CHECKPOINT / "pictures" / FILE)
ASK = KNOWN[0]["question"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["run", "--runs", "1", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)  # all of stdout is one JSON value


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "adsc_kernels.cli", *arguments]


def test_demo(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["run", "--runs", "1", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    marks = "\N{CHECK MARK}" if "\N{CHECK MARK}" in out else "ok"
    answers = [line for known in KNOWN for line in lines if line.startswith(known["question"])]
    assert len(answers) == len(KNOWN)
    assert sum(marks in line for line in answers) > len(KNOWN) / 2
    assert [line.split()[:4] for line in lines if line.startswith("stage ")] == [
        ["stage", "0", "0-3", "576"],
        ["stage", "1", "4-7", "144"],
        ["stage", "2", "8-11", "36"],
        ["stage", "3", "12-15", "9"],
    ]
    assert "mean 191.25" in out
    assert lines[-1] == "survivors drawn in adsc-run.png"
    with Image.open("adsc-run.png") as picture:
        picture.load()
    assert os.listdir(tmp_path) == ["adsc-run.png"]


def test_measured_cache_is_the_accounts_to_the_byte(capsys: pytest.CaptureFixture[str]) -> None:
    facts = run_json(capsys, "--ask", ASK, "--schedule", "2:1/3,9:1/2@center", "--device", "cpu")
    config = LlavaConfig.from_folder(CHECKPOINT)
    (length,) = facts["prompt_tokens"]
    text = length - 576
    schedule = CompressionSchedule.parse(facts["schedule"], num_layers=config.num_layers)
    lengths = [(text + kept,) for kept in (576, 192, 96)]
    costs = {
        "dense": [lengths[0]] * 3,
        "compressed": lengths,
    }
    for key, seq_lens in costs.items():
        counted = account_lengths(
            ModelShape.from_config(config), schedule, seq_lens, tiles=1, kv_dtype="float32"
        )
        stages = facts["stages"]
        assert [s["cache_bytes"][key] for s in stages] == [s.kv_bytes for s in counted.stages]
        assert [s["macs"][key] for s in stages] == [s.macs for s in counted.stages]
        assert facts["total"]["cache_bytes"][key] == counted.kv_bytes
        assert facts["total"]["macs"][key] == counted.macs
    assert [s["vision_tokens_per_image"] for s in facts["stages"]] == [576, 192, 96]
    assert facts["answers"][0]["expected"] == KNOWN[0]["answer"]
    assert facts["seconds"]["prefill"]["dense"] > 0


def test_several_pictures_in_one_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-new-tokens", "2", "--prefill-chunk", "500", "--temperature", "0.5"]
    options += ["--image", PICTURE, PICTURE, "--schedule", "5:1/4"]
    facts = run_json(capsys, *options, "--ask", ASK, "--out", "a.png")
    assert facts["images_per_prompt"] == 2
    assert facts["prompt_tokens"][0] > 2 * 576
    placed = f"left <image> right <image> {ASK}"
    again = run_json(capsys, *options, "--ask", placed, "--out", "b.png")
    assert again["images_per_prompt"] == 2
    for name in ("a.png", "b.png"):
        with Image.open(name) as drawn:
            for row in (0, 1):
                assert_every_fourth_patch_is_clear(drawn, top=56 + row * (PANEL + 58))


def assert_every_fourth_patch_is_clear(drawn: Image.Image, top: int) -> None:
    """1/4 of 576 from the start is every fourth patch in reading order: whole columns of 24."""
    patch = PANEL // 24
    for index in range(576):
        x, y = 28 + index % 24 * patch + patch // 2, top + index // 24 * patch + patch // 2
        all_clear, after = drawn.getpixel((x, y)), drawn.getpixel((x + PANEL + 28, y))
        assert (all_clear == after) == (index % 4 == 0)


def test_dense_schedule_saves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    facts = run_json(capsys, "--ask", ASK, "--schedule", "", "--max-new-tokens", "1")
    assert facts["total"]["macs"]["saved"] == facts["total"]["cache_bytes"]["saved"] == 0
    assert facts["answers"][0]["dense"] == facts["answers"][0]["compressed"]
    assert facts["seconds"]["per_token"] == {"dense": None, "compressed": None}


@pytest.mark.parametrize(
    ("layers", "text"),
    [(32, "8:1/4,16:1/4,24:1/4"), (16, "4:1/4,8:1/4,12:1/4"), (2, "1:1/4"), (1, "")],
)
def test_default_schedule(layers: int, text: str) -> None:
    assert str(default_schedule(object(), layers)) == text


def bad_checkpoint(change: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    """A copy of the bundled checkpoint with something wrong."""

    def make(folder: Path) -> list[str]:
        shutil.copytree(CHECKPOINT, folder / "copy")
        change(folder / "copy")
        return ["--model", "copy"]

    return make


def other_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llava_next"}))


def few_positions(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 580
    (folder / "config.json").write_text(json.dumps(config))


def bomb(folder: Path) -> list[str]:
    """A few bytes that claim to be 60 000 x 60 000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return ["--image", "bomb.png", "--ask", ASK]


def cut_short(folder: Path) -> list[str]:
    (folder / "cut.png").write_bytes(Path(PICTURE).read_bytes()[:200])
    return ["--image", "cut.png", "--ask", ASK]


def no_picture(folder: Path) -> list[str]:
    (folder / "text.png").write_text("not a picture")
    return ["--image", "text.png", "--ask", ASK]


def own_picture(folder: Path) -> list[str]:
    shutil.copy(PICTURE, folder / "own.png")
    return ["--image", "own.png"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


BAD_RUNS: dict[str, tuple[list[str] | Callable[[Path], list[str]], str]] = {
    "schedule that doesn't parse": (["--schedule", "4:1/4,8"], "at character 8"),
    "boundary past the last layer": (["--schedule", "16:1/4"], "0 to 15"),
    "layer twice": (["--schedule", "4:1/4,4:1/2"], "twice"),
    "keep above 1": (["--schedule", "4:5/4"], "[0, 1]"),
    "pattern": (["--schedule", "4:1/4@zigzag"], "at character 7"),
    "no such picture": (["--image", "none.png", "--ask", ASK], "none.png"),
    "not a picture": (no_picture, "text.png"),
    "picture cut short": (cut_short, "cut.png"),
    "bomb": (bomb, "bomb.png"),
    "no question": (own_picture, "--ask"),
    "empty question": (["--ask", " "], "--ask"),
    "placeholders": (["--ask", f"<image> <image> {ASK}"], "2"),
    "no such model": (["--model", "./none"], "none"),
    "other architecture": (bad_checkpoint(other_architecture), "llava_next"),
    "truncated weights": (
        bad_checkpoint(lambda f: truncate(f / "model.safetensors")),
        "model.safetensors",
    ),
    "no weights": (bad_checkpoint(lambda f: (f / "model.safetensors").unlink()), "safetensors"),
    "broken config": (bad_checkpoint(lambda f: truncate(f / "config.json")), "config.json"),
    "too many positions": (bad_checkpoint(few_positions), "at most 580"),
    "device": (["--device", "quantum"], "--device"),
    "no such device": (["--device", "cuda:99"], "--device"),
    "dtype": (["--dtype", "int8"], "--dtype"),
    "no new tokens": (["--max-new-tokens", "0"], "--max-new-tokens"),
    "temperature": (["--temperature", "-1"], "temperature"),
    "chunk": (["--prefill-chunk", "0"], "--prefill-chunk"),
    "runs": (["--runs", "0"], "--runs"),
    "no png": (["--out", "picture.jpg"], "--out"),
    "no folder": (["--out", "none/picture.png"], "--out"),
    "unknown option": (["--nonsense"], "--nonsense"),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_bad_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, said = BAD_RUNS[name]
    arguments = made(tmp_path) if callable(made) else made
    check_refused(["run", *arguments], said, tmp_path, capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--schedule", "8"], "at character 2"),
        (["--schedule", "32:1/4"], "0 to 31"),
        (["--schedule", "8:1/4", "--layers", "0"], "num_layers"),
        (["--schedule", "8:1/4", "--prompt-tokens", "-1"], "--prompt-tokens"),
        (["--schedule", "8:1/4", "--prompt-tokens", "500"], "span"),
        (["--schedule", "8:1/4", "--image-tokens", "big"], "--image-tokens"),
        (["--schedule", "8:1/2x1/2@grid", "--image-tokens", "576"], "height"),
        (["--schedule", "8:1/4", "--span", "0:5:100", "--span", "0:50:100"], "overlap"),
        (["--schedule", "8:1/4", "--span", "1:5:100"], "sequence"),
        (["--schedule", "8:1/4", "--span", "0:5"], "--span"),
        (["--schedule", "8:1/4", "--span", "0:5:99999999999999999999999"], "--span"),
        (["--schedule", "8:1/4", "--chunk", "5-9"], "--chunk"),
        (["--schedule", "8:1/4", "--chunk", "9:5"], "chunk"),
        (["--schedule", "8:1/4", "--block-size", "0"], "block_size"),
        (["--schedule", "8:1/4", "--align", "block"], "block_size"),
        (["--schedule", "8:1/4", "--align", "page"], "--align"),
        (["--schedule", "8:1/2x1/2@grid", "--align", "block", "--block-size", "64"], "grid"),
        ([], "--schedule"),
    ],
)
def test_bad_plan(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(["plan", *arguments], said, tmp_path, capsys)


def check_refused(
    arguments: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line on stderr that says what is wrong, status 2, and nothing written anywhere."""
    before = sorted(os.listdir(folder))
    try:
        status = main(arguments)
    except SystemExit as leave:  # argparse's way
        status = leave.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert re.match(rf"adsc( {arguments[0]})?: error: ", err)
    assert said in err
    assert "Traceback" not in err
    assert sorted(os.listdir(folder)) == before


def test_a_picture_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    Path("out.png").write_text("old")
    monkeypatch.setattr(Image.Image, "save", full)
    arguments = ["run", "--ask", ASK, "--runs", "1", "--max-new-tokens", "1", "--out", "out.png"]
    check_refused(arguments, "No space left", tmp_path, capsys)
    assert Path("out.png").read_text() == "old"


def test_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Llava, "generate", interrupt)
    # A job in the background starts with the signal ignored, and Python then leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["run"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr() == ("", "adsc run: interrupted\n")
    assert os.listdir(tmp_path) == []


def test_broken_pipe() -> None:
    plan = command("plan", "--schedule", "8:1/4", "--segments", "--json", "--prompt-tokens")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*plan, *["677"] * 50], stdout=write, stderr=subprocess.PIPE, env=environment(), timeout=600
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_help_is_light() -> None:
    script = (
        "import sys; from adsc_kernels.cli import main\n"
        "try: main(['run', '--help'])\n"
        "finally: print('heavy' if 'transformers' in sys.modules else 'light')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment()
    )
    assert "usage: adsc run" in done.stdout
    assert done.stdout.endswith("light\n")


def environment() -> dict[str, str]:
    """The package of this process, wherever it was imported from."""
    import adsc_kernels

    package = Path(adsc_kernels.__file__).parent.parent
    return {**os.environ, "PYTHONPATH": str(package)}


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    schedule = ["--schedule", "8:1/4,16:1/4,24:1/4"]
    assert main(["plan", *schedule, "--json", "--segments", "--block-size", "16"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [s["cu_seqlens"] for s in stages] == [[0, 677], [0, 245], [0, 137], [0, 110]]
    assert [s["vision_tokens"] for s in stages] == [[576], [144], [36], [9]]
    assert [s["block_counts"] for s in stages] == [[43], [16], [9], [7]]
    assert stages[1]["segments"] == [
        [0, 0, 5, 5, 0, 0],
        [5, 5, 576, 144, 0, 0],
        [149, 581, 96, 96, 0, 0],
    ]
    assert main(["plan", *schedule]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert " ".join(last.split()) == "3 24-31 110 9 0 110 110"


def test_plan_in_whole_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    schedule = ["--schedule", "8:1/4,16:1/4", "--block-size", "16", "--align", "block"]
    assert main(["plan", *schedule, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [s["vision_tokens"] for s in report["stages"]] == [[576], [144], [48]]
    assert [s["rows"] for s in report["stages"]] == [677, 245, 149]
    assert report["rounded"] == [{"span": [0, 5, 576], "stage": 2, "wanted": 36, "kept": 48}]
    assert main(["plan", *schedule]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert " ".join(last.split()) == "576 tokens at 5 of prompt 0 2 36 48"
    assert main(["plan", "--schedule", "8:1/4", *schedule[2:]]) == 0
    assert "rounded: nothing" in capsys.readouterr().out


def test_plan_of_a_chunk_of_a_ragged_batch(capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["--prompt-tokens", "40", "30", "--span", "0:8:4x4", "--span", "0:24:4x4"]
    chunks = ["--chunk", "12:40", "--chunk", "0:0"]
    assert main(["plan", "--schedule", "0:1/2x1/2@grid", *layout, *chunks, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["stages"]
    assert first["layers"] == []
    assert first["seq_lens"] == [28, 0]
    assert second["vision_tokens"] == [4, 4]
    assert second["cached_lens"] == [10, 0]  # 8 of text, and 2 of the first picture's first row
    assert second["seq_lens"] == [6, 0]
    assert "segments" not in second


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["build"]["torch"]
    assert found["backends"]["reference"]["works"]
    assert found["attention"]["sdpa"]["works"]
    assert found["checkpoint"] == str(CHECKPOINT)
    for state in (*found["backends"].values(), *found["attention"].values()):
        assert state["works"] != bool(state["reason"])
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for reason in (s["reason"] for s in found["backends"].values()):
        assert reason in out
