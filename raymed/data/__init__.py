"""From a manifest to batches: tables, readers, splits, decoded images, augmentation, phantoms."""

from raymed.data.augment import Augment
from raymed.data.captions import CaptionConfig, CaptionSet
from raymed.data.dataset import Batch, DataSet, load
from raymed.data.manifest import DataConfig
from raymed.data.preprocess import Preprocess
from raymed.data.readers import ImageProblem, read
from raymed.data.sampling import BalancedSampler, RandomSampler

__all__ = [
    "Augment",
    "BalancedSampler",
    "Batch",
    "CaptionConfig",
    "CaptionSet",
    "DataConfig",
    "DataSet",
    "ImageProblem",
    "Preprocess",
    "RandomSampler",
    "load",
    "read",
]
