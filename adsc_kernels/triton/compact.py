# mypy: allow-untyped-defs, allow-incomplete-defs
"""compact_kv_ and compact_paged_kv_: the twin of csrc/cuda/compact.cu.

One launch for all tensors of one geometry, up to 64, and one for the lengths and the table; before
them, where something is to be checked, those of check.py.
"""

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from adsc_kernels import fakes
from adsc_kernels.kv.tensors import Places
from adsc_kernels.triton import launch
from adsc_kernels.triton.check import check
from adsc_kernels.triton.compaction import (
    COUNTS,
    Call,
    Compaction,
    call_of,
    move_at,
    new_length,
    place_in_cache,
    sequence_rows,
)
from adsc_kernels.triton.geometry import Geometry, Tile, geometry_of
from adsc_kernels.triton.launch import (
    Packed,
    cdiv,
    packed,
    pointer,
    start,
)

MAX_TENSORS = 64  # of a launch
_ENTRIES = 256  # of the lists of a batch or of a block table, for one program


@triton.jit
def tensor_of(offsets, layers, number):
    """Offset and layer of tensor `number` of the launch; layers: None where they don't matter."""
    offset = tl.cast(offsets[0], tl.int64)
    layer = tl.cast(0, tl.int64)
    for i in tl.static_range(1, len(offsets)):
        offset = tl.where(number == i, tl.cast(offsets[i], tl.int64), offset)
    if layers is not None:
        for i in tl.static_range(len(offsets)):
            layer = tl.where(number == i, tl.cast(layers[i], tl.int64), layer)
    return offset, layer


@triton.jit
def unit_in(strides, block, token):
    """Units from the beginning of a line to a token of it."""
    return block * strides[0] + token * strides[1]


@triton.jit(do_not_specialize=COUNTS)
def compact_kernel(
    base, offsets, layers, strides, lists,
    num_segments, steps, num_indices, table_stride, table_width, num_blocks, size, batch,
    TILE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """One program moves one strip of columns of one line of all rows of one sequence in one tensor.

    base: words. offsets: units from base to each tensor. strides: units from block to block, token
    to token and line to line.
    """
    c = Compaction(
        lists, num_segments, steps, num_indices, table_stride, table_width, num_blocks, size, batch,
        MODE.EDIT_TABLE, MODE.BY_INDEX,
    )  # fmt: skip
    STRIPS: tl.constexpr = (TILE.WIDTH + TILE.STRIP - 1) // TILE.STRIP
    program = tl.program_id(0)
    b = (program % batch).to(tl.int64)
    strip = program // batch % STRIPS
    line = (program // batch // STRIPS % TILE.LINES).to(tl.int64)
    offset, layer = tensor_of(offsets, layers, program // batch // STRIPS // TILE.LINES)
    index = tl.cast(0, tl.int64)
    if MODE.INDEX_LAYERS > 1:
        index = layer
    index = index * MODE.INDEX_HEADS
    if MODE.INDEX_HEADS > 1:
        index += line
    index = index * num_indices

    sequence = sequence_rows(c, b, True)
    end = new_length(sequence)
    if sequence.source == sequence.kept:
        end = sequence.prefix  # all stay: nothing moves
    begin = sequence.prefix
    if MODE.EDIT_TABLE:
        begin = begin // size * size  # whole pages
    words = base + (offset + line * strides[2]) * TILE.WORDS
    column = strip * TILE.STRIP + tl.arange(0, TILE.STRIP)
    for first in tl.range(begin, end, TILE.ROWS):
        position = first + tl.arange(0, TILE.ROWS)
        inside = position < end
        old, new = move_at(c, sequence, index, position, inside)
        moved = inside & (old != new)
        block, token = place_in_cache(c, b, old, moved)
        source = unit_in(strides, block, token) * TILE.WORDS
        block, token = place_in_cache(c, b, new, moved)
        target = unit_in(strides, block, token) * TILE.WORDS
        mask = moved[:, None] & (column < TILE.WIDTH)[None, :]
        values = tl.load(words + source[:, None] + column[None, :], mask=mask)
        # Safe in place for the reason given at store_tile in csrc/cuda/compact.cuh: what lies at a
        # place is taken in an earlier tile or in this one, all of a tile is read before any of it
        # is written, and nobody else touches this strip.
        tl.debug_barrier()
        tl.store(words + target[:, None] + column[None, :], values, mask=mask)


class Outputs(NamedTuple):
    """What is reported: tensors; None where the op has no such output."""

    seq_lens: Any
    slots: Any
    last_page_len: Any = None
    indptr: Any = None
    table: Any = None


@triton.jit
def next_slot(c, sequence, b, inside):
    """The slot of the token that comes next; -1 where there is no room or a block is needed."""
    length = new_length(sequence)
    if c.lists.table is not None:
        rest = length % c.size
        partial = inside & (rest > 0)
        _, home = move_at(c, sequence, 0, length // c.size * c.size, partial)
        block, _ = place_in_cache(c, b, home, partial)
        slot = tl.where(partial, block * c.size + rest, -1)
    elif c.lists.seq_starts is not None:
        slot = tl.load(c.lists.seq_starts + b, mask=inside, other=0).to(tl.int64) + length
        end = tl.load(c.lists.seq_starts + b + 1, mask=inside, other=0).to(tl.int64)
        slot = tl.where(slot < end, slot, -1)
    else:
        slot = tl.where(length < c.size, b * c.size + length, -1)
    return slot


@triton.jit
def write_lengths(c, out, ENTRIES: tl.constexpr):
    """All but the table."""
    pages_before = tl.cast(0, tl.int64)
    if out.indptr is not None:
        tl.store(out.indptr, 0)
    for first in tl.range(0, c.batch, ENTRIES):
        b = first + tl.arange(0, ENTRIES).to(tl.int64)
        inside = b < c.batch
        sequence = sequence_rows(c, b, inside)
        length = new_length(sequence)
        tl.store(out.seq_lens + b, length.to(tl.int32), mask=inside)
        tl.store(out.slots + b, next_slot(c, sequence, b, inside), mask=inside)
        if out.indptr is not None:
            pages = (length + c.size - 1) // c.size
            indptr = (pages_before + tl.cumsum(pages, 0)).to(tl.int32)
            tl.store(out.indptr + 1 + b, indptr, mask=inside)
            pages_before += tl.sum(pages, 0)
            rest = length % c.size
            last = tl.where((length > 0) & (rest == 0), c.size, rest)
            tl.store(out.last_page_len + b, last.to(tl.int32), mask=inside)


@triton.jit
def write_table(c, out, entry):
    """Entries of the new table; -1 behind the last page of a sequence."""
    inside = entry < c.batch * c.table_width
    b = tl.where(inside, entry // c.table_width, 0)
    row = (entry - b * c.table_width) * c.size
    sequence = sequence_rows(c, b, inside)
    used = inside & (row < new_length(sequence))
    _, home = move_at(c, sequence, 0, row, used)
    block, _ = place_in_cache(c, b, home, used)
    tl.store(out.table + entry, tl.where(used, block, -1), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def outputs_kernel(
    out, lists,
    num_segments, steps, num_indices, table_stride, table_width, num_blocks, size, batch,
    ENTRIES: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Program 0 writes lengths, slots and the running sum of pages, the others the new table."""
    c = Compaction(
        lists, num_segments, steps, num_indices, table_stride, table_width, num_blocks, size, batch,
        MODE.EDIT_TABLE, MODE.BY_INDEX,
    )  # fmt: skip
    program = tl.program_id(0)
    if program == 0:
        write_lengths(c, out, ENTRIES)
    elif MODE.EDIT_TABLE:
        write_table(c, out, (program - 1).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES))


# ---- Launchers ----


_SHAPE, _DTYPE = operator.attrgetter("shape"), operator.attrgetter("dtype")


def _forms(
    caches: list[Tensor], num_layers: int, are_alike: bool
) -> Iterator[tuple[tuple[Any, ...], list[int]]]:
    """Shapes, strides and dtypes, and which tensors have them; are_alike: those of a kind."""
    if are_alike:
        for first in range(0, len(caches), num_layers):
            x = caches[first]
            yield (x.shape, x.stride(), x.dtype), list(range(first, first + num_layers))
        return
    # Asked of all at once, a property takes a fraction of the time that it takes in a loop.
    ways = (map(_SHAPE, caches), map(Tensor.stride, caches), map(_DTYPE, caches))
    forms = [*zip(*ways, strict=True)]
    for form in dict.fromkeys(forms):
        yield form, [i for i, own in enumerate(forms) if own == form]


class Group(NamedTuple):
    """One launch: tensors of one geometry, but for what differs from batch to batch."""

    base: Packed
    offsets: Packed
    layers: Packed | None
    strides: Packed
    tile: Tile
    parts: int  # programs for each sequence


def _groups(
    caches: list[Tensor], num_layers: int, places: Places | None, by_layer: bool, *form: Any
) -> list[Group]:
    """form: what `geometry_of` takes last."""
    addresses = [*map(Tensor.data_ptr, caches)] if places is None else places.addresses
    alike_in: dict[Geometry, list[int]] = {}
    for own_form, alike in _forms(caches, num_layers, places is not None):
        alignments = [addresses[i] & 15 for i in alike]
        for alignment in dict.fromkeys(alignments):
            geometry = geometry_of(*own_form, alignment, *form)
            if geometry is not None:
                own = [i for i, a in zip(alike, alignments, strict=True) if a == alignment]
                alike_in.setdefault(geometry, []).extend(own)
    groups = []
    for geometry, members in alike_in.items():
        for first in range(0, len(members), MAX_TENSORS):
            some = members[first : first + MAX_TENSORS]
            origin = addresses[some[0]]
            offsets = [(addresses[i] - origin) // geometry.unit for i in some]
            fill = [0] * (-len(some) % 8)  # a few sizes of tuples, so that few kernels are compiled
            layers = packed((*(i % num_layers for i in some), *fill)) if by_layer else None
            groups.append(
                Group(
                    pointer(caches[some[0]], geometry.dtype),
                    packed((*offsets, *fill)),
                    layers,
                    packed(geometry.strides),
                    geometry.tile,
                    len(some) * geometry.parts,
                )
            )
    return groups


def _move(
    caches: list[Tensor], num_layers: int, cache_layout: str, call: Call, places: Places | None
) -> None:
    """places: where the caches of a kind are known to be alike but for them; they keep what is
    worked out of them."""
    *_, size, batch = call.counts
    first, mode = caches[0], call.mode
    of_slots = first.dim() == 3 and call.lists.table is not None
    form = (first.dim(), size if of_slots else 0, cache_layout, mode.INDEX_HEADS > 1)
    key = (mode.INDEX_LAYERS > 1, *form)
    groups = None if places is None else places.prepared.get(key)
    if groups is None:
        groups = _groups(caches, num_layers, places, *key)
        if places is not None:
            places.prepared[key] = groups
    for group in groups:
        start(
            compact_kernel,
            group.parts * batch,
            first.device,
            (*group[:4], call.packed, *call.counts),
            TILE=group.tile,
            MODE=mode,
        )


def _report(call: Call, out: Outputs) -> None:
    entries = 0 if out.table is None else out.table.numel()
    start(
        outputs_kernel,
        1 + cdiv(entries, _ENTRIES),
        out.seq_lens.device,
        (out, call.packed, *call.counts),
        ENTRIES=_ENTRIES,
        MODE=call.mode,
    )


def compact_kv_(*arguments, places: Places | None = None) -> tuple[Tensor, Tensor]:
    """See `adsc_kernels.ops.compact_kv_`; arguments: those of its schema. places: of the caches,
    where those of a kind (K, V, scales) are known to be alike but for them."""
    caches, num_layers, segments, keep_indices, *bounds, seq_starts, cache_layout = arguments
    tokens = caches[0].shape[-2 if cache_layout == "HND" else -3]
    call = call_of(segments, keep_indices, bounds, tokens, seq_starts=seq_starts)
    if launch.CHECK:
        check(call, caches[0].device)
    _move(caches, num_layers, cache_layout, call, places)
    out = Outputs(*fakes.compact_kv_(*arguments))
    _report(call, out)
    return out.seq_lens, out.slots


def compact_paged_kv_(*arguments, places: Places | None = None) -> tuple[Tensor, ...]:
    """See `adsc_kernels.ops.compact_paged_kv_`; arguments: those of its schema. places: as in
    `compact_kv_`."""
    caches, num_layers, table, size, segments, keep_indices, *bounds, edit_table = arguments[:-2]
    read_only_blocks, cache_layout = arguments[-2:]
    first = caches[0]
    num_blocks = first.shape[0]
    if first.dim() == 3:
        num_blocks = first.shape[1 if cache_layout == "HND" else 0] // size
    call = call_of(
        segments,
        keep_indices,
        bounds,
        size,
        table=table,
        num_blocks=num_blocks,
        edit_table=edit_table,
    )
    if launch.CHECK or read_only_blocks is not None:
        check(call, first.device, read_only_blocks)
    _move(caches, num_layers, cache_layout, call, places)
    out = Outputs(*fakes.compact_paged_kv_(*arguments))
    _report(call, out)
    return tuple(out)
