"""Offline packs: a small project is packed and installed without an index; the whole one works without a network."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
from setuptools import __version__ as setuptools_version

from raymed.cluster import offline
from raymed.cluster.offline import Check, Pack, tags, work
from raymed.cluster.whole import keep_out
from raymed.config import UserError

REPO = Path(__file__).resolve().parents[2]
PYTHON = getattr(sys, "_base_executable", sys.executable)  # a venv of a venv would see nothing else
PROJECT = """
[build-system]
requires = []
build-backend = "setuptools.build_meta"

[project]
name = "raymed"
version = "7.8"
dependencies = ["hospital-greeting>=1; sys_platform == 'linux'"]

[project.optional-dependencies]
all = ["raymed[more]"]
more = ["hospital-more==2.0"]

[tool.setuptools.packages.find]
include = ["raymed*"]
"""


PRIVATE = ("patients.csv", ".env", "data/image.png", "cluster/docker/.env", "cluster/docker/.env.old")
PRIVATE += ("cluster/kuberay/tls.key", "jobs/tls.pem", "jobs/serve.token", "jobs/cluster.json")
PRIVATE += ("cluster/monday/mlflow.db", "raymed/.env")


def wheel(folder: Path, name: str, version: str, licence: str = "", code: str = "") -> None:
    """A wheel by hand."""
    about = f"{name.replace('-', '_')}-{version}.dist-info"
    files = {
        f"{name.replace('-', '_')}.py": code,
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{licence}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/licenses/LICENSE.txt": f"the text of {name}",
    }
    files[f"{about}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{about}/RECORD"])
    with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as file:
        for path, text in files.items():
            file.writestr(path, text)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with two dependencies, beside things that are nobody else's business."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "raymed").mkdir()
    (folder / "raymed/__init__.py").write_text("import hospital_greeting\nhello = hospital_greeting.text\n")
    (folder / "jobs").mkdir()
    (folder / "jobs/greet.py").write_text("import raymed\nprint(raymed.hello)\n")
    shutil.copytree(REPO / "cluster/offline", folder / "cluster/offline", ignore=shutil.ignore_patterns("__pycache__"))
    for private in PRIVATE:
        (folder / private).parent.mkdir(exist_ok=True)
        (folder / private).write_text("private")
    keep_out(folder / "cluster/monday")
    for name in (".gitignore", ".rayignore"):
        shutil.copy(REPO / name, folder)
    return folder


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Where pip finds the dependencies, and nothing else."""
    folder = tmp_path_factory.mktemp("index")
    wheel(folder, "hospital-greeting", "1.5", "License-Expression: MIT", "text = 'hello'")
    wheel(folder, "hospital-greeting", "1.4", "License-Expression: MIT", "text = 'old'")
    wheel(folder, "hospital-more", "2.0", "License: BSD for all\n and more\nClassifier: License :: OSI :: MPL 2.0")
    return folder


@pytest.fixture(scope="module")
def packed(project, index, tmp_path_factory):
    """A pack of the small project, with weights."""
    if int(setuptools_version.split(".")[0]) < 77:
        pytest.skip("setuptools is older than what builds raymed")
    weights = tmp_path_factory.mktemp("hub") / "resnet"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"1234")
    (weights / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    folder = tmp_path_factory.mktemp("usb") / "pack"
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            patch.delenv(name)
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_CONFIG_FILE", os.devnull)
        patch.setenv("PIP_FIND_LINKS", str(index))
        patch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # setuptools of this environment; pip reads it the wrong way round
        offline.pack(Pack(str(folder), weights=(str(weights),)), project)
    return folder


@pytest.fixture
def copy(packed, tmp_path):
    """Of the pack, to be damaged."""
    return Path(shutil.copytree(packed, tmp_path / "pack"))


def install(pack: Path, venv: Path, *words: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """As on a machine that has Python alone."""
    command = [*before, PYTHON, str(pack / "install.py"), str(venv), *words]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=env)


def test_a_pack_holds_what_is_needed_and_no_more(packed, project):
    wheels = sorted(path.name for path in packed.glob("wheels/*"))
    assert wheels == [
        "hospital_greeting-1.5-py3-none-any.whl",
        "hospital_more-2.0-py3-none-any.whl",
        "raymed-7.8-py3-none-any.whl",
    ]
    with tarfile.open(packed / "raymed-7.8.tar.gz") as tar:
        names = [name.removeprefix("raymed-7.8/") for name in tar.getnames()]
    assert "jobs/greet.py" in names and "cluster/offline/install.py" in names and "pyproject.toml" in names
    own = {".gitignore", ".rayignore", "cluster", "jobs", "pyproject.toml", "raymed"}
    assert {name.split("/")[0] for name in names} == own
    assert not {"cluster/monday", *PRIVATE} & set(names)
    assert not list(project.glob("build")) and not list(project.glob("*.egg-info"))
    facts = json.loads((packed / "pack.json").read_text())
    assert facts["python"] == f"{sys.version_info.major}.{sys.version_info.minor}" and facts["raymed"] == "7.8"


def test_a_pack_says_under_which_licences_everything_stands(packed):
    table = (packed / "licences/LICENCES.md").read_text()
    for row in ("| hospital-greeting | 1.5 | MIT |", "| hospital-more | 2.0 | MPL 2.0 |"):
        assert row in table
    assert "| raymed | 7.8 | not stated |" in table and "| weights/resnet | | cc-by-4.0 |" in table
    assert (packed / "licences/hospital-more-2.0/licenses-LICENSE.txt").read_text() == "the text of hospital-more"


def test_the_sums_are_those_that_sha256sum_reads(packed):
    lines = (packed / "SHA256SUMS").read_text().splitlines()
    files = {path.relative_to(packed).as_posix(): path for path in packed.rglob("*") if path.is_file()}
    own = {"SHA256SUMS", ".gitignore"}
    expected = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}" for name, path in files.items()]
    assert sorted(lines) == sorted(line for line in expected if line.split()[1] not in own)
    if shutil.which("sha256sum"):
        assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=packed).returncode == 0
    assert "is whole" in work(Check(str(packed)))


def test_it_installs_by_itself(packed, tmp_path):
    done = install(packed, tmp_path / "venv")
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256((packed / "SHA256SUMS").read_bytes()).hexdigest() in done.stdout
    greeting = [str(tmp_path / "venv/bin/python"), "-I", "-c", "import raymed; print(raymed.hello, raymed.__file__)"]
    said = subprocess.run(greeting, capture_output=True, text=True, cwd=tmp_path).stdout
    assert said.startswith("hello") and str(tmp_path / "venv") in said
    done = install(packed, tmp_path / "venv", "--project", str(tmp_path))
    assert done.returncode == 2 and "there is no pyproject.toml" in done.stderr


def test_an_environment_that_was_half_made_is_made_again(packed, tmp_path):
    """Debian without python3-venv leaves a Python without pip."""
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    done = install(packed, tmp_path / "venv")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        (
            "wheels/hospital_more-2.0-py3-none-any.whl",
            lambda path: path.write_bytes(b"1"),
            "damaged",
        ),
        ("weights/resnet/model.safetensors", lambda path: path.unlink(), "missing"),
        ("wheels/raymed-9.0-py3-none-any.whl", lambda path: path.write_bytes(b""), "added"),
        ("pack.json", lambda path: path.write_text("{}"), "damaged"),
    ],
)
def test_a_pack_that_came_otherwise_is_refused_by_name(file, damage, said, copy, tmp_path):
    damage(copy / file)
    done = install(copy, tmp_path / "venv")
    assert done.returncode == 2 and f"{file} " in done.stderr and said in done.stderr
    assert "nothing was installed" in done.stderr and not (tmp_path / "venv").exists()
    with pytest.raises(UserError, match=f"{file} .*{said}"):
        work(Check(str(copy)))


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"python": "3.9"}, "the pack is for Python 3.9"),
        ({"platform": "manylinux_2_28_riscv64"}, "the pack is for Linux on riscv64"),
        ({"platform": f"manylinux_2_99_{os.uname().machine}"}, "needs glibc 2.99 or newer"),
    ],
)
def test_a_pack_for_another_machine_is_refused(facts, said, copy, tmp_path):
    from raymed.cluster import sums

    path = copy / "pack.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    sums.write(copy)
    done = install(copy, tmp_path / "venv")
    assert done.returncode == 2 and said in done.stderr and not (tmp_path / "venv").exists()


def test_wheels_for_older_systems_are_taken_too():
    found = tags("manylinux_2_18_x86_64")
    assert found[:2] == ["manylinux_2_18_x86_64", "manylinux_2_17_x86_64"] and "manylinux2014_x86_64" in found
    assert "manylinux_2_19_x86_64" not in found and "manylinux1_x86_64" in found
    assert "manylinux2014_aarch64" not in tags("manylinux_2_16_aarch64")


def test_what_cannot_be_packed_leaves_nothing(project, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    target = str(tmp_path / "pack")
    for given, where, reason in [
        ({"folder": target}, project, "pip download failed(.|\n)*hospital-greeting"),
        ({"folder": target}, tmp_path, "is not raymed's project folder"),
        ({"folder": target, "extras": ("train",)}, project, "--extras must be one of 'all', 'more', got 'train'"),
        ({"folder": target, "weights": (str(tmp_path / "no"),)}, project, "there is no such folder"),
        ({"folder": target, "weights": (str(project), str(project))}, project, "two folders have the name"),
        ({"folder": str(tmp_path / "full")}, project, "name a new folder"),
    ]:
        with pytest.raises(UserError, match=reason):
            offline.pack(Pack(**given), where)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    with pytest.raises(UserError, match="--platform must be like"):
        Pack(target, platform="win_amd64")


TINY = (
    "--data.preprocess.size=32 --supcon.batch-size=32 --supcon.steps=12 --supcon.evaluations=2 --supcon.accumulate=1 "
    "--head.batch-size=32 --head.steps=40 --head.evaluations=8 --single.batch-size=32 --single.steps=12 "
    "--single.evaluations=3"
).split()
SWEEP = "--seeds 2023 --sweep.num-trials 4 --finals.seeds 3001 --finals.finalists 1".split()


def make(project: Path, *words: str, before: tuple[str, ...] = (), env: dict | None = None):
    """A target of a project's Makefile."""
    env = env or {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run([*before, "make", *words], cwd=project, env=env, capture_output=True, text=True, timeout=1200)


@pytest.fixture
def short():
    """A folder with a short name, for Ray's sockets, of which nothing stays: it holds some GB."""
    folder = Path(tempfile.mkdtemp(prefix="rp-"))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3000)
def test_the_whole_project_without_a_network(short):
    """The README's commands. `unshare --net` gives a network of its own, with a loopback interface and nothing else."""
    if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("ip"):
        pytest.skip("a network namespace needs root, unshare and iproute2")
    done = make(REPO, "--old-file=install", f"BIN={Path(sys.executable).parent}", "offline-pack", f"TO={short}/pack")
    if "No matching distribution" in done.stderr or "Connection" in done.stderr:
        pytest.skip(f"pip finds no packages here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    alone = ("unshare", "--net", "sh", "-c", 'ip link set lo up; exec "$@"', "sh")
    assert subprocess.run([*alone, "ip", "route", "get", "1.1.1.1"], capture_output=True).returncode != 0
    with tarfile.open(next((short / "pack").glob("raymed-*.tar.gz"))) as tar:
        tar.extractall(short, filter="data")
    (code,) = short.glob("raymed-*")
    env = {"PATH": os.environ["PATH"], "HOME": str(short), "TMPDIR": str(short), "OMP_NUM_THREADS": "1"}
    done = make(code, "install", "OFFLINE=../pack", f"PYTHON={PYTHON}", before=alone, env=env)
    assert done.returncode == 0, done.stderr
    train = [*alone, ".venv/bin/python", "jobs/train_classifier.py", *TINY]
    assert subprocess.run(train, cwd=code, env=env, timeout=600).returncode == 0
    done = make(code, "demo", f"ARGS={' '.join([*TINY, *SWEEP])}", before=alone, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for job, made in [("train_classifier", "evaluation"), ("tune_asl", "report.html")]:
        (run,) = (short / ".raymed/runs").glob(f"{job}-*")
        assert (run / made).exists() and (run / "summary.json").is_file()
