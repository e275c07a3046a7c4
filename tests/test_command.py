"""Command lines: what is printed, and the exit codes."""

import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from raymed.command import command, exit_code
from raymed.config import UserError
from raymed.telemetry import telemetry_off

REPO = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Word:
    """One."""

    word: str


def raises(error: BaseException):
    def work(*_, **__):
        raise error

    return work


def test_exit_codes(capsys):
    assert exit_code(lambda: None) == 0 and exit_code(lambda: 7) == 7
    assert exit_code(raises(UserError("a number is expected, got x"))) == 2
    assert capsys.readouterr().err == "error: a number is expected, got x\n"
    assert exit_code(raises(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "", "no traceback"
    with pytest.raises(RuntimeError, match="a fault of the program"):
        exit_code(raises(RuntimeError("a fault of the program")))


def test_a_command_prints_what_its_work_returns(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["job", "--word", "x"])
    command(Word, lambda config: f"done: {config.word}")
    assert capsys.readouterr().out == "done: x\n"
    for error, code in ((UserError("no"), 2), (KeyboardInterrupt(), 130)):
        with pytest.raises(SystemExit) as ended:
            command(Word, raises(error))
        assert ended.value.code == code


@pytest.mark.parametrize(
    ("file", "flags", "works"),
    [
        ("raymed/cluster/monitoring.py", ["folder"], "raymed.cluster.state.required"),
        ("jobs/rehearse_autoscaling.py", [], "tempfile.TemporaryDirectory"),
        ("jobs/rehearse_faults.py", [], "tempfile.TemporaryDirectory"),
    ],
)
def test_ctrl_c_is_an_exit_code(file, flags, works, monkeypatch):
    # What would import torch and Ray, to be stopped before it uses them.
    monkeypatch.setitem(sys.modules, "raymed.cluster.autoscaled", SimpleNamespace(Autoscaled=None))
    monkeypatch.setattr(works, raises(KeyboardInterrupt()))
    monkeypatch.setattr("sys.argv", [file, *flags])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPO / file), run_name="__main__")
    assert ended.value.code == 130


def test_telemetry_is_off_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("DO_NOT_TRACK", raising=False)
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    telemetry_off()
    assert os.environ["DO_NOT_TRACK"] == "1" and os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "0"
