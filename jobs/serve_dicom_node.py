"""Answer the studies that an archive (PACS) sends by DICOM, through a running server (`jobs/serve_models.py`).

    python jobs/serve_tokens.py add dicom-node > token      # where the server wants one
    python jobs/serve_dicom_node.py --model hsg --token-file token --allow PACS1 --reply-to PACS1@10.0.0.5:104
    python jobs/serve_dicom_node.py --model hsg --allow CT1 --reply-to CT1=PACS1@10.0.0.5:104

Whoever is allowed sends a study by C-STORE; when nothing has come for a while, a report and overlays come back by
C-STORE. What is on its way is kept on disk, and goes on when this is started again.
"""

import logging
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raymed.command import command
from raymed.config import UserError, check_range
from raymed.serve.dicom.endpoint import Endpoint
from raymed.serve.dicom.node import Node
from raymed.serve.dicom.pacs import parse_receivers
from raymed.serve.dicom.queue import Queue
from raymed.storage import lock, resolve_storage


@dataclass(frozen=True)
class ServeDicomNode:
    """Who may send, who gets the results, and which model is asked."""

    model: str
    """Name of the model at the server, as its page and /v1/models show it."""
    allow: tuple[str, ...]
    """AE titles of those who may send studies, such as PACS1."""
    reply_to: tuple[str, ...]
    """Where results go: TITLE@HOST:PORT for what TITLE itself has sent, SENDER=TITLE@HOST:PORT for what SENDER has."""
    ae: str = "RAYMED"
    """AE title of this node, which senders must call it by."""
    host: str = "127.0.0.1"
    """Address to listen on: 127.0.0.1 is reached from this machine alone, 0.0.0.0 from every network. DICOM is not
    encrypted: let an archive's own network alone reach it."""
    port: int = 11112
    """To listen on; 0 = any that is free, which is printed."""
    endpoint: str = "http://127.0.0.1:8000"
    """Address of the server of models (jobs/serve_models.py)."""
    ca: Path | None = None
    """Certificate of the authority that an https endpoint is checked by; None = the system's."""
    token_file: Path | None = None
    """File with the server's token, as jobs/serve_tokens.py add NAME prints it; None = $RAYMED_NODE_TOKEN, else none.
    It is read once, at the start."""
    results: tuple[Literal["report", "overlay", "segmentation"], ...] = ("report", "overlay")
    """What is sent back: a report (SR) of each study, and of each image an overlay and a segmentation of the heat map.
    The report is always among them."""
    quiet: float = 5.0
    """Seconds without an image after which a study is taken to be whole."""
    days: float = 1.0
    """How long a study is kept when its results have arrived, so that a late image is answered together with those
    before it; 0 = deleted at once, and a late image is answered by itself."""
    longest_wait: float = 300.0
    """Most seconds between two tries, while the server or an archive is not there."""
    storage: str | None = None
    """Where raymed keeps things; None = $RAYMED_HOME, else ~/.raymed."""

    def __post_init__(self) -> None:
        check_range("port", self.port, 0, 65535)
        check_range("quiet", self.quiet, 0, low_open=True)
        check_range("days", self.days, 0)
        check_range("longest_wait", self.longest_wait, 1)
        if "report" not in self.results:
            raise UserError("results: a node always sends reports; name report among them")


def work(config: ServeDicomNode) -> str:
    """Serve until SIGTERM or SIGINT."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    receivers = parse_receivers(config.reply_to, config.allow)
    endpoint = Endpoint(config.endpoint, config.model, _token(config), config.results, ca=config.ca)
    folder = resolve_storage(config.storage) / "dicom" / config.ae
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    with lock(folder / "lock"):
        queue = Queue(folder)
        node = Node(config.ae, receivers, endpoint, queue, config.quiet, config.days, config.longest_wait)
        try:
            port = node.start(config.host, config.port)
        except OSError as error:
            raise UserError(
                f"port {config.port} of {config.host} cannot be had ({error.strerror}): --port 0 takes a free one"
            ) from None
        print(f"listening: {config.ae}@{config.host}:{port}", flush=True)
        stopped.wait()
        node.stop()
    return "stopped"


def _token(config: ServeDicomNode) -> str:
    if config.token_file is None:
        return os.environ.get("RAYMED_NODE_TOKEN", "")
    try:
        token = config.token_file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"token_file: {config.token_file} cannot be read") from None
    if not token:
        raise UserError(f"token_file: a token is expected in {config.token_file}, and it is empty")
    return token


if __name__ == "__main__":
    command(ServeDicomNode, work)
