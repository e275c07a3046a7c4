"""What a node has taken on and not yet brought to its end, on disk: whatever happens to the process, nothing is lost.

    FOLDER/queue.sqlite            which images came when, which of them are answered, which answers are sent
    FOLDER/images/STUDY/IMAGE.dcm  the images
    FOLDER/results/ANSWER/N.dcm    what is to be sent; N.sent once it is confirmed

Files are written first, whole; what counts is the row, which is committed after them, and before they are deleted.
Studies and images are named by hashes of their UIDs. The rows stay when the files are deleted, so that an image which
comes again is known.
"""

import hashlib
import json
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from raymed.storage import write_atomic

_TABLES = """
CREATE TABLE IF NOT EXISTS studies (study TEXT PRIMARY KEY, receiver TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS images (
    study TEXT NOT NULL, image TEXT NOT NULL, since REAL NOT NULL, here INTEGER NOT NULL DEFAULT 1,
    answered INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (study, image));
CREATE INDEX IF NOT EXISTS waiting ON images (study) WHERE answered = 0;
CREATE INDEX IF NOT EXISTS here ON images (study) WHERE here = 1;
CREATE TABLE IF NOT EXISTS answers (
    id INTEGER PRIMARY KEY AUTOINCREMENT, study TEXT NOT NULL, images TEXT NOT NULL, report TEXT NOT NULL,
    since REAL NOT NULL, sent REAL);
CREATE TABLE IF NOT EXISTS refusals (id INTEGER PRIMARY KEY, study TEXT NOT NULL);
"""
_HERE = "SELECT study FROM images WHERE here = 1"
_OVER = """GROUP BY study HAVING MIN(answered) = 1 AND MAX(since) <= :before
EXCEPT SELECT study FROM answers WHERE sent IS NULL OR sent > :before"""
_REFUSED = "EXISTS (SELECT 1 FROM refusals WHERE id = (SELECT MAX(id) FROM answers WHERE study = excluded.study))"
_DAY = 86400.0
_REMEMBERED = 400 * _DAY
"""How long an image that came again is known."""


@dataclass(frozen=True)
class Study:
    """A study that waits for its answer. key: its pseudonym. images: files by the images' hashes.
    before, refusal: "SERIES/INSTANCE" of its reports, or "": the newest about fewer images for which the model looked
    at them, and the one that has said since then that it did not look at more, or at these."""

    key: str
    images: dict[str, Path]
    before: str
    refusal: str = ""


@dataclass(frozen=True)
class Result:
    """An answer that waits to be sent. receiver: AE title. files: what is not confirmed yet, in order."""

    id: int
    study: str
    receiver: str
    files: tuple[Path, ...]


class Queue:
    """The queue in a folder, for the threads of one process."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files = threading.Lock()  # what comes is not cleaned away with what was there
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        for name in ("images", "results"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        with self._open() as db:
            db.executescript(_TABLES)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self.folder / "queue.sqlite", timeout=60)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            with db:
                yield db
        finally:
            db.close()

    def add(self, study_uid: str, image_uid: str, receiver: str, content: bytes) -> str:
        """Take an image on; returns the study's key. One that came before changes nothing but the quiet time, unless
        the newest answer to its study is a refusal: whoever sends it again asks again.

        Studies are kept apart by who is to receive their results. Raises OSError or sqlite3.Error where the disk does
        not take it.
        """
        study, image = _hash(study_uid, receiver), _hash(image_uid)
        path = self._image(study, image)
        with self._files, self._open() as db:
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, content)
            db.execute("INSERT OR IGNORE INTO studies VALUES (?, ?)", (study, receiver))
            db.execute(
                "INSERT INTO images (study, image, since) VALUES (?, ?, ?) "
                f"ON CONFLICT DO UPDATE SET since = excluded.since, here = 1, answered = answered AND NOT {_REFUSED}",
                (study, image, time.time()),
            )
        return study

    def due(self, quiet: float) -> list[Study]:
        """Studies with an image that no answer is about yet, to which nothing has come for `quiet` seconds. Where
        something came later than now, the clock was set back: nobody waits for as long as that."""
        now = time.time()
        with self._open() as db:
            rows = db.execute(
                "SELECT study FROM images WHERE study IN (SELECT study FROM images WHERE answered = 0) "
                "GROUP BY study HAVING MAX(since) <= ? OR MAX(since) > ? ORDER BY MAX(since)",
                (now - quiet, now),
            ).fetchall()
            return [self._study(db, study) for (study,) in rows]

    def _study(self, db: sqlite3.Connection, study: str) -> Study:
        rows = db.execute(
            "SELECT image, answered FROM images WHERE study = ? AND here = 1 ORDER BY image", (study,)
        ).fetchall()
        files = {image: self._image(study, image) for image, _ in rows}
        # Without its file, one that was answered is not here; whoever asks about another is to fail, and say so.
        images = {image: files[image] for image, answered in rows if not answered or files[image].exists()}
        answers = db.execute(
            "SELECT images, report, id IN (SELECT id FROM refusals) FROM answers WHERE study = ? ORDER BY id DESC",
            (study,),
        )
        earlier = [
            (report, is_refusal)
            for about, report, is_refusal in answers
            if (told := set(json.loads(about))) < images.keys() or (is_refusal and told == images.keys())
        ]
        before = next((report for report, is_refusal in earlier if not is_refusal), "")
        refusal = earlier[0][0] if earlier and earlier[0][1] else ""
        return Study(study, images, before, refusal)

    def answer(self, study: Study, files: Sequence[bytes], report: str, is_refusal: bool = False) -> None:
        """Note an answer to a study as it was when it was asked about. report: "SERIES/INSTANCE". is_refusal: it says
        that the model has not looked at the images."""
        with self._open() as db:
            made = db.execute(
                "INSERT INTO answers (study, images, report, since) VALUES (?, ?, ?, ?)",
                (study.key, json.dumps(list(study.images)), report, time.time()),
            ).lastrowid
            if is_refusal:
                db.execute("INSERT INTO refusals VALUES (?, ?)", (made, study.key))
            folder = self.folder / "results" / str(made)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for place, content in enumerate(files):
                write_atomic(folder / f"{place:04d}.dcm", content)
            db.executemany(
                "UPDATE images SET answered = 1 WHERE study = ? AND image = ?",
                [(study.key, image) for image in study.images],
            )

    def ready(self) -> list[Result]:
        """Answers that are not sent yet, the oldest first."""
        with self._open() as db:
            rows = db.execute(
                "SELECT id, study, receiver FROM answers JOIN studies USING (study) WHERE sent IS NULL ORDER BY id"
            ).fetchall()
        return [
            Result(id, study, receiver, tuple(sorted((self.folder / "results" / str(id)).glob("*.dcm"))))
            for id, study, receiver in rows
        ]

    def receivers(self) -> dict[str, int]:
        """AE titles that something is on its way to -> number of studies."""
        with self._open() as db:
            rows = db.execute(
                "SELECT receiver, COUNT(*) FROM studies WHERE study IN (SELECT study FROM images WHERE answered = 0 "
                "UNION SELECT study FROM answers WHERE sent IS NULL) GROUP BY receiver ORDER BY receiver"
            ).fetchall()
        return dict(rows)

    def confirm(self, file: Path) -> None:
        """Note that a file of a result has arrived."""
        file.rename(file.with_suffix(".sent"))

    def sent(self, result: Result) -> None:
        """Note that all of a result has arrived."""
        with self._open() as db:
            db.execute("UPDATE answers SET sent = ? WHERE id = ?", (time.time(), result.id))

    def clean(self, days: float) -> None:
        """Delete the files of studies that were brought to their end so many days ago."""
        over = f"SELECT study FROM images WHERE study IN ({_HERE}) {_OVER}"
        with self._files:
            with self._open() as db:
                done = db.execute(over, {"before": time.time() - days * _DAY}).fetchall()
                db.executemany("UPDATE images SET here = 0 WHERE study = ?", done)
                made = [id for study in done for (id,) in db.execute("SELECT id FROM answers WHERE study = ?", study)]
            folders = [self.folder / "images" / study for (study,) in done]
            for folder in [*folders, *(self.folder / "results" / str(id) for id in made)]:
                shutil.rmtree(folder, ignore_errors=True)

    def tidy(self) -> None:
        """Remove results of a process that was killed before its answer counted, files of one that was killed while it
        cleaned, and what nobody will send again. For the start, before anything else is done with the queue."""
        with self._open() as db:
            old = {"before": time.time() - _REMEMBERED}
            done = db.execute(f"SELECT study FROM images WHERE study NOT IN ({_HERE}) {_OVER}", old).fetchall()
            for table in ("images", "answers", "refusals", "studies"):
                db.executemany(f"DELETE FROM {table} WHERE study = ?", done)
            wanted = f"SELECT id FROM answers WHERE sent IS NULL OR study IN ({_HERE})"
            known = {"results": {str(id) for (id,) in db.execute(wanted)}}
            known["images"] = {study for (study,) in db.execute(_HERE)}
        for name, names in known.items():
            for place in (self.folder / name).iterdir():
                if place.name not in names:
                    shutil.rmtree(place)

    def _image(self, study: str, image: str) -> Path:
        return self.folder / "images" / study / f"{image}.dcm"


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
