"""``python -m adsc_kernels``: the same as ``adsc``."""

import sys

from adsc_kernels.cli import main

sys.exit(main())
