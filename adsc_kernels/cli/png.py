"""Writing a picture where the user said."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def check(path: Path, option: str) -> None:
    """``ValueError`` naming the option, unless a .png can be written there."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"{option}: expected a name that ends in .png, got {str(path)!r}")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{option}: expected a file in a folder that can be written, got '{path}'")


def write(picture: Image, path: Path) -> None:
    """Under another name first, so that the file is whole or not there."""
    handle, name = tempfile.mkstemp(suffix=".png", prefix=f".{path.stem}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            picture.save(file, format="PNG", optimize=True)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp's own are for the owner alone
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
