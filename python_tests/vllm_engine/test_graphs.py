"""CUDA graphs, on a CPU: stand-ins that remember tensors at capture, and read them at each replay.

A graph reads its inputs where they lay at capture, whatever is there by then. It is captured with
requests without an image, as vLLM does, and replayed with others.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from engines import MIXED, Ask, answer, check, engine, words

from adsc_kernels.integrations.vllm import builder, metadata, units

SCHEDULE = "2:1/3,4:1/2"
SHORT = "1:1/3,2:1/2"  # of 3 layers, compiled
READ = ("seq_lens", "query_start_loc", "block_table", "scheduler_metadata")


class DecodeGraphs:
    """Full graphs of decode steps, by their number of requests; made by the first such step while
    `capturing`. A replay runs the model on the tensors of that step. The CPU's attention divides
    its work on the host, by the lengths: it does so again at a replay, by those then read."""

    def __init__(self, monkeypatch) -> None:
        from vllm.v1.attention.backends import cpu_attn
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        self.capturing, self.replays, self.graphs = True, 0, {}
        forward = GPUModelRunner._model_forward
        self.divide = cpu_attn.ops.cpu_attn_get_scheduler_metadata

        def divide(**options):
            made = self.divide(**options)
            made.options = options
            return made

        monkeypatch.setattr(cpu_attn.ops, "cpu_attn_get_scheduler_metadata", divide)

        def run(runner, **inputs):
            return forward(runner, **self.inputs_of(inputs))

        monkeypatch.setattr(GPUModelRunner, "_model_forward", run)

    def inputs_of(self, inputs: dict) -> dict:
        from vllm.forward_context import get_forward_context

        context = get_forward_context()
        now = context.attn_metadata
        if not isinstance(now, dict) or any(
            getattr(layer, "max_query_len", 0) != 1 for layer in now.values()
        ):
            return inputs
        size = len(inputs["positions"])
        if self.capturing:
            read = {
                name: {part: getattr(layer, part) for part in READ} for name, layer in now.items()
            }
            self.graphs.setdefault(size, (inputs, dict(context.slot_mapping), read))
        if self.capturing or size not in self.graphs:
            return inputs
        self.replays += 1
        captured, context.slot_mapping, read = self.graphs[size]
        for name, parts in read.items():
            vars(now[name]).update(parts)
            now[name].scheduler_metadata = self.divide(**parts["scheduler_metadata"].options)
        # Embeddings of the step's tokens are made outside of a graph, into a buffer that stays.
        return {
            name: inputs[name] if name == "inputs_embeds" else x for name, x in captured.items()
        }


def decode_graphs(llava, monkeypatch, **options) -> None:
    """Captured for one and two requests without an image, replayed for others."""
    graphs = DecodeGraphs(monkeypatch)
    with engine(llava, SCHEDULE, **options) as llm:
        for count in (1, 2):
            check(llava, SCHEDULE, MIXED[3:4] * count, answer(llm, MIXED[3:4] * count, 3))
        graphs.capturing = False
        for asks in (MIXED[:1], MIXED[1:3], MIXED[3:5]):
            check(llava, SCHEDULE, asks, answer(llm, asks, 8))
        assert graphs.replays > 3 * 6


def test_decode_graphs(llava, monkeypatch):
    decode_graphs(llava, monkeypatch)


def test_prompt_chunks_of_one_token(llava, monkeypatch):
    """vLLM takes them into a graph of decode steps, also where their token is an image's."""
    decode_graphs(llava, monkeypatch, long_prefill_token_threshold=1, max_num_seqs=2)


def test_dense_lengths_in_a_replay(llava, monkeypatch):
    """Where nothing is dropped vLLM's own lengths are right, but a graph would keep those."""
    in_place = builder.StageBuilder._in_place

    def handed_on(self, common, step):
        return common if step.untouched(self.kv_cache_spec.stage) else in_place(self, common, step)

    monkeypatch.setattr(builder.StageBuilder, "_in_place", handed_on)
    with pytest.raises(AssertionError):
        decode_graphs(llava, monkeypatch)


def test_slots_elsewhere(llava, monkeypatch):
    """As if a step's slots were written to a buffer of their own."""
    write = builder.StageBuilder._write_slots
    monkeypatch.setattr(
        builder.StageBuilder,
        "_write_slots",
        lambda self, slots, *rest: write(self, slots.clone(), *rest),
    )
    with pytest.raises(AssertionError):
        decode_graphs(llava, monkeypatch)


class Backend:
    """A backend's builder that hands on what it is given."""

    supports_update_block_table = False

    def __init__(self, *args) -> None:
        self.kv_cache_spec = args[0]

    def build_for_cudagraph_capture(self, common):
        return self.build(0, common)

    def build(self, common_prefix_len, common, fast_build=False):
        return SimpleNamespace(common=common)


def test_a_buffer_that_moved():
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from adsc_kernels import CompressionSchedule

    batch = metadata.Batch(CompressionSchedule.parse(SCHEDULE, 6), None)
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(
            static_forward_context={"layer": SimpleNamespace(adsc_batch=batch)}
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
    )
    spec = SimpleNamespace(stage=1, block_size=32)
    made = builder.stage_builder(Backend)(spec, ["layer"], config, torch.device("cpu"))
    common = CommonAttentionMetadata(
        query_start_loc=torch.tensor([0, 1, 2], dtype=torch.int32),
        query_start_loc_cpu=torch.tensor([0, 1, 2], dtype=torch.int32),
        seq_lens=torch.tensor([5, 9], dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor([5, 9], dtype=torch.int32),
        num_reqs=2,
        num_actual_tokens=2,
        max_query_len=1,
        max_seq_len=9,
        block_table_tensor=torch.tensor([[1], [2]], dtype=torch.int32),
        slot_mapping=torch.tensor([36, 72]),
    )
    captured = made.build_for_cudagraph_capture(common).common.seq_lens
    assert captured.tolist() == [5, 9]
    common.seq_lens.copy_(torch.tensor([6, 10]))
    # As vLLM does: each batch brings a tensor of its own on the host, here of the same starts.
    common = dataclasses.replace(common, query_start_loc_cpu=common.query_start_loc_cpu.clone())
    made.build(0, common)
    assert captured.tolist() == [6, 10]
    moved = dataclasses.replace(common, slot_mapping=common.slot_mapping.clone())
    with pytest.raises(RuntimeError, match=r"slot_mapping.*captured.*--enforce-eager"):
        made.build(0, moved)


class PieceGraph:
    """In place of vLLM's wrapper of a piece between two attention layers: found by the batch's
    token count, reads its arguments of the capture, and writes the results where they lay then.

    The memory of a unit's results goes back to the graphs' pool: the next graph that runs has
    written there, say NaN, before it reads.
    """

    capturing, replays = False, 0
    given_back: ClassVar[list[torch.Tensor]] = []

    def __init__(self, runnable, vllm_config, runtime_mode, cudagraph_options) -> None:
        self.runnable, self.options, self.graphs = runnable, cudagraph_options, {}

    def __call__(self, *args):
        from vllm.config import CUDAGraphMode
        from vllm.forward_context import get_forward_context

        context, kind = get_forward_context(), type(self)
        size = context.batch_descriptor and context.batch_descriptor.num_tokens
        known = size in self.graphs or kind.capturing
        if context.cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE or not known:
            return self.runnable(*args)
        while kind.given_back:
            kind.given_back.pop().fill_(torch.nan)
        if size not in self.graphs:
            self.graphs[size] = (args, self.runnable(*args))
        args, results = self.graphs[size]
        if not kind.capturing:
            kind.replays += 1
            for kept, new in zip(as_tuple(results), as_tuple(self.runnable(*args)), strict=True):
                kept.copy_(new)
        if self.options.weak_ref_output:
            kind.given_back += as_tuple(results)
        return results


def as_tuple(results) -> tuple:
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)


@pytest.fixture(scope="module")
def compile_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def piecewise(short_llava, monkeypatch, as_on_a_gpu, compile_cache):
    """Runs requests in an engine with piecewise graphs of those token counts that a batch without
    an image has had."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import BatchDescriptor
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(compile_cache))  # compiled once
    torch.compiler.reset()
    forward = GPUModelRunner._model_forward

    def run(runner, **inputs):
        from vllm.forward_context import get_forward_context

        context = get_forward_context()
        context.cudagraph_runtime_mode = CUDAGraphMode.PIECEWISE
        context.batch_descriptor = BatchDescriptor(num_tokens=len(inputs["inputs_embeds"]))
        return forward(runner, **inputs)

    monkeypatch.setattr(GPUModelRunner, "_model_forward", run)
    monkeypatch.setattr(
        CpuPlatform,
        "get_static_graph_wrapper_cls",
        lambda self: f"{__name__}.PieceGraph",
        raising=False,
    )
    update = CpuPlatform.check_and_update_config

    def with_graphs(cls, vllm_config):
        update(vllm_config)
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
        vllm_config.compilation_config.max_cudagraph_capture_size = 80

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(with_graphs))
    monkeypatch.setattr(PieceGraph, "replays", 0)

    def answers_right() -> None:
        options = dict(enforce_eager=False, max_num_batched_tokens=70, max_num_seqs=4)
        text = Ask(words(11, 80))  # chunks of 70 tokens and of the rest
        with engine(short_llava, SHORT, **options) as llm:
            monkeypatch.setattr(PieceGraph, "capturing", True)
            for count in (1, 2):
                answer(llm, [text] * count, 2)
            monkeypatch.setattr(PieceGraph, "capturing", False)
            for asks in ([text], MIXED[:3], MIXED[3:]):
                check(short_llava, SHORT, asks, answer(llm, asks, 4))
        assert PieceGraph.replays

    return answers_right


def test_piecewise_graphs(piecewise):
    piecewise()


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        # A stage with fewer rows in a graph of the batch's token count.
        (
            "run",
            lambda self, unit, positions, hidden, residual, narrow: unit(
                positions, hidden, residual
            ),
        ),
        # A unit's results read where they lay, in memory that was given back.
        ("_stay", lambda self, name, rows: rows),
    ],
)
def test_piecewise_graphs_can_go_wrong(piecewise, monkeypatch, name, mistake):
    monkeypatch.setattr(units.PiecewiseGraphs, name, mistake)
    with pytest.raises((AssertionError, RuntimeError)):
        piecewise()
