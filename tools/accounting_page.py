"""Writes docs/accounting.md and its two pictures; every number in the page is computed here.

`python tools/accounting_page.py`; python_tests/test_accounting_page.py fails where the page that is
committed says anything else.
"""
# ruff: noqa: E501 (the page's lines are as long as those of the other pages)

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from adsc_kernels import CompressionSchedule
from adsc_kernels.accounting import CONVENTIONS, MODELS, Account, ModelShape, account
from adsc_kernels.budget import PRESETS, search
from adsc_kernels.coverage import coverage, under_pattern

DOCS = Path(__file__).parents[1] / "docs"
SHAPE = ModelShape.preset("llava-1.5-7b")
DENSE = CompressionSchedule.dense(32)
FOUND = search(192, 576, 32, 2)  # every schedule of one share at two boundaries that averages 192
CHOSEN = FOUND.schedules[0]
QUARTERS = CompressionSchedule.parse("8:1/4,16:1/4,24:1/4", 32)
TEXT = 101


def counted(schedule: CompressionSchedule, text: int = TEXT, decode: int = 0, **how) -> Account:
    return account(SHAPE, schedule, text, decode_tokens=decode, **how)


def macs_cut(
    convention: str, schedule: CompressionSchedule = CHOSEN, text: int = TEXT, decode: int = 0
) -> float:
    """How many per cent of the dense model's MACs are saved."""
    dense, kept = (
        counted(one, text, decode, convention=convention).macs for one in (DENSE, schedule)
    )
    return 100 * (1 - kept / dense)


def kv_cut(schedule: CompressionSchedule = CHOSEN, text: int = TEXT) -> float:
    """How many per cent of the dense model's cache are saved, at the end of the prompt."""
    return 100 * (1 - counted(schedule, text).kv_bytes / counted(DENSE, text).kv_bytes)


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(header), *(list(map(str, row)) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def conventions() -> str:
    return table(
        ("name", "what it counts"),
        ((f"`{how.name}`", how.definition) for how in CONVENTIONS.values()),
    )


def cache_by_text() -> str:
    rows = []
    for text in range(98, 105):
        mib = [counted(one, text).kv_bytes / 2**20 for one in (DENSE, CHOSEN)]
        cut = f"{kv_cut(text=text):.2f} %"
        cut = f"**{cut}**" if text == TEXT else cut
        rows.append((text, f"{mib[0]:.2f} MiB", f"{mib[1]:.2f} MiB", cut))
    return table(("text tokens", "dense", "average 192", "saved"), rows)


def macs_by_convention() -> str:
    rows = []
    for name in CONVENTIONS:
        tera = [counted(one, convention=name).macs / 1e12 for one in (DENSE, CHOSEN)]
        every = [macs_cut(name, schedule) for schedule in FOUND.schedules]
        span = f"{min(every):.2f} to {max(every):.2f}"
        if f"{min(every):.4f}" == f"{max(every):.4f}":
            span = "the same"
        rows.append(
            (f"`{name}`", f"{tera[0]:.3f}", f"{tera[1]:.3f}", f"{macs_cut(name):.2f} %", span)
        )
    header = ("convention", "dense, TMAC", f"`{CHOSEN}`, TMAC", "saved")
    return table((*header, f"all {len(FOUND.schedules)} schedules"), rows)


def first_way() -> str:
    """Scores and a third of the FFN left out, tower in."""
    halves = CompressionSchedule.parse("4:1/2,10:1/2,18:1/2", 32)
    rows = []
    for schedule, text in ((QUARTERS, 103), (halves, 99), (CHOSEN, 101), (CHOSEN, 102)):
        mean = counted(schedule, text).average_processed
        kv, macs = kv_cut(schedule, text), macs_cut("linear-2+tower", schedule, text)
        both = "both" if (f"{kv:.1f}", f"{macs:.1f}") == ("56.7", "53.7") else "not both"
        rows.append((f"`{schedule}`", f"{mean:g}", text, f"{kv:.2f} %", f"{macs:.2f} %", both))
    header = ("schedule", "average", "text tokens", "cache", "MACs, `linear-2+tower`")
    return table((*header, "−56.7 % and −53.7 %"), rows)


def second_way() -> str:
    """Decoded tokens, with all three FFN matrices."""
    rows = []
    for name in ("linear-3+tower", "exact", "halved-3+tower", "full-3+tower"):
        steps = [n for n in range(60) if f"{macs_cut(name, decode=n):.1f}" == "53.7"]
        cuts = ", ".join(f"{macs_cut(name, decode=n):.2f} %" for n in steps)
        rows.append((f"`{name}`", f"{macs_cut(name):.2f} %", " or ".join(map(str, steps)), cuts))
    return table(("convention", "none decoded", "−53.7 % with so many decoded", "MACs saved"), rows)


def llm_only_with_decoding() -> str:
    steps = {
        name: [n for n in range(80) if f"{macs_cut(name, decode=n):.1f}" == "53.7"]
        for name in ("linear-3", "halved-3", "full-3")
    }
    return ", ".join(
        f"{' or '.join(map(str, counts))} under `{name}`" for name, counts in steps.items()
    )


def pyramid() -> str:
    schedule = CompressionSchedule.parse("8:1/2,16:1/2,24:1/2", 32)
    rows = []
    for name, one in (("dense", DENSE), (f"`{schedule}`", schedule)):
        found = counted(one, convention="vision-only")
        tera = found.macs / 1e12
        rows.append((name, f"{found.average_processed:g}", f"{tera:.4f}", f"{tera:.2f} T"))
    return table(("PyramidDrop", "average", "TMAC, `vision-only`", "to three digits"), rows)


def averages() -> str:
    """Peers' settings, by both averages."""
    known = (
        ("FastV, K = 2, 98 kept", "2:98/576"),
        ("FastV, K = 3, 128 kept", "3:128/576"),
        ("FastV, K = 2, 166 kept", "2:166/576"),
        ("PyramidDrop, its default", "8:1/2,16:1/2,24:1/2"),
        ("PyramidDrop's layers, 1/4", "8:1/4,16:1/4,24:1/4"),
        ('SparseVLM+ "192", merged tokens not counted', "3:300/576,7:200/300,16:118/200"),
    )
    rows = []
    for name, text in known:
        found = counted(CompressionSchedule.parse(text, 32))
        kept = " → ".join(map(str, found.vision_tokens))
        rows.append(
            (name, kept, f"{found.average_processed:.2f}", f"{found.average_post_drop:.2f}")
        )
    return table(("setting", "vision tokens", "processed", "post-drop"), rows)


def presets() -> str:
    rows = []
    for name, (depth, text) in PRESETS.items():
        shape, schedule = ModelShape.preset(name.split("/")[0]), CompressionSchedule.preset(name)
        dense = account(shape, CompressionSchedule.dense(depth), TEXT)
        kept = account(shape, schedule, TEXT)
        rows.append(
            (
                f"`{name}`",
                f"`{text}`",
                " → ".join(map(str, schedule.kept(576))),
                f"{kept.average_processed:g}",
                f"{kept.average_post_drop:g}",
                f"{100 * (1 - kept.macs / dense.macs):.2f} %",
                f"{100 * (1 - kept.kv_bytes / dense.kv_bytes):.2f} %",
            )
        )
    header = ("preset", "schedule", "vision tokens", "processed", "post-drop")
    return table((*header, "MACs saved, `exact`", "cache saved"), rows)


def compaction() -> str:
    rows = []
    for stage in (None, 1, 2):
        found = counted(CHOSEN, decode=64, compact_to=stage)
        name = "nothing" if stage is None else f"down to stage {stage}"
        rows.append(
            (
                name,
                f"{found.kv_peak_bytes / 2**20:.2f} MiB",
                f"{found.kv_bytes / 2**20:.2f} MiB",
                f"{found.decode.scores / 1e9:.3f} G",
            )
        )
    header = ("compacted after the prompt", "peak", "resident", "score MACs of the 64")
    return table(header, rows)


def models() -> str:
    rows = []
    for name, shape in MODELS.items():
        grid = (36, 36) if shape.tower.grid is None else None
        found = account(shape, CompressionSchedule.dense(shape.num_layers), TEXT, grid=grid)
        row_bytes = found.cache.row_bytes(shape) * shape.num_layers
        rows.append(
            (
                f"`{name}`",
                shape.num_layers,
                f"{found.vision_tokens[0]}{' (36 × 36)' if grid else ''}",
                f"{found.weight_bytes.total / 2e9:.3f} G",
                f"{found.decoder_macs / 1e12:.3f}",
                f"{(found.prefill.tower + found.prefill.projector) / 1e12:.3f}",
                f"{row_bytes / 2**10:g} KiB",
            )
        )
    header = ("model", "layers", "vision tokens of a tile", "parameters", "decoder, TMAC")
    return table((*header, "tower, projector, TMAC", "cache a token, 16 bits"), rows)


def columns() -> str:
    grid, rows = (24, 24), []
    for stride in (2, 3, 4):
        line = CompressionSchedule.parse(f"0:1/{stride}", 1)
        for pattern in ("start", "linspace", "grid"):
            found = coverage(under_pattern(line, pattern, grid), grid)[-1]
            rows.append(
                (
                    f"1/{stride}",
                    f"`{pattern}`",
                    len(found.kept),
                    f"{found.rows} of 24",
                    f"{found.columns} of 24",
                    f"{found.farthest:.2f}",
                )
            )
    header = ("keep", "pattern", "tokens", "rows left", "columns left")
    return table((*header, "farthest patch from a survivor"), rows)


def page() -> str:
    dense, kept = counted(DENSE), counted(CHOSEN)
    tower = dense.prefill.tower + dense.prefill.projector
    decoder = 100 * (1 - kept.decoder_macs / dense.decoder_macs)
    return f"""# What a schedule costs and saves

<!-- Written by tools/accounting_page.py. Change that, not this. -->

Which schedule gives 192 tokens, and what does it buy?

```sh
adsc account --budget 192
```

`adsc account --compare` sets several schedules side by side, `--conventions` shows one schedule under every
convention, `--model` takes a preset, a folder or an id on the hub, `--plot` draws the chart below, `--json`
prints everything, every layer included. In Python:

```python
from adsc_kernels import CompressionSchedule
from adsc_kernels.accounting import ModelShape, account

shape = ModelShape.preset("llava-1.5-7b")  # or .from_config(...), .from_pretrained(...)
schedule = CompressionSchedule.for_budget(
    average_tokens=192, vision_tokens=576, num_layers=32, num_boundaries=2
)
costs = account(shape, schedule, text_tokens={TEXT})
costs.macs, costs.prefill.ffn, costs.kv_bytes, costs.stages[1].kv_bytes, costs.layers[31].macs
costs.average_processed, costs.average_post_drop
```

![Tokens by layer, MACs and cache of the presets](accounting.png)

## What is counted

One MAC is one multiply-accumulate. Papers of this field call it a FLOP; hardware vendors count two. Below,
n is the number of tokens in a layer, d the hidden size, m the FFN's inner size. Projections always count by
their real widths, so 4nd² shrinks where key heads are grouped.

{conventions()}

**Averages.** *Processed* is the number of vision tokens that a layer sees, averaged over the layers; it is what
memory and MACs follow, and what this library means by an average. *Post-drop* averages the tokens that leave each
layer, so that a layer that runs on everything and is pruned right after counts as if it had been pruned before.
Numbers published for a budget are of either kind:

{averages()}

**Bytes.** A cache row of one layer is 2 × key heads × head size × bits / 8, with scales beside each head's row if
there are any, and each sequence rounded up to whole blocks in every layer if the cache is paged. *Resident* is what
is there when the last token has run, *peak* the most at any time. The two differ where early layers are compacted
after the prompt (`--compact-to`). LLaVA-1.5-7B, `{CHOSEN}`, {TEXT} text tokens, 64 decoded:

{compaction()}

## The paper's −56.7 % and −53.7 %

ADSC (arXiv 2602.12618) reports for LLaVA-1.5-7B, at an average of 192 of 576 vision tokens, 56.7 % less peak KV
cache and 53.7 % fewer FLOPs. What we could read of it gives neither layers nor prompt length nor formula.

**The cache.** With T text tokens, 1 − (192 + T) / (576 + T). It is 56.7 % for T = {TEXT} and for no other whole T:

{cache_by_text()}

So T = {TEXT} is the prompt below, and `{CHOSEN}` the schedule: the first of the {len(FOUND.schedules)} that average
exactly 192 with one share at two boundaries ({", ".join(f"`{s}`" for s in FOUND.schedules[1:])} are the others).

**MACs, by every convention, at that very point:**

{macs_by_convention()}

Of the decoder alone it is {decoder:.2f} % (`decoder`), with vision tower, projector and head {macs_cut("exact"):.2f} %
(`exact`). The tower and the projector cost {tower / 1e12:.4f} TMAC, and no schedule touches them.

No row says 53.7. Nor can a decoder-only prefill of the same prompt: projections and FFN shrink as the cache does, and
scores, which grow with n², shrink more, so its cut is never below the cache's. 53.7 is below 56.7, hence
the published FLOPs hold something that isn't pruned, or are of another prompt. **The paper doesn't say which
convention it used.** Two reproduce both numbers:

**One: `linear-2+tower`**, 4nd² + 2ndm: scores not counted, two of the three FFN matrices, vision tower and projector
in. It says 53.7 together with 56.7 at a T and an average close to, but not at, 192 and {TEXT}:

{first_way()}

**Two: all three FFN matrices, tower and projector, and a short answer.** The prompt's cache saves {kv_cut():.2f} % as
before; a decoded token costs nearly the same with and without compression, and dilutes the cut. `{CHOSEN}`, T = {TEXT}:

{second_way()}

Without a tower it takes longer answers: {llm_only_with_decoding()}.

We claim −{kv_cut():.1f} % of cache at T = {TEXT}, and quote MACs as {decoder:.2f} % (decoder) or {macs_cut("exact"):.2f} % (everything that runs). −53.7 % is shown here under
these two conventions only, and neither is known to be the paper's.

## Peers that reproduce

PyramidDrop publishes 3.82 T and 1.78 T for LLaVA-1.5-7B. That is 4nd² + 2n²d + 3ndm of the 576 vision tokens alone,
as if the prompt held no text:

{pyramid()}

## Presets

{presets()}

All are exact, drop multiples of 16 tokens, and leave the first two layers whole.
`CompressionSchedule.preset("llava-1.5-7b/192")` reads one; `adsc_kernels.budget.search` finds the rest. It lists every
schedule whose average is as near as can be, ranked: nearest first; at most the budget before more; stages of the most
even depth (least sum of squared layer counts); then the latest first boundary. A budget out of reach raises an error
that names the nearest.

## Models without a download

One tile and {TEXT} text tokens, dense, `exact`:

{models()}

`ModelShape.from_config` reads any transformers config of LLaVA-1.5, LLaVA-NeXT, OneVision, Qwen2.5-VL and InternVL, or
of a Llama, Mistral, Qwen2 or Qwen3 decoder alone, and refuses what it doesn't know.

## Strides and columns

LLaVA's 576 patches are a raster of 24 × 24. Strides of 2, 3 and 4 divide 24, so a stride in reading order meets the
same columns in every row and **deletes whole columns**. `linspace` drifts across them; `grid` thins rows
and columns alike (it keeps a × b patches, so that a half is 17 × 17). `adsc visualize` draws this sheet for
any picture, grid and pattern:

{columns()}

![Survivors under each pattern at strides of 2, 3 and 4](patterns.png)

## How it is checked

- MACs under `profiler` equal `torch.utils.flop_counter` on real forward passes, prefill and one decoded token, of small
  random models of every family above; part by part for LLaVA; and on the thin LLaVA under four schedules, a ragged
  batch with several pictures, prefill and decoding. The thin LLaVA runs less than is counted: rows that a boundary is
  about to drop are spared the output projection and the MLP of the layer before it; the test takes off just those.
- Cache bytes equal what transformers' cache and the thin LLaVA's hold, layer by layer; weight bytes equal the models'.
- `for_budget` is compared with trying every schedule there is.
- This page is rebuilt by a test and compared.
"""


def pictures() -> None:
    from adsc_kernels.chart import draw
    from adsc_kernels.cli import main
    from adsc_kernels.cli.png import write

    named = [("dense", DENSE)]
    named += [(f"/{n}", CompressionSchedule.preset(f"llava-1.5-7b/{n}")) for n in (192, 128, 64)]
    title = f"llava-1.5-7b, 576 vision and {TEXT} text tokens"
    write(draw([(name, counted(one)) for name, one in named], title), DOCS / "accounting.png")
    main(["visualize", "--out", str(DOCS / "patterns.png")])


if __name__ == "__main__":
    (DOCS / "accounting.md").write_text(page(), encoding="utf-8")
    pictures()
