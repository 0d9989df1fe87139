"""What transformers calls the cache that a model's forward takes: 5.24 renamed it."""

from __future__ import annotations

import inspect

from transformers import LlamaForCausalLM

KNOWN = inspect.signature(LlamaForCausalLM.forward).parameters
CACHE = "cache" if "cache" in KNOWN else "past_key_values"
