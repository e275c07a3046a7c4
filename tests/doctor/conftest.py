"""What all tests of the doctor share: a place that is this machine, and commands with a mount of their own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch, tmp_path):
    """No proxy, no cluster and no services but those of the test."""
    for name in (*PROXIES, *map(str.upper, PROXIES), "RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAYMED_CLUSTER", str(tmp_path / "no-cluster"))
    monkeypatch.setenv("RAYMED_LOCAL", str(tmp_path / "local"))


@pytest.fixture
def doctor() -> Callable[..., tuple[int, dict[str, dict]]]:
    """doctor(*flags, mount="...", **environment) -> (exit code, {name: finding}).

    mount: shell commands that run before it in a mount namespace of its own.
    """

    def run(*flags: str, mount: str = "", **environment: str) -> tuple[int, dict[str, dict]]:
        words = [sys.executable, "-m", "raymed.doctor", "--json", *flags]
        if mount:
            if os.geteuid() != 0 or shutil.which("unshare") is None:
                pytest.skip("a mount of its own needs root and unshare")
            words = ["unshare", "--mount", "sh", "-ec", f'{mount}; exec "$@"', "sh", *words]
        done = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True, timeout=280)
        assert done.stdout, done.stderr
        findings = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
        assert (done.returncode == 0) is json.loads(done.stdout)["ok"]
        return done.returncode, findings

    return run
