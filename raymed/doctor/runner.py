"""Runs the checks, each in a process of its own: one that hangs or dies takes nothing with it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import IO

from raymed.config import from_dict, to_json
from raymed.doctor.checks import CHECKS, Check
from raymed.doctor.finding import Finding, failure
from raymed.doctor.place import Place
from raymed.tracking import without_credentials

_SEE = "see what stands behind it; python -m raymed.doctor --only '{name}' repeats this check alone"


def examine(
    place: Place, environment: Mapping[str, str], only: tuple[str, ...], tell: Callable[[Finding], None]
) -> list[Finding]:
    """The findings of all checks that a place has something for; each is told as it comes.

    Where Ray does not answer, what needs it is left out.
    """
    findings = []
    for check in CHECKS:
        if not check.when(place) or (only and check.name not in only):
            continue
        if check.on_ray and any(f.name == "Ray" and f.level == "failure" for f in findings):
            continue
        findings.append(run(check, place, environment))
        tell(findings[-1])
    return findings


def run(check: Check, place: Place, environment: Mapping[str, str]) -> Finding:
    """One check, in a process with that environment, which is killed with all it started after `check.seconds`."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as words:
        finding = _asked(check, place, environment, words)
    return dataclasses.replace(
        finding,
        name=check.name,
        seconds=round(time.monotonic() - start, 2),
        found=without_credentials(finding.found),
        remedy=without_credentials(finding.remedy),
    )


def _asked(check: Check, place: Place, environment: Mapping[str, str], words: IO[str]) -> Finding:
    process = subprocess.Popen(
        [sys.executable, "-m", "raymed.doctor.one", check.name],
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=words,
        text=True,
        start_new_session=True,
    )
    try:
        answer, _ = process.communicate(to_json(place), timeout=check.seconds)
    except subprocess.TimeoutExpired:
        return failure(f"no answer within {check.seconds:g} s", _SEE.format(name=check.name))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode != 0 or not answer:
        words.seek(0)
        last = (words.read().strip().splitlines() or ["it said nothing"])[-1]
        return failure(f"the check ended with code {process.returncode}: {last[:300]}", _SEE.format(name=check.name))
    return from_dict(Finding, json.loads(answer))
