"""Compressed DICOM pixels, decoded in processes of their own.

The decoders of JPEG, JPEG-LS and JPEG 2000 are made for files that are well formed: one that is not costs them the
memory of its image for good (measured: pylibjpeg-libjpeg 2.5), may keep them busy, or end the process. So they run in a
process that may be lost, and that goes when it has grown. Only pixels and their shape are sent there.
"""

import io
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil

from raymed.serve.uploads.codestreams import damaged

if TYPE_CHECKING:
    from pydicom import Dataset

SECONDS = 30.0
"""That one frame may take."""
LARGEST = 512 * 2**20
"""Bytes that a process may have after it could not decode something."""
_SCRIPT = Path(__file__).with_name("codec_process.py")
_TOLD = ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "BitsAllocated")
_TOLD += ("BitsStored", "HighBit", "PixelRepresentation")
_idle: list[subprocess.Popen[bytes]] = []
"""Processes that wait: never more than threads have asked at once."""


def decompressed(ds: "Dataset", frame: bytes) -> np.ndarray:
    """One frame: (H, W) or (H, W, 3) as stored, colour as RGB. Raises Problem (422) for what cannot be decoded."""
    process = _process()
    limit = threading.Timer(SECONDS, process.kill)
    limit.start()
    try:
        answer = _asked(process, _small_object(ds, frame))
    except OSError:
        answer = None
    finally:
        limit.cancel()
    if answer is None or (not answer and psutil.Process(process.pid).memory_info().rss > LARGEST):
        process.kill()
        process.communicate()
    else:
        _idle.append(process)
    if not answer:
        raise damaged()
    return np.load(io.BytesIO(answer), allow_pickle=False)


def _process() -> subprocess.Popen[bytes]:
    """One that waits and lives, or a new one."""
    try:
        while (process := _idle.pop()).poll() is not None:
            process.communicate()
        return process
    except IndexError:
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, "-P", _SCRIPT], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)


def _asked(process: subprocess.Popen[bytes], content: bytes) -> bytes | None:
    """The answer of a process, empty for what it cannot decode; None, or OSError, where it has ended."""
    assert process.stdin and process.stdout
    process.stdin.write(len(content).to_bytes(8, "little"))
    process.stdin.write(content)
    process.stdin.flush()
    length = int.from_bytes(process.stdout.read(8).ljust(8, b"\xff"), "little")
    answer = process.stdout.read(length) if length < 2**63 else b""
    return answer if len(answer) == length else None


def _small_object(ds: "Dataset", frame: bytes) -> bytes:
    """An object with a frame and what decoding it takes: nothing of the patient."""
    from pydicom import dcmwrite
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate

    small = Dataset()
    small.preamble, small.file_meta = bytes(128), FileMetaDataset()
    small.file_meta.TransferSyntaxUID = ds.file_meta.TransferSyntaxUID
    for name in _TOLD:
        if name in ds:
            small[name] = ds[name]
    small.PixelData = encapsulate([frame], has_bot=False)
    small["PixelData"].VR = "OB"
    small["PixelData"].is_undefined_length = True
    file = io.BytesIO()
    dcmwrite(file, small)
    return file.getvalue()
