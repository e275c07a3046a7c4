"""Tokens: what is stored of them, who is known by one and until when, and the command that makes them."""

import importlib.util
import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import tyro

from raymed.config import UserError
from raymed.serve.access import tokens as tokens_module
from raymed.serve.access.tokens import Tokens, add_token, read_tokens, revoke_token, tokens_file, tokens_of
from raymed.serve.config import Access, ServeConfig

JOB = str(Path(__file__).resolve().parents[2] / "jobs" / "serve_tokens.py")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "serve" / "tokens.json"


@pytest.fixture
def looking(monkeypatch):
    """The file is looked at on every request."""
    monkeypatch.setattr(tokens_module, "_LOOK_S", 0.0)


def test_a_token_is_known_and_stored_nowhere(file):
    token = add_token(file, "pacs", 3)
    other = add_token(file, "ward", 3)
    tokens = Tokens(file)
    assert (tokens.name_of(token.encode()), tokens.name_of(other.encode())) == ("pacs", "ward")
    assert len(token) > 40 and token != other
    assert token not in file.read_text() and token.removeprefix("raymed_") not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    ends = datetime.fromisoformat(read_tokens(file)[0].expires) - datetime.now(UTC)
    assert timedelta(days=3) - timedelta(minutes=1) < ends <= timedelta(days=3)


@pytest.mark.parametrize("wrong", [b"", b"raymed_", b"pacs", "ä".encode("latin-1"), b"x" * 10000])
def test_others_are_not_known(file, wrong):
    token = add_token(file, "pacs", 3).encode()
    tokens = Tokens(file)
    assert tokens.name_of(wrong) is None
    assert tokens.name_of(token[:-1]) is None and tokens.name_of(token + b"x") is None


def test_the_hash_of_a_token_opens_nothing(file):
    add_token(file, "pacs", 3)
    assert Tokens(file).name_of(read_tokens(file)[0].sha256.encode()) is None


def test_what_changes_in_the_file_holds_at_once(file, looking):
    token = add_token(file, "pacs", 3).encode()
    tokens = Tokens(file)
    later = add_token(file, "ward", 3).encode()
    assert tokens.name_of(later) == "ward"
    revoke_token(file, "pacs")
    assert tokens.name_of(token) is None and tokens.name_of(later) == "ward"
    file.unlink()
    assert tokens.name_of(later) is None


def test_a_damaged_file_lets_nobody_in(file, looking):
    token = add_token(file, "pacs", 3).encode()
    tokens = Tokens(file)
    file.write_text("{")
    assert tokens.name_of(token) is None
    with pytest.raises(UserError, match="is no file of tokens"):
        Tokens(file)


def test_a_file_that_could_not_be_read_once_is_read_again(file, looking, monkeypatch):
    """However many files the process has open at one moment."""
    token = add_token(file, "pacs", 3).encode()
    tokens = Tokens(file)
    later = add_token(file, "ward", 3).encode()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", lambda *_: (_ for _ in ()).throw(OSError(24, "Too many open files")))
        assert tokens.name_of(token) is tokens.name_of(later) is None
    assert (tokens.name_of(token), tokens.name_of(later)) == ("pacs", "ward")


def test_an_expired_token_is_not_known(file):
    token = add_token(file, "pacs", 3)
    described = json.loads(file.read_text())
    described["tokens"][0]["expires"] = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    file.write_text(json.dumps(described))
    tokens = Tokens(file)
    assert tokens.name_of(token.encode()) is None and tokens.valid() == []


def test_names_are_told_apart(file):
    add_token(file, "pacs", 3)
    with pytest.raises(UserError, match="has a token already"):
        add_token(file, "pacs", 3)
    with pytest.raises(UserError, match="there are pacs"):
        revoke_token(file, "ward")
    for name in ("", "a b", "../x", "a\n", "x" * 65):
        with pytest.raises(UserError, match="a name of letters"):
            add_token(file, name, 3)
    with pytest.raises(UserError, match="days"):
        add_token(file, "ward", 0)


def test_a_file_that_others_may_write_is_refused(file):
    add_token(file, "pacs", 3)
    os.chmod(file, 0o620)
    with pytest.raises(UserError, match="other users may write"):
        Tokens(file)


def test_a_server_that_nobody_could_ask_says_both_ways_out(tmp_path):
    with pytest.raises(UserError, match=r"serve_tokens.py add NAME.*--access.open") as raised:
        tokens_of(ServeConfig(storage=str(tmp_path)))
    assert str(tmp_path / "serve" / "tokens.json") in str(raised.value)
    assert tokens_of(ServeConfig(storage=str(tmp_path), access=Access(open=True))) is None


def test_a_token_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMED_SERVE_TOKEN", "short")
    with pytest.raises(UserError, match="can be guessed"):
        tokens_of(ServeConfig(storage=str(tmp_path)))
    monkeypatch.setenv("RAYMED_SERVE_TOKEN", "s" * 32)
    tokens = tokens_of(ServeConfig(storage=str(tmp_path)))
    assert tokens.name_of(b"s" * 32) == "RAYMED_SERVE_TOKEN" and tokens.name_of(b"s" * 31) is None


def test_a_server_whose_storage_is_a_bucket_reads_a_file_that_is_named(tmp_path, monkeypatch):
    """Or takes one token of the environment, as on Kubernetes."""
    monkeypatch.setenv("RAYMED_LOCAL", str(tmp_path / "local"))
    config = ServeConfig(storage="s3://bucket/raymed")
    with pytest.raises(UserError, match="serve_tokens.py add NAME --file FILE, and name it, --access.tokens FILE"):
        tokens_of(config)
    named = tmp_path / "mounted" / "tokens.json"
    token = add_token(named, "pacs", 3)
    assert tokens_of(replace(config, access=Access(tokens=str(named)))).name_of(token.encode()) == "pacs"
    monkeypatch.setenv("RAYMED_SERVE_TOKEN", "s" * 32)
    assert tokens_of(config).name_of(b"s" * 32) == "RAYMED_SERVE_TOKEN"


def test_the_command_writes_no_file_that_no_server_reads(command, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMED_LOCAL", str(tmp_path / "local"))
    bucket = ("--storage", "s3://bucket/raymed")
    for action in (("add", "pacs"), ("list",), ("revoke", "pacs")):
        with pytest.raises(UserError, match=r"is in a bucket.*--file .*access\.tokens"):
            command(*action, *bucket)
    assert not (tmp_path / "local").exists()
    token = command("add", "pacs", *bucket, "--file", str(tmp_path / "tokens.json"))
    assert Tokens(tmp_path / "tokens.json").name_of(token.encode()) == "pacs"


@pytest.fixture(scope="module")
def command():
    """command(*arguments) -> what the command prints, in this process."""
    job = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("job", JOB))
    sys.modules["job"] = job
    spec.loader.exec_module(job)
    return lambda *arguments: tyro.cli(job.ServeTokens, args=[*arguments]).do()


def test_the_command(command, tmp_path):
    def run(*arguments):
        return command(*arguments, "--storage", str(tmp_path))

    line = [sys.executable, JOB, "add", "pacs", "--days", "5", "--storage", str(tmp_path)]
    made = subprocess.run(line, capture_output=True, text=True, timeout=120)
    token = made.stdout.strip()
    tokens = Tokens(tokens_file(None, str(tmp_path)))
    assert made.returncode == 0 and tokens.name_of(token.encode()) == "pacs"
    assert run("add", "ward") not in run("list")
    assert "pacs" in run("list") and "ward" in run("list") and token not in run("list")
    assert run("revoke", "pacs") == "revoked: pacs"
    assert [each.name for each in read_tokens(tokens.file)] == ["ward"]
    with pytest.raises(UserError, match="there is no token of 'pacs'"):
        run("revoke", "pacs")
