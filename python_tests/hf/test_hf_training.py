"""Training through a patched model: loss and gradients are those of the surviving rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import CASES, Row, noise
from hf_oracle import oracle

from adsc_kernels import CompressionSchedule
from adsc_kernels.integrations.hf import apply_adsc

MADE = CASES["llava"]
SCHEDULE = "1:1/2,3:1/3@center"


@pytest.fixture
def model():
    return MADE.model()


def labelled(rows: list[Row], side: str = "right") -> dict[str, Any]:
    inputs = MADE.inputs(rows, side)
    labels = inputs["input_ids"].clone()
    labels[(labels == 3) | (labels == 0)] = -100
    return {**inputs, "labels": labels}


def gradients(model: Any, inputs: dict[str, Any]) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return float(loss.detach()), found


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_that_of_the_rows_that_are_left(model, side):
    schedule, rows = CompressionSchedule.parse(SCHEDULE, 4), MADE.rows()
    total, count = 0.0, 0
    for row in rows:
        inputs = MADE.inputs([row])
        logits, stages = oracle(model, inputs, row.grids, schedule)
        left = torch.tensor(row.ids)[stages[-1]]
        wanted = left.masked_fill(left == 3, -100)[1:]
        cross = torch.nn.functional.cross_entropy
        total += float(cross(logits[:-1], wanted, ignore_index=-100, reduction="sum"))
        count += int((wanted != -100).sum())
    with apply_adsc(model, schedule):
        assert float(model(**labelled(rows, side)).loss) == pytest.approx(total / count, rel=1e-5)


def test_a_dropped_token_has_no_gradient_behind_its_boundary(model):
    row = MADE.rows()[1]
    seen: list[torch.Tensor] = []

    def catch(module: Any, args: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    model.base_model.language_model.layers[0].register_forward_hook(catch)
    with apply_adsc(model, "1:1/5") as applied:
        model(**labelled([row])).loss.backward()
        kept = set(applied.columns[0].tolist())
    alive = seen[0].grad[0].abs().sum(1) > 0
    # The last row predicts nothing: its gradient is 0 too.
    assert {n for n, some in enumerate(alive.tolist()) if some} == kept - {len(row.ids) - 1}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(model, reentrant):
    """Two calls before one backward: what is run again belongs to the call it was made in."""
    one, two = labelled(MADE.rows()[:2]), labelled(MADE.rows()[1:])
    with apply_adsc(model.train(), SCHEDULE):
        model.zero_grad()
        (model(**one).loss + model(**two).loss).backward()
        want = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.zero_grad()
        (model(**one).loss + model(**two).loss).backward()
        got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.gradient_checkpointing_disable()
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["original", "renumber"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_sequences_are_their_rows(attention, positions):
    """Several sequences in one row, told apart by positions that start anew."""
    model, rows = MADE.model(attention), MADE.rows()
    packed = {
        "input_ids": torch.tensor([[token for row in rows for token in row.ids]]),
        "position_ids": torch.cat([torch.arange(len(row.ids)) for row in rows])[None],
        "pixel_values": torch.cat([v for r in rows for v in r.inputs.get("pixel_values", [])]),
    }
    with apply_adsc(model, f"{SCHEDULE}@{positions}"):
        got = model(**packed, use_cache=False).logits[0]
        want = torch.cat([model(**MADE.inputs([row])).logits[0] for row in rows])
    assert got.shape == want.shape
    assert torch.allclose(got, want, atol=1e-4)


@torch.no_grad()
def test_lengths_of_packed_sequences_follow(model):
    """What flash attention is given of them: each stage's own."""
    rows = MADE.rows()
    lens = torch.tensor([len(row.ids) for row in rows])
    offsets = torch.nn.functional.pad(lens.cumsum(0), (1, 0)).int()
    seen: list[Any] = []
    for layer in model.base_model.language_model.layers:
        layer.self_attn.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    with apply_adsc(model, "1:1/5,3:0"):
        model(
            input_ids=torch.tensor([[token for row in rows for token in row.ids]]),
            position_ids=torch.cat([torch.arange(int(n)) for n in lens])[None],
            pixel_values=torch.cat([v for r in rows for v in r.inputs.get("pixel_values", [])]),
            use_cache=False,
            cu_seq_lens_q=offsets,
            cu_seq_lens_k=offsets,
            max_length_q=int(lens.max()),
            max_length_k=int(lens.max()),
        )
    for layer, kept in enumerate([25, 5, 5, 0]):
        left = [6 + 2 * kept, 3 + kept, 5]
        assert seen[layer]["cu_seq_lens_q"].diff().tolist() == left
        assert seen[layer]["max_length_k"] == max(left)
        assert seen[layer]["position_ids"].tolist() == [[n for m in left for n in range(m)]]


def test_half_precision_follows(model):
    row = MADE.rows()[1]
    with apply_adsc(model, SCHEDULE):
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            out = model(**labelled([row]))
        out.loss.backward()
        model.to(torch.bfloat16)
        inputs = labelled([row])
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        assert model(**inputs).logits.dtype == torch.bfloat16


def test_spans_given_by_hand_stand_for_pictures(model):
    """Embeddings that are made elsewhere: what is a picture's in them is said."""
    row = Row().text(1, 11).grid(5, 5).text(12, 13).give(pixel_values=noise(1, 1, 3, 20, 20))
    with torch.no_grad(), apply_adsc(model, "1:1/2x1/3@grid"):
        want = model(**MADE.inputs([row]))
        ids = torch.tensor([row.ids])
        embeds = model.get_input_embeddings()(ids)
        pictures = model.base_model.get_image_features(row.inputs["pixel_values"][0])
        embeds[0, 2:27] = pictures.pooler_output[0]
        got = model(inputs_embeds=embeds, vision_spans=[(0, 2, 25, 5, 5)])
        assert torch.equal(got.logits, want.logits)
        options = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
        answer = model.generate(**MADE.inputs([row]), **options)[0, -3:]
        given = dict(inputs_embeds=embeds, vision_spans=[(0, 2, 25, 5, 5)])
        assert torch.equal(model.generate(**given, **options)[0], answer)
