"""The peer without raymed: files to and from S3 with boto3's own transfers, as its manual has it.

One file after the other (each in parts, side by side, from 8 MiB on), or `at_once` files side by side. The server is
that of the AWS_ variables; checksums beyond S3's own are off, as not every server takes them. Imports nothing else of
this project.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


class PlainS3:
    """One client."""

    def __init__(self, at_once: int = 1):
        import boto3
        from botocore.config import Config

        needed: Any = {
            name: "when_required" for name in ("request_checksum_calculation", "response_checksum_validation")
        }
        self.client = boto3.client("s3", config=Config(max_pool_connections=32, **needed))
        self.at_once = at_once

    def upload(self, bucket: str, files: Sequence[tuple[Path, str]]) -> None:
        """Path -> key."""
        self._each(lambda path, key: self.client.upload_file(str(path), bucket, key), files)

    def download(self, bucket: str, files: Sequence[tuple[Path, str]]) -> None:
        """Key -> path."""
        self._each(lambda path, key: self.client.download_file(bucket, key, str(path)), files)

    def _each(self, move: Callable[[Path, str], None], files: Sequence[tuple[Path, str]]) -> None:
        if self.at_once == 1:
            for path, key in files:
                move(path, key)
            return
        with ThreadPoolExecutor(self.at_once) as pool:
            list(pool.map(lambda pair: move(*pair), files))
