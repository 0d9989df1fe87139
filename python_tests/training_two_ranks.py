"""One of the processes that share a run, started by test_training.py."""

import sys
from pathlib import Path

from training_case import config

from adsc_kernels.training.run import train

if __name__ == "__main__":
    data, out = map(Path, sys.argv[1:])
    train(config(data, out, batch_size=1, steps=1, save_every=1))
