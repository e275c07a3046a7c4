"""Serving as a hospital has it, every part a process of its own; and as a stranger meets it, from a clean clone."""

import base64
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pydicom
import pytest
from dicom_helpers import Archive, is_assessment, send_study, studies, texts
from home import REPO, TINY, Home
from registries import MLflow, register_two
from waiting import until

from raymed.tasks.predictor import Predictor
from raymed.tracking import Outbox, Tracker, connect

pytestmark = pytest.mark.slow
_spec = importlib.util.spec_from_file_location("registry_fixtures", REPO / "tests" / "registry" / "conftest.py")
assert _spec is not None and _spec.loader is not None
_registry = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_registry)
images, bundle = _registry.images, _registry.bundle


@contextmanager
def running(home: Home, job: str, *arguments: str, says: str, log: Path):
    """A job until it says something: the process, and the rest of that line. Its stderr goes to a file."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, f"jobs/{job}.py", *arguments],
            cwd=home.code,
            env=home.env,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith(says)), "")
        assert line, log.read_text()[-3000:]
        yield process, line.removeprefix(says).strip()
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen) -> int:
    """Its exit code after SIGTERM."""
    process.send_signal(signal.SIGTERM)
    return process.wait(60)


def requests_in(log: Path) -> list[dict]:
    """Lines of a server's access log."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if "status" in line]


def got(url: str) -> bytes:
    """The body of a GET that is answered."""
    with urllib.request.urlopen(url, timeout=20) as response:
        return response.read()


# A hospital: an archive sends studies while the model is promoted and rolled back.

MOVES = (
    ("2", ("--version", "2", "--intended-use", "triage of HSG", "--by", "Kim", "--force", "--why", "fewer alarms")),
    ("1", ("--rollback", "--why", "more false alarms since Monday")),
    ("2", ("--version", "2", "--force", "--why", "it was the new detector")),
    ("1", ("--rollback", "--why", "it was not")),
)
"""Version in use afterwards, and how it comes to be."""


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory):
    server = MLflow(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def registry(mlflow, bundle, tmp_path_factory):
    """A client; the model hsg has two versions there, and the first is champion."""
    folder = tmp_path_factory.mktemp("bundles")
    outbox = Outbox(folder / "tracking.jsonl")
    outbox.open("tune-1/final", "final")
    outbox.close()
    with Tracker(mlflow.uri, "raymed", folder) as tracker:
        tracker.follow(outbox.path)
    client = connect(mlflow.uri, folder)
    register_two(client, bundle, folder)
    return client


def version_of(result: pydicom.Dataset) -> str:
    """The version of hsg that an object names, alike wherever it does."""
    (equipment,) = [item for item in result.ContributingEquipmentSequence if item.Manufacturer == "raymed"]
    told = f"{result.SoftwareVersions}\n{equipment.SoftwareVersions}\n{equipment.ContributionDescription}"
    (version,) = set(re.findall(r"(?:\bhsg |\bversion )(\d+)\b", told))
    return version


def threshold_of(report: pydicom.Dataset) -> float:
    """That the case was decided by."""
    (found,) = {
        float(item.MeasuredValueSequence[0].NumericValue)
        for item in _numbers(report)
        if item.ConceptNameCodeSequence[0].CodeMeaning == "Threshold Value"
    }
    return found


def _numbers(item: pydicom.Dataset) -> list[pydicom.Dataset]:
    inner = [found for each in item.get("ContentSequence") or [] for found in _numbers(each)]
    return [item, *inner] if "MeasuredValueSequence" in item else inner


def test_studies_come_back_as_report_and_overlays_while_the_model_is_promoted_and_rolled_back(
    home, mlflow, registry, bundle, tmp_path
):
    sent = studies(tmp_path / "hospital")[:12]
    assert len(sent) == len({study[0].StudyInstanceUID for study in sent}) == 3 * len(MOVES)
    (tmp_path / "token").write_text(home.run("serve_tokens", "add", "dicom-node").split()[-1])
    log, told = tmp_path / "server.log", tmp_path / "node.log"
    model = ("--model", "hsg", "--tracking", mlflow.uri)
    server = ("--models", "hsg=models:/hsg@champion", "--port", "0", "--tracking", mlflow.uri)
    server += ("--follow.every-s", "0.3", "--hardware.device", "cpu", "--hardware.threads", "1")
    in_use: dict[str, str] = {}  # study -> version, of those that were sent when it was certain

    with Archive() as pacs, running(home, "serve_models", *server, says="serving on ", log=log) as (serving, address):
        node = ("--endpoint", address, "--model", "hsg", "--port", "0", "--allow", "PACS1", "--quiet", "0.3")
        node += ("--reply-to", f"PACS1@127.0.0.1:{pacs.port}", "--token-file", str(tmp_path / "token"))
        with running(home, "serve_dicom_node", *node, says="listening: RAYMED@127.0.0.1:", log=told) as (waiting, port):
            rest = iter(sent)

            def send() -> str:
                study = next(rest)
                assert set(send_study(study, int(port))) == {0x0000}
                return str(study[0].StudyInstanceUID)

            for version, move in MOVES:
                promotion = home.start("promote_model", *model, *move)
                send()  # while somebody decides
                until(lambda v=version: registry.get_registered_model("hsg").aliases["champion"] == v, 120)
                send()  # while the server takes it up
                until(lambda v=version: json.loads(got(f"{address}/readyz"))["hsg"]["versions"]["champion"] == v, 60)
                study = send()
                until(lambda s=study: [ds for ds in pacs.of("SR") if ds.StudyInstanceUID == s], 60)
                in_use[study] = version
                output, _ = promotion.communicate(timeout=120)
                assert promotion.returncode == 0 and f"champion: hsg version {version}" in output, output
            until(lambda: len({ds.StudyInstanceUID for ds in pacs.of("SR")}) == len(sent), 60)
            until(lambda: told.read_text().count("results delivered to PACS1") == len(sent), 60)
            assert ended(waiting) == 0
        assert ended(serving) == 0

    points = {str(n): {**bundle.operating_point, "threshold": n / 4} for n in (1, 2)}
    thresholds = {n: Predictor.from_bundle(replace(bundle, operating_point=p)).threshold for n, p in points.items()}
    versions = Counter()
    for study in sent:
        of_study = [ds for ds in pacs.received if ds.StudyInstanceUID == study[0].StudyInstanceUID]
        (report,) = [ds for ds in of_study if ds.Modality == "SR"]
        overlays = [ds for ds in of_study if ds.Modality == "OT"]
        assert len(overlays) == sum(int(ds.get("NumberOfFrames") or 1) for ds in study) == len(of_study) - 1
        (version,) = {version_of(ds) for ds in of_study}
        assert is_assessment(report) and "RESEARCH USE ONLY" in texts(report)
        assert threshold_of(report) == pytest.approx(thresholds[version], rel=1e-5)
        assert version == in_use.get(study[0].StudyInstanceUID, version)
        versions[version] += 1
    assert set(versions) == {"1", "2"} and sum(versions.values()) == len(pacs.of("SR")) == len(sent)

    asked = [line for line in requests_in(log) if line["route"] == "/v1/models/{name}/studies"]
    assert Counter(line["version"] for line in asked) == versions and {line["caller"] for line in asked} == {
        "dicom-node"
    }
    assert {line["status"] for line in requests_in(log)} == {200}
    loaded = [json.loads(line) for line in log.read_text().splitlines() if '"event": "loaded"' in line]
    assert [line["version"] for line in loaded] == ["1", *(version for version, _ in MOVES)]
    assert "again in" not in told.read_text()
    assert "each as it was written" in home.run("promote_model", *model, "--verify")
    names = {str(ds.PatientName) for study in sent for ds in study} | {ds.PatientID for study in sent for ds in study}
    assert not [name for name in names if name in log.read_text() + told.read_text()]


# A stranger: from the source as it is published to an answer, with nothing of this machine but Python's packages.


class Stranger(Home):
    """The source as it was committed, a home and a temporary folder, and nothing else."""

    def __init__(self, folder: Path, temporary: Path):
        self.code, self.temporary = folder / "raymed", temporary
        done = subprocess.run(["git", "clone", "--quiet", REPO, self.code], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"the source is no git repository: {done.stderr.strip()}")
        (folder / "home").mkdir()
        self.storage = folder / "home" / ".raymed"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAYMED", "RAY_", "MLFLOW"))}
        self.env = kept | {
            "HOME": str(folder / "home"),
            "TMPDIR": str(temporary),
            "PYTHONPATH": str(self.code),  # in place of `make install`
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
        }


DEMO = (*TINY, *"--seeds 2023 --sweep.num-trials 4 --finals.seeds 3001 3002 --finals.finalists 1".split())
"""As `make demo`, in a minute."""


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """Who has run the demo."""
    temporary = Path(tempfile.mkdtemp(prefix="rm-"))
    machine = Stranger(tmp_path_factory.mktemp("stranger"), temporary)
    machine.run("tune_asl", *DEMO)
    yield machine
    machine.end_all()
    shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def server(stranger, tmp_path_factory):
    """address of a server of whatever is registered, and the name of its model; it has ended well in the end."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    with running(stranger, "serve_models", "--access.open", "--port", "0", says="serving on ", log=log) as started:
        process, address = started
        (model,) = json.loads(got(f"{address}/v1/models"))
        yield address, model["model"]
        assert ended(process) == 0
    assert {line["status"] for line in requests_in(log)} == {200}


@pytest.fixture(scope="module")
def pictures(stranger):
    """Two images of the demo's data."""
    return sorted((stranger.storage / "phantoms").rglob("*.png"))[:2]


def curl(*words: str) -> dict:
    """What curl prints, where the answer is no error."""
    done = subprocess.run(["curl", "--silent", "--show-error", "--fail", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_lines_of_the_readme(server, stranger, pictures):
    address, model = server
    places = {"case.png": pictures[0], "early.dcm": pictures[0], "late.dcm": pictures[1], "NAME": model}
    places["http://127.0.0.1:8000"] = address
    answers = []
    for line in re.findall(r"^    curl (.*)$", (stranger.code / "README.md").read_text(), re.M):
        for word, place in places.items():
            line = line.replace(word, str(place))
        answers.append(curl(*shlex.split(line, comments=True)))
    assert sum("decision" in answer for answer in answers) >= 2


def test_an_image_as_it_is(server, pictures):
    address, model = server
    url = f"{address}/v1/models/{model}:predict"
    answer = curl("--data-binary", f"@{pictures[0]}", "-H", "Content-Type: image/png", url)
    assert answer["model"] == model and answer["version"] == "1" and answer["research_only"] is True
    assert answer["decision"] in ("positive", "negative", "abstain") and answer["reasons"]
    assert 0 <= answer["result"]["probability"] <= 1 and len(answer["result"]["images"]) == 1


def test_two_files_of_a_case_explained(server, pictures):
    address, model = server
    files = [word for path in pictures for word in ("-F", f"file=@{path}")]
    answer = curl(*files, "-F", "explain=gradcam", f"{address}/v1/models/{model}:predict")
    explained = [image["explanation"] for image in answer["result"]["images"]]
    assert [each["method"] for each in explained] == ["gradcam"] * 2
    assert all(base64.b64decode(each["overlay"]).startswith(b"\x89PNG") for each in explained)


def test_the_same_as_json(server, pictures, tmp_path):
    address, model = server
    url = f"{address}/v1/models/{model}:predict"
    contents = [base64.b64encode(path.read_bytes()).decode() for path in pictures]
    (tmp_path / "case.json").write_text(json.dumps({"files": contents}))
    files = [word for path in pictures for word in ("-F", f"file=@{path}")]
    assert curl("--json", f"@{tmp_path}/case.json", url) == curl(*files, url)


def test_tritonclient(server, pictures):
    import numpy as np
    import tritonclient.http as triton

    address, model = server
    client = triton.InferenceServerClient(address.removeprefix("http://"))
    assert client.is_server_ready() and client.is_model_ready(model)
    image = triton.InferInput("image", [1], "BYTES")
    image.set_data_from_numpy(np.array([pictures[0].read_bytes()], dtype=object))
    found = client.infer(model, [image])
    url = f"{address}/v1/models/{model}:predict"
    answer = curl("--data-binary", f"@{pictures[0]}", "-H", "Content-Type: image/png", url)
    assert float(found.as_numpy("probability").item()) == pytest.approx(answer["result"]["probability"], abs=1e-6)
    assert found.as_numpy("decision").item().decode() == answer["decision"]


def test_the_python_of_the_readme(server, stranger, pictures, tmp_path, monkeypatch):
    address, model = server
    shutil.copy(pictures[0], tmp_path / "case.png")
    monkeypatch.chdir(tmp_path)
    places = {"127.0.0.1:8000": address.removeprefix("http://"), "NAME": model}
    names = {}
    for snippet in re.findall(r"^```python\n(.*?)^```", (stranger.code / "README.md").read_text(), re.M | re.S):
        for word, place in places.items():
            snippet = snippet.replace(word, place)
        exec(snippet, names)
    answer = names["predict"](address, model, (tmp_path / "case.png").read_bytes())
    assert names["found"].as_numpy("decision").item().decode() == answer["decision"]


def test_the_page(server):
    address, model = server
    page = got(f"{address}/").decode()
    parts = re.findall(r'(?:src|href)="(/?page/[^"]+)"', page)
    assert parts and all(got(f"{address}/{part.lstrip('/')}") for part in parts)
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    assert model in got(f"{address}/v1/models/{model}/card").decode()
