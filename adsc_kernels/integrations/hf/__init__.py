"""ADSC on any transformers vision-language model, in one line: `apply_adsc(model, schedule)`.

Read `hooks.py` first; `families.py` is what a new family of models needs.
"""

from adsc_kernels.integrations.hf.families import FAMILIES, Family, register
from adsc_kernels.integrations.hf.patch import AppliedSchedule, apply_adsc, remove_adsc
from adsc_kernels.integrations.hf.pictures import Piece

__all__ = [
    "FAMILIES",
    "AppliedSchedule",
    "Family",
    "Piece",
    "apply_adsc",
    "register",
    "remove_adsc",
]
