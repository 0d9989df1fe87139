"""The README says of transformers models what the test matrix does."""

from __future__ import annotations

from pathlib import Path

from hf_models import CASES
from hf_table import NAMES, table

from adsc_kernels.integrations.hf import FAMILIES


def test_the_readme_has_the_table():
    assert table() in (Path(__file__).parents[2] / "README.md").read_text()


def test_every_family_is_in_the_matrix():
    assert {case.config().model_type for case in CASES.values()} == set(FAMILIES)
    assert set(NAMES) <= set(CASES)
