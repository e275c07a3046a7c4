"""Losses, each a frozen dataclass: its fields are the hyper-parameters, calling it computes it.

    loss = AsymmetricLoss(gamma_neg=2.0, clip=0.02)
    value = loss(logits, targets)
    loss = DHNNCELoss(temperature=0.6, beta1=0.15)
    value = loss(image_features, text_features, cases)

Every loss checks its hyper-parameters at construction, computes in at least float32 with autocast off, and carries its
search space (`loss.space`). A head loss (one logit a label, targets of the same shape) and a loss over pairs of an
image and a text (`PairLoss`) have a `name`; LOSSES and PAIR_LOSSES map these names to the classes.
To add one, put a module with such a class into this folder.
"""

import importlib
import pkgutil
from types import ModuleType

from raymed.losses._pairs import PairLoss
from raymed.losses.asymmetric import AsymmetricLoss
from raymed.losses.asymmetric_softmax import AsymmetricSoftmaxLoss
from raymed.losses.cross_entropy import CrossEntropyLoss
from raymed.losses.decoupled import DCLLoss
from raymed.losses.focal import ClassBalancedFocalLoss, FocalLoss
from raymed.losses.hard_negative import DHNNCELoss, HNNCELoss
from raymed.losses.info_nce import InfoNCELoss
from raymed.losses.poly import PolyLoss
from raymed.losses.siglip import SigLIPLoss
from raymed.losses.supcon import SupConLoss

__all__ = [
    "LOSSES",
    "PAIR_LOSSES",
    "AsymmetricLoss",
    "AsymmetricSoftmaxLoss",
    "ClassBalancedFocalLoss",
    "CrossEntropyLoss",
    "DCLLoss",
    "DHNNCELoss",
    "FocalLoss",
    "HNNCELoss",
    "InfoNCELoss",
    "PairLoss",
    "PolyLoss",
    "SigLIPLoss",
    "SupConLoss",
]


def _named_classes(module: ModuleType) -> dict[str, type]:
    classes = (item for item in vars(module).values() if isinstance(item, type) and item.__module__ == module.__name__)
    return {cls.name: cls for cls in classes if isinstance(getattr(cls, "name", None), str)}


LOSSES: dict[str, type] = {}
PAIR_LOSSES: dict[str, type[PairLoss]] = {}
for _module in pkgutil.iter_modules(__path__):
    for _name, _class in _named_classes(importlib.import_module(f"{__name__}.{_module.name}")).items():
        (PAIR_LOSSES if issubclass(_class, PairLoss) else LOSSES)[_name] = _class
