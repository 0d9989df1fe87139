"""Lets PyPI's torchvision, which is built for CUDA, be imported beside a CPU build of torch.

Of that torchvision only the transforms are used, which are Python. But its import attaches fake
implementations to `nms` and `qnms`, whose schemas its CUDA library, not loadable here, would have
defined. So they are defined when torchvision is about to be imported. `make venv-vllm` copies this
file into the site-packages of `.venv-vllm`, with a .pth file that imports it in every process.
"""

import sys
from importlib.abc import MetaPathFinder

_libraries = []  # a schema lives as long as the library that defined it


class _BeforeTorchvision(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _libraries.append(library)


sys.meta_path.insert(0, _BeforeTorchvision())
