"""Let torchvision import beside a CPU-only torch.

PyPI's torchvision is linked against CUDA, so with a CPU build of torch its operator library does not load, and the
import then fails on two operator names that its Python code registers fakes for. This hook declares those two schemas
right after `torchvision.extension` has run, and only when the library did not load: on a machine with CUDA, or with a
matching CPU build, nothing is changed. Models and transforms work; `torchvision.ops.nms` still raises.
"""

import importlib.abc
import importlib.util
import sys

_MODULE = "torchvision.extension"
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def install() -> None:
    """Register the hook, unless torchvision is already imported or the hook is there."""
    if "torchvision" not in sys.modules and not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    library = None  # keeps the torch.library.Library alive: its operators vanish with it

    def find_spec(self, name, path=None, target=None):
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            if not module._has_ops():
                import torch

                _Finder.library = torch.library.Library("torchvision", "FRAGMENT")
                for operator in ("nms", "qnms"):
                    _Finder.library.define(operator + _SCHEMA)

        spec.loader.exec_module = exec_module
        return spec
