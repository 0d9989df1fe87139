"""A thin LLaVA-1.5 that compresses: reads any checkpoint of it, and shows how to wire the ops in.

Read `decoder.py` first: it is where vision tokens are dropped. `model.py` holds the weights around it,
`generate.py` runs prompts through it, and the other files read checkpoints, text and pictures.
"""

from pathlib import Path

from .config import LlavaConfig
from .decoder import Phase
from .generate import Conversation, Generation
from .model import Llava
from .processor import load_image

__all__ = [
    "Conversation",
    "Generation",
    "Llava",
    "LlavaConfig",
    "Phase",
    "bundled_checkpoint",
    "load_image",
]


def bundled_checkpoint() -> Path:
    """The folder of tiny-llava-digits, the checkpoint that comes with the package."""
    return Path(__file__).parent.parent / "checkpoints" / "tiny-llava-digits"
