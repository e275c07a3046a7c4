"""From a hospital's share to a paper, with the commands of the README alone; and outside the folder of the key nothing
names a patient."""

import base64
import io
import json
import re
import sqlite3
import unicodedata
import zipfile
import zlib
from pathlib import Path

import pandas as pd
import pytest
from docx import Document
from home import Home
from PIL import Image
from readme import five

from raymed.data.phantom_hospital_register import draw_register
from raymed.data.phantom_hospital_sheet import key_in_sheet

pytestmark = pytest.mark.slow

STUDIES, SEEDS = 60, {"hospital": 0, "elsewhere": 1}
SIZE = "64"
TINY = (
    "--data.preprocess.size=32 --method=asl --single.batch-size=32 --single.steps=30 --single.evaluations=3 "
    "--data.deidentified"
).split()


class Rehearsal:
    """What each command printed, and where it was typed."""

    def __init__(self, home: Home):
        self.home, self.printed = home, {}

    def run(self, what: str, job: str, *arguments: str) -> str:
        self.printed[what] = self.home.run(job, *arguments)
        return self.printed[what]

    @property
    def folder(self) -> Path:
        return self.home.code

    @property
    def private(self) -> Path:
        return Path(self.home.env["HOME"]) / ".config" / "raymed"

    def summary(self, what: str) -> dict:
        line = self.printed[what].strip().splitlines()[-1]
        return json.loads(Path(line.removeprefix("summary: ")).read_text())


@pytest.fixture(scope="module")
def rehearsal(home):
    """Every command of the README's section, in its order; only the numbers of steps and studies are smaller."""
    done, readme = Rehearsal(home), five()
    (imported,) = readme["import_data"]
    trained, preview, folds = readme["train_classifier"]
    for (name, seed), imported_to in zip(SEEDS.items(), ("hsg", "other"), strict=True):
        done.run(f"write {name}", "write_hospital", f"--to={name}", f"--size={SIZE}", f"--seed={seed}")
        here = [imported_to if word == "hsg" else word.replace("hospital", name) for word in imported]
        done.run(f"import {name}", "import_data", *here)
    done.run("preview", "train_classifier", *preview, *TINY)
    done.run("train", "train_classifier", *trained, *TINY)
    done.run("folds", "train_classifier", *[{"5x3": "2x1"}.get(word, word) for word in folds], *TINY)
    model = done.summary("train")["paths"]["model"]
    for job in ("evaluate_classifier", "predict", "paper_pack"):
        (arguments,) = readme[job]
        extra = {"evaluate_classifier": ["--data.deidentified"], "paper_pack": ["--cross-validation=hsg-cv"]}
        done.run(job, job, *[model if word == "MODEL" else word for word in arguments], *extra.get(job, []))
    return done


def truth(name: str) -> list:
    return draw_register(STUDIES, SEEDS[name])


def usable(name: str) -> list:
    """The studies that an honest import uses: their row is right, and somebody could tell."""
    return [s for s in truth(name) if key_in_sheet(s) == s.accession and s.reported != "equivocal" and s.number != 7]


def manifest(rehearsal: Rehearsal) -> pd.DataFrame:
    return pd.read_csv(rehearsal.folder / "hsg" / "manifest.csv", dtype=str, keep_default_na=False)


def test_the_import_ends_with_the_training_command_of_the_readme(rehearsal):
    last = rehearsal.printed["import hospital"].strip().splitlines()[-1]
    assert last.strip().startswith("python jobs/train_classifier.py --data.manifest=")
    assert last.endswith("/hsg/manifest.csv --data.positive=occluded")
    table = manifest(rehearsal)
    assert len(set(table["case"])) == len(usable("hospital"))
    assert (table.groupby("case").size() == 2).all()


def test_the_data_sheet_comes_first_and_alone(rehearsal):
    pages = sorted(rehearsal.home.storage.rglob("data_sheet.html"))
    assert pages and "data_sheet.html" in rehearsal.printed["preview"]
    assert "occluded" in pages[0].read_text()
    assert not (rehearsal.home.storage / "runs" / "preview").exists()


def test_figures_are_of_cases_and_images_stand_beside(rehearsal):
    summary = rehearsal.summary("train")
    (method,) = summary["figures"]
    assert "auroc" in summary["figures"][method]["test"] and "auroc" in summary["image_figures"][method]["test"]
    assert "by cases" in rehearsal.printed["train"]
    page = Path(summary["paths"]["evaluation"])
    assert page.name == "evaluation.html" and "no evidence of localisation" in page.read_text()


def test_cross_validation_scores_every_case(rehearsal):
    summary = rehearsal.summary("folds")
    figure = next(iter(summary["figures"].values()))["test"]["auroc"]
    assert figure["num_patients"] == manifest(rehearsal)["patient"].nunique()


def test_the_external_test_set_is_scored_whole_and_the_threshold_stays(rehearsal):
    summary = rehearsal.summary("evaluate_classifier")
    page = Path(summary["paths"]["run"]) / "evaluation.html"
    assert page.stat().st_size > 10_000 and "no evidence of localisation" in page.read_text()
    bundle = json.loads((Path(rehearsal.summary("train")["paths"]["model"]) / "bundle.json").read_text())
    assert bundle["operating_point"]["unit"] == "case" and 0 < bundle["operating_point"]["threshold"] < 1


def test_predictions_have_a_row_a_case(rehearsal):
    table = pd.read_csv(rehearsal.folder / "predictions.csv")
    assert len(table) >= STUDIES and table["score"].dropna().between(0, 1).all()
    assert set(table["decision"].dropna()) <= {"occluded", "patent"}
    assert table["case"].is_unique


def test_the_paper_tells_the_numbers_of_this_study(rehearsal):
    pack = rehearsal.folder / "paper"
    methods = (pack / "methods.md").read_text()
    counts = json.loads((rehearsal.folder / "hsg" / "import.json").read_text())["counts"]
    said = f"{counts['patients']} patients, {counts['cases']} cases and {counts['images']} images"
    assert said in methods
    assert "[TO FILL: ethics committee" in methods and "ethics = " in (pack / "study.toml").read_text()
    assert str(counts["cases"]) in (pack / "table_cohort.csv").read_text()
    performance = (pack / "table_performance.csv").read_text()
    decided = pd.read_csv(pack / "table_confusion.csv").select_dtypes("number").to_numpy()
    assert decided.size >= 4 and (decided >= 0).all()
    assert "Case, cross-validation" in performance and "External test, case" in performance
    assert (pack / "figure_flow.pdf").is_file() and "연구" in (pack / "methods.ko.md").read_text()


def test_words_of_the_authors_fill_the_blanks(rehearsal):
    pack = rehearsal.folder / "paper"
    study = pack / "study.toml"
    study.write_text(study.read_text().replace('ethics = ""', 'ethics = "기관윤리심의 IRB-1"'), encoding="utf-8")
    rehearsal.home.run("paper_pack", *five()["paper_pack"][0], "--cross-validation=hsg-cv")
    methods = (pack / "methods.md").read_text()
    assert "IRB-1" in methods and "TO FILL: ethics" not in methods


# Whoever was examined is nowhere to be found.


def identifiers() -> set[str]:
    """Names in both scripts, numbers, and days of examinations and births."""
    found = set()
    for study in (study for name in SEEDS for study in truth(name)):
        person = study.person
        found |= {person.name, person.roman, person.roman.replace("^", " "), study.patient_id, study.accession}
        found |= {f"{day:{form}}" for day in (study.day, person.born) for form in ("%Y-%m-%d", "%Y%m%d")}
    return found


CANDIDATES = re.compile(
    r"(?<![0-9A-Za-z.])(?:[0-9N][0-9]{7}|[0-9]{4}-[0-9]{2}-[0-9]{2})(?![0-9A-Za-z])"  # whole numbers, and days
    r"|[A-Z][a-z]+[ ^][A-Z][a-z]+|[가-힣]{3,}|[\u1100-\u11ff]{6,}"
)


def told(content: bytes, known: set[str]) -> set[str]:
    """The identifiers in some bytes, in any of the encodings that names are written in here."""
    found = set()
    for encoding in ("utf-8", "cp949", "utf-16-le"):
        for word in set(CANDIDATES.findall(content.decode(encoding, "replace"))):
            word = unicodedata.normalize("NFC", word)
            parts = {word} | ({word[i : i + 3] for i in range(len(word))} if word > "가" else set())
            found |= parts & known
    return found


def texts(path: Path, content: bytes) -> list[bytes]:
    """The bytes of a file, and what is packed in them: members of archives, pictures' headers, tables, pages of PDF."""
    found = [content]
    if content.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            found += [archive.read(member) for member in archive.namelist()]
    if content.startswith(b"SQLite format 3"):
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            found += ["\n".join(database.iterdump()).encode()]
    if content.startswith(b"%PDF"):
        for stream in re.findall(rb"stream\r?\n(.*?)endstream", content, re.DOTALL):
            try:
                found.append(zlib.decompress(stream))
            except zlib.error:
                continue
    pictures = [content] if content.startswith((b"\x89PNG", b"\xff\xd8")) else []
    if path.suffix == ".html":
        embedded = re.compile(rb"data:image/[a-z+]+;base64,([A-Za-z0-9+/=]+)")
        pictures += [base64.b64decode(data) for data in embedded.findall(content)]
        found[0] = embedded.sub(b"", content)
    for data in pictures:
        with Image.open(io.BytesIO(data)) as image:
            found.append(repr((image.info, dict(image.getexif()))).encode())
    return found


def test_the_search_for_identifiers_finds_them(rehearsal, tmp_path):
    """Of a name in a docx, in a picture's header and in the tables of the hospital itself."""
    study = truth("hospital")[0]
    document = Document()
    document.add_paragraph(f"Seen: {study.person.name}.")
    document.save(str(tmp_path / "a.docx"))
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Comment", study.accession, zip=True)
    Image.new("L", (4, 4)).save(tmp_path / "b.png", pnginfo=info)
    for path in (tmp_path / "a.docx", tmp_path / "b.png", rehearsal.folder / "hospital" / "labels.xlsx"):
        assert any(told(text, identifiers()) for text in texts(path, path.read_bytes())), path
    for encoding in ("utf-8", "cp949", "utf-16-le"):
        text = f"x{study.person.name}은 {study.day:%Y-%m-%d}, {unicodedata.normalize('NFD', study.person.name)}"
        assert told(text.encode(encoding, "ignore"), identifiers()) == {study.person.name, f"{study.day:%Y-%m-%d}"}
    assert not told(f"0.{study.accession} 1{study.accession}".encode(), identifiers())


def test_no_name_and_no_number_of_a_patient_leaves_the_folder_of_the_key(rehearsal):
    known = identifiers()
    outside = [rehearsal.private, *(rehearsal.folder / name for name in (*SEEDS, "raymed", "jobs"))]
    seen, found = 0, []
    for path in (*rehearsal.folder.parent.rglob("*"), *rehearsal.home.temporary.rglob("*")):
        if not path.is_file() or any(place in path.parents for place in outside):
            continue
        seen += 1
        found += [(path.name, names) for text in texts(path, path.read_bytes()) if (names := told(text, known))]
    found += [(what, names) for what, text in rehearsal.printed.items() if (names := told(text.encode(), known))]
    assert seen > 200
    assert not found


def test_only_where_the_key_is_a_pseudonym_tells_whom_it_stands_for(rehearsal):
    table = manifest(rehearsal)
    said = rehearsal.home.run("whois", table["case"][0], table["patient"][0])
    case, patient = (line.partition(": ")[2].split(", ") for line in said.strip().splitlines())
    (study,) = [s for s in truth("hospital") if s.accession in case]
    assert study.patient_id in patient
    elsewhere = rehearsal.folder / "another.key"
    refused = rehearsal.home.run("whois", table["case"][0], f"--key-file={elsewhere}", expect=2)
    assert study.accession not in refused and not elsewhere.exists()
