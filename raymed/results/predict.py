"""What a model says of cases it has never seen, as two CSV files (`raymed.results.predict_table`).

    cases -> read, one network pass a case -> score, decision, why not to trust it -> a row, written at once

A case is computed by itself and on one CPU thread, so its row depends on nothing else: neither on what was done before
a restart nor on how many workers share the work. An image that cannot be used is listed, and its case is answered from
the others. With several workers the cases go, a few at a time, to tasks of Ray: what a lost worker had is done again
by another, and rows are written in the order of the cases.
"""

import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch

from raymed.bundle import NOT_STATED, Bundle
from raymed.config import UserError, check_range
from raymed.data.intake.scan import CLOSED, Silent, patiently
from raymed.data.manifest import DataConfig
from raymed.data.readers import ImageFile, ImageProblem, Window
from raymed.registry.promote import is_released
from raymed.registry.store import alias_of, load_model, version_of
from raymed.results.predict_cases import Asked, Case, CaseImage, ImageFolder, folder_cases, manifest_cases
from raymed.results.predict_table import Answer, Origin, Tables
from raymed.storage import resolve_storage
from raymed.tasks.decide import decide_of
from raymed.tasks.predictor import CasePrediction, Prediction, Predictor
from raymed.threads import one_thread

Device = Literal["auto", "cpu", "cuda"]
_CHUNK = 8  # cases of one task
_RETRIES = 3  # of a task whose worker was lost


@dataclass(frozen=True)
class Predicted:
    """What was done. cases: rows of the file, `before` of them from an earlier start. unscored: cases without an image
    that can be used; problems: images that cannot. decisions: name -> cases. Without those of earlier starts."""

    cases: int
    before: int
    unscored: int
    problems: int
    decisions: dict[str, int]
    path: Path
    image_path: Path

    def text(self) -> str:
        """For the terminal."""
        already = f", {self.before} of them there already" if self.before else ""
        lines = [f"{self.cases} cases{already}"]
        lines += [", ".join(f"{name} {num}" for name, num in sorted(self.decisions.items()))] if self.decisions else []
        if self.problems:
            lines.append(f"{self.problems} images could not be used; {self.unscored} cases have no score")
        return "\n".join([*lines, f"by image: {self.image_path.absolute()}", f"predictions: {self.path.absolute()}"])


def load_origin(model: str, tracking: str | None, storage: str | None) -> tuple[Bundle, Origin]:
    """A model and what its answers are to be signed with; an alias becomes the version that bears it now.

    Args:
        model, tracking, storage: as `raymed.registry.store.load_model` has them.

    Raises:
        UserError: there is no such model.
    """
    model = _with_version(model, tracking, storage)
    bundle = load_model(model, tracking, storage)
    name, _, version = model.removeprefix("models:/").partition("/")
    run_id = str(bundle.provenance.get("run_key") or NOT_STATED)
    if not model.startswith("models:/"):
        name, version = run_id, ""
    geometry = " ".join(f"{key}={value}" for key, value in bundle.preprocess.items() if key not in ("mean", "std"))
    return bundle, Origin(
        name,
        version,
        bundle_hash(bundle),
        geometry,
        run_id=run_id,
        intended_use=bundle.intended_use,
        research_only=_is_for_research(bundle, model, tracking, storage),
    )


def _is_for_research(bundle: Bundle, model: str, tracking: str | None, storage: str | None) -> bool:
    """Unless a version of the registry was released, or a bundle that was copied from there says so."""
    from raymed.tracking import connect

    if not model.startswith("models:/"):
        return bundle.contract.get("research_only", True) is not False
    name, _, version = model.removeprefix("models:/").partition("/")
    return not is_released(version_of(connect(tracking, resolve_storage(storage)), name, int(version)))


def _with_version(model: str, tracking: str | None, storage: str | None) -> str:
    from raymed.tracking import connect

    name, at, alias = model.removeprefix("models:/").partition("@")
    if not (model.startswith("models:/") and at):
        return model
    found = alias_of(connect(tracking, resolve_storage(storage)), name, alias)
    return f"models:/{name}/{found.version}" if found else model


def bundle_hash(bundle: Bundle) -> str:
    """sha256 of the bundle.json that `Bundle.save` writes, which holds the sha256 of all else."""
    with TemporaryDirectory(prefix="raymed-bundle-") as folder:
        return hashlib.sha256((bundle.save(Path(folder)) / "bundle.json").read_bytes()).hexdigest()


def asked_cases(bundle: Bundle, images: ImageFolder, data: DataConfig, most_frames: int | None = None) -> Asked:
    """The cases of a folder or of a manifest, as the model decides about them.

    Args:
        most_frames: of a file of the folder (`folder_cases`).

    Raises:
        UserError: both are stated, or neither; what `folder_cases` and `manifest_cases` raise.
    """
    if (images.images is None) == (not data.manifest):
        raise UserError("state what to predict: --images DIR or --data.manifest FILE")
    level = decide_of(bundle.operating_point).unit or "image"
    return folder_cases(images, level, most_frames) if images.images else manifest_cases(data, level)


def predict(
    bundle: Bundle, origin: Origin, cases: Sequence[Case], to: Path, *, workers: int = 1, device: Device = "auto"
) -> Predicted:
    """Answer the cases that do not stand in the files yet.

    Args:
        bundle: of a classifier with an operating point.
        to: the CSV of cases (`CASE_COLUMNS`); that of images (`IMAGE_COLUMNS`) is named after it.
        workers: 1 = this process; more = so many tasks of Ray at a time, each with a CPU and its part of a GPU.

    Raises:
        UserError: the files belong to another model; the images' share stopped answering, or workers were lost again
            and again (what is done is kept, and the same call goes on).
    """
    check_range("workers", workers, 1)
    Predictor.from_bundle(bundle)  # says what is wrong with the bundle before a file is begun
    if to.parts[0] == "s3:":
        raise UserError(f"--to must be a file on this machine, which rows can be added to, got {to}")
    to = to.expanduser()
    to.parent.mkdir(parents=True, exist_ok=True)
    check_share(cases)
    unscored, problems, decisions = 0, 0, dict[str, int]()
    with Tables(to, cases, origin) as tables:
        todo = [case for case in cases if case.key not in tables.done]
        before = len(cases) - len(todo)
        for answer in _shown(_answers(bundle, todo, workers, device), len(todo)):
            tables.add(answer)
            decision, found = answer.case["decision"], [row for row in answer.images if row["problem"]]
            unscored, problems = unscored + (not decision), problems + len(found)
            if decision:
                decisions[decision] = decisions.get(decision, 0) + 1
        return Predicted(len(cases), before, unscored, problems, decisions, tables.path, tables.image_path)


def _shown(answers: Iterator[Answer], num: int) -> Iterator[Answer]:
    from rich.console import Console
    from rich.progress import track

    console = Console()
    yield from track(answers, "Predicting", num, console=console, transient=True, disable=not console.is_terminal)


def _answers(bundle: Bundle, cases: Sequence[Case], workers: int, device: Device) -> Iterator[Answer]:
    root = _root(cases)
    if workers > 1 and len(cases) > _CHUNK:
        yield from _on_ray(bundle, cases, root, workers, device)
        return
    predictor = _predictor(bundle, device)
    for case in cases:
        with one_thread():
            answer = answer_case(predictor, case, root)
        yield answer


def _predictor(bundle: Bundle, device: Device) -> Predictor:
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise UserError("--device is cuda, but torch sees no GPU here: use --device cpu")
    return Predictor.from_bundle(bundle, "cuda" if has_gpu and device != "cpu" else "cpu")


def answer_case(predictor: Predictor, case: Case, root: Path | None = None) -> Answer:
    """Read the images of one case and predict it.

    Args:
        root: a folder above all images, by which it is told whether their share still answers; None = not known.

    Raises:
        Silent: the share stopped answering.
        UserError: a bucket cannot be read.
    """
    pixels, problems = {}, {}
    for image in case.images:
        try:
            pixels[image.name] = _read(image, predictor.preprocess.window, root)
        except ImageProblem as problem:
            problems[image.name] = str(problem)
    predictions = dict(zip(pixels, predictor([*pixels.values()]), strict=True))
    together = predictor.case([*predictions.values()]) if predictions else None
    rows = [_image_row(case, image, predictions.get(image.name), problems) for image in case.images]
    reasons = [*_reasons(predictor, predictions, together, problems)]
    unread = any(image.name in problems and not image.problem for image in case.images)
    told = predictor.answer(together)[0] if together else ""
    told = "abstain" if told and unread else told  # what the image shows may have changed the answer
    return Answer(_case_row(case, together, told, reasons), tuple(rows))


def _case_row(case: Case, found: CasePrediction | None, told: str, reasons: Sequence[str]) -> dict[str, str]:
    row = {"case": case.case, "side": case.side, "image": case.image, "patient": case.patient}
    row |= {"num_images": "0", "score": "", "threshold": "", "decision": "", "answer": told, "uncertain": ""}
    if found:
        row |= {"num_images": str(len(found.images)), "score": repr(found.probability)}
        row |= {"threshold": repr(found.threshold), "decision": found.decision, "uncertain": _yes(found.uncertain)}
    return row | {"reasons": "; ".join(reasons)}


def _image_row(case: Case, image: CaseImage, found: Prediction | None, problems: dict[str, str]) -> dict[str, str]:
    row = {"case": case.case, "side": case.side, "patient": case.patient, "image": image.name}
    score = repr(found.raw_probability) if found else ""
    foreign = _yes(bool(found.ood["foreign"])) if found and found.ood else ""
    return row | {"raw_score": score, "foreign": foreign, "problem": problems.get(image.name, ""), "state": image.state}


def _yes(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _reasons(
    predictor: Predictor, images: dict[str, Prediction], found: CasePrediction | None, problems: dict[str, str]
) -> Iterator[str]:
    """Why the answer is not to be trusted."""
    if found is None:
        yield "no image can be used"
    elif found.uncertain:
        yield "inside the uncertain band"
    if foreign := [name for name, image in images.items() if image.ood and image.ood["foreign"]]:
        yield f"unlike the images of the training: {', '.join(foreign)}"
    usual = predictor.bundle.contract.get("views_per_case")
    of_cases = predictor.bundle.operating_point.get("unit") == "case"
    if found and of_cases and isinstance(usual, int) and len(images) < usual:
        yield f"fewer images than usual: {len(images)} of {usual}"
    yield from (f"not used: {name} ({why})" for name, why in problems.items())


def check_share(cases: Sequence[Case]) -> None:
    """Raises Silent where the folder above all images does not answer: answers that stand in the tables would be taken
    for those of other images."""
    if root := _root(cases):
        _wait_for(root)


def _root(cases: Sequence[Case]) -> Path | None:
    """The folder above all images of this machine."""
    sources = (image.source for case in cases for image in case.images)
    folders = {
        os.fspath(s.path.absolute().parent) for s in sources if isinstance(s, ImageFile) and isinstance(s.path, Path)
    }
    return Path(os.path.commonpath(folders)) if folders else None


def _read(image: CaseImage, window: Window | None, root: Path | None) -> np.ndarray:
    """The pixels. What cannot be read is unusable only while its share answers; one that is silent is asked again."""
    try:
        return image.read(window)
    except (ImageProblem, OSError):
        if image.problem:
            raise
        if root is not None:
            _wait_for(root)
    try:
        return image.read(window)
    except OSError as error:
        raise ImageProblem(CLOSED) from error


def _wait_for(root: Path) -> None:
    """Return when the folder answers: it is there and, unlike one that has lost its share, not empty."""
    try:
        patiently(functools.partial(_look_into, root))
    except OSError as error:
        raise Silent(
            f"{root} stopped answering ({error.strerror or error}): check the share or the network; the same command "
            "goes on"
        ) from error


def _look_into(root: Path) -> None:
    with os.scandir(root) as listing:
        if next(listing, None) is None:
            raise OSError("it is empty")


def _on_ray(bundle: Bundle, cases: Sequence[Case], root: Path | None, workers: int, device: Device) -> Iterator[Answer]:
    import ray

    from raymed.train.places.cluster import connected, gpu_share, gpus_of, require

    with connected():
        each = math.ceil(workers / max(1, ray.cluster_resources().get("GPU", 0)))
        gpus = gpus_of(device) and gpu_share(each)
        room = require(1, gpus, at_most=workers, advice="--workers 1 predicts in this process")
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=_RETRIES)(_answers_of)
        chunks = [cases[start : start + _CHUNK] for start in range(0, len(cases), _CHUNK)]
        shared = ray.put((bundle, device))
        # In a list, the reference itself arrives, and a process fetches the model once.
        yield from _in_order(lambda chunk: task.remote([shared], chunk, root), chunks, room)


def _in_order(
    submit: Callable[[Sequence[Case]], Any], chunks: Sequence[Sequence[Case]], at_once: int
) -> Iterator[Answer]:
    """What the tasks return, in the order of the chunks, with so many running at a time."""
    import ray
    from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError

    from raymed.train.places.cluster import fetched

    waiting = iter(enumerate(chunks))
    running = {submit(chunk): number for number, chunk in islice(waiting, at_once)}
    done: dict[int, list[Answer]] = {}
    number = 0
    while running:
        (reference,), _ = ray.wait(list(running))
        try:
            done[running.pop(reference)] = fetched(reference)
        except (WorkerCrashedError, OutOfMemoryError, NodeDiedError, ObjectLostError) as error:
            raise UserError(
                f"workers were lost {_RETRIES + 1} times at the same cases ({type(error).__name__}): the same command "
                "goes on; where it ends here again, --workers 1 gets as far as the case that does it"
            ) from error
        running |= {submit(chunk): later for later, chunk in islice(waiting, 1)}
        while number in done:
            yield from done.pop(number)
            number += 1


def _answers_of(shared: list[Any], cases: Sequence[Case], root: Path | None) -> list[Answer]:
    """In a task of Ray."""
    predictor = _fetched_predictor(shared[0])
    return [answer_case(predictor, case, root) for case in cases]


@functools.lru_cache(maxsize=1)
def _fetched_predictor(reference: Any) -> Predictor:
    import ray

    torch.set_num_threads(1)
    return _predictor(*ray.get(reference))
