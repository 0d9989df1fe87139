"""Every family: a patched model is the slow oracle, and itself again without the patch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import BLOCKS, CASES, LAYERS, Case
from hf_oracle import oracle
from torch import Tensor

from adsc_kernels import CompressionSchedule, UnsupportedError
from adsc_kernels.integrations.hf import apply_adsc, remove_adsc

SCHEDULES = [
    *(
        f"1:1/2,3:1/3@{pattern}@{positions}"
        for pattern in ("start", "center", "linspace")
        for positions in ("original", "renumber")
    ),
    "0:1/4,2:2/3@linspace",
    "1:1/2x2/3,3:1/2x1/2@grid",
    "0:1x1/2,2:1/3x1@grid@renumber",
]


@pytest.fixture(scope="module", params=CASES)
def case(request: Any) -> tuple[Case, Any]:
    made = CASES[request.param]
    if made.refused:
        pytest.skip("refused with this transformers")
    return made, made.model()


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("text", SCHEDULES)
def test_logits_equal_the_oracle(case, text):
    made, model = case
    schedule = CompressionSchedule.parse(text, LAYERS)
    for row in made.rows():
        inputs = made.inputs([row])
        want, stages = oracle(model, inputs, row.grids, schedule, made.blocks(row))
        with apply_adsc(model, schedule) as applied:
            got = model(**inputs)
            lengths = [layer.get_seq_length() for layer in got.past_key_values.layers]
            if row.grids:
                assert applied.columns.tolist() == [stages[-1]]
        assert error(got.logits[0], want) < 1e-5
        assert lengths == [len(stages[schedule.stage_of_layer(n)]) for n in range(LAYERS)]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_rows(case, side):
    made, model = case
    rows = made.rows()
    with apply_adsc(model, "1:1/2,3:1/3") as applied:
        alone = [model(**made.inputs([row])).logits[0] for row in rows]
        together = model(**made.inputs(rows, side)).logits
        for row, want, columns in zip(together, alone, applied.columns, strict=True):
            assert error(row[columns >= 0], want) < 1e-5


@torch.no_grad()
def test_it_is_the_same_model_before_and_after(case):
    made, model = case
    inputs = made.inputs(made.rows())
    dense = model(**inputs).logits
    with apply_adsc(model, "1:1,3:1"):
        assert torch.equal(model(**inputs).logits, dense)
    apply_adsc(model, "1:1/2")
    assert model(**inputs).logits.shape[1] < dense.shape[1]
    remove_adsc(model)
    assert torch.equal(model(**inputs).logits, dense)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert "prepare_inputs_for_generation" not in vars(model)


@torch.no_grad()
def test_a_batch_is_generated_as_its_rows_are(case):
    made, model = case
    rows = made.rows()
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    with apply_adsc(model, "1:1/2,3:1/3"):
        alone = [model.generate(**made.inputs([row]), **options)[0, -4:] for row in rows]
        together = model.generate(**made.inputs(rows), **options)[:, -4:]
    assert torch.equal(together, torch.stack(alone))


@torch.no_grad()
@pytest.mark.skipif(BLOCKS, reason="served here")
@pytest.mark.parametrize("name", [name for name, made in CASES.items() if made.refused])
def test_blocks_that_masks_cannot_have_are_refused(name):
    made = CASES[name]
    model = made.model()
    with apply_adsc(model, "1:1/2"), pytest.raises(UnsupportedError, match="expected a transform"):
        model(**made.inputs(made.rows()))
