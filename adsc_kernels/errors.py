"""The one error type of this package's own."""


class UnsupportedError(NotImplementedError):
    """Something valid in itself that is not supported here: a backend, a device, a layout."""
