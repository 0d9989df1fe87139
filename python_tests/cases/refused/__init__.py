"""Calls that are refused: of each a function, the error and what its message says.

Their tensors are made on import, on the device that is torch's default then.
"""
