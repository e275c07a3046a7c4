"""What tests of the clouds' providers share."""

import os
from collections.abc import Callable, Sequence

import pytest

from raymed.cluster.providers import launcher


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """No credentials, and a state folder of this test."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "GCE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    monkeypatch.setenv("GCE_METADATA_TIMEOUT", "1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAYMED_CLUSTER", str(tmp_path / "cluster"))


@pytest.fixture
def on_google(tmp_path) -> Callable[..., launcher.Launch]:
    """What is launched from tmp_path/template.yaml, a copy of cluster/gcp.yaml. there: machines that run already."""
    template = tmp_path / "template.yaml"
    template.write_text((launcher.PROJECT / "cluster" / "gcp.yaml").read_text())

    def launch(
        project: str = "ours",
        zone: str = "europe-west4-a",
        there: Sequence[str] = (),
        max_workers: int | None = None,
        home: str = "/mnt",
    ) -> launcher.Launch:
        return launcher.Launch(
            "gcp",
            template,
            {"google_project": project, "region": zone[:-2], "zone": zone},
            {"RAYMED_HOME": home},
            {"project": project, "zone": zone},
            machines=lambda: there,
            end=" ".join,
            max_workers=max_workers,
        )

    return launch
