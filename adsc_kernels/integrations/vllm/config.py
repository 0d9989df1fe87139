"""Reading the schedule from vLLM's configuration, and refusing what would silently go wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CompilationMode
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from adsc_kernels.integrations.vllm.families import FAMILIES, Family
from adsc_kernels.integrations.vllm.layout import Layouts, Span
from adsc_kernels.schedule import CONFIG_KEY, CompressionSchedule

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_PACKAGE = "adsc_kernels.integrations.vllm"
# In --additional-config, or in the checkpoint's config.json.
ALIGN_KEY = "adsc_align"
_SCHEDULER = f"{_PACKAGE}.scheduler.make_scheduler"
_SCHEDULERS = (None, _SCHEDULER, f"{_PACKAGE}.scheduler.AdscAsyncScheduler")
_CPU_WORKER = f"{_PACKAGE}.worker.AdscCPUWorker"
_PARAMS_CHECK = f"{_PACKAGE}.request_check:RefusePromptLogprobs"
# Whose compilation vLLM 0.32 and 0.33 were read with.
TORCH_MINORS = ("2.10", "2.11", "2.12", "2.13", "2.14")
_CPU_BLOCK = 32  # vLLM's CPU attention works on multiples of it


def schedule_of(vllm_config: VllmConfig) -> CompressionSchedule:
    """The schedule in `--additional-config`, else the one in the checkpoint's config.

    Text such as "8:1/4,16:1/4", or the mapping that `CompressionSchedule.to_dict` makes; an empty
    text drops nothing. Raises ValueError where there is none, it does not parse, or it is for
    another depth.
    """
    hf_config = vllm_config.model_config.hf_config
    given = _option(vllm_config, CONFIG_KEY)
    if given is None:
        raise ValueError(
            f"{CONFIG_KEY}: expected one in --additional-config, such as "
            f'\'{{"{CONFIG_KEY}": "8:1/4"}}\', or in the checkpoint\'s config.json, got none'
        )
    return CompressionSchedule.of_config(given, hf_config.text_config.num_hidden_layers)


def layouts_of(vllm_config: VllmConfig) -> Layouts:
    """What finds the survivors of this model's requests, under its schedule."""
    reader = family_of(vllm_config).spans(vllm_config.model_config.hf_config)
    aligned = _option(vllm_config, ALIGN_KEY) == "block"
    block = vllm_config.cache_config.block_size if aligned else None
    return Layouts(schedule_of(vllm_config), reader, block)


def _option(vllm_config: VllmConfig, key: str) -> Any:
    extra = vllm_config.additional_config
    given = extra.get(key) if isinstance(extra, Mapping) else None
    return getattr(vllm_config.model_config.hf_config, key, None) if given is None else given


def family_of(vllm_config: VllmConfig) -> Family:
    """That of the model's architecture."""
    return FAMILIES[vllm_config.model_config.architecture]


def image_span(vllm_config: VllmConfig) -> Span:
    """An image of common size at the start of a prompt, for reports and estimates."""
    return family_of(vllm_config).image(vllm_config.model_config.hf_config)


def problems(vllm_config: VllmConfig, schedule: CompressionSchedule) -> list[str]:
    """What is configured and does not go together with dropping tokens between layers."""
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    scheduler, speculative = vllm_config.scheduler_config, vllm_config.speculative_config
    model = vllm_config.model_config
    family, mm = family_of(vllm_config), model.get_multimodal_config()
    text, tower = model.hf_config.text_config, model.hf_config.vision_config.model_type
    method = None if speculative is None else speculative.method
    align = _option(vllm_config, ALIGN_KEY)
    strategy = getattr(model.hf_config, "vision_feature_select_strategy", None)
    deepstack = len(getattr(model.hf_config.vision_config, "deepstack_visual_indexes", ()))
    checks = (
        (align not in (None, "block"), f"{ALIGN_KEY} {align!r}: expected 'block'"),
        (
            align is not None and schedule.pattern == "grid",
            f"{ALIGN_KEY} with the pattern 'grid': whole rows and columns can't be rounded",
        ),
        (vllm_config.lora_config is not None, "LoRA: its token map counts every prompt token"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallel: ranks pass on every token"),
        (parallel.decode_context_parallel_size > 1, "decode context parallel: shards by position"),
        (parallel.prefill_context_parallel_size > 1, "prefill context parallel: as the former"),
        (parallel.enable_dbo, "dual-batch overlap: splits a batch in the middle of a request"),
        (vllm_config.kv_transfer_config is not None, "KV connectors: they take position for index"),
        (vllm_config.ec_transfer_config is not None, "encoder-cache connectors: not tried"),
        (
            vllm_config.kv_events_config is not None
            and vllm_config.kv_events_config.enable_kv_cache_events,
            "KV events: they publish blocks by position",
        ),
        (
            method not in (None, "ngram"),
            f"speculative method {method!r}: expected 'ngram'; a draft model would need dense KV",
        ),
        (
            scheduler.disable_hybrid_kv_cache_manager is True,
            "disable_hybrid_kv_cache_manager: stages need KV groups of their own",
        ),
        (
            scheduler.scheduler_cls not in _SCHEDULERS,
            f"scheduler_cls {scheduler.scheduler_cls!r}: the plug-in brings its own",
        ),
        (cache.kv_sharing_fast_prefill, "kv_sharing_fast_prefill: it drops rows by another rule"),
        (model.runner_type != "generate", f"runner {model.runner_type!r}: expected 'generate'"),
        (model.enable_prompt_embeds, "prompt embeddings: images can't be found in them"),
        (
            text.model_type not in family.text,
            f"text model {text.model_type!r}: expected {' or '.join(family.text)}",
        ),
        (
            tower not in family.tower,
            f"vision tower {tower!r}: expected {' or '.join(family.tower)}",
        ),
        (
            schedule.pattern == "grid" and family.class_token and strategy == "full",
            "the pattern 'grid' with vision_feature_select_strategy 'full': a class token is in no "
            "row and no column",
        ),
        (
            not family.class_token and strategy not in (None, "full"),
            f"vision_feature_select_strategy {strategy!r}: expected 'full'; without its first "
            "token an image has no rows and columns",
        ),
        (
            any(boundary.layer < deepstack for boundary in schedule.boundaries),
            f"a boundary before layer {deepstack}: images enter the layers before it",
        ),
        (model.get_sliding_window() is not None, "sliding-window attention: it counts positions"),
        (mm.is_multimodal_pruning_enabled(), "video pruning: it drops tokens by another rule"),
        (
            family.reads_data and mm.mm_processor_cache_type == "shm",
            "mm_processor_cache_type 'shm': expected 'lru'; the scheduler sees no image's size",
        ),
        (
            model.uses_mrope and schedule.positions == "renumber",
            "renumbered positions with M-RoPE: height and width can't be renumbered",
        ),
        (
            vllm_config.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE,
            "compilation mode 1: it compiles the boundaries too; expected --compilation-config "
            "'{\"mode\": 3}' or --enforce-eager",
        ),
    )
    return [why for wrong, why in checks if wrong]


class AdscConfig(VerifyAndUpdateConfig):
    """vLLM's hook for a model's own defaults and checks, run once the configuration is complete."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        from vllm import envs
        from vllm.platforms import current_platform

        schedule = schedule_of(vllm_config)
        wrong = problems(vllm_config, schedule)
        cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
        if current_platform.is_cpu():
            block = cache.block_size
            if cache.user_specified_block_size and block % _CPU_BLOCK:
                wrong.append(f"block size {block}: expected a multiple of {_CPU_BLOCK} on a CPU")
            if parallel.worker_cls not in ("auto", _CPU_WORKER):
                wrong.append(f"worker_cls {parallel.worker_cls!r}: the plug-in brings its own")
            parallel.worker_cls = _CPU_WORKER
        else:
            if not vllm_config.use_v2_model_runner:
                wrong.append(
                    "model runner V1 on a GPU: expected VLLM_USE_V2_MODEL_RUNNER=1, and Triton"
                )
            if schedule.positions == "renumber" and not vllm_config.model_config.enforce_eager:
                wrong.append(
                    "renumbered positions without --enforce-eager: CUDA graphs would keep the first"
                )
            if envs.VLLM_USE_BREAKABLE_CUDAGRAPH:
                wrong.append(
                    "VLLM_USE_BREAKABLE_CUDAGRAPH: expected 0; its graphs hold the boundaries too"
                )
        torch_minor = ".".join(torch.__version__.split(".")[:2])
        if torch_minor not in TORCH_MINORS and not vllm_config.model_config.enforce_eager:
            wrong.append(
                f"compilation by torch {torch_minor}: expected one of {', '.join(TORCH_MINORS)}, "
                "or --enforce-eager"
            )
        if wrong:
            raise ValueError(f"adsc_kernels doesn't go together with {'; '.join(wrong)}")
        # Where processors find it: of an engine's configuration they see that of the model only.
        vllm_config.model_config.hf_config.adsc_schedule = schedule.to_dict()
        if vllm_config.scheduler_config.scheduler_cls is None:
            vllm_config.scheduler_config.scheduler_cls = _SCHEDULER
        # vLLM takes logits processors, and asks them to check a request's parameters, only without
        # speculation; with it the scheduler finishes such a request as an error.
        if vllm_config.speculative_config is None and current_platform.is_cpu():
            model = vllm_config.model_config
            model.logits_processors = [*(model.logits_processors or ()), _PARAMS_CHECK]
