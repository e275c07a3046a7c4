"""The model card of a bundle: `card.md` for people and MONAI's `metadata.json` for tools, written beside the weights.

Both are made from nothing but the bundle. What the bundle does not know stands in them as "not stated"; what somebody
intends the model for is never made up. metadata.json has the keys of the MONAI bundle specification
(https://docs.monai.io/en/stable/mb_specification.html). What is said of one kind of model alone is in
`raymed.registry.classifier_card` and `clip_card`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from raymed.bundle import Bundle
from raymed.config import UserError, config_hash, to_json
from raymed.data.captions import CaptionSet
from raymed.data.dataset import DataSet
from raymed.registry import classifier_card, clip_card
from raymed.registry.card_text import common_metadata, render
from raymed.storage import write_atomic
from raymed.tracking import git_state

CARD, METADATA = "card.md", "metadata.json"
CONTEXTS: dict[str, Callable[[Bundle], dict[str, Any]]] = {
    "classifier": classifier_card.context,
    "clip": clip_card.context,
}
DESCRIPTIONS: dict[str, Callable[[Bundle], dict[str, Any]]] = {
    "classifier": classifier_card.described,
    "clip": clip_card.described,
}


def write_card(folder: Path, name: str | None = None) -> Bundle:
    """Write `card.md` and `metadata.json` into a bundle's folder, in place of older ones; returns the bundle.

    name: the heading, such as that of the registered model. Raises UserError when the folder holds no bundle, or one of
    an unknown kind.
    """
    bundle = Bundle.load(folder)
    write_atomic(folder / CARD, card(bundle, name))
    write_atomic(folder / METADATA, to_json(metadata(bundle)))
    return bundle


def card(bundle: Bundle, name: str | None = None) -> str:
    """The card as Markdown."""
    return render(f"{_known_kind(bundle)}_card.md.j2", bundle, name, CONTEXTS[bundle.kind](bundle))


def metadata(bundle: Bundle) -> dict[str, Any]:
    """metadata.json of a MONAI bundle; the input is that of the exported network (`raymed.registry.export`)."""
    return common_metadata(bundle) | DESCRIPTIONS[_known_kind(bundle)](bundle)


def _known_kind(bundle: Bundle) -> str:
    if bundle.kind not in CONTEXTS:
        raise UserError(f"the bundle holds a {bundle.kind}: there are cards of {', '.join(CONTEXTS)} alone")
    return bundle.kind


def provenance(data: DataSet, config: Any) -> dict[str, Any]:
    """What a bundle's provenance needs for its card and its version's tags, beside run_key, seed and data.

    counts: {split: {class: images}}; of captioned images {split: {"images", "captions"}}, and findings: {split:
    {finding: images}}. patients: {split: number, or None where they are not known}. git: the commit of the working
    directory, "+changes" behind it where files differ; None without a repository. config_sha: sha256 of the config, a
    dataclass.
    """
    patients = {
        split: len(np.unique(data.patients[rows])) if data.has_patients else None for split, rows in data.splits.items()
    }
    git = git_state()
    commit = git["commit"] and git["commit"] + "+changes" * bool(git["dirty"])
    return _counts(data) | {"patients": patients, "git": commit, "config_sha": config_hash(config)}


def _counts(data: DataSet) -> dict[str, Any]:
    if isinstance(data, CaptionSet):
        num = np.array([len(several) for several in data.captions])
        counts = {split: {"images": len(i), "captions": int(num[i].sum())} for split, i in data.splits.items()}
        found = {split: data.has_finding[i].sum(axis=0).tolist() for split, i in data.splits.items()}
        findings = {split: dict(zip(data.findings, of_split, strict=True)) for split, of_split in found.items()}
        return {"counts": counts, "findings": findings}
    counts = {
        split: {name: int((data.class_codes[rows] == code).sum()) for code, name in enumerate(data.classes)}
        for split, rows in data.splits.items()
    }
    return {"counts": counts}
