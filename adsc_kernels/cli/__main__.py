"""``python -m adsc_kernels.cli``: the same as ``adsc``."""

import sys

from adsc_kernels.cli import main

sys.exit(main())
