import json
import math
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from raymed.config import UserError
from raymed.storage import working_copy
from raymed.tracking.outbox import Outbox, read


@pytest.fixture
def outbox(tmp_path):
    return Outbox(tmp_path / "run/outbox.jsonl")


def _losses(outbox):
    return {r["step"]: r["values"]["loss"] for r in outbox.records() if r["op"] == "metrics" and "loss" in r["values"]}


def test_what_is_written_is_read(outbox):
    outbox.open("key", "name", parent="sweep", params={"lr": 0.1, "sizes": (1, 2)}, tags={"seed": 3})
    outbox.metrics({"loss": 0.5}, step=7)
    outbox.tags({"loss": "asl"})
    outbox.artifact(outbox.path.parent / "roc.png", "figures")
    outbox.json({"a": 1}, "a.json")
    outbox.close("KILLED")
    records = outbox.records()
    assert [r["op"] for r in records] == ["open", "metrics", "tags", "artifact", "text", "close"]
    assert records[0]["params"] == {"lr": 0.1, "sizes": [1, 2]}
    assert records[0]["tags"] == {"seed": "3"}
    assert records[1]["values"] == {"loss": 0.5} and records[1]["step"] == 7
    assert records[3]["path"] == "roc.png"
    assert json.loads(records[4]["text"]) == {"a": 1}
    assert all(record["time"] > 1.7e12 for record in records)


def test_artifacts_are_named_from_the_outbox_where_they_move_with_it(outbox, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMED_LOCAL", str(tmp_path / "local"))
    outbox.artifact(outbox.path.parent / "u/bundle")
    outbox.artifact(tmp_path / "else.txt")
    copy = working_copy("s3://bucket/runs/one")
    Outbox(copy / "u/tracking.jsonl").artifact(copy / "figures/roc.png")
    outbox.artifact(copy / "x")  # the outbox is in no working copy
    assert [r["path"] for r in outbox.records()] == ["u/bundle", str(tmp_path / "else.txt"), str(copy / "x")]
    assert [r["path"] for r in Outbox(copy / "u/tracking.jsonl").records()] == ["../figures/roc.png"]


def test_a_full_disk_is_told(outbox):
    outbox.path.parent.mkdir()
    outbox.path.symlink_to("/dev/full")
    with pytest.raises(UserError, match=f"the disk of {outbox.path} is full: make room; the same command goes on"):
        outbox.metrics({"loss": 1.0}, step=1)


FILL = """
import resource, signal, sys
from raymed.config import UserError
from raymed.tracking.outbox import Outbox
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # of the last line only a part is written
try:
    for step in range(100):
        Outbox(sys.argv[1]).metrics({"loss": 1.0}, step)
except UserError as error:
    print(step, error)
"""


def test_a_line_of_which_only_a_part_is_written_is_an_error(outbox):
    done = subprocess.run([sys.executable, "-c", FILL, str(outbox.path)], text=True, capture_output=True)
    step, _, said = done.stdout.partition(" ")
    assert said == f"the disk of {outbox.path} is full: make room; the same command goes on\n", done.stderr
    assert list(_losses(outbox)) == list(range(int(step)))


def test_any_number_is_a_value_and_the_file_stays_plain_json(outbox):
    import torch

    outbox.metrics({"t": torch.tensor(0.25), "nan": math.nan, "inf": -math.inf, "int": 3}, step=torch.tensor(2))
    line = json.loads(outbox.path.read_text(), parse_constant=pytest.fail)
    assert line["values"] == {"t": 0.25, "nan": None, "inf": None, "int": 3.0} and line["step"] == 2


def test_a_torn_last_line_is_ignored_and_cut_by_the_next_writer(outbox):
    outbox.open("key", "name")
    outbox.metrics({"loss": 1.0}, step=1)
    whole = outbox.path.stat().st_size
    outbox.metrics({"loss": 2.0}, step=2)
    data = outbox.path.read_bytes()
    for size in range(whole, len(data)):
        outbox.path.write_bytes(data[:size])
        assert _losses(outbox) == {1: 1.0}, size
        outbox.metrics({"loss": 3.0}, step=2)
        assert _losses(outbox) == {1: 1.0, 2: 3.0}, size
        assert outbox.path.read_bytes()[:whole] == data[:whole]


def test_a_file_that_is_one_long_torn_line(outbox):
    outbox.path.parent.mkdir()
    outbox.path.write_bytes(b"x" * 200_000)
    assert outbox.records() == []
    outbox.close()
    assert [r["op"] for r in outbox.records()] == ["close"]
    outbox.path.write_bytes(outbox.path.read_bytes() + b"y" * 200_000)
    outbox.close()
    assert [r["op"] for r in outbox.records()] == ["close", "close"]


def test_rewind_drops_later_steps_and_only_those(outbox):
    for step in range(1, 7):
        outbox.metrics({"loss": float(step)}, step)
    outbox.metrics({"system/cpu": 50.0}, step=90)
    outbox.tags({"phase": "head"})
    outbox.rewind(4)
    outbox.metrics({"loss": 50.0}, 5)
    assert _losses(outbox) == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 50.0}
    assert [r["step"] for r in outbox.records() if r["op"] == "metrics"] == [1, 2, 3, 4, 90, 5]
    assert [r["op"] for r in outbox.records()].count("tags") == 1


def test_status_is_the_last_word(outbox):
    assert outbox.status() is None
    outbox.open("key", "name")
    assert outbox.status() == "RUNNING"
    outbox.close("FAILED")
    outbox.close("KILLED")
    assert outbox.status() == "KILLED"
    outbox.open("key", "name")
    assert outbox.status() == "RUNNING"


def test_reading_goes_on_from_an_offset(outbox):
    outbox.open("key", "name")
    outbox.tags({"a": "ä"})
    (_, first), (_, second) = read(outbox.path)
    assert second == outbox.path.stat().st_size
    assert [record["op"] for record, _ in read(outbox.path, first)] == ["tags"]
    assert list(read(outbox.path, second)) == []
    assert list(read(outbox.path.with_name("missing"))) == []


def test_several_writers_never_mix_their_lines(outbox):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda step: Outbox(outbox.path).metrics({"loss": step, "x" * 5000: 0}, step), range(200)))
    assert _losses(outbox) == {step: float(step) for step in range(200)}


def test_an_outbox_can_be_sent_to_another_process(outbox):
    assert pickle.loads(pickle.dumps(outbox)).path == outbox.path


def test_it_needs_no_mlflow_and_no_torch():
    code = "import sys, raymed.tracking; sys.exit(bool({'mlflow', 'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
