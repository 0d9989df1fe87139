"""What lies in a cache's blocks under prefix hits, without a model: vLLM's own block manager, and
for each row of each block the prefix of the prompt that it was computed from.

Requests come, grow, are preempted and leave as drawn. Each step, in vLLM's order: blocks are
allotted to its requests, tails are copied, its rows are written; then every row that a request may
read has to be that of its own prompt.
"""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from adsc_kernels import CompressionSchedule
from adsc_kernels.integrations.vllm import manager as stage_manager
from adsc_kernels.integrations.vllm.layout import Layouts
from adsc_kernels.integrations.vllm.manager import AdscStageManager, LayoutHashes
from adsc_kernels.integrations.vllm.plugin import register
from adsc_kernels.integrations.vllm.spec import AdscStageSpec

BLOCK, IMAGE = 4, 12
SCHEDULES = ("2:1/2,4:1/2", "1:1/3,2:1/2", "2:1/12,4:0", "3:0", "2:2/3@linspace", "1:1/2@center")


class Simulation:
    def __init__(self, schedule: str, seed: int, blocks: int) -> None:
        register()
        kv_cache_utils.init_none_hash(sha256)
        rule = CompressionSchedule.parse(schedule, 6)
        self.layouts = Layouts(rule, lambda prompt, images: tuple(images))
        self.rng = random.Random(seed)
        page = dict(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float16)
        specs = [FullAttentionSpec(**page)]
        specs += [AdscStageSpec(**page, schedule=rule, stage=s) for s in range(1, rule.num_stages)]
        groups = [KVCacheGroupSpec([f"layer.{n}"], spec) for n, spec in enumerate(specs)]
        config = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)
        self.manager = KVCacheManager(config, 512, BLOCK, BLOCK)
        self.stages = self.manager.coordinator.single_type_managers[1:]
        self.requests: dict[str, Request] = {}
        for some in self.stages:
            some.requests = self.requests
        self.rows: dict[tuple[int, int], tuple[int, int]] = {}  # block, row: group, prefix
        self.prefixes: dict[str, list[int]] = {}
        self.hits = self.made = self.copied = 0
        self.hash = kv_cache_utils.get_request_block_hasher(BLOCK, sha256)

    def prompt(self) -> tuple[list[int], list[tuple[int, int]]]:
        """Text and pictures of few kinds, so that prompts share their beginnings."""
        tokens, spans = [], []
        for part in range(self.rng.randrange(1, 6)):
            if part % 2:
                spans.append((len(tokens), IMAGE))
                tokens += [1000 + self.rng.randrange(2)] * IMAGE
            else:
                tokens += [7 + self.rng.randrange(2)] * self.rng.randrange(9)
        return tokens + [self.rng.randrange(3) for _ in range(self.rng.randrange(1, 9))], spans

    def come(self) -> None:
        tokens, spans = self.prompt()
        name = f"request-{self.made}"
        self.made += 1
        request = Request(name, tokens, SamplingParams(max_tokens=9), None, block_hasher=self.hash)
        layout = self.layouts.of(tokens, spans)
        request.block_hashes = LayoutHashes(layout, request.block_hashes)
        self.requests[name] = request

    def leave(self, name: str, for_good: bool) -> None:
        request = self.requests[name]
        self.manager.free(request)
        request.num_computed_tokens = 0
        if for_good:
            del self.requests[name]

    def step(self) -> None:
        scheduled = []
        for name, request in list(self.requests.items()):
            if name not in self.requests or self.rng.random() < 0.3:
                continue
            if request.num_computed_tokens == request.num_tokens:
                request.append_output_token_ids(self.rng.randrange(3))
            hit, blocks = 0, None
            if request.num_computed_tokens == 0:
                blocks, hit, _ = self.manager.get_computed_blocks(request)
            begin = request.num_computed_tokens + hit
            new = self.rng.randint(1, request.num_tokens - begin)
            if self.manager.allocate_slots(request, new, hit, blocks) is None:
                # As vLLM: the last one gives way, also if it is in this step.
                last = list(self.requests)[-1]
                scheduled = [one for one in scheduled if one[0] != last]
                self.leave(last, for_good=False)
                continue
            self.hits += hit > 0
            request.num_computed_tokens = begin + new
            scheduled.append((name, begin, begin + new))
        copies, retained = self.manager.take_kv_cache_block_copies()
        for stage in self.stages:
            stage.publish()
        self.run(scheduled, copies)
        if retained:
            self.manager.block_pool.free_blocks(retained)

    def run(self, scheduled, copies) -> None:
        self.copied += len(copies or ())
        source = dict(self.rows)
        for pair in copies or ():
            for row in range(BLOCK):
                self.rows[pair.dst_block_id, row] = source.get((pair.src_block_id, row))
        for name, begin, end in scheduled:
            for where, prefix in self.rows_of(name, begin, end):
                self.rows[where] = prefix
        for name, _, end in scheduled:
            for where, prefix in self.rows_of(name, 0, end):
                assert self.rows.get(where) == prefix, (name, where)

    def rows_of(self, name: str, begin: int, end: int):
        """Where each token's row is in each stage that it is in, and its prefix."""
        prefixes, layout = self.prefixes_of(name), self.requests[name].block_hashes.layout
        for group, blocks in enumerate(self.manager.get_block_ids(name)):
            for row in range(layout.kept_before(group, begin), layout.kept_before(group, end)):
                prefix = prefixes[layout.position_of(group, row)]
                yield (blocks[row // BLOCK], row % BLOCK), (group, prefix)

    def prefixes_of(self, name: str) -> list[int]:
        """Of each token of a request, a hash of it and of all before it."""
        made = self.prefixes.setdefault(name, [])
        for token in self.requests[name].all_token_ids[len(made) :]:
            made.append(hash((*made[-1:], token)))
        return made

    def play(self, steps: int = 60) -> None:
        for _ in range(steps):
            if self.requests and self.rng.random() < 0.3:
                self.leave(self.rng.choice(list(self.requests)), self.rng.random() < 0.8)
            while len(self.requests) < 4 and self.rng.random() < 0.7:
                self.come()
            self.step()
        for name in list(self.requests):
            self.leave(name, for_good=True)
        pool = self.manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        assert not any(some._keyed or some._unpublished for some in self.stages)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_contents(schedule):
    """With room for all, and in a pool so small that requests are preempted and blocks reused."""
    for blocks in (2000, 60):
        games = [Simulation(schedule, seed, blocks) for seed in range(20)]
        for game in games:
            game.play()
        assert sum(game.hits for game in games) > 30
        assert sum(game.copied for game in games) > 10 or schedule == "3:0"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_hits_are_the_dense_ones(schedule):
    """One request at a time, each after the last one left."""
    made = []
    for some in ("", schedule):
        game, hits = Simulation(some, 0, 4000), []
        for _ in range(150):
            game.come()
            [(name, request)] = game.requests.items()
            blocks, hit, _ = game.manager.get_computed_blocks(request)
            hits.append(hit)
            new = request.num_tokens - hit
            assert game.manager.allocate_slots(request, new, hit, blocks) is not None
            copies, retained = game.manager.take_kv_cache_block_copies()
            for stage in game.stages:
                stage.publish()
            game.run([(name, hit, request.num_tokens)], copies)
            game.manager.block_pool.free_blocks(retained or [])
            game.leave(name, for_good=True)
        made.append(hits)
    assert made[0] == made[1]
    assert max(made[0]) > IMAGE


@pytest.mark.parametrize("mistake", ["own step", "no copy", "a row too far", "one key for both"])
def test_mistakes(mistake, monkeypatch):
    kind = AdscStageManager
    if mistake == "own step":
        cache = kind.cache_blocks

        def at_once(self, *args, **kwargs):
            cache(self, *args, **kwargs)
            self.publish()

        monkeypatch.setattr(kind, "cache_blocks", at_once)
    elif mistake == "no copy":
        monkeypatch.setattr(kind, "_apply_cow", lambda *some: None)
    elif mistake == "a row too far":
        rows_of = Simulation.rows_of

        def from_the_next(self, name, begin, end):
            return rows_of(self, name, begin + (begin > 0), end)

        monkeypatch.setattr(Simulation, "rows_of", from_the_next)
    else:
        monkeypatch.setattr(stage_manager, "tail_hash", lambda block_hash: block_hash)
    with pytest.raises(AssertionError):
        play_all()


def play_all() -> None:
    for schedule, seed in product(SCHEDULES[:3], range(12)):
        Simulation(schedule, seed, 2000).play()
