"""Whether images are what a bundle's `contract` demands (`raymed.tasks.predictor.input_contract`).

Demands: the kinds of files, the modality and the body part. What a file does not state (a PNG states neither modality
nor body part) is not refused, and NOT_STATED demands nothing. Size, channels, photometric interpretation and bits are
those of what the network gets: images are resampled, scaled, and turned into grey or colour on the way. The number of
views is that of the training data: a case may have fewer images or more.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from raymed.bundle import NOT_STATED, Bundle
from raymed.serve.handlers import Upload
from raymed.serve.problems import Problem

_MODALITIES = frozenset(
    "AR BDUS BI BMD CFM CR CT DG DMS DX ES GM IO IVOCT IVUS KER LEN LS MG MR NM OAM OCT OP OPM OPT OPTBSV OPTENF OPV"
    " OSS OT PA PT PX RF RG RTIMAGE SC SM SRF TG US VA XA XC".split()
)
"""Of images (PS3.16 CID 29), and of secondary captures."""
_DEFINED_TERM = re.compile(r"[A-Z][A-Z0-9_ ]{0,15}")
"""A code string (PS3.5 6.2), as Body Part Examined is."""


def check_contract(bundle: Bundle, uploads: Sequence[Upload]) -> None:
    """Raises Problem (422) with the field files[PLACE].NAME for an image that the model was not made for. It says what
    is expected, not what was found."""
    for upload in uploads:
        where = f"files[{upload.file}]"
        _check(f"{where}.kind", _known(bundle.contract, "file_kinds"), upload.kind or None)
        if upload.header is not None:
            _check(f"{where}.modality", _modalities(bundle.contract), _stated(upload.header, "Modality"))
            _check(f"{where}.body_part", _body_parts(bundle.contract), _stated(upload.header, "BodyPartExamined"))


def check_frames(frames: Sequence[int] | None, uploads: Sequence[Upload]) -> None:
    """Raises Problem (422) where frames were chosen and no file of the case has any to choose from. uploads: of all its
    files."""
    if frames is not None and all(upload.frame is None for upload in uploads):
        raise Problem(422, "frames: a file that holds several images is expected, to choose from", field="frames")


def _check(field: str, expected: Sequence[str], found: str | None) -> None:
    if expected and found and found not in expected:
        raise Problem(422, f"{field}: {' or '.join(expected)} is expected", field=field)


def _known(contract: Mapping[str, Any], name: str) -> list[str]:
    """What a contract lists; nothing where it states nothing."""
    value = contract.get(name, NOT_STATED)
    if value == NOT_STATED or not value:
        return []
    return [value] if isinstance(value, str) else list(value)


def _modalities(contract: Mapping[str, Any]) -> list[str]:
    """DICOM's codes of a contract, which may name several; nothing where it says it in other words."""
    codes = [code for text in _known(contract, "modality") for code in re.split(r"[\s,;/|]+", text.upper()) if code]
    return codes if _MODALITIES.issuperset(codes) else []


def _body_parts(contract: Mapping[str, Any]) -> list[str]:
    """Defined terms of a contract, which may name several; nothing where it says it in other words."""
    terms = [term.strip() for text in _known(contract, "body_part") for term in re.split(r"[,;/|]", text)]
    return terms if all(_DEFINED_TERM.fullmatch(term) for term in terms) else []


def _stated(header: Any, name: str) -> str | None:
    """An attribute of a data set, if it is one text."""
    try:
        value = header.get(name)
    except Exception:  # a damaged value is none
        return None
    return value.strip().upper() or None if isinstance(value, str) else None
