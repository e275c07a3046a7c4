"""The node that an archive talks to: it takes studies by C-STORE, asks a model about them, and sends back results.

    C-STORE -> queue on disk -> quiet time -> endpoint (HTTP) -> results on disk -> C-STORE to the sender's archive

Success is answered once an image is on disk. Whoever is not there, the endpoint or an archive, is tried again, at
longer and longer intervals, for as long as it takes. A study that gets a late image is answered again, as a whole, in a
report that names the one before it; where that cannot be, the one before it stands. Logs know studies by a hash.
"""

import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raymed.serve.dicom.classes import image_classes, transfer_syntaxes
from raymed.serve.dicom.endpoint import Endpoint, NotNow, header_of, identity_of_report
from raymed.serve.dicom.pacs import Receiver, send
from raymed.serve.dicom.provenance import is_own
from raymed.serve.dicom.queue import Queue, Result, Study
from raymed.serve.uploads import quiet

if TYPE_CHECKING:
    from pynetdicom.events import Event

log = logging.getLogger("raymed.dicom")

_SOON = 20.0
# Statuses of C-STORE (PS3.4, table B.2-1).
STORED, NO_SUCH_CLASS, OUT_OF_RESOURCES, MISMATCH, NOT_UNDERSTOOD = 0x0000, 0x0122, 0xA700, 0xA900, 0xC000


@dataclass
class Patience:
    """When what has failed is tried again: after a second, then twice as long each time, up to `longest`."""

    longest: float = 300.0
    _waits: dict[str, tuple[float, float]] = field(default_factory=dict)

    def is_due(self, what: str) -> bool:
        """Whether it may be tried now."""
        return time.monotonic() >= self.until(what)

    def failed(self, what: str, after: float | None = None) -> float:
        """Note a failure; returns the seconds until the next try. after: as the other side asks for."""
        wait = min(self.longest, max(1.0, 2 * self._waits.get(what, (0.0, 0.0))[1]))
        self._waits[what] = (time.monotonic() + (wait if after is None else after), wait)
        return wait if after is None else after

    def worked(self, what: str) -> None:
        """Note that it is well again."""
        self._waits.pop(what, None)

    def until(self, what: str) -> float:
        """When it may be tried again, by the monotonic clock; 0 for what has not failed."""
        return self._waits.get(what, (0.0, 0.0))[0]


class Node:
    """A DICOM node.

    Args:
        title: its AE title, which it must be called by.
        receivers: sender's AE title -> who gets the results; nobody else may send.
        quiet: seconds without an image after which a study is taken to be whole.
        days: how long a study's files are kept when its results are confirmed, so that a late image is answered
            together with those before it. 0: deleted at once, and a late image is answered by itself.
    """

    def __init__(
        self,
        title: str,
        receivers: dict[str, Receiver],
        endpoint: Endpoint,
        queue: Queue,
        quiet: float = 5.0,
        days: float = 1.0,
        longest_wait: float = 300.0,
    ):
        self.title, self.receivers, self.endpoint, self.queue = title, receivers, endpoint, queue
        self.quiet, self.days = quiet, days
        self._patience = Patience(longest_wait)
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=(work,), name=work.__name__, daemon=True)
            for work in (self._ask, self._send)
        ]
        self._server: Any = None

    def start(self, host: str, port: int) -> int:
        """Listen, and go on with what is in the queue; returns the port. Raises OSError where it is taken."""
        from pynetdicom import AE, _config, evt
        from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

        _config.LOG_HANDLER_LEVEL = "none"  # its own log names AE titles and attributes
        logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)
        quiet()
        self.queue.tidy()
        self._tell_of_strangers()
        entity = AE(self.title)
        # Who has not said who he is counts among the associations: not for long.
        entity.acse_timeout, entity.maximum_associations = 3, 100
        entity.require_called_aet, entity.require_calling_aet = True, sorted(self.receivers)
        entity.add_supported_context(Verification)
        for kind in image_classes():
            entity.add_supported_context(kind, list(transfer_syntaxes()))
        self._server = entity.start_server(
            (host, port), block=False, evt_handlers=[(evt.EVT_C_STORE, self._store), (evt.EVT_REJECTED, self._rejected)]
        )
        for thread in self._threads:
            thread.start()
        return self._server.server_address[1]

    def stop(self) -> None:
        """Take nothing more, and let what is being done come to its end, if that is soon; else it is done again."""
        self._stopping.set()
        if self._server is not None:
            self._server.shutdown()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(_SOON)

    def _store(self, event: "Event") -> int:
        """An image comes."""
        request: Any = event.request
        content = event.encoded_dataset()
        try:
            header = header_of(content)
            told = header.get("SOPClassUID"), header.get("SOPInstanceUID")
            study, series = header.get("StudyInstanceUID"), header.get("SeriesInstanceUID")
        except Exception:  # a parser raises anything at all on damaged data
            return NOT_UNDERSTOOD
        if told != (request.AffectedSOPClassUID, request.AffectedSOPInstanceUID):
            return MISMATCH
        if not all(uid and isinstance(uid, str) for uid in (study, series)):
            return MISMATCH
        if told[0] not in image_classes():
            return NO_SUCH_CLASS
        if is_own(header):  # sent on by an archive that sends on whatever comes
            return STORED
        sender = event.assoc.requestor.ae_title
        try:
            key = self.queue.add(study, told[1], self.receivers[sender].title, content)
        except (OSError, sqlite3.Error) as error:
            log.error("an image was not taken: %s", type(error).__name__)
            return OUT_OF_RESOURCES
        log.info("study %s: an image from %s", key[:12], sender)
        return STORED

    def _tell_of_strangers(self) -> None:
        """Results are kept until they have arrived, however long nobody says where that is."""
        known = {receiver.title for receiver in self.receivers.values()}
        for title, num in self.queue.receivers().items():
            if title not in known:
                log.warning("results of %d studies wait for %s, whose address is not in --reply-to", num, title)

    def _rejected(self, event: "Event") -> None:
        log.warning("an association was refused: unknown title, calling or called, or too many at once")

    def _repeat(self, work: Callable[[], None]) -> None:
        while not self._stopping.wait(min(0.5, max(0.05, self.quiet / 4))):
            try:
                work()
            except Exception as error:  # nothing may end a node; whose text might name somebody
                log.error("%s: %s", work.__name__.strip("_"), type(error).__name__)
                self._stopping.wait(1)

    def _ask(self) -> None:
        """Ask about every study that is whole, about those that have failed after the others."""
        for study in sorted(self.queue.due(self.quiet), key=lambda study: self._patience.until(study.key)):
            if self._stopping.is_set() or not self._patience.is_due("endpoint"):
                return
            if self._patience.is_due(study.key):
                self._ask_about(study)

    def _ask_about(self, study: Study) -> None:
        try:
            found = self.endpoint.ask(list(study.images.values()), study.before, study.refusal)
            self.queue.answer(study, found.files, identity_of_report(found.files[0]), found.is_refusal)
        except NotNow as why:
            wait = self._patience.failed(study.key, None if why.everybody else why.after)
            if why.everybody:  # unless it is this study alone that it cannot answer: the next try is another's
                wait = max(wait, self._patience.failed("endpoint", why.after))
            self._tell_of_wait(study.key, str(why), wait)
        except Exception as error:  # this study must not hold up others; what it says might name somebody
            self._later(study.key, study.key, type(error).__name__)
        else:
            self._patience.worked("endpoint")
            self._patience.worked(study.key)
            log.info("study %s: %d images answered, %d results", study.key[:12], len(study.images), len(found.files))

    def _later(self, what: str, study: str, why: str) -> None:
        self._tell_of_wait(study, why, self._patience.failed(what))

    def _tell_of_wait(self, study: str, why: str, wait: float) -> None:
        log.warning("study %s: %s; again in %g s", study[:12], why, wait)

    def _send(self) -> None:
        """Send every result that is ready, and clean up."""
        addresses = {receiver.title: receiver for receiver in self.receivers.values()}
        for result in sorted(self.queue.ready(), key=lambda result: self._patience.until(f"result {result.id}")):
            receiver = addresses.get(result.receiver)
            if self._stopping.is_set() or receiver is None:
                continue
            if self._patience.is_due(receiver.title) and self._patience.is_due(f"result {result.id}"):
                self._send_result(result, receiver)
        self.queue.clean(self.days)

    def _send_result(self, result: Result, receiver: Receiver) -> None:
        name, refused = f"result {result.id}", ""
        try:
            for file, why in send(self.title, receiver, result.files) if result.files else ():
                refused = refused or why
                if not why:
                    self.queue.confirm(file)
        except ConnectionError as error:
            self._patience.failed(name)  # as in `_ask_about`
            return self._later(receiver.title, result.study, f"{receiver.title}: {error}")
        except Exception as error:  # this result must not hold up others
            return self._later(name, result.study, type(error).__name__)
        self._patience.worked(receiver.title)
        if refused:
            return self._later(name, result.study, f"{receiver.title}: {refused}")
        self._patience.worked(name)
        self.queue.sent(result)
        log.info("study %s: %d results delivered to %s", result.study[:12], len(result.files), receiver.title)
