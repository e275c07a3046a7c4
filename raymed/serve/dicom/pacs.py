"""Where results go: an archive's address, and C-STORE to it."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from raymed.config import UserError

_TITLE = r"[A-Za-z0-9_.\- ]{1,16}"
_ADDRESS = re.compile(rf"(?:(?P<sender>{_TITLE})=)?(?P<title>{_TITLE})@(?P<host>[^@:\s]+):(?P<port>\d{{1,5}})")
_STORED = (0x0000, 0xB000, 0xB006, 0xB007)
"""Success, and warnings of an object that was stored all the same."""
_NO_SUCH_CLASS = "the receiver takes no objects of this class"


@dataclass(frozen=True)
class Receiver:
    """An archive that takes results."""

    title: str
    host: str
    port: int


def parse_receivers(texts: Sequence[str], allow: Sequence[str]) -> dict[str, Receiver]:
    """Allowed sender's AE title -> who gets the results of what it sends.

    texts: TITLE@HOST:PORT (who sends gets them), or SENDER=TITLE@HOST:PORT. Raises UserError for another form, an
    allowed sender without a receiver, a sender with two, and a title with two addresses: results are kept by title.
    """
    found: dict[str, Receiver] = {}
    addresses: dict[str, Receiver] = {}
    for text in texts:
        parts = _ADDRESS.fullmatch(text)
        if parts is None or not 0 < int(parts["port"]) < 65536:
            raise UserError(f"reply_to: TITLE@HOST:PORT or SENDER=TITLE@HOST:PORT is expected, got {text!r}")
        sender, receiver = (
            parts["sender"] or parts["title"],
            Receiver(parts["title"], parts["host"], int(parts["port"])),
        )
        if sender in found:
            raise UserError(f"reply_to: who gets the results of what {sender} sends is named twice")
        if addresses.setdefault(receiver.title, receiver) != receiver:
            raise UserError(f"reply_to: {receiver.title} has two addresses: an AE title must stand for one archive")
        found[sender] = receiver
    for title in allow:
        if title not in found:
            raise UserError(
                f"allow: nobody gets the results of what {title} sends: name its address, "
                f"--reply-to {title}@HOST:PORT, or another's, --reply-to {title}=TITLE@HOST:PORT"
            )
    if not allow:
        raise UserError("allow: name the AE titles of those who may send")
    return {title: found[title] for title in allow}


def send(title: str, receiver: Receiver, files: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Send files over one association; yields each with "" where it was confirmed, else why it was not.

    title: of who sends. Raises ConnectionError where there is no association, or it breaks.
    """
    from pydicom import dcmread
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
    from pynetdicom import AE

    entity = AE(title)
    entity.connection_timeout, entity.acse_timeout, entity.dimse_timeout, entity.network_timeout = 5, 15, 60, 60
    for kind in {dcmread(file, stop_before_pixels=True).SOPClassUID for file in files}:
        entity.add_requested_context(kind, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
    association = entity.associate(receiver.host, receiver.port, ae_title=receiver.title)
    if association.rejected_contexts and not association.accepted_contexts:
        yield from ((file, _NO_SUCH_CLASS) for file in files)
        return
    if not association.is_established:
        raise ConnectionError("it refuses the association" if association.is_rejected else "nobody answers there")
    try:
        for file in files:
            yield file, _send_one(association, file)
    finally:
        association.release()


def _send_one(association, file: Path) -> str:
    from pydicom import dcmread

    try:
        status = association.send_c_store(dcmread(file))
    except ValueError:  # no presentation context of its kind
        return _NO_SUCH_CLASS
    except RuntimeError:
        raise ConnectionError("the association broke") from None
    if "Status" not in status:
        raise ConnectionError("the association broke, or timed out")
    return "" if status.Status in _STORED else f"refused with status {status.Status:04X}"
