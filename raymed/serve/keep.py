"""Inputs and answers on disk, where a server was told to keep them: the pixels as they were decoded, without any header
or name, and the answer, in one folder a request, which is deleted after so many days.

    DIR/20260105T081502.123456Z-0f3c.../0.png 1.png answer.json

Names are a time and the number of the request, as in the log.
"""

import os
import re
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from PIL import Image

from raymed.config import UserError

_NAME = re.compile(r"(\d{8}T\d{6}\.\d{6})Z-[0-9A-Za-z-]{1,64}")
_TIME = "%Y%m%dT%H%M%S.%f"


class Keeper:
    """Keeps in a folder, which only its owner reads. Raises UserError where it cannot be written."""

    def __init__(self, folder: str | Path, days: int):
        if "://" in str(folder):
            raise UserError(f"--keep needs a folder of this machine, got {folder}")
        self.folder, self.days = Path(folder).expanduser().absolute(), days
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UserError(f"--keep {folder} cannot be written: {error.strerror}") from None
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise UserError(f"--keep {folder} cannot be written")

    def keep(self, request: str, images: Sequence[np.ndarray], answer: str) -> Path:
        """Write one request: whole, or not at all. images: (H, W) or (H, W, 3) uint8 or uint16; answer: JSON. Blocks.
        Raises OSError."""
        final = self.folder / f"{datetime.now(UTC).strftime(_TIME)}Z-{request or 'none'}"
        part = self.folder / f".{final.name}.tmp"
        part.mkdir(mode=0o700)
        try:
            for place, pixels in enumerate(images):
                _write_pixels(part / str(place), pixels)
            (part / "answer.json").write_text(answer)
            return part.rename(final)
        except OSError:
            shutil.rmtree(part, ignore_errors=True)
            raise

    def forget(self, now: datetime | None = None) -> int:
        """Delete what is older than the days, and what a crash left half; returns how many. What bears no name of this
        keeper's stays. Blocks."""
        before = (now or datetime.now(UTC)) - timedelta(days=self.days)
        old = [path for path in self.folder.iterdir() if _is_before(path.name, before)]
        for path in old:
            shutil.rmtree(path, ignore_errors=True)
        return len(old)


def _is_before(name: str, when: datetime) -> bool:
    parts = _NAME.fullmatch(name.removeprefix(".").removesuffix(".tmp"))
    return parts is not None and datetime.strptime(parts[1], _TIME).replace(tzinfo=UTC) < when


def _write_pixels(path: Path, pixels: np.ndarray) -> None:
    """PNG; npz of what PNG has no form for here, colours of 16 bits."""
    if pixels.ndim == 3 and pixels.dtype != np.uint8:
        np.savez_compressed(path.with_suffix(".npz"), pixels=pixels)
    else:
        Image.fromarray(pixels).save(path.with_suffix(".png"), compress_level=1)
