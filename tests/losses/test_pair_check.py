"""The job that checks contrastive losses: what is right passes, and each way of being wrong is named."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from raymed.config import UserError

JOBS = Path(__file__).resolve().parents[2] / "jobs"
LOSSES = """
import torch
import torch.distributed as dist
import torch.nn.functional as F

class Gathered:
    '''The full matrix on every process, features of the others without gradient: the default of open_clip.'''

    def __call__(self, image, text):
        image, text = self.gather(image), self.gather(text)
        logits, labels = 10 * image @ text.T, torch.arange(len(image))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    def gather(self, x):
        parts = [torch.zeros_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.detach())
        parts[dist.get_rank()] = x
        return torch.cat(parts)

class OwnPairsOnly(Gathered):
    def gather(self, x):
        return x

def refused(image, text):
    raise RuntimeError("this loss has no idea")
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The job as a module, in a folder with losses of a user's own."""
    (tmp_path / "mine.py").write_text(LOSSES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(JOBS)
    threads = torch.get_num_threads()
    yield importlib.import_module("check_contrastive")
    torch.set_num_threads(threads)
    sys.modules.pop("mine", None)


def test_right_losses_pass_and_each_way_of_being_wrong_is_named(job, capsys):
    names = ["dhn_nce", "siglip", "supcon", "mine:Gathered", "mine:OwnPairsOnly"]
    with pytest.raises(SystemExit) as ended:
        job.check(job.CheckContrastive(loss=tuple(names), equal=True))
    assert ended.value.code == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert all(lines[name].endswith("equal") for name in names[:3])
    assert "3+6+4" in lines["dhn_nce"] and "4+4+4" in lines["supcon"]
    assert lines["mine:Gathered"].endswith("gradients are 0.3333 of what they should be")
    assert lines["mine:OwnPairsOnly"].endswith("gradients differ")


def test_a_loss_that_cannot_be_checked(job):
    for name, words in [
        ("dhn_ncee", "did you mean 'dhn_nce'"),
        ("mine:Missing", "Missing"),
        ("no.such:Loss", "no.such"),
    ]:
        with pytest.raises(UserError, match=words):
            job.check(job.CheckContrastive(loss=(name,)))
    with pytest.raises(UserError, match="(?s)a process failed: this loss has no idea.*--equal"):
        job.check(job.CheckContrastive(loss=("mine:refused",)))
    assert not dist.is_initialized()


def test_what_is_compared(job):
    right = {"value": torch.tensor(2.0), "weight": torch.tensor([1.0, -2.0])}
    assert job.compare(right, right, 1e-5) == (0, "equal")
    assert job.compare(right | {"value": torch.tensor(2.1)}, right, 1e-5)[1] == "values differ"
    assert job.compare(right | {"weight": torch.tensor([1.0, -2.1])}, right, 1e-5)[1] == "gradients differ"
    assert "0.5000 of" in job.compare(right | {"weight": right["weight"] / 2}, right, 1e-5)[1]
    assert job.compare(right | {"weight": torch.tensor([1.0, math.nan])}, right, 1e-5)[1] == "gradients differ"


def test_its_exit_code_is_0_where_all_are_right(job, monkeypatch):
    record = {"value": torch.tensor(2.0), "weight": torch.tensor([1.0, -2.0])}

    def save(rank, world, config, folder):
        torch.save({"hn_nce": record}, f"{folder}/{world}.pt")

    monkeypatch.setattr(job, "work", save)
    monkeypatch.setattr(torch.multiprocessing, "start_processes", lambda work, inputs, *_, **__: save(0, *inputs))
    assert job.check(job.CheckContrastive(loss=("hn_nce",))) == "3 processes train as one does."
