"""Records to what a model trains on: tokens with labels on answers, padded or packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from adsc_kernels import checks
from adsc_kernels.training.records import Record, Records

IGNORED = -100
_BY_TOKEN = ("input_ids", "labels", "attention_mask", "token_type_ids", "mm_token_type_ids")


class Conversations(Dataset[dict[str, Tensor]]):
    """Each record by the processor's own chat template, with labels on what the model says.

    An item has `input_ids` and `labels`, [1, S], and what else the processor makes of the picture.
    ValueError names the record that is longer than `max_tokens`, or whose answers the template or
    the tokenizer does not keep apart from the questions.
    """

    def __init__(self, records: Records, processor: Any, max_tokens: int) -> None:
        self.records, self.processor, self.max_tokens = records, processor, max_tokens
        # LLaVA-1.5's template doesn't end an answer, and who never saw an end never stops.
        stop = processor.tokenizer.eos_token or ""
        probe = processor.apply_chat_template(Record(0, None, (("a", "b"),), "").messages())
        self.ending = "" if probe.rstrip().endswith(stop) else stop

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        record = self.records[at]
        messages = record.messages(self.ending)
        text = self.processor.apply_chat_template(messages)
        image = record.image()
        given = {} if image is None else {"images": [image]}
        item = dict(self.processor(text=[text], return_tensors="pt", **given))
        item.pop("attention_mask", None)  # of one sequence: ones
        ids = item["input_ids"]
        if ids.shape[1] > self.max_tokens:
            got = f"{ids.shape[1]} tokens"
            raise ValueError(
                f"record {record.index}: expected at most {self.max_tokens}, got {got}"
            )
        item["labels"] = self._labels(record, messages, text, ids)
        return item

    def _labels(
        self, record: Record, messages: list[dict[str, Any]], text: str, ids: Tensor
    ) -> Tensor:
        """Counted from the end: only in front of the first answer is a picture's token expanded."""
        labels = torch.full_like(ids, IGNORED)
        whole = self._tokens(text)
        for turn in range(1, len(messages), 2):
            template = self.processor.apply_chat_template
            before = self._tokens(template(messages[:turn], add_generation_prompt=True))
            after = self._tokens(template(messages[: turn + 1]))
            if whole[: len(before)] != before or whole[: len(after)] != after or before == after:
                where = f"record {record.index}: turn {turn}"
                got = checks.shown(messages[turn]["content"][0]["text"])
                raise ValueError(f"{where}: expected tokens of its own for the answer, got {got}")
            begin, end = (ids.shape[1] - len(whole) + len(part) for part in (before, after))
            labels[:, begin:end] = ids[:, begin:end]
        return labels

    def _tokens(self, text: str) -> list[int]:
        return self.processor.tokenizer(text)["input_ids"]


def pad(items: list[dict[str, Tensor]], pad_token: int) -> dict[str, Tensor]:
    """One row for each, padded at the end."""
    width = max(item["input_ids"].shape[1] for item in items)
    fill = {"input_ids": pad_token, "labels": IGNORED}
    batch = {}
    for name in items[0]:
        rows = [item[name] for item in items if name in item]
        if name in _BY_TOKEN:
            rows = [
                torch.nn.functional.pad(row, (0, width - row.shape[1]), value=fill.get(name, 0))
                for row in rows
            ]
        batch[name] = torch.cat(rows)
    lens = torch.tensor([item["input_ids"].shape[1] for item in items])
    batch["attention_mask"] = (torch.arange(width) < lens[:, None]).long()
    return batch


def pack(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All in one row without padding; positions start anew with each, which tells them apart.

    The first label of each is ignored as it is: no answer begins a conversation.
    """
    batch = {}
    for name in {name: None for item in items for name in item}:
        rows = [item[name] for item in items if name in item]
        batch[name] = torch.cat(rows, dim=1 if name in _BY_TOKEN else 0)
    lens = [item["input_ids"].shape[1] for item in items]
    batch["position_ids"] = torch.cat([torch.arange(n) for n in lens])[None]
    return batch
