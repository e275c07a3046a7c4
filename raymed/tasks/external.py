"""Images on which a trained model is evaluated, with labels or for a CLIP with captions; nothing is trained."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np

from raymed.bundle import Bundle
from raymed.config import UserError, from_dict
from raymed.data.captions import CaptionConfig, CaptionSet, load_captions
from raymed.data.dataset import DataSet, load_external
from raymed.data.locations import as_location, ending
from raymed.data.manifest import DataConfig, check_there, read_table, required_column
from raymed.data.phantoms import write_hsg
from raymed.data.preprocess import Preprocess
from raymed.tasks import recipe

_TABLES = (".csv", ".tsv", ".parquet")
_SHOWN = 5  # labels


def load_labelled(config: DataConfig, cache_dir: Path) -> DataSet:
    """An external test set (`load_external`), whose labels are among those that `config.classes` names.

    Raises UserError as `load_external` does, and for labels that are not the model's.
    """
    return load_external(replace(config, classes=_classes_there(config)), cache_dir)


@dataclass(frozen=True)
class LabelledData(recipe.Recipe):
    """Images with labels, and nothing to train."""

    read: ClassVar[Callable[[Any, Path], DataSet]] = staticmethod(load_labelled)

    data: DataConfig = DataConfig()

    def phantoms(self, folder: Path) -> tuple[Path, dict[str, Any]]:
        """Digital HSG X-rays of patients other than those that a classifier is trained on."""
        manifest = write_hsg(folder / "hsg-64-external", num_patients=120, seed=1, size=64)
        return manifest, {"data.deidentified": True}


def load_pairs(config: CaptionConfig, cache_dir: Path) -> CaptionSet:
    """Images with captions, every usable one in the split test. A column with splits is not looked at. Raises UserError
    as `load_captions`."""
    config = replace(config, label="", split="", split_how="random", split_file=None)
    data = cast(CaptionSet, load_captions(config, cache_dir))
    return replace(data, splits={"test": np.arange(len(data))})


@dataclass(frozen=True)
class CaptionedPairs(recipe.Recipe):
    """Images with captions, and nothing to train."""

    read: ClassVar[Callable[[Any, Path], DataSet]] = staticmethod(load_pairs)

    data: CaptionConfig = CaptionConfig()


def data_of(bundle: Bundle, data: DataConfig) -> DataConfig:
    """The config with what a classifier decides about its images: preprocessing, classes, and which is positive.

    Raises UserError for another kind of model, and where classes or positive class are stated and others than its own.
    """
    if bundle.kind != "classifier":
        raise UserError(f"the model is a {bundle.kind}, not a classifier")
    names, positive = tuple(bundle.classes["names"]), bundle.classes["positive"]
    if data.positive not in (None, positive):
        raise UserError(f"--data.positive {data.positive}: the model finds {positive!r}. Leave the flag out")
    if data.classes and set(data.classes) != set(names):
        stated = ", ".join(map(repr, data.classes))
        raise UserError(f"--data.classes states {stated}: {_told_apart(names, positive)}. Leave the flag out")
    preprocess = from_dict(Preprocess, bundle.preprocess)
    return replace(data, preprocess=preprocess, classes=data.classes or names, positive=positive)


def _classes_there(config: DataConfig) -> tuple[str, ...]:
    """Those of the config's classes that a table has, in their order; all of a MedMNIST file, whose labels are numbers.

    Raises UserError for a label that is no class of the config, and where none is its positive class.
    """
    path = as_location(config.manifest)
    if ending(path) not in _TABLES:
        return config.classes
    check_there(path)
    raw = read_table(path)
    counts = Counter(raw[required_column(raw, "label", config.label, path)])
    counts.pop("", None)
    unknown = [f"{name!r} ({num})" for name, num in counts.most_common() if name not in config.classes]
    if not unknown and config.positive in counts:
        return tuple(name for name in config.classes if name in counts)
    listed = ", ".join(unknown[:_SHOWN]) + ", ..." * (len(unknown) > _SHOWN)
    wrong = f"it does not know (rows): {listed}" if unknown else f"no row has the label {config.positive!r}"
    raise UserError(
        f"{path}: the labels in the column {config.label!r} are not the model's. "
        f"{_told_apart(config.classes, config.positive)}; {wrong}. Name the column that holds its classes "
        "(--data.label COLUMN), or give the texts their names when the data are imported (import_data.py --map "
        "CLASS=TEXT,TEXT)"
    )


def _told_apart(names: tuple[str, ...], positive: str | None) -> str:
    others = " and ".join(repr(name) for name in names if name != positive)
    return f"The model tells {positive!r} from {others}"
