"""What a schedule costs and saves: multiply-accumulates and bytes, by layer, stage and in all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from adsc_kernels import checks
from adsc_kernels.accounting.cache import CacheFormat
from adsc_kernels.accounting.conventions import DEFAULT_CONVENTION, Convention, find_convention
from adsc_kernels.accounting.shapes import ModelShape
from adsc_kernels.checks import at_least
from adsc_kernels.schedule import CompressionSchedule

WEIGHT_BYTES = 2  # of a parameter in 16 bits


@dataclass(frozen=True)
class Parts:
    """MACs or bytes by part of the model. The first four are inside the decoder's layers."""

    projections: int = 0
    scores: int = 0  # and the values they weigh
    ffn: int = 0
    norms: int = 0
    embedding: int = 0
    head: int = 0  # with the norm before it
    tower: int = 0
    projector: int = 0

    def __add__(self, other: Parts) -> Parts:
        return Parts(*(a + b for a, b in zip(self._values(), other._values(), strict=True)))

    def __mul__(self, factor: int) -> Parts:
        return Parts(*(factor * value for value in self._values()))

    @property
    def layers(self) -> int:
        """The decoder's layers."""
        return self.projections + self.scores + self.ffn + self.norms

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self._values())

    def _values(self) -> tuple[int, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class LayerAccount:
    """One decoder layer. Cache bytes are those of all sequences together."""

    prefill: Parts  # MACs
    decode: Parts  # MACs of all decoded tokens
    weight_bytes: Parts
    kv_prompt_bytes: int  # when the prompt has run, before any compaction
    kv_bytes: int  # when the last token has run

    @property
    def macs(self) -> int:
        """Prefill and decoding."""
        return self.prefill.total + self.decode.total


@dataclass(frozen=True)
class StageAccount:
    """One stage: its layers, which cost the same each, and its rows after the prompt."""

    layers: range
    rows: int  # over all sequences
    layer: LayerAccount

    @property
    def prefill(self) -> Parts:
        """MACs of the prompt in all of the stage's layers."""
        return self.layer.prefill * len(self.layers)

    @property
    def decode(self) -> Parts:
        """MACs of the decoded tokens in all of the stage's layers."""
        return self.layer.decode * len(self.layers)

    @property
    def macs(self) -> int:
        """Prefill and decoding."""
        return self.layer.macs * len(self.layers)

    @property
    def weight_bytes(self) -> Parts:
        """Parameters of the stage's layers."""
        return self.layer.weight_bytes * len(self.layers)

    @property
    def kv_prompt_bytes(self) -> int:
        """K and V when the prompt has run, before any compaction."""
        return self.layer.kv_prompt_bytes * len(self.layers)

    @property
    def kv_bytes(self) -> int:
        """K and V when the last token has run."""
        return self.layer.kv_bytes * len(self.layers)


@dataclass(frozen=True)
class Account:
    """The whole model. ``vision_tokens`` are those of each stage, where they are known."""

    convention: Convention
    cache: CacheFormat
    stages: tuple[StageAccount, ...]
    outside_prefill: Parts  # MACs outside the decoder's layers
    outside_decode: Parts
    outside_weight_bytes: Parts
    vision_tokens: tuple[int, ...] | None = None

    @property
    def layers(self) -> tuple[LayerAccount, ...]:
        """Each decoder layer in order."""
        return tuple(stage.layer for stage in self.stages for _ in stage.layers)

    @property
    def prefill(self) -> Parts:
        """MACs of the prompt up to the first token."""
        return sum((stage.prefill for stage in self.stages), self.outside_prefill)

    @property
    def decode(self) -> Parts:
        """MACs of the tokens decoded after it."""
        return sum((stage.decode for stage in self.stages), self.outside_decode)

    @property
    def macs(self) -> int:
        """All that the convention counts."""
        return self.prefill.total + self.decode.total

    @property
    def decoder_macs(self) -> int:
        """The decoder layers alone."""
        return self.prefill.layers + self.decode.layers

    @property
    def weight_bytes(self) -> Parts:
        """Parameters, by part; they don't depend on the schedule."""
        return sum((stage.weight_bytes for stage in self.stages), self.outside_weight_bytes)

    @property
    def kv_prompt_bytes(self) -> int:
        """K and V of all layers when the prompt has run, before any compaction."""
        return sum(stage.kv_prompt_bytes for stage in self.stages)

    @property
    def kv_bytes(self) -> int:
        """Resident K and V of all layers: when the last token has run, compacted if it is asked."""
        return sum(stage.kv_bytes for stage in self.stages)

    @property
    def kv_peak_bytes(self) -> int:
        """The most K and V at any time: after the prompt or after the last token."""
        return max(self.kv_prompt_bytes, self.kv_bytes)

    @property
    def average_processed(self) -> float | None:
        """Vision tokens that a layer processes, averaged over the layers."""
        return None if self.vision_tokens is None else self._average(self.vision_tokens, drop=0)

    @property
    def average_post_drop(self) -> float | None:
        """The same by the tokens that leave a layer: one before a boundary counts as dropped."""
        return None if self.vision_tokens is None else self._average(self.vision_tokens, drop=1)

    def _average(self, counts: tuple[int, ...], drop: int) -> float:
        depth, total = self.stages[-1].layers.stop, 0
        for stage, count in zip(self.stages, counts, strict=True):
            first, stop = stage.layers.start, stage.layers.stop
            first = max(0, first - drop)
            stop = stop if stop == depth else max(0, stop - drop)
            total += count * (stop - first)
        return total / depth


def account(
    shape: ModelShape,
    schedule: CompressionSchedule,
    text_tokens: int,
    vision_tokens: int | None = None,
    decode_tokens: int = 0,
    *,
    grid: tuple[int, int] | None = None,
    tiles: int | None = None,
    kv_dtype: str = "bfloat16",
    kv_scale_bytes: int = 0,
    block_size: int = 1,
    compact_to: int | None = None,
    weight_bytes: int = WEIGHT_BYTES,
    convention: str | Convention = DEFAULT_CONVENTION,
) -> Account:
    """Account for one prompt of ``text_tokens`` and one span of ``vision_tokens``.

    ``vision_tokens`` None means what the model makes of ``tiles`` tiles (LLaVA-1.5: 576 of its
    one). ``grid`` is the span's (height, width) in tokens: for the grid pattern, and for towers
    that take any size. ``tiles`` go through the tower: 1, or 0 without vision tokens. The rest is
    as in :func:`account_lengths`. Raises ``TypeError`` or ``ValueError`` for bad input.
    """
    _check_depth(shape, schedule)
    if grid is not None:
        grid = checks.pair("grid", grid, 1, ("height", "width"))
    if tiles is not None:
        checks.integer("tiles", tiles, 0)
    if vision_tokens is None:
        vision_tokens = _default_vision_tokens(shape, grid, tiles)
    at_least(0, text_tokens=text_tokens, vision_tokens=vision_tokens)
    at_least(1, tokens=text_tokens + vision_tokens)
    if grid is not None and grid[0] * grid[1] != vision_tokens:
        raise ValueError(f"grid: expected {vision_tokens} = vision_tokens in all, got {grid}")
    if tiles is None:
        tiles = int(vision_tokens > 0)
    kept = schedule.kept(vision_tokens, *(grid or (None, None)))
    lengths: list[tuple[int, ...]] = [(text_tokens + count,) for count in kept]
    how = find_convention(convention)
    return _account(
        shape,
        schedule,
        lengths if how.text else [(count,) for count in kept],
        lengths,
        decode_tokens=decode_tokens,
        tiles=tiles,
        token_grid=grid,
        cache=CacheFormat(kv_dtype, kv_scale_bytes, block_size),
        compact_to=compact_to,
        weight_bytes=weight_bytes,
        convention=how,
        vision_tokens=kept,
    )


def account_lengths(
    shape: ModelShape,
    schedule: CompressionSchedule,
    seq_lens: Sequence[Iterable[int]],
    *,
    tiles: int,
    token_grid: tuple[int, int] | None = None,
    decode_tokens: int = 0,
    kv_dtype: str = "bfloat16",
    kv_scale_bytes: int = 0,
    block_size: int = 1,
    compact_to: int | None = None,
    weight_bytes: int = WEIGHT_BYTES,
    convention: str | Convention = DEFAULT_CONVENTION,
) -> Account:
    """Account for a ragged batch whose real lengths are known for every stage.

    seq_lens: each sequence's rows in stage ``s`` at ``seq_lens[s]``; with a plan of whole prompts
      it is ``[stage.seq_lens for stage in plan.stages]``.
    tiles: pictures that go through the vision tower, crops and frames counted each.
    token_grid: a tile's (height, width) in tokens, for towers that take any size.
    decode_tokens: tokens that each sequence runs through the decoder one at a time after its
      prompt; their K and V count too.
    kv_dtype, kv_scale_bytes, block_size: the cache's, as in :class:`CacheFormat`.
    compact_to: a stage; when the prompt has run, layers before it give up the rows that it has
      dropped. None compacts nothing.
    weight_bytes: of one parameter.

    Raises ``TypeError`` or ``ValueError`` where the arguments don't fit together.
    """
    how = find_convention(convention)
    if not how.text:
        raise ValueError(f"convention: expected one that counts text as well, got {how.name!r}")
    _check_depth(shape, schedule)
    lengths: list[tuple[int, ...]] = []
    for stage in checks.sequence("seq_lens", seq_lens, object, "lengths for each stage"):
        if not isinstance(stage, Iterable):
            raise TypeError(f"seq_lens: expected lengths for each stage, got {checks.kind(stage)}")
        lengths.append(tuple(stage))
    if token_grid is not None:
        checks.pair("token_grid", token_grid, 1, ("height", "width"))
    if len(lengths) != schedule.num_stages:
        raise ValueError(f"seq_lens: expected {schedule.num_stages} stages, got {len(lengths)}")
    for given in lengths:
        if len(given) != len(lengths[0]):
            raise ValueError(f"seq_lens: expected {len(lengths[0])} sequences, got {len(given)}")
        for length in given:
            at_least(0, seq_lens=length)
    return _account(
        shape,
        schedule,
        lengths,
        lengths,
        decode_tokens=decode_tokens,
        tiles=tiles,
        token_grid=token_grid,
        cache=CacheFormat(kv_dtype, kv_scale_bytes, block_size),
        compact_to=compact_to,
        weight_bytes=weight_bytes,
        convention=how,
    )


def _account(
    shape: ModelShape,
    schedule: CompressionSchedule,
    counted: list[tuple[int, ...]],
    cached: list[tuple[int, ...]],
    *,
    decode_tokens: int,
    tiles: int,
    token_grid: tuple[int, int] | None,
    cache: CacheFormat,
    compact_to: int | None,
    weight_bytes: int,
    convention: Convention,
    vision_tokens: tuple[int, ...] | None = None,
) -> Account:
    """``counted`` rows cost MACs and ``cached`` ones bytes, both by stage and sequence."""
    at_least(0, decode_tokens=decode_tokens, tiles=tiles)
    at_least(1, weight_bytes=weight_bytes)
    if compact_to is not None:
        at_least(0, compact_to=compact_to)
        if compact_to >= schedule.num_stages:
            raise ValueError(
                f"compact_to: expected a stage in 0..{schedule.num_stages - 1}, got {compact_to}"
            )
    stages = []
    weights = _layer_parameters(shape) * weight_bytes
    for index, prompt in enumerate(counted):
        later = max(index, compact_to or 0)  # the stage whose rows are there while decoding
        ends = tuple(length + decode_tokens for length in cached[later])
        layer = LayerAccount(
            prefill=_prefill(shape, convention, prompt),
            decode=_decode(shape, convention, counted[later], decode_tokens),
            weight_bytes=weights,
            kv_prompt_bytes=cache.layer_bytes(shape, cached[index]),
            kv_bytes=cache.layer_bytes(shape, ends),
        )
        stages.append(StageAccount(schedule.layers_of_stage(index), sum(cached[index]), layer))
    sequences, decoded = len(counted[0]), len(counted[0]) * decode_tokens
    positions = {"none": 0, "last": sequences, "all": sum(counted[-1])}[convention.head]
    tower = projector = 0
    if convention.tower and shape.tower is not None and tiles:
        tower = tiles * shape.tower.macs(token_grid, scores=convention.scores != "none")
        projector = tiles * shape.tower.projector_macs(token_grid)
    head = shape.hidden_size * (shape.vocab_size + 2 * convention.norms)
    return Account(
        convention=convention,
        cache=cache,
        stages=tuple(stages),
        outside_prefill=Parts(head=positions * head, tower=tower, projector=projector),
        outside_decode=Parts(head=decoded * head if convention.head != "none" else 0),
        outside_weight_bytes=_outside_parameters(shape) * weight_bytes,
        vision_tokens=vision_tokens,
    )


def _prefill(shape: ModelShape, how: Convention, lengths: tuple[int, ...]) -> Parts:
    """MACs of one layer on whole prompts."""
    twice = {  # the pairs, doubled, so that half a square stays whole
        "none": lambda n: 0,
        "causal": lambda n: n * (n + 1),
        "full": lambda n: 2 * n * n,
        "halved": lambda n: n * n,
    }[how.scores]
    return _layer(shape, how, sum(lengths), sum(map(twice, lengths)))


def _decode(shape: ModelShape, how: Convention, lengths: tuple[int, ...], steps: int) -> Parts:
    """MACs of one layer for the tokens after the prompt; each sees all before it and itself."""
    pairs = sum(length * steps + steps * (steps + 1) // 2 for length in lengths)
    return _layer(shape, how, len(lengths) * steps, 2 * pairs * (how.scores != "none"))


def _layer(shape: ModelShape, how: Convention, rows: int, twice_pairs: int) -> Parts:
    width = shape.hidden_size
    normed = 2 * width + (shape.query_width + shape.kv_width) * shape.qk_norm
    matrices = how.ffn_matrices or shape.ffn_matrices
    return Parts(
        projections=rows * width * 2 * (shape.query_width + shape.kv_width),
        scores=twice_pairs * shape.query_width,
        ffn=rows * matrices * width * shape.intermediate_size,
        norms=rows * 2 * normed * how.norms,
    )


def _layer_parameters(shape: ModelShape) -> Parts:
    width, inner = shape.hidden_size, shape.intermediate_size
    query, kv = shape.query_width, shape.kv_width
    biases = (query + 2 * kv) * shape.qkv_bias + width * shape.out_bias
    ffn_biases = ((shape.ffn_matrices - 1) * inner + width) * shape.mlp_bias
    return Parts(
        projections=2 * width * (query + kv) + biases,
        ffn=shape.ffn_matrices * width * inner + ffn_biases,
        norms=2 * width + 2 * shape.head_dim * shape.qk_norm,
    )


def _outside_parameters(shape: ModelShape) -> Parts:
    table = shape.vocab_size * shape.hidden_size
    return Parts(
        embedding=0 if shape.tied else table,
        head=table + shape.hidden_size,
        tower=0 if shape.tower is None else shape.tower.weights,
        projector=0 if shape.tower is None else shape.tower.projector_weights,
    )


def _check_depth(shape: ModelShape, schedule: CompressionSchedule) -> None:
    checks.instance("shape", shape, ModelShape)
    checks.instance("schedule", schedule, CompressionSchedule)
    if schedule.num_layers != shape.num_layers:
        raise ValueError(
            f"schedule: expected one for {shape.num_layers} layers, got {schedule.num_layers}"
        )


def _default_vision_tokens(
    shape: ModelShape, grid: tuple[int, int] | None, tiles: int | None
) -> int:
    if grid is not None:
        return grid[0] * grid[1]
    if shape.tower is None or shape.tower.tokens is None:
        raise ValueError(
            "vision_tokens: expected a count or a grid, since this model has no fixed one, got None"
        )
    return shape.tower.tokens * (1 if tiles is None else tiles)
