"""Losses for imbalanced images, each a frozen dataclass: its fields are the hyper-parameters, calling it computes it.

    loss = AsymmetricLoss(gamma_neg=2.0, clip=0.02)
    value = loss(logits, targets)

Every loss checks its hyper-parameters at construction, computes in at least float32 with autocast off, and carries its
search space (`loss.space`). A head loss (one logit a label, targets of the same shape) has a `name`; LOSSES maps these
names to the classes. To add one, put a module with such a class into this folder.
"""

import importlib
import pkgutil
from types import ModuleType

from raymed.losses.asymmetric import AsymmetricLoss
from raymed.losses.asymmetric_softmax import AsymmetricSoftmaxLoss
from raymed.losses.cross_entropy import CrossEntropyLoss
from raymed.losses.focal import ClassBalancedFocalLoss, FocalLoss
from raymed.losses.poly import PolyLoss
from raymed.losses.supcon import SupConLoss

__all__ = [
    "LOSSES",
    "AsymmetricLoss",
    "AsymmetricSoftmaxLoss",
    "ClassBalancedFocalLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "PolyLoss",
    "SupConLoss",
]


def _named_classes(module: ModuleType) -> dict[str, type]:
    classes = (item for item in vars(module).values() if isinstance(item, type) and item.__module__ == module.__name__)
    return {cls.name: cls for cls in classes if hasattr(cls, "name")}


LOSSES: dict[str, type] = {}
for _module in pkgutil.iter_modules(__path__):
    LOSSES |= _named_classes(importlib.import_module(f"{__name__}.{_module.name}"))
