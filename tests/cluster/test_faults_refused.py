"""What can only go wrong is refused by the job with one clear message and exit code 2."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import Training, beside, images

from raymed.storage import working_copy
from raymed.train.checkpoints.checkpoint import Checkpoints


def refused(training: Training, capsys) -> str:
    """The message with which the job ends: its only one."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        training.here()
    said = capsys.readouterr()
    assert ended.value.code == 2 and "Traceback" not in said.out + said.err
    [message] = said.err.strip().splitlines()
    assert message.startswith("error: ")
    return message


def files(folder: Path) -> dict[Path, bytes]:
    """Everything below a folder, but what a lock leaves."""
    found = (path for path in folder.rglob("*") if path.is_file() and "lock" not in path.name)
    return {path: path.read_bytes() for path in found}


@pytest.mark.parametrize(
    ("variables", "bucket", "expected"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, None, r"refuses the secret key: check AWS_ACCESS_KEY_ID"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, None, "does not know this access key: check AWS_ACCESS_KEY_ID"),
        (
            {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "reader-secret"},
            None,
            "no permission for PutObject on ",
        ),
        ({}, "s3://missing-bucket/prefix", "there is no bucket 'missing-bucket' at "),
    ],
)
def test_a_bucket_that_cannot_be_used(s3, monkeypatch, tmp_path_factory, capsys, variables, bucket, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    url = bucket or s3.url

    assert expected in refused(Training(working_copy(url), images(tmp_path_factory), url, ()), capsys)

    assert not working_copy(url).exists() and not s3.keys()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Training:
    """A run that Ctrl-C has stopped after its first checkpoint."""
    training = Training(tmp_path_factory.mktemp("stopped"), images(tmp_path_factory), None, ())

    def interrupt(over: Callable[[], bool]) -> None:
        training.reaches(training.every + 1, over=over)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit) as ended:
        beside(training.here, interrupt)
    assert ended.value.code == 130
    return training


def test_a_name_that_belongs_to_another_run(stopped, capsys):
    before = files(stopped.unit)
    other = Training(stopped.storage, stopped.manifest, None, ("--single.optim.lr=0.5", "--model.norm=batch"))

    message = refused(other, capsys)

    assert "run 'run' exists with another config (model.norm was 'group' and is 'batch', single.optim.lr was" in message
    assert "choose another --name" in message
    assert files(stopped.unit) == before


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "average.safetensors", "state.json"])
def test_a_checkpoint_with_a_flipped_byte(stopped, capsys, file):
    last = Checkpoints(stopped.checkpoints).find("last")
    assert last
    path = last / file
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    before = files(stopped.checkpoints)
    try:
        message = refused(stopped, capsys)
    finally:
        path.write_bytes(whole)

    assert f"{path} is damaged: " in message and f"Remove that checkpoint, the folder {path.parent}" in message
    assert "the run goes on from the one before" in message
    assert {**before, path: whole} == files(stopped.checkpoints)


def test_a_checkpoint_of_another_model(stopped, tmp_path, capsys):
    """It has come into the folder of this run, by whatever mistake."""
    other = Training(tmp_path, stopped.manifest, None, ("--model.norm=batch",), 12)
    other.here()
    own = stopped.checkpoints.rename(stopped.checkpoints.with_name("own"))
    other.checkpoints.rename(stopped.checkpoints)
    before = files(stopped.checkpoints)
    try:
        message = refused(stopped, capsys)
        assert files(stopped.checkpoints) == before
    finally:
        stopped.checkpoints.rename(other.checkpoints)
        own.rename(stopped.checkpoints)

    assert f"{stopped.checkpoints / 'step-000012'} is a checkpoint of another model: " in message
    assert "running_mean" in message and "wanted" in message
