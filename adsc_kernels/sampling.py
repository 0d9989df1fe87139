"""How answers are drawn, on the device, and how they come to the host without a wait."""

from __future__ import annotations

import torch
from torch import Tensor

from adsc_kernels import checks

COLDEST = 1e-6  # of temperatures above 0: below it logits overflow, and any sampling is greedy


def check_options(
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    prefill_chunk: int | None = None,
) -> None:
    """The numbers that `Llava.generate` takes; needs no model."""
    checks.integer("max_new_tokens", max_new_tokens, 1)
    if prefill_chunk is not None:
        checks.integer("prefill_chunk", prefill_chunk, 1)
    # Logits are divided by it, in float32.
    if 0 < checks.number("temperature", temperature, 0, 1 / COLDEST) < COLDEST:
        raise ValueError(f"temperature: expected 0 or at least {COLDEST:g}, got {temperature}")
    checks.number("top_p", top_p, most=1, above=0)
    if seed is not None:
        checks.integer("seed", seed, -(2**63))


def check_stop(stop: object) -> tuple[str, ...]:
    """The texts that end an answer. An empty one is in every answer, and would leave nothing."""
    if stop is None or isinstance(stop, str):
        stop = () if stop is None else (stop,)
    texts = checks.sequence("stop", stop, str)
    if "" in texts:
        raise ValueError("stop: expected texts that aren't empty, got ''")
    return texts


def choose(logits: Tensor, temperature: float, top_p: float, rng: torch.Generator) -> Tensor:
    """A token for each row, int64, drawn on the device."""
    if temperature == 0:
        return logits.argmax(-1)
    shares, tokens = (logits / temperature).softmax(-1).sort(descending=True)
    shares.masked_fill_(shares.cumsum(-1) - shares >= top_p, 0)  # the likeliest always stays
    # As multinomial draws, which looks at the shares and so waits: the first of exponential clocks.
    clocks = torch.empty_like(shares).exponential_(generator=rng)
    return tokens.gather(-1, (shares / clocks).argmax(-1, keepdim=True))[:, 0]


class Inbox:
    """Tokens on their way to the host."""

    def __init__(self, steps: int, like: Tensor) -> None:
        self.cuda = like.is_cuda
        self._host = torch.empty(
            (steps, len(like)), dtype=like.dtype, device="cpu", pin_memory=self.cuda
        )
        self._sent: dict[int, torch.cuda.Event] = {}

    @property
    def late(self) -> bool:
        """Whether the device works on by itself, so that a step is better begun unread."""
        return self.cuda

    def send(self, step: int, tokens: Tensor) -> None:
        """Behind what the device has been told to do so far."""
        self._host[step].copy_(tokens, non_blocking=True)
        if self.cuda:
            self._sent[step] = torch.cuda.current_stream(tokens.device).record_event()

    def receive(self, step: int) -> list[int]:
        """Once they are there."""
        if self.cuda:
            self._sent.pop(step).synchronize()
        return self._host[step].tolist()
