"""Where raymed keeps things: one absolute storage folder, whole files, and one process a run."""

from raymed.storage.lock import lock
from raymed.storage.network import is_network_share, local_folder
from raymed.storage.paths import home, resolve_storage, write_atomic

__all__ = ["home", "is_network_share", "local_folder", "lock", "resolve_storage", "write_atomic"]
