"""Shared by tests of DICOM: studies of phantoms, what an IOD demands, an archive that takes results."""

import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import uvicorn
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from waiting import until

from raymed.data.phantom_hospital import write_hospital
from raymed.serve.app import create_app
from raymed.serve.config import ServeConfig
from raymed.serve.dicom.endpoint import Endpoint
from raymed.serve.dicom.node import Node
from raymed.serve.dicom.pacs import Receiver
from raymed.serve.dicom.queue import Queue


def studies(folder: Path) -> list[list[Dataset]]:
    """Twelve studies of two views or more, as of an angiography machine: single images and runs, MONOCHROME1 and 2, 8
    and 12 bits, Hangul names in two character sets."""
    found: dict[str, list[Dataset]] = {}
    for path in sorted((write_hospital(folder, num_studies=12, size=64) / "images").rglob("IM*")):
        ds = pydicom.dcmread(path)
        if ds.Modality == "CT":
            continue
        ds.Modality, ds.SOPClassUID = "XA", pydicom.uid.XRayAngiographicImageStorage
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
        del ds.BodyPartExamined
        found.setdefault(ds.StudyInstanceUID, []).append(ds)
    return list(found.values())


def content(ds: Dataset) -> bytes:
    """As a file."""
    file = BytesIO()
    ds.save_as(file, enforce_file_format=True)
    return file.getvalue()


def flaws(ds: Dataset) -> list[str]:
    """What the mandatory modules of an object's IOD demand and it lacks: attributes of type 1, of type 2, at any depth.
    By the tables of the standard that highdicom holds. Content trees and functional groups are left out, whose items
    demand one thing or another: highdicom's parsers look at them."""
    from highdicom._standard_utils import get_iod_module_map, get_module_attribute_map, get_sop_class_iod_map

    found = []
    for module in get_iod_module_map()[get_sop_class_iod_map()[ds.SOPClassUID]]:
        if module["usage"] != "M" or module["key"].endswith(("-content", "-functional-groups")):
            continue
        for attribute in get_module_attribute_map()[module["key"]]:
            for item in _items(ds, attribute["path"]):
                keyword, kind = attribute["keyword"], attribute["type"]
                is_empty = keyword in item and item[keyword].is_empty
                if (kind in ("1", "2") and keyword not in item) or (kind == "1" and is_empty):
                    found.append(f"{module['key']}: {'.'.join([*attribute['path'], keyword])} ({kind})")
    return found


def texts(ds: Dataset) -> str:
    """All text values of a content tree."""
    inner = [texts(item) for item in ds.get("ContentSequence") or []]
    return "\n".join([str(ds.get("TextValue") or ""), *inner])


def _items(ds: Dataset, path: list[str]) -> list[Dataset]:
    items = [ds]
    for keyword in path:
        items = [inner for item in items for inner in item.get(keyword) or []]
    return items


@dataclass
class Archive:
    """A PACS: takes whatever comes, as often as it comes."""

    title: str = "PACS1"
    port: int = 0
    received: list[Dataset] = field(default_factory=list)
    refuses: int = 0
    """Objects that it refuses before it takes one."""
    classes: tuple[str, ...] = ()
    """SOP classes that it takes beside reports; none = all."""

    def __enter__(self) -> "Archive":
        self._lock = threading.Lock()
        entity = AE(self.title)
        entity.require_called_aet = True
        for uid in (pydicom.uid.ComprehensiveSRStorage, *(self.classes or _RESULTS)):
            entity.add_supported_context(uid, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
        self._server = entity.start_server(
            ("127.0.0.1", self.port), False, evt_handlers=[(evt.EVT_C_STORE, self._take)]
        )
        self.port = self._server.server_address[1]
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()

    def _take(self, event) -> int:
        with self._lock:
            if self.refuses:
                self.refuses -= 1
                return 0xA700
            ds = event.dataset
            ds.file_meta = event.file_meta
            self.received.append(ds)
        return 0x0000

    def of(self, modality: str) -> list[Dataset]:
        """What has come of a modality."""
        with self._lock:
            return [ds for ds in self.received if ds.Modality == modality]


_RESULTS = (pydicom.uid.SecondaryCaptureImageStorage, pydicom.uid.SegmentationStorage)


def send_study(study: list[Dataset], port: int, sender: str = "PACS1", called: str = "RAYMED") -> list[int]:
    """Statuses of C-STORE, one an image."""
    entity = AE(sender)
    for uid in {ds.SOPClassUID for ds in study}:
        entity.add_requested_context(uid, [ExplicitVRLittleEndian])
    association = entity.associate("127.0.0.1", port, ae_title=called)
    assert association.is_established
    statuses = [association.send_c_store(ds).Status for ds in study]
    association.release()
    return statuses


def ramp(size: int = 16) -> np.ndarray:
    """A map that rises to the right."""
    return np.tile(np.linspace(0, 1, size, dtype=np.float32), (size, 1))


@contextmanager
def serving(config: ServeConfig):
    """A server on 127.0.0.1 in a thread of its own; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(create_app(config), log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            until(lambda: server.started)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def free_port() -> int:
    """One that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


@contextmanager
def node(folder: Path, address: str, receiver_port: int, **changes):
    """A node that answers PACS1, and its port."""
    settings = {"quiet": 0.3, "longest_wait": 1.0} | changes
    results = settings.pop("results", ("report", "overlay"))
    endpoint = Endpoint(address, "hsg", results=results)
    made = Node("RAYMED", {"PACS1": Receiver("PACS1", "127.0.0.1", receiver_port)}, endpoint, Queue(folder), **settings)
    try:
        yield made.start("127.0.0.1", 0)
    finally:
        made.stop()


def files(folder: Path, kind: str) -> list[Path]:
    """DICOM files of a node's folder."""
    return list((folder / kind).rglob("*.dcm"))


def is_over(folder: Path) -> bool:
    """Nothing is waiting."""
    queue = Queue(folder)
    return not queue.ready() and not queue.due(0)


def is_assessment(report: Dataset) -> bool:
    """Whether the model has looked at the images."""
    return "has not looked" not in texts(report)
