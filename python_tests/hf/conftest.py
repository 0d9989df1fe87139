"""Where these tests run: `ADSC_HF_DEVICE=cuda pytest python_tests/hf` runs them on a GPU."""

import os

import torch

DEVICE = os.environ.get("ADSC_HF_DEVICE")

if DEVICE:
    torch.set_default_device(DEVICE)
    torch.backends.cudnn.allow_tf32 = False  # rows are held against the batch they are in
