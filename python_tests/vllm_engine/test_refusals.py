"""What can't work is refused with a reason: when the engine is configured, or with the request."""

from __future__ import annotations

import re
from functools import reduce
from types import SimpleNamespace

import pytest
from engines import MIXED, Ask, answer, arguments, check, engine

SCHEDULE = "2:1/3,4:1/2"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(enable_lora=True), "LoRA"),
        (dict(pipeline_parallel_size=2, distributed_executor_backend="mp"), "pipeline parallel"),
        (dict(disable_hybrid_kv_cache_manager=True), "disable_hybrid_kv_cache_manager"),
        (dict(block_size=48), "block size 48: expected a multiple of 32"),
        (dict(scheduler_cls="vllm.v1.core.sched.scheduler.Scheduler"), "scheduler_cls"),
        (
            dict(kv_transfer_config=dict(kv_connector="ExampleConnector", kv_role="kv_both")),
            "KV connectors",
        ),
        (
            dict(speculative_config=dict(method="ngram_gpu", num_speculative_tokens=2)),
            "speculative method",
        ),
        (dict(additional_config={"adsc_align": "page"}), "adsc_align 'page': expected 'block'"),
        (
            dict(additional_config={"adsc_align": "block", "adsc_schedule": "2:1x1/2@grid"}),
            "adsc_align with the pattern 'grid'",
        ),
        (dict(additional_config={"adsc_schedule": "9:1/2"}), "expected 0 to 5"),
        (dict(additional_config={"adsc_schedule": "2:x"}), "at character 3"),
        (dict(additional_config={"adsc_schedule": 3}), "expected text or a mapping"),
        (
            dict(additional_config={"adsc_schedule": {"num_layers": 8, "boundaries": []}}),
            "expected a schedule for 6 layers, got 8",
        ),
        (dict(additional_config={"adsc_schedule": None}), "got none"),
        (dict(enable_prompt_embeds=True), "prompt embeddings"),
        (dict(kv_events_config=dict(enable_kv_cache_events=True)), "KV events"),
        (
            dict(hf_overrides={"architectures": ["AdscFuyuForCausalLM"]}),
            r"\['AdscFuyuForCausalLM'\] are not supported",
        ),
    ],
)
def test_engine_configuration(llava, options, reason):
    with pytest.raises(ValueError, match="(?s)" + reason), engine(llava, SCHEDULE, **options):
        pass


@pytest.fixture(scope="module")
def config(llava):
    """What vLLM makes of the arguments, without an engine."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(**arguments(llava, SCHEDULE)).create_engine_config()


SOME = SimpleNamespace()


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("lora_config", SOME, "LoRA: its token map counts every prompt token"),
        (
            "parallel_config.pipeline_parallel_size",
            2,
            "pipeline parallel: ranks pass on every token",
        ),
        (
            "parallel_config.decode_context_parallel_size",
            2,
            "decode context parallel: shards by position",
        ),
        (
            "parallel_config.prefill_context_parallel_size",
            2,
            "prefill context parallel: as the former",
        ),
        (
            "parallel_config.enable_dbo",
            True,
            "dual-batch overlap: splits a batch in the middle of a request",
        ),
        (
            "parallel_config.worker_cls",
            "a.Worker",
            "worker_cls 'a.Worker': the plug-in brings its own",
        ),
        ("kv_transfer_config", SOME, "KV connectors: they take position for index"),
        ("ec_transfer_config", SOME, "encoder-cache connectors: not tried"),
        (
            "kv_events_config",
            SimpleNamespace(enable_kv_cache_events=True),
            "KV events: they publish blocks by position",
        ),
        *(
            (
                "speculative_config",
                SimpleNamespace(method=method),
                f"speculative method '{method}': expected 'ngram'; "
                "a draft model would need dense KV",
            )
            for method in ("eagle", "eagle3", "mtp", "draft_model", "medusa")
        ),
        (
            "cache_config.kv_sharing_fast_prefill",
            True,
            "kv_sharing_fast_prefill: it drops rows by another rule",
        ),
        ("model_config.runner_type", "pooling", "runner 'pooling': expected 'generate'"),
        (
            "model_config.enable_prompt_embeds",
            True,
            "prompt embeddings: images can't be found in them",
        ),
        (
            "model_config.hf_config.text_config.model_type",
            "gpt2",
            "text model 'gpt2': expected llama",
        ),
        (
            "model_config.hf_config.vision_config.model_type",
            "siglip_vision_model",
            "vision tower 'siglip_vision_model': expected clip_vision_model",
        ),
        (
            "model_config.hf_text_config.sliding_window",
            128,
            "sliding-window attention: it counts positions",
        ),
        (
            "compilation_config.mode",
            1,
            "compilation mode 1: it compiles the boundaries too; expected --compilation-config "
            """'{"mode": 3}' or --enforce-eager""",
        ),
        (
            "model_config.multimodal_config.video_pruning_rate",
            0.5,
            "video pruning: it drops tokens by another rule",
        ),
    ],
)
def test_configuration(config, monkeypatch, option, value, reason):
    """Also what vLLM itself would refuse on a CPU, or with this model: the reason, in one line."""
    from adsc_kernels.integrations.vllm.config import AdscConfig

    *path, name = option.split(".")
    monkeypatch.setattr(reduce(getattr, path, config), name, value, raising=False)
    line = re.escape(f"adsc_kernels doesn't go together with {reason}")
    with pytest.raises(ValueError, match=f"^{line}$"):
        AdscConfig.verify_and_update_config(config)


def test_configuration_for_a_gpu(config, monkeypatch):
    from vllm.platforms import current_platform

    from adsc_kernels.integrations.vllm.config import AdscConfig

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(config.model_config, "enforce_eager", False)
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    monkeypatch.setitem(config.additional_config, "adsc_schedule", f"{SCHEDULE}@renumber")
    with pytest.raises(
        ValueError,
        match=r"model runner V1 on a GPU.*; renumbered positions without --enforce-eager.*; "
        "VLLM_USE_BREAKABLE_CUDAGRAPH: expected 0",
    ):
        AdscConfig.verify_and_update_config(config)


def test_class_token_without_a_grid(config, monkeypatch):
    from adsc_kernels.integrations.vllm.config import AdscConfig

    monkeypatch.setitem(config.additional_config, "adsc_schedule", "2:1x1/2@grid")
    monkeypatch.setattr(config.model_config.hf_config, "vision_feature_select_strategy", "full")
    with pytest.raises(ValueError, match="'grid' with vision_feature_select_strategy 'full'"):
        AdscConfig.verify_and_update_config(config)


def test_torch_that_is_not_known(config, monkeypatch):
    """Refused where it would compile."""
    import torch

    from adsc_kernels.integrations.vllm.config import AdscConfig

    monkeypatch.setattr(torch, "__version__", "2.99.0")
    AdscConfig.verify_and_update_config(config)  # eager
    monkeypatch.setattr(config.model_config, "enforce_eager", False)
    with pytest.raises(ValueError, match=r"compilation by torch 2.99: .*--enforce-eager"):
        AdscConfig.verify_and_update_config(config)


def test_schedule_in_the_checkpoint(llava):
    """Found in config.json without --additional-config."""
    overrides = {
        "architectures": ["AdscLlavaForConditionalGeneration"],
        "adsc_schedule": SCHEDULE,
    }
    none = {"adsc_schedule": None}
    with engine(llava, "", hf_overrides=overrides, additional_config=none) as llm:
        check(llava, SCHEDULE, MIXED, answer(llm, MIXED, 3))


def test_requests(llava):
    """Refused before the engine sees them; the engine goes on."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    bad = (ValueError, VLLMValidationError)
    with engine(llava, SCHEDULE) as llm:
        with pytest.raises(bad, match="expected text behind the last image"):
            answer(llm, [Ask("w1 <image>", (1,))])
        with pytest.raises(bad, match="prompt_logprobs: not supported with ADSC"):
            llm.generate(["w1 w2"], SamplingParams(prompt_logprobs=1), use_tqdm=False)
        with pytest.raises(bad, match=r"(?i)at most 4 image"):
            answer(llm, [Ask("<image> " * 5 + "w1", (1, 2, 3, 4, 5))])
        with pytest.raises(bad, match="maximum context length is 512"):
            answer(llm, [Ask("w1 " * 600)])
        # Those that only the scheduler sees finish as errors: streaming input, and parameters
        # under speculation or on a GPU, where vLLM asks no plug-in about them.
        for refused in (dict(resumable=True), dict(prompt_logprobs=1)):
            assert finish_reason(llm, **refused) == "error", refused
        assert finish_reason(llm) == "length"
        check(llava, SCHEDULE, MIXED, answer(llm, MIXED, 3))


def finish_reason(llm, *, prompt_logprobs: int | None = None, **options) -> str | None:
    """Of a request that reaches the engine as it is."""
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    request = EngineCoreRequest(
        request_id="raw",
        prompt_token_ids=[1, 5, 6, 7],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=2, prompt_logprobs=prompt_logprobs),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        **options,
    )
    engine = llm.llm_engine
    name, reason = engine.add_request("raw", request, request.sampling_params), None
    for _ in range(10):
        for output in engine.step():
            reason = output.outputs[0].finish_reason
        if reason:
            break
    engine.abort_request([name], internal=True)  # a streaming one waits for more
    return reason


def test_other_vllm(monkeypatch):
    """Under another vLLM nothing is registered, and one line says why."""
    from adsc_kernels.integrations.vllm import plugin

    monkeypatch.setattr(plugin, "version", lambda name: "0.34.1")
    assert plugin.vllm_problem() == "adsc_kernels: expected vLLM 0.32.x or 0.33.x, got vllm 0.34.1"
    lines = []
    monkeypatch.setattr(plugin.logger, "error", lambda text, *values: lines.append(text % values))
    plugin.register()
    assert lines == [plugin.vllm_problem() + ": ADSC architectures are not registered"]
