"""What a schedule costs and saves, before anything runs. No tensors here.

:class:`ModelShape` holds a model's sizes, :data:`CONVENTIONS` what a number may count, and
:func:`account` puts them together with a schedule.
"""

from adsc_kernels.accounting.account import (
    Account,
    LayerAccount,
    Parts,
    StageAccount,
    account,
    account_lengths,
)
from adsc_kernels.accounting.cache import KV_BITS, CacheFormat
from adsc_kernels.accounting.conventions import CONVENTIONS, DEFAULT_CONVENTION, Convention
from adsc_kernels.accounting.shapes import KNOWN_DECODERS, MODELS, ModelShape
from adsc_kernels.accounting.tower import TowerShape

__all__ = [
    "CONVENTIONS",
    "DEFAULT_CONVENTION",
    "KNOWN_DECODERS",
    "KV_BITS",
    "MODELS",
    "Account",
    "CacheFormat",
    "Convention",
    "LayerAccount",
    "ModelShape",
    "Parts",
    "StageAccount",
    "TowerShape",
    "account",
    "account_lengths",
]
