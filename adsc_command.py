"""The command `adsc`. It lies beside the package, since importing that brings torch.

`adsc_kernels` sees that this module is there, and leaves torch to the commands that need it: help,
bad input and accounts come at once.
"""

from adsc_kernels.cli import main

__all__ = ["main"]
