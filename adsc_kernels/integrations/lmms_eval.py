"""lmms-eval's model `adsc`: any transformers model that `apply_adsc` serves, with a schedule in it.

    python -m lmms_eval --model adsc --tasks pope \
        --model_args "pretrained=llava-hf/llava-1.5-7b-hf,schedule=8:1/4;16:1/4"
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from transformers import AutoModelForImageTextToText, AutoProcessor

from adsc_kernels import checks
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.integrations.hf import apply_adsc

Message = dict[str, Any]
# A task's options that `generate` takes; what it has besides is for other models.
OPTIONS = ("max_new_tokens", "temperature", "top_p", "num_beams", "do_sample")


def manifest() -> Any:
    """How lmms-eval finds the model: this package's entry point in `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("adsc", chat_class_path=f"{__name__}.AdscModel")


class AdscModel(lmms):
    """A model of lmms-eval's chat interface.

    pretrained: a checkpoint's folder or name.
    schedule: its text, with `;` where it has a comma, as lmms-eval splits its arguments at commas;
      None takes what the checkpoint's config holds. `1:1` keeps all, for a baseline.
    batch_size: requests that are answered together, at least 1.
    dtype, attn_implementation: as `from_pretrained` takes them.
    device: None takes that of the process under accelerate.

    Raises what `apply_adsc` and the loading of the checkpoint raise, and UnsupportedError for tasks
    other than generation in one round.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        schedule: str | None = None,
        batch_size: int | str = 1,
        dtype: str = "auto",
        device: str | None = None,
        attn_implementation: str | None = None,
    ) -> None:
        super().__init__()
        digits = isinstance(batch_size, str) and batch_size.isdigit()  # as the command line has it
        self.batch_size = checks.integer("batch_size", int(batch_size) if digits else batch_size, 1)
        self.accelerator = here = Accelerator()
        self._rank, self._world_size = here.process_index, here.num_processes
        self.device = torch.device(here.device if device is None else device)
        self.model = AutoModelForImageTextToText.from_pretrained(
            pretrained, dtype=dtype, attn_implementation=attn_implementation
        )
        self.model.to(self.device).eval()
        self.processor = AutoProcessor.from_pretrained(pretrained)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        text = schedule.replace(";", ",") if isinstance(schedule, str) else schedule
        self.applied = apply_adsc(self.model, text)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request, in their order, cut where its task's `until` stands first."""
        answers: list[str] = []
        for options, batch in self._batches(requests):
            conversations = [self._messages(request) for request in batch]
            for request, text in zip(batch, self._answer(conversations, options), strict=True):
                answers.append(_cut(text, request.args[2].get("until") or ()))
                key = (request.args[0], request.args[2])
                self.cache_hook.add_partial("generate_until", key, answers[-1])
        return answers

    def _batches(self, requests: Sequence[Any]) -> Iterator[tuple[dict[str, Any], list[Any]]]:
        """Requests that follow one another and are answered with the same options."""
        for options, group in groupby(requests, key=lambda request: _options(request.args[2])):
            alike = list(group)
            for first in range(0, len(alike), self.batch_size):
                yield options, alike[first : first + self.batch_size]

    def _messages(self, request: Any) -> list[Message]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        return [_message(m) for m in doc_to_messages(self.task_dict[task][split][doc_id])]

    def _answer(self, conversations: list[list[Message]], options: dict[str, Any]) -> list[str]:
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.device, self.model.dtype)
        with torch.inference_mode():
            out = self.model.generate(**inputs, **options, pad_token_id=self.tokenizer.pad_token_id)
        new = out[:, inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(new, skip_special_tokens=True)

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        """Refused: the chat interface has none."""
        raise UnsupportedError("task: expected one that generates, got one of log-likelihoods")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
        """Refused."""
        raise UnsupportedError("task: expected one that generates in one round, got several")


def _message(message: Message) -> Message:
    """A message of lmms-eval as a transformers processor takes it."""
    parts = []
    for part in message["content"]:
        kind = part["type"]
        if kind not in ("text", "image", "video"):
            raise UnsupportedError(f"messages: expected text, images or videos, got {kind}")
        parts.append({"type": kind, kind: part["text" if kind == "text" else "url"]})
    return {"role": message["role"], "content": parts}


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """What `generate` is given of a task's options; greedy unless a temperature is asked for."""
    others = sorted(set(given) - {"until", *OPTIONS})
    if others:
        warnings.warn(f"generation_kwargs: {', '.join(others)} go unused", stacklevel=2)
    options = {name: given[name] for name in OPTIONS if given.get(name) is not None}
    options.setdefault("max_new_tokens", 1024)
    if not options.setdefault("do_sample", options.get("temperature", 0) > 0):
        options.update(temperature=None, top_p=None)
    return options


def _cut(text: str, until: str | Sequence[str]) -> str:
    """What stands before the first of the strings that end an answer."""
    ends = [until] if isinstance(until, str) else until
    return text[: min((text.find(end) for end in ends if end and end in text), default=None)]
