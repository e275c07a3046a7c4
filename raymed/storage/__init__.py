"""Where raymed keeps things: one absolute storage folder, whole files, and one process a run.

With a storage in S3 the folder is a working copy that a `Mirror` keeps in step; what a user names may be a URL, of
which readers get a file on this machine (`local_copy`).
"""

from raymed.storage.locations import (
    address,
    exists,
    fetch_all,
    is_remote,
    join,
    local_copy,
    local_folder_copy,
    push_file,
    read_bytes,
    remote_of,
    working_copy,
    write_bytes,
)
from raymed.storage.lock import lock
from raymed.storage.mirror import Mirror
from raymed.storage.network import is_network_share, local_folder
from raymed.storage.paths import resolve_storage, storage_folder, write_atomic, write_private

__all__ = [
    "Mirror",
    "address",
    "exists",
    "fetch_all",
    "storage_folder",
    "is_network_share",
    "is_remote",
    "join",
    "local_copy",
    "local_folder",
    "local_folder_copy",
    "lock",
    "push_file",
    "read_bytes",
    "remote_of",
    "resolve_storage",
    "working_copy",
    "write_atomic",
    "write_bytes",
    "write_private",
]
