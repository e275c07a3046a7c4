import pytest

from raymed.storage import is_network_share, local_folder, network

MOUNTS = [("/", "ext4"), ("/home", "nfs4"), ("/home/local", "xfs"), ("/data", "autofs"), ("/data", "cifs")]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/tmp/x", False),
        ("/home/user/runs", True),
        ("/home", True),
        ("/homes/user", False),
        ("/home/local/runs", False),
        ("/data/set", True),
    ],
)
def test_the_deepest_mount_point_decides(path, expected):
    assert is_network_share(path, MOUNTS) is expected


@pytest.mark.parametrize("kind", ["nfs", "NFS", "smb3", "9p", "fuse.sshfs", "lustre"])
def test_network_file_systems(kind):
    assert is_network_share("/x/y", [("/", "ext4"), ("/x", kind)])


def test_a_table_without_the_path_means_local():
    assert not is_network_share("/x", [])


def test_this_machine_has_a_mount_table(tmp_path):
    assert not is_network_share("/proc")


def _shares(monkeypatch, *folders):
    """The named folders look like network shares to the code under test."""
    mounts = [("/", "ext4"), *((str(folder), "nfs") for folder in folders)]
    monkeypatch.setattr(network, "is_network_share", lambda path: is_network_share(path, mounts))


def test_local_storage_keeps_its_stores(tmp_path, monkeypatch, capsys):
    _shares(monkeypatch)
    assert local_folder(tmp_path, "cache") == tmp_path / "cache"
    assert (tmp_path / "cache").is_dir()
    assert capsys.readouterr().out == ""


def test_a_share_moves_them_and_says_so_once(tmp_path, monkeypatch, capsys):
    share, disk = tmp_path / "share", tmp_path / "disk"
    _shares(monkeypatch, share)
    monkeypatch.setenv("RAYMED_LOCAL", str(disk))
    folder = local_folder(share, "mlflow")
    assert folder == local_folder(share, "mlflow")
    assert folder.is_dir() and folder.is_relative_to(disk) and folder.name == "mlflow"
    assert local_folder(tmp_path / "share" / "other", "mlflow") != folder
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and str(share) in lines[0] and str(folder) in lines[0]


def test_a_home_on_a_share_is_no_local_disk(tmp_path, monkeypatch):
    monkeypatch.delenv("RAYMED_LOCAL", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(network.tempfile, "gettempdir", lambda: str(tmp_path / "scratch"))
    _shares(monkeypatch, tmp_path / "share")
    assert local_folder(tmp_path / "share", "x").is_relative_to(tmp_path / "cache" / "raymed")
    _shares(monkeypatch, tmp_path / "share", tmp_path / "cache")
    assert local_folder(tmp_path / "share", "x").is_relative_to(tmp_path / "scratch")
