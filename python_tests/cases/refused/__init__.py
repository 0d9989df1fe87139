"""Calls that are refused: of each a function, the error and what its message says.

Their tensors are made on import, on the device that is torch's default then.
"""

import torch

# What an op itself raises; in torch 2.15 whatever a native op throws is a RuntimeError. Public
# functions give it its type back.
BY_THE_OP = RuntimeError if torch.__version__ >= (2, 15) else ValueError
