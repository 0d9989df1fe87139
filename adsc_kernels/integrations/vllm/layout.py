"""Which tokens of a request are in which stage, in vLLM's terms. No vLLM here.

vLLM counts in positions of the whole prompt; a later stage's KV cache counts in survivors. The two
are translated here, and the only source of survivors is the library's own plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from adsc_kernels.plan import make_plan
from adsc_kernels.schedule import CompressionSchedule

Span = tuple[int, ...]  # start, length[, height, width]: a span of make_plan within its sequence


class RequestLayout:
    """The survivors of one request in every stage.

    Attributes:
        begin, end: positions from the first image's first token to the last one's last; behind
            `end` every token is in every stage.
        dropped: for each stage, how many of the tokens before `end` are not in it.
    """

    def __init__(
        self, schedule: CompressionSchedule, spans: tuple[Span, ...], align_block: int | None = None
    ) -> None:
        self.spans = spans
        self.begin = min((span[0] for span in spans), default=0)
        self.end = max((span[0] + span[1] for span in spans), default=0)
        plan = make_plan(
            schedule, [0, self.end], [(0, *span) for span in spans], **alignment(align_block)
        )
        self._survivors = [stage.token_indices().numpy() for stage in plan.stages]
        self.dropped = tuple(self.end - len(rows) for rows in self._survivors)

    def kept_before(self, stage: int, position: int) -> int:
        """How many tokens before `position` are in `stage`."""
        if position >= self.end:
            return position - self.dropped[stage]
        if position <= self.begin:
            return position
        return int(np.searchsorted(self._survivors[stage], position))

    def position_of(self, stage: int, index: int) -> int:
        """The position of `stage`'s token number `index`: the inverse of `kept_before`."""
        rows = self._survivors[stage]
        return int(rows[index]) if index < len(rows) else index + self.dropped[stage]

    def cuts(self, begin: int, end: int) -> bool:
        """Positions [begin, end) hold tokens of an image: some of them may be dropped."""
        return begin < self.end and end > self.begin


class Columns:
    """The layouts of a batch's requests side by side, so that a step needs no loop over them.

    Attributes:
        layouts: of the requests, in the batch's order.
        begin, end: int32 [size]; dropped: int32 [stages behind a boundary, size]: as those of a
            layout, and 0 behind the last one, where a batch has padding or dummies.
    """

    def __init__(self, layouts: Sequence[RequestLayout], num_stages: int, size: int) -> None:
        self.layouts = layouts
        table = np.zeros((num_stages + 1, size), np.int32)
        if layouts:
            some = [(layout.begin, layout.end, *layout.dropped[1:]) for layout in layouts]
            table[:, : len(layouts)] = np.array(some, np.int32).T
        self.begin, self.end, self.dropped = table[0], table[1], table[2:]

    def hold(self, layouts: Sequence[RequestLayout], size: int) -> bool:
        """Whether they are those of this batch."""
        return len(self.end) == size and self.layouts == layouts


class Layouts:
    """The layouts of an engine's requests; those with images of one size at one place share one.

    read_spans: prompt token ids and a request's images to its spans, by model family.
    align_block: tokens of a cache block where every image has to lose whole blocks, else None.
    """

    MAX = 4096

    def __init__(
        self,
        schedule: CompressionSchedule,
        read_spans: Callable[[Sequence[int], Sequence[Any]], tuple[Span, ...]],
        align_block: int | None = None,
    ) -> None:
        self.schedule, self.align_block = schedule, align_block
        self._read_spans = read_spans
        self._known: dict[tuple[Span, ...], RequestLayout] = {}

    def of(self, prompt_token_ids: Sequence[int] | None, images: Sequence[Any]) -> RequestLayout:
        """That of one request; of one whose images can't be placed, that of text alone."""
        return self.read(prompt_token_ids, images)[0]

    def read(
        self, prompt_token_ids: Sequence[int] | None, images: Sequence[Any]
    ) -> tuple[RequestLayout, str]:
        """`of`, and why the images can't be placed: empty where they can.

        Every process of an engine reads every request, and none may end by one: so all take such a
        request for text, until the scheduler has finished it as an error.
        """
        if not images:
            return self.of_spans(()), ""
        try:
            return self.of_spans(self._read_spans(prompt_token_ids or (), images)), ""
        except Exception as error:
            return self.of_spans(()), f"{type(error).__name__}: {error}"

    def of_spans(self, spans: tuple[Span, ...]) -> RequestLayout:
        """That of any request with these spans."""
        layout = self._known.get(spans)
        if layout is None:
            if len(self._known) == self.MAX:
                self._known.clear()
            layout = self._known[spans] = RequestLayout(self.schedule, spans, self.align_block)
        return layout


def alignment(block: int | None) -> dict[str, Any]:
    """The arguments with which make_plan drops whole blocks."""
    return {} if block is None else {"align": "block", "block_size": block}


def aligned_schedule(
    schedule: CompressionSchedule, image: Span, block: int
) -> CompressionSchedule | None:
    """The nearest schedule under which this image loses whole blocks in every stage; None for the
    grid pattern, whose counts are not free."""
    if schedule.pattern == "grid":
        return None
    layout = RequestLayout(schedule, (image,), block)
    kept = [layout.end - dropped for dropped in layout.dropped]
    shares = [
        f"{boundary.layer}:{now}/{before}" if before else f"{boundary.layer}:0"
        for boundary, before, now in zip(schedule.boundaries, kept, kept[1:], strict=False)
    ]
    _, at, options = str(schedule).partition("@")
    return CompressionSchedule.parse(",".join(shares) + at + options, schedule.num_layers)
