import subprocess
import sys

from raymed.tracking import Outbox, SystemMetrics, environment, git_state, installed_packages


def _git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_git_state_of_a_repository(tmp_path):
    _git(tmp_path, "init", "-b", "work")
    assert git_state(tmp_path)["commit"] is None  # nothing committed yet
    (tmp_path / "recipe.py").write_text("1")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-m", "one")
    head = subprocess.check_output(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], text=True).strip()
    assert git_state(tmp_path) == {"commit": head, "branch": "work", "dirty": False}
    (tmp_path / "recipe.py").write_text("2")
    assert git_state(tmp_path)["dirty"] is True
    _git(tmp_path, "checkout", ".")
    _git(tmp_path, "checkout", "--detach")
    assert git_state(tmp_path) == {"commit": head, "branch": None, "dirty": False}
    (tmp_path / "new.py").touch()
    assert git_state(tmp_path)["dirty"] is True


def test_git_state_outside_a_repository_and_without_git(tmp_path, monkeypatch):
    unknown = {"commit": None, "branch": None, "dirty": None}
    assert git_state(tmp_path) == unknown
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) == unknown


def test_environment_names_what_decides_a_result():
    import torch

    found = environment()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["versions"]) >= {"raymed", "ray", "deepspeed", "mlflow"}
    assert found["num_cpus"] >= 1 and isinstance(found["gpus"], list)


def test_installed_packages_reads_like_pip_freeze():
    lines = installed_packages().splitlines()
    assert f"torch=={environment()['versions']['torch']}" in lines
    assert lines == sorted(set(lines), key=str.lower)


def test_system_metrics_sample_the_machine_and_go_on_counting(tmp_path):
    outbox = Outbox(tmp_path / "outbox.jsonl")
    outbox.metrics({"loss": 1.0}, step=1000)
    for _ in range(2):  # a process, and the one that continues its run
        with SystemMetrics(outbox, period=60):
            sum(range(10**6))
    samples = [r for r in outbox.records() if r["op"] == "metrics" and r["step"] != 1000]
    assert [sample["step"] for sample in samples] == [0, 1]
    for sample in samples:
        assert all(name.startswith("system/") for name in sample["values"])
        assert 0 < sample["values"]["system/system_memory_usage_percentage"] < 100
        assert {"system/cpu_utilization_percentage", "system/disk_usage_percentage"} <= set(sample["values"])
