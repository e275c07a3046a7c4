"""What can only go wrong is refused by the job with one clear message and exit code 2."""

from pathlib import Path

import pytest
from faults import Training, images

from raymed.storage import working_copy


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
def trained(tmp_path_factory) -> Training:
    """A run that has trained, and was killed before it wrote its result."""
    training = Training(tmp_path_factory.mktemp("trained"), images(tmp_path_factory), None, (), 12)
    training.here()
    (training.unit / "result.json").unlink()
    return training


def test_a_name_that_belongs_to_another_run(trained, capsys):
    before = files(trained.unit)
    other = Training(trained.storage, trained.manifest, None, ("--single.optim.lr=0.5", "--model.norm=batch"), 12)

    message = refused(other, capsys)

    assert "run 'run' exists with another config (model.norm was 'group' and is 'batch', single.optim.lr was" in message
    assert "choose another --name" in message
    assert files(trained.unit) == before


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "average.safetensors", "state.json"])
def test_a_checkpoint_with_a_flipped_byte(trained, capsys, file):
    path = trained.checkpoints / "step-000012" / file
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    before = files(trained.checkpoints)
    try:
        message = refused(trained, capsys)
    finally:
        path.write_bytes(whole)

    assert f"{path} is damaged: " in message and f"Remove that checkpoint, the folder {path.parent}" in message
    assert "the run goes on from the one before" in message
    assert {**before, path: whole} == files(trained.checkpoints)


def test_a_checkpoint_of_another_model(trained, tmp_path, capsys):
    """It has come into the folder of this run, by whatever mistake."""
    other = Training(tmp_path, trained.manifest, None, ("--model.norm=batch",), 12)
    other.here()
    own = trained.checkpoints.rename(trained.checkpoints.with_name("own"))
    other.checkpoints.rename(trained.checkpoints)
    before = files(trained.checkpoints)
    try:
        message = refused(trained, capsys)
        assert files(trained.checkpoints) == before
    finally:
        trained.checkpoints.rename(other.checkpoints)
        own.rename(trained.checkpoints)

    assert f"{trained.checkpoints / 'step-000012'} is a checkpoint of another model: " in message
    assert "running_mean" in message and "wanted" in message
