"""Network shares: sqlite and memory-mapped caches do not belong on them, so they get a folder on a local disk.

sqlite's locks are unreliable on NFS and SMB (https://www.sqlite.org/faq.html#q5), and a memory-mapped cache there is
read over the network again and again.
"""

import functools
import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePath

NETWORK_FILE_SYSTEMS = frozenset(
    ["nfs", "nfs4", "cifs", "smbfs", "smb2", "smb3", "afs", "ncpfs", "9p", "vboxsf"]
    + ["lustre", "gpfs", "beegfs", "beegfs_nodev", "ceph", "glusterfs", "orangefs", "pvfs2", "panfs", "wekafs"]
    + [f"fuse.{kind}" for kind in ("sshfs", "ceph", "glusterfs", "gcsfuse", "juicefs", "rclone", "s3fs")]
)


def is_network_share(path: str | Path, mounts: Iterable[tuple[str, str]] | None = None) -> bool:
    """True when the path lies on a file system that another machine serves.

    mounts: (mount point, file system type) in the order they were mounted; default: this machine's.
    """
    path = Path(path).resolve()
    if mounts is None:
        import psutil

        mounts = [(part.mountpoint, part.fstype) for part in psutil.disk_partitions(all=True)]
    above = [(len(PurePath(point).parts), kind) for point, kind in mounts if path.is_relative_to(point)]
    # The deepest mount point holds the path; of two mounts on one point the later one covers the earlier.
    deepest = max((depth for depth, _ in above), default=0)
    kinds = [kind.lower() for depth, kind in above if depth == deepest]
    return bool(kinds) and kinds[-1] in NETWORK_FILE_SYSTEMS


def local_folder(storage: Path, what: str) -> Path:
    """Folder for `what` (a sqlite store, a cache), created: storage/what, or one on a local disk if storage is a share.

    That is below $RAYMED_LOCAL, else ~/.cache/raymed, else (home is a share too) the temporary folder; a line says so.
    """
    folder = storage / what
    if is_network_share(storage):
        folder = local_root() / hashlib.sha256(str(storage).encode()).hexdigest()[:12] / what
        _announce(storage, folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def local_root() -> Path:
    """Folder on a disk of this machine for what can be had again: $RAYMED_LOCAL, else ~/.cache/raymed."""
    if chosen := os.environ.get("RAYMED_LOCAL"):
        return Path(chosen).expanduser().absolute()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute()
    return Path(tempfile.gettempdir(), f"raymed-{os.getuid()}") if is_network_share(cache) else cache / "raymed"


def moved(path: Path, root: Path) -> Path:
    """Where a path of another machine lies on this one: what is below that machine's `root` (its `local_root()`) is
    below this one's."""
    return local_root() / path.relative_to(root) if path.is_relative_to(root) else path


@functools.cache
def _announce(storage: Path, folder: Path) -> None:
    print(f"{storage} is on a network share: {folder.name} is kept in {folder} (RAYMED_LOCAL=PATH moves it)")
