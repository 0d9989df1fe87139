"""Each baseline against a plain restatement of its rule, in ragged batches; what each processes."""

from __future__ import annotations

from typing import Any

import baseline_oracle as plain
import pytest
import torch
from PIL import Image
from tiny_checkpoints import IMAGE_ID, make_checkpoint

from adsc_kernels.baselines import BY_BUDGET, make_method
from adsc_kernels.baselines.batch import Batch, answered, embed
from adsc_kernels.baselines.method import near_square
from adsc_kernels.errors import UnsupportedError
from adsc_kernels.llava import Llava, bundled_checkpoint
from adsc_kernels.schedule import CompressionSchedule

SIZE, SIDE, LAYERS = 36, 6, 8
STARTS = (3, 1, 2)
TAILS = ((5, 6, 7, 8, 9), (10, 11), (12, 13, 14, 15))
ANSWERS = (2, 1, 1)
POSITIONS = torch.arange(100)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Llava]:
    folder = tmp_path_factory.mktemp("tiny")
    hf = make_checkpoint(folder, layers=LAYERS, kv_heads=2, grid=SIDE, seed=3)
    hf.set_attn_implementation("eager")
    return hf, Llava.from_pretrained(folder, None, "cpu", torch.float32)


@pytest.fixture(scope="module")
def batch(models: Any) -> Batch:
    """Three sequences about two pictures, the answers behind the prompts."""
    tokens = [
        [*range(20, 20 + start), *[IMAGE_ID] * SIZE, *tail]
        for start, tail in zip(STARTS, TAILS, strict=True)
    ]
    lens = [len(ids) - n for ids, n in zip(tokens, ANSWERS, strict=True)]
    torch.manual_seed(5)
    pixels = torch.randn(2, 3, 4 * SIDE, 4 * SIDE)
    return Batch(tokens, list(STARTS), lens, pixels, [0, 1, 0], [0, 1, 2])


def logits(model: Llava, batch: Batch, method: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        hidden, lens = method.hidden(model, batch)
        return list(model.logits(hidden).split(list(lens)))


def compare(models: Any, batch: Batch, method: Any, choose: Any) -> None:
    hf, model = models
    rows = embed(model, batch).split(batch.lens)
    for b, got in enumerate(logits(model, batch, method)):
        want = plain.run(hf, rows[b], POSITIONS[: len(rows[b])], choose(b))
        assert got.shape == want.shape
        assert torch.allclose(got, want, atol=2e-3), float((got - want).abs().max())


def vision(batch: Batch, b: int, tokens: list[int]) -> list[int]:
    """Which of the tokens are of the picture."""
    return [t for t in tokens if batch.starts[b] <= t < batch.starts[b] + SIZE]


def ranked(batch: Batch, b: int, tokens: list[int], scores: torch.Tensor, count: int) -> list[int]:
    """The tokens, of the picture's only the `count` with the highest scores."""
    seen = vision(batch, b, tokens)
    best = plain.highest(scores[[tokens.index(t) for t in seen]], count)
    return [t for t in tokens if t not in seen or seen.index(t) in best]


@torch.no_grad()
def test_fastv(models: Any, batch: Batch) -> None:
    method = make_method("fastv", models[1].config, budget=12)
    assert (method.layer, method.kept) == (1, (12 * 8 - 36) // 7)

    def choose(b: int) -> Any:
        def at(n: int, before: Any, here: Any, tokens: list[int]) -> list[int] | None:
            if n != 1:
                return None
            last = batch.prompt_lens[b] - 1
            return ranked(batch, b, tokens, before.mean(0)[last], method.kept)

        return at

    compare(models, batch, method, choose)


@torch.no_grad()
def test_pyramid_drop(models: Any, batch: Batch) -> None:
    method = make_method("pyramid_drop", models[1].config, budget=18)
    assert method.layers == [2, 4, 6]

    def choose(b: int) -> Any:
        def at(n: int, before: Any, here: Any, tokens: list[int]) -> list[int] | None:
            if n not in method.layers:
                return None
            last = tokens.index(batch.prompt_lens[b] - 1)
            count = method.counts[1 + method.layers.index(n)]
            return ranked(batch, b, tokens, here.mean(0)[last], count)

        return at

    compare(models, batch, method, choose)


@torch.no_grad()
def test_sparse_vlm(models: Any, batch: Batch) -> None:
    method = make_method("sparse_vlm", models[1].config, budget=12)
    assert method.layers == [1, 2, 4]
    rows = embed(models[1], batch).split(batch.lens)

    def choose(b: int) -> Any:
        start, end = batch.starts[b], batch.starts[b] + SIZE
        text = range(end, batch.prompt_lens[b])
        shares = (rows[b][start:end] @ rows[b][end : batch.prompt_lens[b]].T).softmax(-1).mean(0)
        raters = [t for t, share in zip(text, shares, strict=True) if share >= shares.mean()]
        assert raters

        def at(n: int, before: Any, here: Any, tokens: list[int]) -> list[int] | None:
            if n not in method.layers:
                return None
            asking = [tokens.index(t) for t in raters]
            count = method.counts[1 + method.layers.index(n)]
            return ranked(batch, b, tokens, before.mean(0)[asking].mean(0), count)

        return at

    compare(models, batch, method, choose)


@torch.no_grad()
def test_random_drop(models: Any, batch: Batch) -> None:
    """Other patches by seed and question, the same whatever the batch; counts of the schedule."""
    schedule = CompressionSchedule.parse("2:1/3,5:1/4", LAYERS)
    hf, model = models

    def first(seed: int) -> list[torch.Tensor]:
        return logits(
            model, batch, make_method("random", model.config, schedule=schedule, seed=seed)
        )

    got = first(4)
    assert [len(one) for one in got] == [n - SIZE + 3 for n in batch.lens]
    assert all(torch.equal(a, b) for a, b in zip(got, first(4), strict=True))
    assert not torch.equal(got[0], first(5)[0])
    method = make_method("random", model.config, schedule=schedule, seed=4)
    last = Batch(
        batch.tokens[2:], batch.starts[2:], batch.prompt_lens[2:], batch.pixels[:1], [0], [2]
    )
    assert torch.allclose(logits(model, last, method)[0], got[2], atol=1e-4)
    draw = torch.Generator().manual_seed(4 * 1_000_003 + 2)

    def choose(n: int, before: Any, here: Any, tokens: list[int]) -> list[int] | None:
        if n not in (2, 5):
            return None
        seen = vision(batch, 2, tokens)
        drawn = torch.randperm(len(seen), generator=draw)[: {2: 12, 5: 3}[n]].tolist()
        return [t for t in tokens if t not in seen or seen.index(t) in drawn]

    rows = embed(model, batch).split(batch.lens)[2]
    assert torch.allclose(got[2], plain.run(hf, rows, POSITIONS[: len(rows)], choose), atol=2e-3)


# ---- Before the decoder ----


def replaced(models: Any, batch: Batch, b: int, rows: torch.Tensor, places: Any) -> torch.Tensor:
    """A sequence's logits with these rows in the picture's place, at these places in it."""
    hf, model = models
    x, start = embed(model, batch).split(batch.lens)[b], batch.starts[b]
    behind = torch.arange(start + SIZE, len(x))
    if places is None:  # numbered anew
        positions = torch.arange(len(x) - SIZE + len(rows))
    else:
        positions = torch.cat([torch.arange(start), start + places, behind])
    return plain.run(hf, torch.cat([x[:start], rows, x[start + SIZE :]]), positions)


def check_pictures(models: Any, batch: Batch, name: str, budget: int, want: Any) -> None:
    """want: of a picture's number, its rows and their places."""
    got = logits(models[1], batch, make_method(name, models[1].config, budget=budget))
    for b, picture in enumerate(batch.pictures):
        rows, places = want(picture)
        expected = replaced(models, batch, b, rows, places)
        assert torch.allclose(got[b], expected, atol=2e-3), b


@torch.no_grad()
def test_div_prune(models: Any, batch: Batch) -> None:
    features = models[1].image_features(batch.pixels)

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return 1 - float(torch.cosine_similarity(a, b, dim=0))

    def want(picture: int) -> Any:
        rows, chosen = features[picture], []
        while len(chosen) < 5:
            least = {
                n: min(distance(rows[n], rows[m]) for m in (chosen or range(SIZE)) if m != n)
                for n in range(SIZE)
                if n not in chosen
            }
            chosen.append(max(least, key=lambda n: least[n]))
        return rows[sorted(chosen)], torch.tensor(sorted(chosen))

    check_pictures(models, batch, "div_prune", 5, want)


@torch.no_grad()
def test_average_pooling(models: Any, batch: Batch) -> None:
    grid = models[1].image_features(batch.pixels).view(2, SIDE, SIDE, -1)

    def want(picture: int) -> Any:
        cells = [(r, c) for r in range(2) for c in range(3)]
        rows = [grid[picture, 3 * r : 3 * r + 3, 2 * c : 2 * c + 2].mean((0, 1)) for r, c in cells]
        places = [(3 * r + 1) * SIDE + 2 * c + 1 for r, c in cells]
        return torch.stack(rows), torch.tensor(places)

    check_pictures(models, batch, "average_pooling", 6, want)


@torch.no_grad()
def test_uniform(models: Any, batch: Batch) -> None:
    features = models[1].image_features(batch.pixels)
    places = torch.tensor([r * SIDE + c for r in (0, 3) for c in (0, 2, 4)])
    check_pictures(models, batch, "uniform", 6, lambda p: (features[p][places], places))


@torch.no_grad()
def test_downsampling(models: Any, batch: Batch) -> None:
    """At its full size the picture is what it was; smaller, its rows are the tower's."""
    features = models[1].image_features(batch.pixels)
    check_pictures(models, batch, "downsampling", 36, lambda p: (features[p], torch.arange(36)))
    small = torch.nn.functional.interpolate(
        batch.pixels, (8, 12), mode="bilinear", antialias=True, align_corners=False
    )
    tower = models[0].model.vision_tower
    states = tower(small, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    rows = models[0].model.multi_modal_projector(states[-2][:, 1:])
    places = torch.tensor([(3 * r + 1) * SIDE + 2 * c + 1 for r in range(2) for c in range(3)])
    check_pictures(models, batch, "downsampling", 6, lambda p: (rows[p], places))


@torch.no_grad()
def test_vision_zip(models: Any, batch: Batch) -> None:
    """12 of 36: CLS, 9 patches that it looks at, 2 averages."""
    tower = models[0].model.vision_tower
    out = tower(batch.pixels, output_hidden_states=True, output_attentions=True)
    keys = []
    inner = getattr(tower, "vision_model", tower)
    layer = inner.encoder.layers[-2]
    normed = layer.layer_norm1(out.hidden_states[-3])
    keys = layer.self_attn.k_proj(normed).view(2, SIZE + 1, 2, 8).mean(2)

    def want(picture: int) -> Any:
        features = out.hidden_states[-2][picture]
        looked = out.attentions[-2][picture, :, 0, 1:].sum(0)
        dominant = [0, *(n + 1 for n in plain.highest(looked, 9))]
        rest = [n for n in range(SIZE + 1) if n not in dominant]
        step = len(rest) // 2
        targets = [rest[0], rest[step]]
        groups: dict[int, list[int]] = {target: [] for target in targets}
        for n in rest:
            if n not in targets:
                like = [
                    float(torch.cosine_similarity(keys[picture, n], keys[picture, t], dim=0))
                    for t in targets
                ]
                groups[targets[like.index(max(like))]].append(n)
        merged = [
            features[t] + (features[group].mean(0) if group else 0) for t, group in groups.items()
        ]
        rows = torch.cat([features[dominant], torch.stack(merged)])
        return models[0].model.multi_modal_projector(rows[None])[0], None

    check_pictures(models, batch, "vision_zip", 12, want)


# ---- Budgets ----


@pytest.mark.parametrize("name", list(BY_BUDGET))
@pytest.mark.parametrize("budget", [36, 64, 128, 192])
def test_what_is_processed_is_the_budget(name: str, budget: int) -> None:
    """Of 576 tokens and 16 layers: never above it, and as near as whole tokens allow."""
    from adsc_kernels.llava import LlavaConfig

    config = LlavaConfig.from_folder(bundled_checkpoint())
    if budget == 36 and name in ("fastv", "pyramid_drop", "sparse_vlm"):
        with pytest.raises(UnsupportedError, match=f"{name}: expected a budget above 36"):
            make_method(name, config, budget=budget)
        return
    method = make_method(name, config, budget=budget)
    assert len(method.tokens) == 16
    assert budget - 1 <= method.average <= budget


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"name": "fastw", "budget": 12}, ValueError, "method"),
        ({"name": "fastv"}, ValueError, "fastv: expected a budget"),
        ({"name": "adsc", "budget": 12}, ValueError, "adsc: expected a schedule"),
        ({"name": "fastv", "budget": 0}, ValueError, "budget"),
        ({"name": "uniform", "budget": 37}, ValueError, "budget"),
        ({"name": "vision_zip", "budget": 1}, UnsupportedError, "vision_zip"),
    ],
)
def test_bad_input(models: Any, given: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make_method(config=models[1].config, **given)


def test_grids_are_as_near_to_squares_as_can_be() -> None:
    assert [near_square(n) for n in (192, 128, 64, 36, 16, 7)] == [
        (12, 16), (8, 16), (8, 8), (6, 6), (4, 4), (1, 7),
    ]  # fmt: skip


def test_one_pass_tells_what_decoding_answers() -> None:
    """Of the bundled model, right and wrong answers alike."""
    import json

    from adsc_kernels.baselines.batch import encode
    from adsc_kernels.llava import load_image

    folder = bundled_checkpoint()
    known = json.loads((folder / "pictures" / "questions.json").read_text())
    model = Llava.from_pretrained(folder, None, "cpu", torch.float32)
    schedule = CompressionSchedule.parse("0:1/6x1/6@grid", 16)
    name, asked = next(iter(known.items()))
    image: Image.Image = load_image(folder / "pictures" / name)
    prompts = [f"USER: <image>\n{q['question']} ASSISTANT:" for q in asked]
    truth = [q["answer"] for q in asked]
    said = model.with_schedule(schedule).generate(
        prompts, [[image]] * len(prompts), max_new_tokens=12
    )
    texts = [text.strip() for text in said.texts]
    with torch.no_grad():
        for answers in (truth, texts):
            batch = encode(model, prompts, answers, [image] * len(prompts), range(len(prompts)))
            method = make_method("adsc", model.config, schedule=schedule)
            right = answered(model, batch, *method.hidden(model, batch))
            assert right == [a == b for a, b in zip(answers, texts, strict=True)]
    assert 0 < sum(a == b for a, b in zip(truth, texts, strict=True)) < len(texts)
