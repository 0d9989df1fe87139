"""What a number counts. Published MACs differ in this more than in anything else.

One MAC is one multiply-accumulate; this field's papers call it a FLOP, hardware vendors count two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from adsc_kernels import checks


@dataclass(frozen=True)
class Convention:
    """Which parts of a model count, and how.

    Projections always count by their real widths: with as many key heads as query heads these are
    the formulas' 4nd^2, and with grouped heads less.
    """

    name: str
    definition: str
    scores: str  # one of SCORES
    ffn_matrices: int | None = None  # None: as many as the model has
    norms: bool = False  # two MACs an element: the sum of squares, and the weight
    head: str = "none"  # one of HEADS
    tower: bool = False  # the vision tower and its projector
    text: bool = True  # False: as if the prompt held no text

    def __post_init__(self) -> None:
        for name, got, choices in (("scores", self.scores, SCORES), ("head", self.head, HEADS)):
            checks.choice(name, got, choices)
        if self.ffn_matrices is not None:
            checks.integer("ffn_matrices", self.ffn_matrices, 1)
        for name in ("norms", "tower", "text"):
            checks.flag(name, getattr(self, name))


SCORES = {
    "causal": "row t of a sequence with the t + 1 rows up to it, n(n+1)/2 pairs",
    "full": "every row with every row, n^2 pairs",
    "halved": "half of full, n^2/2 pairs",
    "none": "no scores at all, not even the tower's",
}
HEADS = {
    "last": "the last position of each sequence, and every decoded one",
    "all": "every position",
    "none": "no head",
}

_FORMULAS = (
    Convention("full-3", "4nd^2 + 2n^2d + 3ndm, decoder layers only (SparseVLM's code)", "full", 3),
    Convention("halved-3", "4nd^2 + n^2d + 3ndm, decoder layers only", "halved", 3),
    Convention("linear-3", "4nd^2 + 3ndm, no scores, decoder layers only", "none", 3),
    Convention("full-2", "4nd^2 + 2n^2d + 2ndm, decoder layers only (FastV's paper)", "full", 2),
    Convention("halved-2", "4nd^2 + n^2d + 2ndm, decoder layers only", "halved", 2),
    Convention("linear-2", "4nd^2 + 2ndm, no scores, decoder layers only", "none", 2),
)


def _with_tower(formula: Convention) -> Convention:
    name, definition = f"{formula.name}+tower", f"{formula.name}, vision tower and projector"
    if formula.scores == "none":
        definition += ", no scores in the tower either"
    return replace(formula, name=name, definition=definition, tower=True)


CONVENTIONS: dict[str, Convention] = {
    convention.name: convention
    for convention in (
        Convention(
            "exact",
            "every matrix product that runs: projections, causal scores and values over real "
            "lengths, SwiGLU's three matrices, the head on last positions, vision tower and "
            "projector",
            "causal",
            head="last",
            tower=True,
        ),
        Convention(
            "everything",
            "exact, with norms in the decoder and the head on every position",
            "causal",
            norms=True,
            head="all",
            tower=True,
        ),
        Convention(
            "profiler",
            "what torch.utils.flop_counter counts in an eager pass: full scores, head on every "
            "position, vision tower and projector",
            "full",
            head="all",
            tower=True,
        ),
        Convention("decoder", "exact, of the decoder layers only", "causal"),
        *_FORMULAS,
        *map(_with_tower, _FORMULAS),
        Convention(
            "vision-only",
            "4nd^2 + 2n^2d + 3ndm of the vision tokens as if there were no text, decoder layers "
            "only (PyramidDrop's paper)",
            "full",
            3,
            text=False,
        ),
    )
}
DEFAULT_CONVENTION = "exact"


def find_convention(convention: str | Convention) -> Convention:
    """A convention by its name; ``ValueError`` lists the names."""
    if isinstance(convention, Convention):
        return convention
    return CONVENTIONS[checks.choice("convention", convention, CONVENTIONS)]
