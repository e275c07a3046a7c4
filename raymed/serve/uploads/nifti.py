"""What a NIfTI file must be before it is decoded."""

import math

from raymed.data.formats import Images, Nifti
from raymed.serve.problems import Problem

INFLATED = 2**30
"""Bytes that a gzipped volume may be. They are passed through, not held."""


def check(images: Images, content: bytes) -> None:
    """Raises Problem for a volume whose values are not there (422), or are too many to go through (413)."""
    assert isinstance(images, Nifti)
    end = images.offset + math.prod(images.shape) * images.dtype.itemsize
    is_gzipped = content.startswith(b"\x1f\x8b")
    if is_gzipped and end > INFLATED:
        raise Problem(413, f"a volume of at most {INFLATED // 2**20} MiB is expected")
    if not is_gzipped and end > len(content):
        raise Problem(422, "cut short: there are fewer values than its header states")
