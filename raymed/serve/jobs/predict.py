"""A prediction for every case of a folder or a manifest of this machine, as `jobs/predict.py` makes it.

The networks are those that the server has loaded, in the thread of its device, one image at a time and only when nobody
else waits; the rest happens in the thread of jobs. Files are read as those of requests are, with the same limits, and
what a case is answered is what a request for its images is answered: of a folder all frames count and nothing is
painted black, as in `jobs/predict.py --frames all --blank none`. What stands in the tables is not done again.

A folder's cases have pseudonyms under the key of the server's user, that of `import_data` there. The key is never put
in the storage, where it would lie beside the answers: a job goes on where its key is.
"""

import hmac
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from raymed.config import UserError
from raymed.data.intake.pseudonyms import default_key_file, load_key
from raymed.data.intake.scan import Silent
from raymed.data.locations import Location, below
from raymed.data.manifest import DataConfig, read_table
from raymed.results.predict import answer_case, asked_cases, bundle_hash, check_share
from raymed.results.predict_cases import Asked, Case, ImageFolder
from raymed.results.predict_table import Origin, Tables
from raymed.serve.config import Limits
from raymed.serve.handlers import Handler
from raymed.serve.jobs.files import as_uploads
from raymed.serve.live import Live
from raymed.serve.problems import Problem
from raymed.tasks.predictor import Prediction, Predictor

TABLES = {"cases": "predictions.csv", "images": "predictions_images.csv"}


def check(handler: Handler) -> None:
    """Raises Problem (422) for a model that has no such predictions."""
    _predictor(handler)


def allowed(source: str, roots: Sequence[str]) -> Path:
    """The folder or manifest that a request names: an absolute path, or one below a root.

    Raises:
        Problem: 403 for what lies in none of the roots, wherever links lead; 422 for what is not there.
    """
    path = _inside(source, roots)
    if not os.path.exists(path):  # False also for a name that is too long
        raise Problem(422, "source: there is no such folder or manifest", field="source")
    return path


def present(source: str, roots: Sequence[str]) -> Path:
    """What a job is about, which was there when it was asked for. Raises Silent where it is gone, or a folder without
    anything in it, as where its share is gone; Problem (403); OSError for a folder that may not be read."""
    path = _inside(source, roots)
    if not (any(path.iterdir()) if path.is_dir() else path.is_file()):
        raise Silent("the source is not there now, or an empty folder: check the share or the network")
    return path


def _inside(source: str, roots: Sequence[str]) -> Path:
    path = inside(source, roots)
    if path is None:
        raise Problem(403, "source: it does not lie in a folder that this server takes jobs from", field="source")
    return path


def inside(source: str, roots: Sequence[str]) -> Path | None:
    """Where a source lies in one of the roots, whether it is there or not; None for what lies in none of them."""
    for root in roots:
        folder = Path(root).expanduser().resolve()
        path = _resolved(folder, source)
        if path is not None and path.is_relative_to(folder):
            return path
    return None


def _resolved(folder: Path, source: str) -> Path | None:
    try:
        return (folder / source).resolve()
    except (OSError, ValueError, RuntimeError):  # a NUL, links in a circle
        return None


def cases_of(live: Live, path: Path, roots: Sequence[str], limits: Limits) -> Asked:
    """What is to be answered. Raises UserError, also for images that lie in none of the roots; OSError for a manifest
    that cannot be read now."""
    if path.is_dir():
        folder = ImageFolder(images=path, frames="all", blank="none")  # as of a request
        asked = asked_cases(live.handler.bundle, folder, DataConfig(manifest=""), limits.frames)
        _check_inside((image.source.path for case in asked.cases for image in case.images), roots)
        return asked
    with path.open("rb") as file:  # of a table that cannot be read, nobody could tell whether it is damaged
        file.read(1)
    # Before anything looks for the images that a manifest names, which may be elsewhere or URLs.
    table = read_table(path)
    if "image" in table:
        _check_inside((below(path.parent, name) for name in table["image"]), roots)
    return asked_cases(live.handler.bundle, ImageFolder(), DataConfig(manifest=str(path)))


def key_mark() -> str:
    """Sixteen hexadecimal digits that tell the key of a folder's pseudonyms, and nothing of it; "" where this server
    has none that can be used."""
    try:
        key = load_key(default_key_file()) if default_key_file().is_file() else None
    except (UserError, OSError):
        return ""
    return hmac.digest(key, b"jobs", "sha256").hex()[:16] if key else ""


def _check_inside(paths: Iterable[Location], roots: Sequence[str]) -> None:
    folders = [Path(root).expanduser().resolve() for root in roots]
    outside = sum(not _is_inside(path, folders) for path in paths)
    if outside:
        raise UserError(f"{outside} images do not lie in a folder that this server takes jobs from")


def _is_inside(path: Location, folders: Sequence[Path]) -> bool:
    """URLs are nowhere inside."""
    if not isinstance(path, Path):
        return False
    found = _resolved(path, "")
    return found is not None and any(found.is_relative_to(folder) for folder in folders)


def answers(
    live: Live, asked: Asked, folder: Path, limits: Limits, ask: Callable[[Tensor], Prediction]
) -> Iterator[int]:
    """Answer case after case into the tables of a folder; yields how many stand there, before each and at the end.

    ask: the network's answer for one image (C, size, size), as `Live.__call__` gives it.

    Raises UserError, of which Silent may pass, and Problem.
    """
    check_share(asked.cases)
    predictor = _Asking(_predictor(live.handler), ask)
    with Tables(folder / TABLES["cases"], asked.cases, _origin(live, asked)) as tables:
        todo = [case for case in asked.cases if case.key not in tables.done]
        before = len(asked.cases) - len(todo)
        for place, case in enumerate(todo):
            yield before + place
            tables.add(answer_case(predictor, as_uploads(case, live.handler.bundle, limits), _folder_above(case)))
    yield len(asked.cases)


class _Asking(Predictor):
    """A predictor whose network answers elsewhere."""

    def __init__(self, predictor: Predictor, ask: Callable[[Tensor], Prediction]):
        super().__init__(predictor.bundle, predictor.network, predictor.device)
        self._ask = ask

    def from_unit(self, image: Tensor) -> list[Prediction]:
        """One after the other."""
        return [self._ask(one) for one in image]


def _predictor(handler: Any) -> Predictor:
    predictor = getattr(handler, "predictor", None)
    if not isinstance(predictor, Predictor):
        raise Problem(422, "model: one that decides about cases is expected, a classifier", field="model")
    return predictor


def _folder_above(case: Case) -> Path | None:
    """Where it is looked whether the share still answers."""
    paths = [image.source.path for image in case.images]
    return paths[0].parent if paths and isinstance(paths[0], Path) else None


def _origin(live: Live, asked: Asked) -> Origin:
    """As `jobs/predict.py` signs its rows."""
    bundle, where, identity = live.handler.bundle, live.origin.where, live.identity
    name = where.removeprefix("models:/").partition("/")[0] if where.startswith("models:/") else ""
    geometry = " ".join(f"{key}={value}" for key, value in bundle.preprocess.items() if key not in ("mean", "std"))
    return Origin(
        name or str(bundle.provenance.get("run_key") or live.name),
        live.origin.version,
        bundle_hash(bundle),
        f"{geometry} {asked.settings}".strip(),
        run_id=str(identity["run_id"]),
        intended_use=str(identity["intended_use"]),
        research_only=bool(identity["research_only"]),
    )
