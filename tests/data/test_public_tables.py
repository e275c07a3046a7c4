"""Public sets come in from their own tables by the command that a hospital types, and are split by patient."""

import re
import runpy
import sys
from pathlib import Path

import pandas as pd
import pytest

from raymed.data import DataConfig, DataSet, Preprocess, load
from raymed.data.intake.pseudonyms import open_vault
from raymed.data.manifest import read_table

JOB = Path(__file__).resolve().parents[2] / "jobs" / "import_data.py"


@pytest.fixture
def imported(data_dir, tmp_path, monkeypatch, capsys):
    """imported(name, *flags) -> (what the import prints, its data set as the printed command reads it, the public
    table's row of each image)."""

    def run(name, *flags) -> tuple[str, DataSet, pd.DataFrame]:
        table, key_file = data_dir / name / "manifest.csv", tmp_path / "secret" / "my.key"
        if not table.is_file():
            pytest.skip(f"no test images: there is no {table}")
        argv = [JOB, "--images", table.parent, "--labels", table, "--key", "path", "--columns.key", "file", *flags]
        monkeypatch.setattr(
            sys, "argv", [str(word) for word in (*argv, "--to", tmp_path / name, "--key-file", key_file)]
        )
        runpy.run_path(str(JOB), run_name="__main__")
        text = capsys.readouterr().out
        given = dict(re.findall(r"--data\.(\S+)=(\S+)", text.splitlines()[-1]))
        size = int(given.get("preprocess.size", 0)) or None
        config = DataConfig(given["manifest"], positive=given["positive"], preprocess=Preprocess(size=size))
        data = load(config, tmp_path / "cache")
        images = read_table(Path(given["manifest"]))["image"].tolist()
        vault, public = open_vault(key_file), pd.read_csv(table, dtype=str, keep_default_na=False)
        files = [vault.whois(Path(images[row - 1]).stem)[0] for row in data.rows]
        return text, data, public.set_index("file").loc[files]

    return run


def test_nih_chest_xrays(imported):
    text, data, public = imported("nih_cxr64", "--positive", "abnormal")
    assert "classes: abnormal 500, normal 500\nimages: 1000, cases: 1000, patients: 264, unlabelled images: 0" in text
    assert "no row in the sheet       6\n" in text  # a few larger images beside the set
    assert "patient: column 'patient_id', by its name" in text and "not used: 'split', 'width'" in text
    assert len(data) == 1000 and len(set(data.patients)) == 264
    assert [data.classes[code] for code in data.class_codes] == public["label"].tolist()
    assert data.views is not None and data.views.tolist() == public["view"].tolist()
    assert data.groups["sex"].tolist() == public["sex"].tolist()
    assert data.groups["age"].astype(int).tolist() == public["age"].astype(int).clip(upper=90).tolist()
    patients = {split: set(public["patient_id"].iloc[indices]) for split, indices in data.splits.items()}
    assert sum(map(len, patients.values())) == len(set.union(*patients.values())) == 264
    assert [len(indices) for indices in data.splits.values()] == pytest.approx([650, 150, 200], abs=5)
    assert [data.labels[indices].mean() for indices in data.splits.values()] == pytest.approx([0.5] * 3, abs=0.02)


def test_brain_tumours(imported):
    """Whose they are is not known, and nothing says otherwise; the given split is kept."""
    text, data, public = imported("brain_tumor_figshare", "--positive", "glioma", "--columns.keep", "split")
    assert "classes: glioma 110, meningioma 110, pituitary 110\nimages: 330, cases: 330, unlabelled images: 0" in text
    assert "no image has a patient: one with several cases may be in two splits" in text
    assert data.classes == ("glioma", "meningioma", "pituitary")
    assert data.labels.tolist() == (public["label"] == "glioma").astype(int).tolist()
    assert {split: len(indices) for split, indices in data.splits.items()} == {"train": 231, "val": 48, "test": 51}
    for split, indices in data.splits.items():
        assert set(public["split"].iloc[indices]) == {split}
    assert any("no patient column" in note for note in data.notes)
