"""Refusing a request that can't be answered, before it reaches the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import LogitsProcessor

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate

PROMPT_LOGPROBS = (
    "prompt_logprobs: not supported with ADSC: dropped tokens don't reach the last layer"
)
ENDS_IN_IMAGE = (
    "prompt: expected text behind the last image: with ADSC its last token may not reach the last "
    "layer, where the first new token is chosen"
)


class RefusePromptLogprobs(LogitsProcessor):
    """Changes no logits: vLLM asks logits processors to check the parameters of each request."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        if sampling_params.prompt_logprobs is not None:
            raise VLLMValidationError(PROMPT_LOGPROBS, parameter="prompt_logprobs")

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        pass
