"""The frame of a job: what is refused leaves nothing, what has trained stays, and its command line gives it again."""

import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import tyro
from small import RECIPE, recipe

from raymed.config import UserError, replace
from raymed.tasks.classifier import ClassifierRecipe
from raymed.tracking.outbox import Outbox
from raymed.train.compute import Compute
from raymed.train.runs.command import command_line
from raymed.train.runs.job import Job, RunConfig, main, open_job


@dataclass(frozen=True)
class Config:
    """A job's config."""

    recipe: Annotated[ClassifierRecipe, tyro.conf.arg(name="")] = field(default_factory=lambda: RECIPE)
    seeds: tuple[int, ...] = (1,)
    compute: Compute = Compute()
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = RunConfig()


@pytest.fixture
def config(manifest, tmp_path) -> Config:
    """A job on small images, with an MLflow that does not answer: nothing waits for it."""
    run = RunConfig(name="job", storage=str(tmp_path / "storage"), tracking="http://127.0.0.1:9")
    return Config(recipe(manifest), run=run)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("error", [UserError("no room"), KeyboardInterrupt()])
def test_what_ends_before_the_first_training_leaves_no_run(config, error):
    storage = Path(config.run.storage)
    with pytest.raises(type(error)), open_job("any", config) as job:
        job.unit("seed-1", 1)
        job.folder.joinpath("seed-1").mkdir()  # as a unit does before it is refused
        raise error

    assert not (storage / "runs").exists() and not (storage / "mlflow").exists()
    assert all(name.startswith("cache/") for name in files(storage))


def test_what_has_trained_stays_and_has_failed(config):
    with pytest.raises(UserError), open_job("any", config) as job:
        child = job.unit("seed-1", 1).outbox
        child.open("child", "seed-1", job.key)
        raise UserError("the disk is full")

    assert job.outbox.status() == child.status() == "FAILED"
    assert json.loads((job.folder / "config.json").read_text())["job"] == "any"


def test_an_error_of_the_program_is_on_record(config):
    with pytest.raises(ZeroDivisionError), open_job("any", config) as job:
        raise ZeroDivisionError
    assert job.outbox.status() == "FAILED"


def test_a_refused_continuation_leaves_the_run_as_it_was(config):
    with open_job("any", config) as job:
        _end(job)
    before = {name: (job.folder / name).read_bytes() for name in files(job.folder) if not name.endswith("budget.json")}

    with pytest.raises(UserError), open_job("any", config):
        raise UserError("no room")

    assert {name: (job.folder / name).read_bytes() for name in before} == before
    with (
        pytest.raises(UserError, match="'job' exists with another config"),
        open_job("any", replace(config, {"recipe.single.steps": 13})),
    ):
        pass


def _end(job: Job) -> Path:
    path = job.folder / "summary.json"
    job.outbox.close("FINISHED")
    path.write_text(json.dumps({"figures": {"ce": {"test": {"auroc": {"mean": 0.5}}}}}))
    return path


def test_the_run_records_what_repeats_it(config):
    with open_job("any", config) as job:
        records = job.outbox.records()
        _end(job)

    opened = next(r for r in records if r["op"] == "open")
    texts = {r["file"]: r["text"] for r in records if r["op"] == "text"}
    assert opened["tags"]["raymed.data"] == job.data.fingerprint and opened["tags"]["raymed.git.commit"]
    assert json.loads(texts["environment.json"])["threads"] >= 1 and "torch==" in texts["requirements.txt"]
    assert json.loads((job.folder / "data.json").read_text())["fingerprint"] == job.data.fingerprint
    assert job.name == "job" and job.budget.exhausted() is None


def test_a_command_line_gives_its_config():
    changes = {
        "recipe.data.manifest": "/a folder/it's.csv",
        "recipe.data.classes": ("a b", "c"),
        "recipe.data.deidentified": True,
        "recipe.data.patient": "",
        "recipe.single.balanced": False,
        "recipe.single.ema_decay": None,
        "recipe.losses.asl.gamma_neg": 3.25,
        "seeds": (4, 5),
        "compute.threads": 2,
    }
    default = Config()
    config = replace(default, changes)

    for start in (default, None):
        line = command_line("train_classifier", config, start)
        program, script, *flags = shlex.split(line)
        parsed = tyro.cli(Config, default=default, config=(tyro.conf.AvoidSubcommands,), args=flags)
        assert (program, script, parsed) == ("python", "jobs/train_classifier.py", config)
    assert command_line("any", default, default) == "python jobs/any.py"
    named = replace(default, {"run": RunConfig(name="x", storage="/there")})
    assert command_line("any", named, default) == "python jobs/any.py"


def test_export_run_writes_the_file_and_works_no_more(config, monkeypatch, capsys, tmp_path):
    with open_job("any", config) as job:
        _end(job)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["any.py", "--export-run", "job", "--storage", config.run.storage])

    main(Config, lambda config: pytest.fail("it works"))

    assert f"exported: {tmp_path}/job.raymed.json" in capsys.readouterr().out
    assert json.loads((tmp_path / "job.raymed.json").read_text())["name"] == "job"
    assert Outbox(job.folder / "tracking.jsonl").status() == "FINISHED"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--from-run", "nothing"], "there is no run 'nothing'"),
        (["--from-run", "job", "--name", "job"], "--name job is the name of the run that is repeated"),
        (["--from-run", "job", "--compute.workers=0"], "compute.workers must be >= 1, got 0"),
        (["--time-budget", "soon"], "2h"),
        (["--max-gpu-hours=-1"], "max_gpu_hours must be > 0, got -1"),
    ],
)
def test_unusable_flags_are_one_message(config, monkeypatch, capsys, flags, expected):
    with open_job("any", config) as job:
        _end(job)
    monkeypatch.setattr(sys, "argv", ["any.py", *flags, "--storage", config.run.storage])

    def work(config: Config) -> Path:
        with open_job("any", config) as job:
            return _end(job)

    with pytest.raises(SystemExit) as ended:
        main(Config, work)

    said = capsys.readouterr()
    assert ended.value.code == 2 and expected in said.err + said.out
    assert [path.name for path in (Path(config.run.storage) / "runs").iterdir()] == ["job"]
