"""A thin LLaVA-1.5 that compresses: how to wire the ops into an engine of one's own.

Read `model.py` first, where `Decoder.forward` drops the vision tokens, then `generate.py`; the
other files read checkpoints, text and pictures.
"""

from pathlib import Path

from adsc_kernels.images import load_image
from adsc_kernels.llava.config import LlavaConfig
from adsc_kernels.llava.generate import Generation
from adsc_kernels.llava.model import Llava

__all__ = ["Generation", "Llava", "LlavaConfig", "bundled_checkpoint", "load_image"]


def bundled_checkpoint() -> Path:
    """The folder of tiny-llava-digits, the checkpoint that comes with the package."""
    return Path(__file__).parent.parent / "checkpoints" / "tiny-llava-digits"
