"""Imports only ever go down. Read off the syntax tree, so imports inside functions count too."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "raymed"
FLOORS = {
    "config": 0, "space": 0, "bundle": 0, "storage": 0, "distributed": 0, "random": 0, "threads": 0, "ledger": 0,
    "command": 0, "telemetry": 0, "_torchvision": 0,
    "data": 1, "tracking": 1,
    "models": 2, "losses": 2, "explain": 2, "metrics": 2, "report": 2,
    "tasks": 3,
    "train": 4, "registry": 4,
    "results": 5,
    "tune": 6, "serve": 6, "cluster": 6,
    "doctor": 7,
}  # fmt: skip
PLAIN = {"config", "space", "bundle", "random", "threads", "ledger", "command", "telemetry"}
PLAIN |= {"models", "losses", "explain", "metrics", "report", "tasks"}
"""Usable in any script: no Ray, DeepSpeed or MLflow."""
CLUSTER = {"ray", "deepspeed", "mlflow"}


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import of a file of the package; relative ones resolved."""
    package = ["raymed", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            yield from ((node.lineno, ".".join([*base, name.name])) for name in node.names)


def violations(path: Path) -> list[str]:
    """What a file must not import."""
    mine = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    found = []
    for line, name in imported(path):
        top, *rest = name.split(".")
        if top in CLUSTER and mine in PLAIN:
            found.append(f"{path.name}:{line} imports {name}")
        if top != "raymed" or not rest or rest[0] == mine or rest[0] not in FLOORS or mine == "__init__":
            continue
        if FLOORS[rest[0]] > FLOORS[mine] or FLOORS[rest[0]] == FLOORS[mine] > 0:
            found.append(f"{path.name}:{line} ({mine}, floor {FLOORS[mine]}) imports {name} (floor {FLOORS[rest[0]]})")
    return found


def test_every_part_has_a_floor():
    parts = {p.name.removesuffix(".py") for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    parts |= {p.name for p in PACKAGE.iterdir() if p.is_dir() and list(p.glob("*.py"))}
    assert parts - {"__init__"} <= set(FLOORS)


def test_imports_go_down():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 50
    assert [violation for path in files for violation in violations(path)] == []


@pytest.mark.parametrize(
    ("place", "code", "found"),
    [
        ("losses/new.py", "def f():\n    from raymed.train.loop import Fit\n", 1),
        ("losses/new.py", "from raymed.models import head\n", 1),
        ("losses/new.py", "from raymed import tasks\n", 1),
        ("losses/new.py", "from ..train import loop\n", 1),
        ("losses/new.py", "class A:\n    def f(self):\n        import ray.train\n        import mlflow as m\n", 2),
        ("losses/new.py", "from . import focal\nfrom raymed.config import UserError\nimport raymed.losses.focal\n", 0),
        ("tasks/new.py", "import deepspeed.ops\nfrom raymed.data import dataset\n", 1),
        ("train/new.py", "import ray\nfrom raymed.tune import sweep\n", 1),
        ("bundle.py", "from raymed.storage import write_atomic\nfrom raymed.random import derive\n", 0),
        ("storage/new.py", "from raymed.data.dataset import load\n", 1),
    ],
)
def test_the_check_finds_what_is_wrong(place, code, found, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_text(code)
    assert len(violations(path)) == found
