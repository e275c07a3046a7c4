"""What tests of the clouds' providers share."""

import os

import pytest


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
