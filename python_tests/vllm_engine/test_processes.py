"""Several processes, and drafts: as served, tensor parallel, speculating."""

from __future__ import annotations

import pytest
from engines import MIXED, Ask, answer, check, engine, words

SCHEDULE = "2:1/3,4:1/2"


@pytest.fixture
def spawn(monkeypatch):
    """Workers that import everything anew."""
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def serve(llava, **options):
    with engine(llava, SCHEDULE, **options) as llm:
        check(llava, SCHEDULE, MIXED, answer(llm, MIXED))


def test_compiled_in_a_separate_process(llava, spawn, monkeypatch):
    """A unit of compilation for each stage; chunks of many sizes, some without survivors."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    options = dict(max_num_batched_tokens=70, max_num_seqs=4)
    serve(llava, enforce_eager=False, enable_prefix_caching=True, **options)


def test_tensor_parallel(llava, spawn, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    serve(llava, tensor_parallel_size=2)


def test_ngram_speculation(llava):
    """Drafts from the prompt: a step then has several rows of a request."""
    from vllm import SamplingParams

    repeated = f"{words(3, 8)} {words(3, 8)} {words(3, 4)}"
    asks = [*MIXED, Ask(f"<image> {repeated}", (1,)), Ask(repeated)]
    ngram = dict(method="ngram", num_speculative_tokens=3, prompt_lookup_max=3, prompt_lookup_min=1)
    with engine(llava, SCHEDULE, speculative_config=ngram) as llm:
        # transformers' own float32 is up to 1.3e-5 off on this model.
        check(llava, SCHEDULE, asks, answer(llm, asks, 24), tolerance=2e-5)
        accepted = "vllm:spec_decode_num_accepted_tokens"
        assert sum(metric.value for metric in llm.get_metrics() if metric.name == accepted)
        # vLLM asks no plug-in about parameters then: the scheduler finishes this one as an error.
        options = SamplingParams(max_tokens=2, prompt_logprobs=1)
        [refused] = llm.generate(["w1 w2"], options, use_tqdm=False)
        assert refused.outputs[0].finish_reason == "error"
