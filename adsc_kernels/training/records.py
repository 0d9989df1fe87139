"""Conversations about pictures in LLaVA's JSON format, read lazily, a bad record by its number.

A file holds one list of records; pictures lie in a folder::

    [{"id": "17", "image": "coco/17.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is on the table?"},
        {"from": "gpt", "value": "A cup."}]}]

A record without a picture has no "image". Other keys may be there; "kind" names a record's task in
an evaluation.
"""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from adsc_kernels import checks
from adsc_kernels.images import load_image

PLACEHOLDER = "<image>"
SPEAKERS = ("human", "gpt")
_BETWEEN = " \t\r\n,"


@dataclass(frozen=True)
class Record:
    """One conversation. `turns` are pairs (question, answer); the picture comes first in it."""

    index: int
    picture: Path | None
    turns: tuple[tuple[str, str], ...]
    kind: str

    def image(self) -> Image | None:
        """The picture, read now; ValueError or FileNotFoundError that names the record."""
        if self.picture is None:
            return None
        try:
            return load_image(self.picture)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"record {self.index}: {error}") from error

    def messages(self, ending: str = "") -> list[dict[str, Any]]:
        """The conversation as chat templates take it, each answer with `ending` behind it."""
        found: list[dict[str, Any]] = []
        for number, (question, answer) in enumerate(self.turns):
            text = {"type": "text", "text": question}
            picture = [{"type": "image"}] if number == 0 and self.picture is not None else []
            found.append({"role": "user", "content": [*picture, text]})
            answered = [{"type": "text", "text": answer + ending}]
            found.append({"role": "assistant", "content": answered})
        return found


class Records:
    """The records of a file. Each is decoded when asked for; what stays in memory is the text.

    path: the JSON file, or a folder that holds `conversations.json` and the pictures.
    pictures: the folder of the pictures; None means the file's own.
    skip_malformed: leave out records that are malformed or lack their picture, in place of raising
      ValueError (FileNotFoundError) with the first one's index. `skipped` says which and why.
    """

    def __init__(
        self, path: str | Path, pictures: str | Path | None = None, *, skip_malformed: bool = False
    ) -> None:
        given = checks.path("data", path)
        file = given / "conversations.json" if given.is_dir() else given
        self.folder = checks.path("pictures", file.parent if pictures is None else pictures)
        self.file = file
        self.skipped: list[tuple[int, str]] = []
        if not file.is_file():
            raise FileNotFoundError(f"data {file}: no such file")
        if not self.folder.is_dir():
            raise FileNotFoundError(f"pictures {self.folder}: no such folder")
        try:
            self._text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"data {file}: expected UTF-8 ({error})") from error
        self._decode = json.JSONDecoder().raw_decode
        self._starts, self._numbers = array("q"), array("q")
        for number, start in enumerate(self._offsets()):
            try:
                self._read(start, number)
            except (ValueError, FileNotFoundError) as error:
                if not skip_malformed:
                    raise
                self.skipped.append((number, str(error)))
                continue
            self._starts.append(start)
            self._numbers.append(number)
        if not self._starts:
            raise ValueError(f"data {file}: expected at least one record, got none that is sound")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, at: int) -> Record:
        return self._read(self._starts[at], self._numbers[at])

    def _offsets(self) -> Any:
        """Where each member of the list begins."""
        text, at = self._text, self._skip(0)
        if text[at : at + 1] != "[":
            got = checks.shown(text[at : at + 20])
            raise ValueError(f"data {self.file}: expected a JSON list of records, got {got}")
        at = self._skip(at + 1)
        number = 0
        while text[at : at + 1] != "]":
            yield at
            try:
                _, at = self._decode(text, at)
            except ValueError as error:  # what comes behind it can't be told apart
                raise ValueError(f"data {self.file}: record {number}: no JSON ({error})") from None
            at, number = self._skip(at), number + 1

    def _skip(self, at: int) -> int:
        while self._text[at : at + 1] and self._text[at] in _BETWEEN:
            at += 1
        return at

    def _read(self, start: int, number: int) -> Record:
        try:
            data, _ = self._decode(self._text, start)
        except ValueError as error:
            raise ValueError(f"record {number}: no JSON ({error})") from None
        where = f"record {number}"
        if not isinstance(data, dict):
            raise ValueError(f"{where}: expected an object, got {checks.shown(data)}")
        picture = self._picture(where, data.get("image"))
        turns = _turns(where, data.get("conversations"), picture is not None)
        return Record(number, picture, turns, str(data.get("kind", "all")))

    def _picture(self, where: str, name: object) -> Path | None:
        if name is None:
            return None
        if not isinstance(name, str) or not name or Path(name).is_absolute() or "\0" in name:
            got = checks.shown(name)
            raise ValueError(f"{where}: image: expected a name inside the folder, got {got}")
        if ".." in Path(name).parts:
            raise ValueError(f"{where}: image: expected a name inside the folder, got {name!r}")
        if not (self.folder / name).is_file():
            raise FileNotFoundError(f"{where}: image {self.folder / name}: no such file")
        return self.folder / name


def _turns(where: str, given: object, has_picture: bool) -> tuple[tuple[str, str], ...]:
    if not isinstance(given, list) or not given or len(given) % 2:
        want = "pairs of a human's and a gpt's turn"
        got = len(given) if isinstance(given, list) else checks.kind(given)
        raise ValueError(f"{where}: conversations: expected {want}, got {got}")
    texts = []
    for number, turn in enumerate(given):
        want = SPEAKERS[number % 2]
        said = turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(said, str) or turn.get("from") != want or not said.strip():
            name = f"{where}: conversations[{number}]"
            raise ValueError(f"{name}: expected words from {want!r}, got {checks.shown(turn)}")
        texts.append(said)
    count = sum(text.count(PLACEHOLDER) for text in texts)
    if count != has_picture or (has_picture and PLACEHOLDER not in texts[0]):
        want = f"one {PLACEHOLDER} in the first question" if has_picture else f"no {PLACEHOLDER}"
        raise ValueError(f"{where}: conversations: expected {want}, got {count} in all")
    texts[0] = texts[0].replace(PLACEHOLDER, "")
    clean = [text.strip() for text in texts]
    if "" in clean:
        raise ValueError(f"{where}: conversations[0]: expected a question, got the picture alone")
    return tuple(zip(clean[::2], clean[1::2], strict=True))
