"""Several processes, which vLLM spawns, and drafts: as served, tensor parallel, speculating."""

from __future__ import annotations

from engines import MIXED, Ask, answer, check, engine, words

SCHEDULE = "2:1/3,4:1/2"


def serve(llava, schedule, **options):
    with engine(llava, schedule, **options) as llm:
        check(llava, schedule, MIXED, answer(llm, MIXED))


def test_compiled_in_a_separate_process(short_llava, monkeypatch):
    """A unit of compilation for each stage; chunks of many sizes, some without survivors."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    options = dict(max_num_batched_tokens=70, max_num_seqs=4)
    options |= dict(enforce_eager=False, enable_prefix_caching=True)
    serve(short_llava, "1:1/3,2:1/2", **options)


def test_tensor_parallel(llava, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    serve(llava, SCHEDULE, tensor_parallel_size=2)


def test_ngram_speculation(llava):
    """Drafts from the prompt: a step then has several rows of a request."""
    from vllm import SamplingParams

    repeated = f"{words(3, 8)} {words(3, 8)} {words(3, 4)}"
    asks = [*MIXED, Ask(f"<image> {repeated}", (1,)), Ask(repeated)]
    ngram = dict(method="ngram", num_speculative_tokens=3, prompt_lookup_max=3, prompt_lookup_min=1)
    with engine(llava, SCHEDULE, speculative_config=ngram) as llm:
        check(llava, SCHEDULE, asks, answer(llm, asks, 24))
        accepted = "vllm:spec_decode_num_accepted_tokens"
        assert sum(metric.value for metric in llm.get_metrics() if metric.name == accepted)
        # vLLM asks no plug-in about parameters then: the scheduler finishes this one as an error.
        options = SamplingParams(max_tokens=2, prompt_logprobs=1)
        [refused] = llm.generate(["w1 w2"], options, use_tqdm=False)
        assert refused.outputs[0].finish_reason == "error"
