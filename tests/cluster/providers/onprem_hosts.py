"""Hosts on this machine that are as real as its kernel allows: each with systemd as its first process, sshd, a network
interface, a journal and an /etc of its own, over this machine's files, none of which they change.

Needs root, overlayfs, iproute2, systemd and openssh-server. A bridge joins the hosts with this machine.
"""

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from nodes import wait_for

REPO = Path(__file__).resolve().parents[3]
_PROGRAMS = ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "sshd", "/lib/systemd/systemd")
_CGROUPS = ("/sys/fs/cgroup/unified", "/sys/fs/cgroup")  # beside older ones, and alone

# The first process of a host, in namespaces of its own: ROOT (its disk, kept over a reboot), NAME, SHARED.
_BOOT = r"""
set -e
root=$1; name=$2; shared=$3
mount --make-rprivate /
mount -t overlay overlay -o "lowerdir=/,upperdir=$root/upper,workdir=$root/work" "$root/disk"
cd "$root/disk"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=755 tmpfs dev
for device in null zero full random urandom tty; do touch dev/$device; mount --bind /dev/$device dev/$device; done
mkdir dev/shm dev/pts
mount -t tmpfs -o mode=1777,size=12g tmpfs dev/shm
mount -t devpts -o newinstance,ptmxmode=666,mode=620 devpts dev/pts
ln -s pts/ptmx dev/ptmx; ln -s /proc/self/fd dev/fd
mkdir -p shared
mount --bind "$shared" shared
hostname "$name"
if [ ! -e etc/raymed-installed ]; then
    touch etc/raymed-installed
    echo "$name" > etc/hostname
    printf '127.0.0.1 localhost\n127.0.1.1 %s\n' "$name" > etc/hosts
    : > etc/machine-id; rm -f etc/ssh/ssh_host_*
    mkdir -p var/log/journal
    mkdir -p root/.ssh; cp "$root/authorized" root/.ssh/authorized_keys
    chmod 700 root/.ssh; chmod 600 root/.ssh/authorized_keys
    cp "$root/host_key" etc/ssh/ssh_host_ed25519_key; chmod 600 etc/ssh/ssh_host_ed25519_key
    (cd etc/systemd/system; rm -rf ./*.wants; mkdir multi-user.target.wants
     ln -s /lib/systemd/system/ssh.service multi-user.target.wants
     for unit in systemd-tmpfiles-setup systemd-tmpfiles-clean systemd-udevd; do ln -s /dev/null $unit.service; done)
fi
pivot_root . mnt
umount -l mnt
exec env -i container=raymed PATH="$PATH" /lib/systemd/systemd --unit=multi-user.target
"""


def check_possible() -> None:
    """Skip the test where such hosts cannot be."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [program for program in _PROGRAMS if shutil.which(program, path=path) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"hosts need root and {', '.join(missing) or 'nothing else'}")


class Hosts:
    """Two hosts, "alpha" and "beta", and what SSH needs to get there. A context manager.

    folder: of files for SSH (`key`, `known`, `config`), of `shared`, which hosts see as /shared, and of `venv`.
    """

    def __init__(self, folder: Path):
        self.folder, self.shared, self.key = folder, folder / "shared", folder / "key"
        self.known, self.config = folder / "known_hosts", folder / "ssh_config"
        self.network = f"10.79.{os.getpid() % 250}"
        self.bridge = f"rm{os.getpid()}"
        self.disks = Path(f"/dev/shm/{self.bridge}")  # an overlay's upper folder may not lie in the lower one
        self.numbers = {"alpha": 1, "beta": 2}
        self.processes: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Hosts":
        self.shared.mkdir()
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key)
        self.config.write_text(f"UserKnownHostsFile {self.known}\nGlobalKnownHostsFile none\nUser root\n")
        try:
            _run("ip", "link", "add", self.bridge, "type", "bridge")
            _run("ip", "addr", "add", f"{self.network}.254/24", "dev", self.bridge)
            _run("ip", "link", "set", self.bridge, "up")
            for name in self.numbers:
                self._install(name)
                self.boot(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for name in list(self.processes):
            self.cut_power(name)
        for name in self.numbers:
            subprocess.run(["ip", "netns", "del", self._space(name)], capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)
        shutil.rmtree(self.disks, ignore_errors=True)

    def address(self, name: str) -> str:
        """Its IP address."""
        return f"{self.network}.{self.numbers[name]}"

    def boot(self, name: str) -> None:
        """Switch a host on; returns when sshd answers."""
        group = self._group(name)
        group.mkdir(exist_ok=True)
        words = ["ip", "netns", "exec", self._space(name), "unshare", "--mount", "--pid", "--uts", "--ipc", "--cgroup"]
        words += ["--fork", "--kill-child", "sh", "-c", _BOOT, "boot", self.disks / name, name, self.shared]
        enter = f"echo $$ > {group}/cgroup.procs; exec " + ' "$@"'
        log = open(self.folder / f"{name}.log", "ab")
        self.processes[name] = subprocess.Popen(
            ["sh", "-c", enter, "sh", *map(str, words)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        wait_for(lambda: self._sshd(name), 60, f"{name} boots: {(self.folder / f'{name}.log').read_text()}")

    def cut_power(self, name: str) -> None:
        """All that runs on a host is gone at once; its disk stays."""
        process = self.processes.pop(name)
        process.kill()
        process.wait(30)
        group = self._group(name)
        wait_for(lambda: "populated 0" in (group / "cgroup.events").read_text(), 30, f"{name} ends")
        for folder in sorted(group.rglob("*/"), reverse=True):
            with suppress(OSError):
                folder.rmdir()
        group.rmdir()

    def inside(self, name: str, *words: object) -> str:
        """What a command prints that root runs there, past SSH."""
        first = _run("pgrep", "-P", self.processes[name].pid).split()[0]
        return _run("nsenter", "-t", first, "-a", *words)

    def unplug(self, name: str, how: str = "down") -> None:
        """Take the host's network cable out, or ("up") plug it in."""
        _run("ip", "-n", self._space(name), "link", "set", "eth0", how)

    def _install(self, name: str) -> None:
        disk, space = self.disks / name, self._space(name)
        for folder in ("upper", "work", "disk"):
            (disk / folder).mkdir(parents=True)
        shutil.copy(f"{self.key}.pub", disk / "authorized")
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", disk / "host_key")
        with self.known.open("a") as known:
            known.write(f"{self.address(name)} {(disk / 'host_key.pub').read_text()}")
        cable = f"{self.bridge}-{self.numbers[name]}"
        _run("ip", "netns", "add", space)
        _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
        _run("ip", "link", "set", cable, "master", self.bridge, "up")
        _run("ip", "-n", space, "link", "set", "lo", "up")
        _run("ip", "-n", space, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        _run("ip", "-n", space, "link", "set", "eth0", "up")

    def _sshd(self, name: str) -> bool:
        assert self.processes[name].poll() is None, (self.folder / f"{name}.log").read_text()
        words = ["ssh", "-F", self.config, "-i", self.key, "-o", "BatchMode=yes", "-o", "ConnectTimeout=2"]
        return subprocess.run([*words, self.address(name), "true"], capture_output=True).returncode == 0

    def _space(self, name: str) -> str:
        return f"{self.bridge}-{name}"

    def _group(self, name: str) -> Path:
        top = next(Path(top) for top in _CGROUPS if Path(top, "cgroup.procs").exists())
        return top / self._space(name)


def make_venv(folder: Path) -> Path:
    """A virtual environment that finds this project and the packages that run this test."""
    venv = folder / "venv"
    _run(sys.executable, "-m", "venv", "--without-pip", venv)
    packages = next(venv.glob("lib/python*/site-packages"))
    found = [path for path in sys.path if path.endswith(("-packages", "extra"))]
    (packages / "here.pth").write_text("\n".join([str(REPO), *found]))
    return venv


def _run(*words: object) -> str:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, words))}: {done.stderr}{done.stdout}"
    return done.stdout
