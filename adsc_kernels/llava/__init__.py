"""A thin LLaVA-1.5 that compresses: how to wire the ops into an engine of one's own.

Read `model.py` first, where `Decoder.forward` drops the vision tokens, then `generate.py`; the
other files read checkpoints, text and pictures.
"""

from adsc_kernels.hub import bundled_checkpoint
from adsc_kernels.images import load_image
from adsc_kernels.llava.config import LlavaConfig
from adsc_kernels.llava.generate import Generation
from adsc_kernels.llava.model import Llava

__all__ = ["Generation", "Llava", "LlavaConfig", "bundled_checkpoint", "load_image"]
