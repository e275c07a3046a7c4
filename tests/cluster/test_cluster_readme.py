"""What cluster/README.md says can be typed: flags and files exist, and the commands of this machine run."""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import tyro

from raymed.cluster import providers
from raymed.storage.server import weed

REPO = Path(__file__).resolve().parents[2]
TEXT = (REPO / "cluster" / "README.md").read_text(encoding="utf-8")
SMALL = {
    "jobs/train_classifier.py": "--method asl --single.steps 12 --single.evaluations 3 --data.preprocess.size 32",
    "jobs/tune_asl.py": "--data.preprocess.size 32 --supcon.steps 20 --sweep.num-trials 4 --finals.seeds 3001 "
    "--finals.finalists 1",
}
"""Flags that make a job short."""


def commands() -> Iterator[list[str]]:
    """The words of each line of the indented blocks."""
    lines = re.sub(r"\\\n\s*", "", TEXT).splitlines()
    return (shlex.split(line, comments=True) for line in lines if line.startswith("    "))


def made() -> Iterator[tuple[str, dict[str, str]]]:
    """Target and variables of each `make`."""
    for words in commands():
        for start in [place for place, word in enumerate(words) if word == "make"]:
            rest = words[start + 1 :]
            end = rest.index("&&") if "&&" in rest else len(rest)
            yield rest[0], dict(word.split("=", 1) for word in rest[1:end])


def test_every_target_is_in_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    named = {target for target, _ in made()} | set(re.findall(r"`make ([a-z-]+)", TEXT))
    assert len(named) > 9 and named <= targets


def test_every_flag_is_one_of_its_provider():
    ups = [variables for target, variables in made() if target == "cluster-up"]
    assert {variables["PROVIDER"] for variables in ups} == set(providers.PROVIDERS)
    for variables in ups:
        tyro.cli(providers.provider(variables["PROVIDER"]).Config, args=shlex.split(variables.get("ARGS", "")))


def test_every_file_and_module_that_is_named_exists():
    files = re.findall(r"(?:jobs|cluster|raymed)/[\w./-]*\w", TEXT)
    assert len(files) > 10 and not [file for file in files if not (REPO / file).exists()]
    modules = re.findall(r"python -m (raymed[\w.]*)", TEXT)
    assert modules and all(find_spec(module) for module in modules)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_this_machine_can_do_runs(tmp_path):
    if weed() is None or find_spec("flask_wtf") is None or not (REPO / ".venv" / "bin" / "python").exists():
        pytest.skip("no local cluster: make install")
    foreign = ("RAY_", "RAYMED_", "AWS_", "MLFLOW_", "MAKE", "MFLAGS")
    kept = {name: v for name, v in os.environ.items() if not name.startswith(foreign)}
    home = {"HOME": str(tmp_path), "RAYMED_HOME": str(tmp_path / "own"), "RAYMED_CLUSTER": str(tmp_path / "cluster")}
    *block, down = list(made())[:8]
    saved, restored = (found for found in made() if found[0] in ("backup", "restore"))
    block += [saved, down, restored]
    assert [target for target, _ in block] == [
        "cluster-up", "doctor", "submit", "submit", "logs", "cluster-status", "stop",
        "backup", "cluster-down", "restore",
    ]  # fmt: skip
    saved[1]["TO"] = restored[1]["FROM"] = str(tmp_path / saved[1]["TO"])
    restored[1]["ARGS"] = restored[1]["ARGS"].replace("/new", str(tmp_path / "new"))
    try:
        for target, variables in block:
            if "JOB" in variables:
                variables["ARGS"] = f"{variables.get('ARGS', '')} {SMALL[variables['JOB']]}"
            words = [f"{name}={value}" for name, value in variables.items()]
            done = subprocess.run(
                ["make", target, *words], cwd=REPO, env=kept | home, capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, (target, done.stdout[-3000:], done.stderr[-3000:])
        assert list((tmp_path / "new/runs").glob("tune_asl-*/report.html"))
    finally:
        subprocess.run(["make", "cluster-down"], cwd=REPO, env=kept | home, check=True, timeout=120)
    mine = subprocess.run(["ps", "eww", "-A", "-o", "pid,args"], capture_output=True, text=True, check=True).stdout
    assert not [line for line in mine.splitlines() if f"RAYMED_CLUSTER={tmp_path}" in line and "ps eww" not in line]
