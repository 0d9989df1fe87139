"""Parts of adsc train that need no model: configuration, curriculum, records and batches."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from adsc_kernels.hub import bundled_checkpoint
from adsc_kernels.schedule import CompressionSchedule
from adsc_kernels.training.batches import IGNORED, Conversations, pack, pad
from adsc_kernels.training.config import CurriculumSettings, TrainConfig
from adsc_kernels.training.curriculum import Curriculum, average
from adsc_kernels.training.records import Records

NEEDED = {"model": "m", "data": "d", "out": "o", "schedule": "1:1/4", "steps": 10}
TARGET = CompressionSchedule.parse("4:1/4", 16)


def settings(**changes: Any) -> CurriculumSettings:
    return CurriculumSettings(
        **{"direction": "strong_to_mild", "through": ("0:1/9", "2:1/4"), **changes}
    )


# ---- Configuration ----


def test_a_yaml_file_is_a_configuration(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\ndata: d\nout: o\nschedule: '4:1/4'\nsteps: 10\nlearning_rate: 1.0e-3\n"
        "lora: {rank: 8, targets: [q_proj]}\n"
        "curriculum: {direction: mild_to_strong, through: ['8:1/4']}\n"
    )
    config = TrainConfig.from_file(file)
    assert (config.learning_rate, config.lora.rank, config.lora.targets) == (1e-3, 8, ("q_proj",))
    assert config.curriculum == CurriculumSettings("mild_to_strong", ("8:1/4",))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"stepz": 1}, ValueError, "stepz"),
        ({"steps": 0}, ValueError, "steps"),
        ({"steps": True}, TypeError, "steps"),
        ({"learning_rate": "1e-3"}, TypeError, "learning_rate"),
        ({"learning_rate": 0}, ValueError, "learning_rate"),
        ({"save_every": 15}, ValueError, "save_every: expected a multiple of log_every"),
        ({"dtype": "float16"}, ValueError, "dtype"),
        ({"packing": 1}, TypeError, "packing"),
        ({"lora": {"rank": 0}}, ValueError, r"lora\.rank"),
        ({"lora": {"targets": []}}, ValueError, r"lora\.targets"),
        ({"lora": 3}, TypeError, "lora"),
        ({"curriculum": {"direction": "mild"}}, ValueError, r"curriculum\.direction"),
        ({"curriculum": {"through": ["1:1/2"]}}, ValueError, r"curriculum\.through"),
        ({"distillation": {"weight": 2}}, ValueError, r"distillation\.weight"),
    ],
)
def test_a_bad_key_or_value_is_named(changes: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        TrainConfig.from_dict({**NEEDED, **changes})


def test_a_missing_key_and_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="key steps"):
        TrainConfig.from_dict({name: NEEDED[name] for name in NEEDED if name != "steps"})
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="no YAML"):
        TrainConfig.from_file(tmp_path / "bad.yaml")
    with pytest.raises(FileNotFoundError, match="no such file"):
        TrainConfig.from_file(tmp_path / "none.yaml")


# ---- Curriculum ----


def test_averages_count_what_layers_process() -> None:
    assert average(TARGET) == (4 * 576 + 12 * 144) / 16
    assert average(CompressionSchedule.parse("0:1/2x1/2@grid", 16)) == 144


@pytest.mark.parametrize(
    ("direction", "through", "order"),
    [
        ("strong_to_mild", ("2:1/4", "0:1/9"), ["0:1/9", "2:1/4", "4:1/4"]),
        ("mild_to_strong", ("8:1/4", "12:1/4"), ["12:1/4", "8:1/4", "4:1/4"]),
    ],
)
def test_phases_go_one_way_and_end_at_the_target(
    direction: str, through: tuple[str, ...], order: list[str]
) -> None:
    curriculum = Curriculum(settings(direction=direction, through=through), TARGET, 100)
    assert [str(phase) for phase in curriculum.phases] == order
    phases = [curriculum.phase(step, []) for step in range(100)]
    assert phases == [0] * 25 + [1] * 25 + [2] * 50


def test_a_constant_one_has_one_phase() -> None:
    curriculum = Curriculum(CurriculumSettings(), TARGET, 3)
    assert [curriculum.phase(step, []) for step in range(3)] == [0, 0, 0]
    assert curriculum.phases == (TARGET,)


@pytest.mark.parametrize("direction", ["strong_to_mild", "mild_to_strong"])
def test_a_schedule_on_the_wrong_side_is_refused(direction: str) -> None:
    wrong = "8:1/4" if direction == "strong_to_mild" else "0:1/9"
    with pytest.raises(ValueError, match=r"curriculum\.through: expected schedules"):
        Curriculum(settings(direction=direction, through=(wrong,)), TARGET, 100)
    with pytest.raises(ValueError, match=r"curriculum\.through"):
        Curriculum(settings(direction=direction, through=("4:1/4",)), TARGET, 100)


def test_a_plateau_moves_on_before_its_time_and_a_falling_loss_does_not() -> None:
    curriculum = Curriculum(settings(pace="plateau", patience=2), TARGET, 1000)
    flat = [(10 * n, 1.0) for n in range(1, 10)]
    assert curriculum.phase(39, flat[:3]) == 0
    assert curriculum.phase(40, flat[:4]) == 1  # two pairs of logs, no gain
    assert curriculum.phase(79, flat[:7]) == 1  # counted anew in each phase
    assert curriculum.phase(80, flat[:8]) == 2
    falling = [(10 * n, 0.9**n) for n in range(1, 25)]
    assert curriculum.phase(240, falling) == 0
    assert curriculum.phase(250, falling) == 1  # its share of the steps is over


# ---- Records ----


def write_records(folder: Path, records: Any) -> Path:
    (folder / "pictures").mkdir(exist_ok=True)
    Image.new("RGB", (48, 48), (9, 80, 200)).save(folder / "pictures" / "a.png")
    (folder / "conversations.json").write_text(json.dumps(records, indent=2))
    return folder


def record(*turns: str, image: str | None = "pictures/a.png", **more: Any) -> dict[str, Any]:
    said = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)]
    return {"conversations": said, **({} if image is None else {"image": image}), **more}


GOOD = record("<image>\nWhat digit is at row 1 column 2?", "7", kind="cell")


def test_records_are_read_by_number(tmp_path: Path) -> None:
    second = record("Hello\n<image>", "none", "And then?", "7 7")
    found = Records(write_records(tmp_path, [GOOD, second, record("Hi", "none", image=None)]))
    assert len(found) == 3
    assert found[0].turns == (("What digit is at row 1 column 2?", "7"),)
    assert (found[0].kind, found[1].kind) == ("cell", "all")
    assert found[1].turns == (("Hello", "none"), ("And then?", "7 7"))
    assert found[2].image() is None
    assert found[0].image().size == (48, 48)


BAD = [
    (7, "expected an object"),
    (record("<image>\nA?", "b", "c"), "pairs of"),
    (record("<image>\nA?"), "pairs of"),
    ({"image": "pictures/a.png"}, "pairs of"),
    (record("A?", "b"), "expected one <image>"),
    (record("<image>\nA?", "b", image=None), "expected no <image>"),
    (record("<image> <image>\nA?", "b"), "got 2"),
    (record("A?", "b", "<image>\nC?", "d"), "first question"),
    (record("<image>", "b"), "the picture alone"),
    (record("<image>\nA?", " "), "words from 'gpt'"),
    (record("<image>\nA?", "b", image="/a.png"), "inside the folder"),
    (record("<image>\nA?", "b", image="../a.png"), "inside the folder"),
    (record("<image>\nA?", "b", image=3), "inside the folder"),
    (record("<image>\nA?", "b", image="pictures/b.png"), "no such file"),
]


@pytest.mark.parametrize(("bad", "says"), BAD)
def test_a_malformed_record_is_named_and_skipped_on_request(
    tmp_path: Path, bad: Any, says: str
) -> None:
    folder = write_records(tmp_path, [GOOD, bad, GOOD])
    with pytest.raises((ValueError, FileNotFoundError), match=f"record 1: .*{says}"):
        Records(folder)
    left = Records(folder, skip_malformed=True)
    assert [left[0].index, left[1].index] == [0, 2]
    ((number, why),) = left.skipped
    assert number == 1 and says in why


@pytest.mark.parametrize(
    ("text", "says"), [("{}", "JSON list"), ("[", "record 0: no JSON"), ("[]", "at least one")]
)
def test_a_file_that_holds_no_records(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "conversations.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        Records(tmp_path)


def test_a_damaged_picture_names_its_record(tmp_path: Path) -> None:
    folder = write_records(tmp_path, [GOOD, GOOD])
    (folder / "pictures" / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="record 1: image"):
        Records(folder)[1].image()


# ---- Batches ----


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(bundled_checkpoint())


@pytest.fixture
def items(tmp_path: Path, processor: Any) -> list[dict[str, torch.Tensor]]:
    talk = record("<image>\nRead row 2.", "7 none 1", "How many 7s are there?", "1")
    data = Conversations(Records(write_records(tmp_path, [GOOD, talk])), processor, 4096)
    return [data[n] for n in range(len(data))]


def test_labels_are_on_answers_and_their_ends(items: Any, processor: Any) -> None:
    read = [
        [processor.tokenizer.decode(part) for part in _runs(item["labels"][0])] for item in items
    ]
    assert read == [[" 7</s>"], [" 7 none 1</s>", " 1</s>"]]
    for item in items:
        here = item["labels"] != IGNORED
        assert torch.equal(item["labels"][here], item["input_ids"][here])
        assert (item["input_ids"] == 3).sum() == 576


def _runs(labels: torch.Tensor) -> list[list[int]]:
    found: list[list[int]] = []
    for n, label in enumerate(labels.tolist()):
        if label == IGNORED:
            continue
        if n == 0 or labels[n - 1] == IGNORED:
            found.append([])
        found[-1].append(label)
    return found


def test_padding_and_packing_hold_the_same_tokens(items: Any) -> None:
    lens = [item["input_ids"].shape[1] for item in items]
    padded, packed = pad(items, 0), pack(items)
    assert padded["attention_mask"].sum(1).tolist() == lens
    assert padded["labels"][padded["attention_mask"] == 0].eq(IGNORED).all()
    assert torch.equal(padded["input_ids"][padded["attention_mask"].bool()], packed["input_ids"][0])
    assert torch.equal(padded["labels"][padded["attention_mask"].bool()], packed["labels"][0])
    assert packed["position_ids"][0].tolist() == [n for m in lens for n in range(m)]
    assert packed["pixel_values"].shape == padded["pixel_values"].shape == (2, 3, 48, 48)


def test_answers_end_whatever_the_template_says(tmp_path: Path) -> None:
    """LLaVA-1.5's own puts a space behind an answer, and no end."""
    plain = AutoProcessor.from_pretrained(bundled_checkpoint())
    plain.chat_template = plain.chat_template.replace("else eos_token", "else ' '")
    assert "eos_token" not in plain.chat_template
    talk = record("<image>\nRead row 2.", "7", "How many 7s are there?", "1")
    data = Conversations(Records(write_records(tmp_path, [talk])), plain, 4096)
    answers = [plain.tokenizer.decode(part) for part in _runs(data[0]["labels"][0])]
    assert [text.rstrip() for text in answers] == [" 7</s>", " 1</s>"]


def test_a_record_that_is_too_long_is_named(tmp_path: Path, processor: Any) -> None:
    data = Conversations(Records(write_records(tmp_path, [GOOD])), processor, 100)
    with pytest.raises(ValueError, match="record 0: expected at most 100, got 594"):
        data[0]
