"""The scheduler: vLLM's own, which tells the stages' block managers about each request's images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from adsc_kernels.integrations.vllm.config import image_span, layouts_of
from adsc_kernels.integrations.vllm.manager import AdscStageManager, LayoutHashes
from adsc_kernels.integrations.vllm.report import startup_report
from adsc_kernels.integrations.vllm.request_check import ENDS_IN_IMAGE, PROMPT_LOGPROBS

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.adsc")  # vLLM configures only loggers of its own


class AdscScheduler(Scheduler):
    """vLLM's scheduler, with the layout of each request."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self.adsc_layouts = layouts_of(vllm_config)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self.adsc_managers = [m for m in managers if isinstance(m, AdscStageManager)]
        for manager in self.adsc_managers:
            manager.requests = self.requests
        image = image_span(vllm_config)
        logger.info("%s", startup_report(self.adsc_layouts, self.kv_cache_config, image))

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)
        for manager in self.adsc_managers:
            manager.publish()
        return output

    def add_request(self, request: Request) -> None:
        """As vLLM's, but for what would be answered wrongly: that finishes as an error."""
        layout, reason = self.adsc_layouts.read(request.prompt_token_ids, request.mm_features)
        request.block_hashes = LayoutHashes(layout, request.block_hashes)
        if self.adsc_layouts.schedule.boundaries and not reason:
            if request.resumable:
                reason = "streaming input: not supported with ADSC"
            elif request.sampling_params and request.sampling_params.prompt_logprobs is not None:
                reason = PROMPT_LOGPROBS
            elif layout.spans and layout.end == request.num_prompt_tokens:
                reason = ENDS_IN_IMAGE
        super().add_request(request)
        if reason:
            logger.error("request %s: %s", request.request_id, reason)
            # vLLM finishes these as errors with the next step's output.
            self.encoder_cache_mismatch_reqs.add(request.request_id)


class AdscAsyncScheduler(AdscScheduler, AsyncScheduler):
    """The same over vLLM's asynchronous scheduler."""


def make_scheduler(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> AdscScheduler:
    """The one that the configuration asks for, known only after the plug-in has chosen."""
    asynchronous = vllm_config.scheduler_config.async_scheduling
    return (AdscAsyncScheduler if asynchronous else AdscScheduler)(vllm_config, *args, **kwargs)
