"""The planner, spelled out token by token: what make_plan must equal. Nothing here is shared."""

from __future__ import annotations

from fractions import Fraction

from adsc_kernels.reference import aligned_kept_count, kept_count, kept_index


def spread(pattern: str, n: int, m: int) -> list[int]:
    """The kept indices among n."""
    return [kept_index(pattern, j, n, m) for j in range(m)]


def share(n: int, keep: Fraction) -> list[int]:
    return spread("start", n, kept_count(n, keep))


def survivors_of_span(schedule, span, block: int = 1) -> list[list[int]]:
    """Positions of a span's vision tokens that live in each stage."""
    _, start, length = span[:3]
    if len(span) == 3:
        rows = [[start + i for i in range(length)]]
    else:
        height, width = span[3:]
        pitch = length // height
        rows = [[start + r * pitch + c for c in range(width)] for r in range(height)]
    stages = [[p for row in rows for p in row]]
    wanted = len(stages[0])
    for boundary in schedule.boundaries:
        if schedule.pattern == "grid":
            kept_rows = share(len(rows), boundary.keep_rows)
            columns = len(rows[0]) if rows else 0
            kept_columns = share(columns, boundary.keep_columns)
            rows = [[rows[r][c] for c in kept_columns] for r in kept_rows]
            stages.append([p for row in rows for p in row])
        else:
            before = stages[-1]
            wanted = kept_count(wanted, boundary.keep)
            kept = aligned_kept_count(len(stages[0]), wanted, block)
            stages.append([before[i] for i in spread(schedule.pattern, len(before), kept)])
    return stages


def survivors(schedule, cu_seqlens, spans, block: int = 1) -> list[list[list[int]]]:
    """[stage][sequence] -> the positions that live in that stage, in order."""
    num_sequences = len(cu_seqlens) - 1
    lives = [
        [set(range(cu_seqlens[b + 1] - cu_seqlens[b])) for b in range(num_sequences)]
        for _ in range(schedule.num_stages)
    ]
    for span in spans:
        stages = survivors_of_span(schedule, span, block)
        for stage, kept in enumerate(stages):
            lives[stage][span[0]] -= set(stages[0]) - set(kept)
    return [[sorted(sequence) for sequence in stage] for stage in lives]
