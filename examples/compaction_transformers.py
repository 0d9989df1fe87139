"""Shrink a picture in a transformers cache after the prompt. A random small Llama, no download."""

import inspect

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import adsc_kernels as adsc
from adsc_kernels.integrations.layouts import crop_transformers, from_transformers

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=200,
)
model = LlamaForCausalLM(config).to(device).eval()
# What forward calls its cache: transformers 5.24 renamed it.
known = inspect.signature(model.forward).parameters
CACHE = "cache" if "cache" in known else "past_key_values"

# A batch of two prompts of 100 rows, of which 10 to 73 stand for a picture; every fourth stays.
prompt = torch.randint(200, (2, 100), device=device)
schedule = adsc.CompressionSchedule.parse("0:1/4", num_layers=4)
spans = [(0, 10, 64), (1, 10, 64)]
stage = adsc.make_plan(schedule, [0, 100, 200], spans, device=device).stages[1]


@torch.no_grad()
def answer(cache, change, steps: int = 8) -> list[list[int]]:
    """Greedy tokens; positions go on from the prompt's true length, whatever the cache holds."""
    token = model(prompt, **{CACHE: cache}).logits[:, -1:].argmax(-1)
    change(cache)
    tokens = [token]
    for position in range(100, 100 + steps):
        where = torch.full((2, 1), position, device=device)
        logits = model(tokens[-1], **{CACHE: cache}, position_ids=where).logits
        tokens.append(logits[:, -1:].argmax(-1))
    return torch.cat(tokens, 1).tolist()


def shrink(cache) -> None:
    after = adsc.ops.compact_kv_(from_transformers(cache), stage=stage, seq_lens=[100, 100])
    crop_transformers(cache, after.seq_lens.host)


def gather(cache) -> None:
    """The same by hand, with an index."""
    keep = stage.keep_indices()[: stage.seq_lens[0]]
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, keep], layer.values[:, :, keep]


whole = answer(DynamicCache(), lambda cache: None)
expected = answer(DynamicCache(), gather)
print(f"rows in the cache: 100 -> {stage.seq_lens[0]}")
print("whole cache:        ", whole)
print("shrunk DynamicCache:", got := answer(DynamicCache(), shrink))
assert got == expected
static = StaticCache(config=config, max_cache_len=128)
print("shrunk StaticCache: ", got := answer(static, shrink))
assert got == expected
