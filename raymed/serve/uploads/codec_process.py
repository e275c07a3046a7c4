"""A process that decodes compressed DICOM pixels, one small object after the other: run by `apart`, never imported.

Each object comes in, and each array leaves (as .npy, empty for what cannot be decoded), behind its length in 8 bytes.
"""

import io
import os
import sys

import numpy as np
import pydicom
import pydicom.config
import pydicom.uid
from pydicom.pixels.utils import pixel_array


def main() -> None:
    """Until nobody asks any more."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries may print
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    while length := int.from_bytes(sys.stdin.buffer.read(8), "little"):
        answer = io.BytesIO()
        try:
            np.save(answer, decoded(sys.stdin.buffer.read(length)), allow_pickle=False)
        except Exception:  # decoders raise anything at all on damaged pixels
            answer = io.BytesIO()
        answers.write(len(answer.getbuffer()).to_bytes(8, "little"))
        answers.write(answer.getbuffer())
        answers.flush()


def decoded(content: bytes) -> np.ndarray:
    """The only frame of an object. Raises anything."""
    ds = pydicom.dcmread(io.BytesIO(content))
    is_jpeg_ls = ds.file_meta.TransferSyntaxUID in pydicom.uid.JPEGLSTransferSyntaxes
    # of the two decoders of JPEG-LS, the other takes seconds to find out that ten pixels are damaged
    return pixel_array(ds, decoding_plugin="pylibjpeg" if is_jpeg_ls else "")


if __name__ == "__main__":
    main()
