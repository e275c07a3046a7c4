"""Who is answered by the challenger: a share of the patients, always the same ones, by a hash that nobody keeps."""

import hashlib
import json
from collections.abc import Sequence

from raymed.serve.uploads import File
from raymed.serve.uploads.dicom import Counted, check_transfer_syntax


def is_in_share(name: str, patient: str, share: float) -> bool:
    """Whether a patient is among those answered by the challenger: by a hash, so that he always is or never is. A
    request that names nobody is not."""
    if not patient or share <= 0:
        return False
    hashed = hashlib.sha256(json.dumps([name, patient]).encode()).digest()
    return int.from_bytes(hashed[:8], "big") < share * 2**64


def patient_of(files: Sequence[File]) -> str:
    """What names the patient in the first of the files that is DICOM and does: PatientID, else StudyInstanceUID; "" in
    files that name nobody. A damaged one is told of where it is decoded."""
    return next((patient for file in files if (patient := _patient(file.content))), "")


def _patient(content: bytes) -> str:
    if content[128:132] != b"DICM":
        return ""
    from pydicom import dcmread

    try:
        check_transfer_syntax(content)
        tags = ["PatientID", "StudyInstanceUID"]
        header = dcmread(Counted(content), stop_before_pixels=True, specific_tags=tags)  # type: ignore[arg-type]
        return str(header.get("PatientID") or header.get("StudyInstanceUID") or "")
    except Exception:  # a parser raises anything at all on damaged data
        return ""
