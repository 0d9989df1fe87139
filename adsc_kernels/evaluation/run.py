"""Asking a model all questions of a folder by one method, batch after batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image

from adsc_kernels.baselines import Method
from adsc_kernels.baselines.batch import answered, encode
from adsc_kernels.evaluation.intervals import bootstrap, wilson
from adsc_kernels.evaluation.results import Results
from adsc_kernels.llava import Llava
from adsc_kernels.training.records import Records

SAVE_SECONDS = 20.0


@dataclass(frozen=True)
class Question:
    """One turn of a record, asked on its own."""

    text: str
    answer: str
    kind: str
    picture: str
    record: int


def questions_of(records: Records) -> list[Question]:
    """Of all records; ValueError where one has no picture."""
    found = []
    for n in range(len(records)):
        record = records[n]
        if record.picture is None:
            raise ValueError(f"record {record.index}: expected a picture to ask about, got none")
        for question, answer in record.turns:
            name = record.picture.name
            found.append(Question(question, answer, record.kind, name, n))
    return found


def evaluate(
    model: Llava,
    method: Method,
    records: Records,
    questions: list[Question],
    entry: dict[str, Any],
    results: Results,
    batch: int,
    tick: Callable[[int], None],
) -> None:
    """Fill an entry's `right` from where it stands, saving on the way; tick counts questions."""
    done = len(entry["right"])
    spent = entry["seconds"]
    dtype = str(model.language_model.norm.weight.dtype).removeprefix("torch.")
    where = f"{model.device.type} {dtype}"
    saved = time.monotonic()
    for first, part, images in _batches(records, questions[done:], batch):
        started = time.monotonic()
        prompts = [f"USER: <image>\n{question.text} ASSISTANT:" for question in part]
        answers = [question.answer for question in part]
        numbers = range(done + first, done + first + len(part))
        with torch.no_grad():
            asked = encode(model, prompts, answers, images, numbers)
            right = answered(model, asked, *method.hidden(model, asked))
        entry["right"] += "".join("01"[good] for good in right)
        spent[where] = round(spent.get(where, 0.0) + time.monotonic() - started, 2)
        tick(len(part))
        if time.monotonic() - saved > SAVE_SECONDS:
            results.save()
            saved = time.monotonic()
    results.save()


def _batches(
    records: Records, questions: list[Question], size: int
) -> Iterator[tuple[int, list[Question], list[Image]]]:
    """Questions in order, with their pictures; a picture is opened once in a batch."""
    for first in range(0, len(questions), size):
        part = questions[first : first + size]
        opened: dict[str, Image] = {}
        for question in part:
            if question.picture not in opened:
                image = records[question.record].image()
                assert image is not None
                opened[question.picture] = image
        yield first, part, [opened[question.picture] for question in part]


def summary(
    entry: dict[str, Any], questions: list[Question], dense: str | None = None
) -> dict[str, Any]:
    """Accuracy with both intervals, by kind, and what of dense is retained where it is known."""
    asked = questions[: len(entry["right"])]
    right = [mark == "1" for mark in entry["right"]]
    pictures = [question.picture for question in asked]
    kinds: dict[str, list[bool]] = {}
    for question, good in zip(asked, right, strict=True):
        kinds.setdefault(question.kind, []).append(good)
    found: dict[str, Any] = {
        "questions": len(asked),
        "accuracy": sum(right) / max(len(right), 1),
        "wilson": wilson(sum(right), len(right)),
        "by_picture": bootstrap(right, pictures),
        "by_kind": {kind: sum(good) / len(good) for kind, good in sorted(kinds.items())},
    }
    found["mean_of_kinds"] = sum(found["by_kind"].values()) / max(len(kinds), 1)
    if dense is not None and len(dense) == len(right):
        base = [mark == "1" for mark in dense]
        found["retention"] = sum(right) / max(sum(base), 1)
        found["retention_by_picture"] = bootstrap(right, pictures, base)
    return found
