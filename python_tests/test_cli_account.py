"""``adsc account``: its tables, its JSON, its chart, and what it says about bad input."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from PIL import Image

from adsc_kernels import chart
from adsc_kernels.accounting import CONVENTIONS, ModelShape, account
from adsc_kernels.cli import main
from adsc_kernels.llava import bundled_checkpoint
from adsc_kernels.schedule import CompressionSchedule

PRESET = "llava-1.5-7b/192"


def text_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["account", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def json_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    return json.loads(text_of(capsys, "--json", *arguments))


def row(out: str, start: str) -> list[str]:
    """The last line that starts so, by cells."""
    *_, line = (line for line in out.splitlines() if line.startswith(start + " "))
    return re.split(r"\s{2,}", line.strip())


def test_which_schedule_gives_192_tokens_and_what_does_it_buy(capsys) -> None:
    out = text_of(capsys, "--budget", "192")
    assert "budget    192: 7 schedules average exactly that, best first" in out
    assert "5:1/3,17:1/3  averages 192" in out
    assert "192 processed, 176 post-drop" in out
    cache = ["338.50 MiB", "146.50 MiB", "56.7 %"]
    assert row(out, "decoder") == [
        "decoder",
        "all",
        "mean 192",
        "4.444 T",
        "1.913 T",
        "57.0 %",
        *cache,
    ]
    assert row(out, "model")[1:] == ["4.648 T", "2.116 T", "54.5 %", *cache]
    assert row(out, "stage 1") == [
        *("stage 1", "5-16", "192", "1.667 T", "715.8 G", "57.1 %"),
        *("126.94 MiB", "54.94 MiB", "56.7 %"),
    ]
    assert row(out, "ffn") == ["ffn", "2.93 T", "1.268 T", "56.7 %", "8.06 GiB"]
    assert f"MACs by the convention exact: {CONVENTIONS['exact'].definition}." in out
    assert text_of(capsys) == out  # a third of the tokens is what it does without a budget


def test_json_is_the_account(capsys) -> None:
    options = ["--decode", "9", "--kv-dtype", "int8", "--kv-scale-bytes", "4", "--block-size", "16"]
    options += ["--compact-to", "1", "--convention", "everything", "--text-tokens", "50"]
    facts = json_of(capsys, "--schedule", PRESET, "--compare", "8:1/4@center", *options)
    assert "budget" not in facts
    shape = ModelShape.preset("llava-1.5-7b")
    schedules = [
        CompressionSchedule.dense(32),
        CompressionSchedule.preset(PRESET),
        CompressionSchedule.parse("8:1/4@center", 32),
    ]
    for schedule, got in zip(schedules, [facts["dense"], *facts["schedules"]], strict=True):
        counted = account(
            shape,
            schedule,
            50,
            decode_tokens=9,
            kv_dtype="int8",
            kv_scale_bytes=4,
            block_size=16,
            compact_to=1 if schedule.boundaries else None,
            convention="everything",
        )
        assert got["schedule"] == str(schedule)
        assert got["vision_tokens"] == list(schedule.kept(576))
        assert got["average_processed"] == counted.average_processed
        assert got["average_post_drop"] == counted.average_post_drop
        assert got["macs"] == counted.macs
        assert got["kv_bytes"] == counted.kv_bytes
        assert got["kv_peak_bytes"] == counted.kv_peak_bytes
        assert got["prefill_macs"]["norms"] == counted.prefill.norms > 0
        assert got["decode_macs"]["total"] == counted.decode.total
        assert [layer["kv_bytes"] for layer in got["layers"]] == [
            layer.kv_bytes for layer in counted.layers
        ]
        for stage, expected in zip(got["stages"], counted.stages, strict=True):
            assert stage["layers"] == list(expected.layers)
            assert stage["prefill_macs"]["scores"] == expected.prefill.scores
            assert stage["kv_bytes"] == expected.kv_bytes
    weights = facts["model"]["weight_bytes"]
    assert weights["total"] == sum(count for part, count in weights.items() if part != "total")


def test_budget_options(capsys) -> None:
    options = "--budget 64 --boundaries 3 --mixed --first-layer 2 --last-layer 12 --align 16"
    facts = json_of(capsys, *options.split())
    assert facts["budget"]["exact"]
    assert facts["budget"]["schedules"][0]["schedule"] == "2:1/4,3:1/3,12:1/3"
    options = "--budget 300 --pattern grid --keep 1/2x1/2 --boundaries 1"
    out = text_of(capsys, *options.split())
    assert "300: none averages exactly that; 1 schedule comes nearest" in out
    assert "12:1/2x1/2@grid  averages 306" in out


def test_comparison(capsys) -> None:
    out = text_of(capsys, "--budget", "192", "--compare", "llava-1.5-7b/64", "")
    assert row(out, "dense")[:2] == ["dense", "576"]
    lines = [line for line in out.splitlines() if re.match(r"(5:1/3,17|2:1/4,3)\S*  .*T ", line)]
    assert [line.split()[0] for line in lines] == ["5:1/3,17:1/3", "2:1/4,3:1/3,12:1/3"]
    assert lines[1].split()[1:7] == ["576", "144", "48", "16", "64", "46.5"]


def test_every_layer_and_every_convention(capsys) -> None:
    out = text_of(capsys, "--schedule", "1:1/2", "--layers", "--conventions", "--decode", "3")
    numbered = [line for line in out.splitlines() if re.match(r" *\d+ +\d+ ", line)]
    assert [line.split()[:2] for line in numbered] == [
        [str(n), "288" if n else "576"] for n in range(32)
    ]
    for name, how in CONVENTIONS.items():
        assert row(out, name)[0] == name
        assert f"{name}: {how.definition}" in out


def test_other_models(capsys) -> None:
    bundled = json_of(capsys, "--model", str(bundled_checkpoint()), "--schedule", "4:1/4,8:1/4")
    assert bundled["model"]["layers"] == 16
    qwen = json_of(capsys, "--model", "qwen2.5-vl-7b", "--image-tokens", "20x30")
    assert qwen["prompt"]["vision_tokens"] == 600
    assert qwen["dense"]["prefill_macs"]["tower"] > 0
    next_ = json_of(capsys, "--model", "llava-next-vicuna-7b", "--tiles", "5", "--budget", "960")
    assert next_["prompt"]["vision_tokens"] == 2880
    assert next_["budget"]["exact"]
    grid = json_of(capsys, "--schedule", "8:1/2x1/2@grid")
    assert grid["schedules"][0]["vision_tokens"] == [576, 144]


def test_chart_shows_the_accounts(capsys, tmp_path: Path) -> None:
    file = tmp_path / "chart.png"
    out = text_of(capsys, "--compare", PRESET, "8:1/4,16:1/4,24:1/4", "--plot", str(file))
    assert out.splitlines()[-1] == f"drawn in {file}"
    with Image.open(file) as picture:
        assert picture.size == (1650, 506 if matplotlib.__version_info__ >= (3, 11) else 505)
        colours = picture.convert("RGB").getcolors(2**20)
    found = {"#{:02X}{:02X}{:02X}".format(*colour) for count, colour in colours if count > 200}
    assert set(chart.COLOURS[:4]) <= found

    shape = ModelShape.preset("llava-1.5-7b")
    accounts = [
        (name, account(shape, schedule, 101))
        for name, schedule in (
            ("dense", CompressionSchedule.dense(32)),
            ("192", CompressionSchedule.preset(PRESET)),
        )
    ]
    tokens, macs, cache = chart.figure(accounts, "title").axes
    steps = [patch.get_data().values.tolist() for patch in tokens.patches]
    assert steps == [[576] * 32, [576] * 5 + [192] * 12 + [64] * 15]
    for axes, unit, total in ((macs, 1e12, "macs"), (cache, 2**20, "kv_bytes")):
        heights = [0.0, 0.0]
        for bars in axes.containers:
            for place, bar in enumerate(bars):
                heights[place] += bar.get_height()
        assert heights == pytest.approx([getattr(one, total) / unit for _, one in accounts])
    assert [note.get_text() for note in cache.texts] == ["338.5", "146.5\n-56.7 %"]


def test_without_matplotlib(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["account", "--plot", str(tmp_path / "a.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--budget 577", "at most vision_tokens = 576, got 577"),
        ("--budget 10 --boundaries 1", "the nearest is 157.5, by 1:1/4"),
        ("--budget 191 --exact", "average_tokens: 191 can't be met"),
        ("--budget 0", "average_tokens: expected above 0"),
        ("--budget many", "expected a number of tokens, got 'many'"),
        ("--budget 1/0", "expected a number of tokens"),
        ("--keep 1", "keep: expected shares above 0 and below 1, got 1"),
        ("--boundaries 0", "num_boundaries: expected at least 1, got 0"),
        ("--align 0", "block_size: expected at least 1, got 0"),
        ("--block-size 0", "block_size: expected at least 1, got 0"),
        ("--text-tokens -1", "expected a whole number"),
        ("--text-tokens 0 --image-tokens 0 --schedule 1:1/2", "tokens: expected at least 1, got 0"),
        ("--image-tokens 0", "average_tokens: expected above 0|vision_tokens: expected at least 1"),
        ("--image-tokens 0x9 --schedule 1:1/2", "grid_height: expected at least 1"),
        ("--schedule 40:1/2", "boundary layer: expected 0 to 31"),
        ("--schedule llava-1.5-13b/192", "schedule: expected one for 32 layers, got 40"),
        ("--compact-to 3", "compact_to: expected a stage in 0..2, got 3"),
        ("--convention flops", "--convention: invalid choice: 'flops'"),
        ("--kv-dtype int2", "--kv-dtype: invalid choice"),
        ("--model qwen2.5-vl-7b", "--image-tokens: expected a count or HEIGHTxWIDTH"),
        ("--model .", "model: expected one of llava-1.5-7b, .* a folder with a config.json"),
        ("--plot a.svg", "--plot: expected a name that ends in .png"),
        ("--plot nowhere/a.png", "--plot: expected a file in a folder that can be written"),
    ],
)
def test_bad_input(
    arguments: str, message: str, capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["account", *arguments.split()])
    except SystemExit as stopped:  # argparse's own way
        code = stopped.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert re.search(message, err) and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_config_of_no_known_decoder(capsys, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert main(["account", "--model", str(tmp_path)]) == 2
    assert "expected a decoder of type llama" in capsys.readouterr().err
