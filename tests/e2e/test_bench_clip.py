"""The CLIP benchmark refuses to time unequal trainings, and its peer is nobody's relative."""

import ast
import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from raymed.config import UserError, replace
from raymed.train.compute import Compute

JOBS = Path(__file__).resolve().parents[2] / "jobs"
IMAGE = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


@pytest.fixture
def bench(monkeypatch):
    """jobs/bench_clip.py as a module."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(JOBS))
    monkeypatch.setenv("PYTHONPATH", str(JOBS))
    import bench_clip
    import bench_train

    monkeypatch.setattr(bench_train, "WARM_UP", 1)
    yield bench_clip
    for name in set(sys.modules) - before:
        if name.startswith("bench_"):
            sys.modules.pop(name)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def vit(bench):
    """As small as can be; every caption is cut at the context."""
    model = {"embed_dim": 32, "vision_cfg": IMAGE, "text_cfg": TEXT}
    return bench.Workload(model, None, None, (bench.PEER, bench.INFO_NCE, bench.DHN_NCE), Compute(), 16, 64, 2, 1)


@pytest.fixture
def biomedclip(bench, vit):
    """A BERT beside it, and captions of 6 to 30 words."""
    model = bench._with_bert(32, IMAGE)
    model["text_cfg"]["context_length"] = 32
    sizes, sides = bench._bert_sizes(32, layers=1, heads=2), (bench.PEER, bench.INFO_NCE, bench.PADDED)
    return dataclasses.replace(vit, model=model, bert=sizes, words=(12.0, 0.6), sides=sides)


def test_the_peer_imports_nothing_of_ours():
    tree = ast.parse((JOBS / "bench_peers" / "open_clip_training.py").read_text())
    names = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    names += [alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names]
    ours = {path.stem for path in JOBS.glob("*.py")} | {"raymed", "bench_peers"}
    assert not {name.split(".")[0] for name in names} & ours


def test_all_sides_of_a_model_with_a_bert(bench, biomedclip, tmp_path):
    figures = bench.measure(biomedclip, tmp_path)
    assert figures["losses differ by"] < 1e-5
    assert len(figures["ours over open_clip"]["values"]) == 2
    assert len(figures["texts in groups over padded"]["values"]) == 2
    flops = figures["MFU"]["FLOPs an image"]
    assert flops["ours"] < flops[bench.PEER], "captions of a dozen words are padded to 32 tokens there"


def test_all_sides_of_a_vit_and_another_learning_rate_is_found_out(bench, vit, tmp_path):
    figures = bench.measure(vit, tmp_path)
    assert figures["losses differ by"] < 1e-5
    assert len(figures["DHN-NCE over InfoNCE"]["values"]) == 2
    flops = figures["MFU"]["FLOPs an image"]
    assert flops["ours"] == flops[bench.PEER]
    recipe, data = bench.prepare(vit, tmp_path / "other")
    other = replace(recipe, {"stage.optim.lr": 1.2 * recipe.stage.optim.lr})
    with pytest.raises(UserError, match="the losses of both loops differ by"):
        bench.check_equal(vit, tmp_path, other, data)


def test_memory_of_a_share_and_of_the_whole_matrix(bench):
    import bench_loss_memory

    share = bench_loss_memory.in_fresh_process("info_nce", 64, 32, 1)["bytes"]
    whole = bench_loss_memory.in_fresh_process(bench.PEER, 2048, 1, 1)["bytes"]
    candidates, matrix = 2 * 2048 * 512 * 4, 2048 * 2048 * 4
    assert candidates < share < whole
    assert whole > 3 * matrix, "both directions and their softmax"
