"""A sweep that is killed, as with the machine, and started again: shared by the tests of `jobs/tune_asl.py`."""

import json
import signal
from collections import Counter
from pathlib import Path

from home import TINY, Home, wait_for

NUM_TRIALS = 12
COMMAND = (*TINY, *f"--sweep.num-trials {NUM_TRIALS} --sweep.generation 6 --seeds 1 2 --finals.finalists 1".split())
COMMAND += ("--finals.seeds", "11", "12", "--name=sweep")


def run_folder(home: Home) -> Path:
    """Of the sweep."""
    return home.storage / "runs" / "sweep"


def events(home: Home, name: str = "sweep") -> list[dict]:
    """The whole lines of a sweep's journal."""
    path = home.storage / "runs" / name / "sweep.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def finished(home: Home) -> dict[Path, int]:
    """Whatever is written once and for all -> when."""
    results = [path for path in run_folder(home).glob("**/result.json") if "tune" not in path.parts]
    files = [*results, *home.storage.glob("cache/features-*.npy")]
    return {path: path.stat().st_mtime_ns for path in files}


PHASES = {
    "encoder": lambda home: list(run_folder(home).glob("encoder/*/checkpoints/supcon/index.json")),
    "features": lambda home: list(home.storage.glob("cache/features-*.npy")),
    "heads": lambda home: [event for event in events(home) if "status" in event],
    "finals": lambda home: list(run_folder(home).glob("finals/*/*/result.json")),
    "report": lambda home: (run_folder(home) / "report.html").exists(),
}
"""What is there once a phase has begun."""


def killed_sweep(home: Home, phases: tuple[str, ...]) -> tuple[dict[str, dict], str]:
    """Kill the sweep in each of the phases: what stood there after each kill, and what the last command printed."""
    killed = {}
    for phase in phases:
        process = home.start("tune_asl", *COMMAND)
        has_begun = PHASES[phase]
        wait_for(lambda: has_begun(home) or process.poll() is not None, 300, f"phase {phase}")  # noqa: B023
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == -signal.SIGKILL, output
        home.end_all()  # Ray's processes, as when the machine goes down; by themselves they may take a minute
        wait_for(lambda: not home.processes(), 30, "end of Ray's processes")
        killed[phase] = {"finished": finished(home), "events": events(home)}
        home.edit_source()
    return killed, home.run("tune_asl", *COMMAND)


def check_nothing_repeated(home: Home, killed: dict[str, dict]) -> None:
    """Whatever stood there after a kill stands there unchanged."""
    now, journal = finished(home), events(home)
    for phase, there in killed.items():
        assert {path: now[path] for path in there["finished"]} == there["finished"], phase
        assert json.dumps(journal[: len(there["events"])]) == json.dumps(there["events"]), phase
    assert Counter(e["trial"] for e in journal if "status" in e) == dict.fromkeys(range(NUM_TRIALS), 1)
    assert len(list(home.storage.glob("cache/features-*.npy"))) == 4  # an encoder a seed, of search and finals
