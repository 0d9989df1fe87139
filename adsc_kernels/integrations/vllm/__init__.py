"""ADSC inside vLLM: an out-of-tree plug-in that saves real KV-cache blocks.

vLLM finds it by the entry point `vllm.general_plugins` (`plugin.register`). `docs/vllm.md` says how
to use it and how it maps on vLLM. Only `plugin` and `layout` can be imported without vLLM.
"""
