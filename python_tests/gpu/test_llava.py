"""The thin LLaVA end to end on the device: the CPU's tokens in float32, whole, in chunks and on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from gpu_device import BACKEND, DEVICE, DRY_RUN
from llava_case import IMAGES, PROMPTS, SECOND, SECOND_IMAGES, begin
from tiny_checkpoints import make_checkpoint

import adsc_kernels as adsc
from adsc_kernels.attention import graphable
from adsc_kernels.cache import Phase
from adsc_kernels.graphs import Graphs
from adsc_kernels.llava import Llava, bundled_checkpoint, load_image
from adsc_kernels.llava.generate import run
from adsc_kernels.plan import make_plan
from adsc_kernels.sampling import Inbox, choose

SCHEDULES = ["", "1:1/2,3:1/3", "0:1/2", "2:1/2x1/2@grid", "1:1/3@center@renumber"]


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """The tower's convolution runs in TF32 by default, whose rounding is another."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(path, seed=5, layers=4, heads=4, kv_heads=2)
    return path


def answers(model: Llava, **options: int) -> list[list[list[int]]]:
    """The tokens of two turns."""
    first = model.generate(PROMPTS, IMAGES, max_new_tokens=6, **options)
    second = model.generate(
        SECOND, SECOND_IMAGES, max_new_tokens=6, conversation=first.conversation, **options
    )
    return [first.token_ids, second.token_ids]


IN_FLOAT32 = pytest.mark.filterwarnings("ignore:attention by SDPA")  # no other kernel takes it


@IN_FLOAT32
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tokens_equal_the_cpus(folder: Path, schedule: str) -> None:
    with adsc.backend("auto"):
        wanted = answers(Llava.from_pretrained(folder, schedule, device="cpu"))
    model = Llava.from_pretrained(folder, schedule, device=DEVICE)
    assert answers(model) == wanted
    assert answers(model, prefill_chunk=7) == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(folder: Path, dtype: torch.dtype) -> None:
    """Under the backend nearly what it is under the reference: every layer's norms are its own."""
    model = Llava.from_pretrained(folder, "1:1/2,3:1/3", device=DEVICE, dtype=dtype)
    got = model.generate(PROMPTS, IMAGES, max_new_tokens=1)
    with adsc.backend("reference"):
        wanted = model.generate(PROMPTS, IMAGES, max_new_tokens=1)
    assert got.plan.stages[-1].seq_lens == wanted.plan.stages[-1].seq_lens
    caches = (got.conversation.cache, wanted.conversation.cache)
    for stage in (0, -1):
        for mine, truth in zip(*(cache.stages[stage].k for cache in caches), strict=True):
            assert (mine - truth).float().norm() <= 0.02 * truth.float().norm()


@IN_FLOAT32
def test_bundled_checkpoint() -> None:
    """The demo's model and picture: what it says on the CPU, it says here."""
    questions = ["What is the largest digit?", "Read row 2.", "How many 4s are there?"]
    if DRY_RUN:
        pytest.skip("the CPU beside itself")
    prompts = [f"USER: <image>\n{question} ASSISTANT:" for question in questions]
    image = load_image(sorted((bundled_checkpoint() / "pictures").glob("*.png"))[0])
    schedule = "4:1/4,8:1/4,12:1/4"
    texts = []
    for device, backend in (("cpu", "auto"), (DEVICE, BACKEND)):
        model = Llava.from_pretrained(
            bundled_checkpoint(), schedule, device=device, dtype=torch.float32
        )
        with adsc.backend(backend):
            texts.append(model.generate(prompts, [[image]] * len(prompts), max_new_tokens=8).texts)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("schedule", SCHEDULES[:2])
def test_graphs_give_the_same_tokens(folder: Path, schedule: str) -> None:
    """In float16, for which there are kernels that read lengths on the device."""
    plain = Llava.from_pretrained(folder, schedule, device=DEVICE, dtype=torch.float16)
    graphed = Llava.from_pretrained(folder, schedule, device=DEVICE, dtype=torch.float16)
    plain.graphs.enabled = False
    wanted = answers(plain)
    assert [answers(graphed) for _ in range(3)] == [wanted] * 3
    kernels = graphable("decode", DEVICE, torch.float16, plain.config.head_dim)
    assert (len(graphed.graphs) > 0) == (kernels and not DRY_RUN)


@pytest.mark.parametrize("cache", ["dense", "paged"])
def test_a_graph_serves_every_cache(folder: Path, cache: str) -> None:
    """Caches that lie elsewhere, and batches of one bucket: no graph more, and the same tokens."""
    plain = Llava.from_pretrained(folder, SCHEDULES[1], device=DEVICE, dtype=torch.float16)
    graphed = plain.with_schedule(SCHEDULES[1])
    graphed.graphs = Graphs()
    plain.graphs.enabled = False
    kept, sizes = [], (3, 4, 3, 4, 3)
    for n in sizes:
        given = (PROMPTS[:n], IMAGES[:n])
        kept.append(graphed.generate(*given, max_new_tokens=6, cache=cache))
        assert kept[-1].token_ids == plain.generate(*given, max_new_tokens=6, cache=cache).token_ids
    made = len(graphed.graphs)
    assert made in (0, 3)  # of two prompts and of a step; none where there is no kernel for it
    graphed.generate(*given, max_new_tokens=6, cache=cache)
    assert len(graphed.graphs) == made


@torch.no_grad()
def test_the_host_never_waits(folder: Path) -> None:
    """Over a prefill and steps of decode, sampled; the tokens come behind an event."""
    model = Llava.from_pretrained(folder, SCHEDULES[1], device=DEVICE, dtype=torch.float16)
    rng = torch.Generator(DEVICE).manual_seed(1)
    for mode in ("default", "error"):  # what starts once may wait in the first
        talk, pictures = begin(model)
        ends = [len(tokens) for tokens in talk.tokens]
        if not DRY_RUN:
            torch.cuda.set_sync_debug_mode(mode)
        try:
            talk.cache.fit(make_plan(model.schedule, [0, *accumulate(ends)], talk.vision_spans), 4)
            hidden = run(model, talk, ends, Phase.PREFILL, pictures)
            tokens = choose(model.logits(hidden), 0.7, 0.9, rng)
            state = model.begin_decode(talk.cache, talk.cached, 4)
            inbox = Inbox(5, tokens)
            for step in range(5):
                inbox.send(step, tokens)
                if step < 4:
                    tokens = choose(model.decode(tokens, state), 0.7 * (step % 2), 0.9, rng)
                assert len(inbox.receive(step)) == len(PROMPTS)
        finally:
            if not DRY_RUN:
                torch.cuda.set_sync_debug_mode("default")
