"""What a server is told when it starts: which models, how much it takes, and who may ask."""

import re
from dataclasses import dataclass, field
from typing import Literal

from raymed.config import UserError, check_choice, check_range

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Limits:
    """The most that is taken; what is more is refused before any of it is decoded, or waited for."""

    body_bytes: int = 64 * 2**20
    """Size of a request's body in bytes (413)."""
    files: int = 32
    """Images of one case (413)."""
    pixels: int = 64_000_000
    """Height x width of one image (413)."""
    frames: int = 64
    """Frames of one file that are scored (413)."""
    held_pixels: int = 512_000_000
    """Height x width of all images that are being answered; what comes then is told to come later (503). A case that
    has more by itself is refused (413)."""
    queue: int = 128
    """Images that wait for one model, half of them of one token; what comes then is told to come later (503, 429). A
    case may have more: its images come to the queue by and by."""
    timeout_s: float = 30.0
    """Seconds from the last byte of a request to its answer (503 beyond it)."""
    read_s: float = 20.0
    """Seconds between two pieces of a request's body; the whole of it may take one more for each 1000 bytes (408)."""
    per_minute: int = 600
    """Requests of one token in a minute; what comes then is told to come later (429)."""
    at_once: int = 32
    """Requests of one token that are being answered."""
    jobs: int = 16
    """Jobs (`/v1/jobs`) that wait to be worked on (429)."""

    def __post_init__(self) -> None:
        whole = ("body_bytes", "files", "pixels", "frames", "held_pixels", "queue", "per_minute", "at_once", "jobs")
        for name in whole:
            check_range(f"limits.{name}", getattr(self, name), 1)
        for name in ("timeout_s", "read_s"):
            check_range(f"limits.{name}", getattr(self, name), 0, low_open=True)


@dataclass(frozen=True)
class Hardware:
    """Where networks run, and how."""

    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto = a GPU where there is one."""
    threads: int = 0
    """Of torch, on a CPU; 0 = one a core that this process may use, or one alone for a network that more do not make
    faster."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: networks run under autocast."""
    compile: bool = False
    """Whether networks go through torch.compile: a minute or two more to load each architecture; needs a C++ compiler
    and, on a GPU, Triton."""
    max_batch: int = 0
    """Images that go through a network at once; 0 = what the warm-up finds to be worth it, up to 64."""

    def __post_init__(self) -> None:
        check_choice("hardware.precision", self.precision, ("fp32", "bf16"))
        check_range("hardware.threads", self.threads, 0)
        check_range("hardware.max_batch", self.max_batch, 0)


@dataclass(frozen=True)
class Follow:
    """How a model keeps up with its alias in the registry."""

    every_s: float = 30.0
    """Seconds between two looks at the registry; a webhook is faster."""
    canary: float = 0.0
    """Share of patients, 0 to 1, who are answered by the version with the alias `challenger`, where there is one."""
    secret: str | None = None
    """File with the secret of MLflow's webhook, or $RAYMED_WEBHOOK_SECRET; None = there is no POST /admin/registry."""

    def __post_init__(self) -> None:
        check_range("follow.every_s", self.every_s, 0, low_open=True)
        check_range("follow.canary", self.canary, 0, 1)


@dataclass(frozen=True)
class Access:
    """Who may ask."""

    tokens: str | None = None
    """File of tokens (`jobs/serve_tokens.py`); None = tokens.json in the storage's folder serve."""
    open: bool = False
    """Nobody needs a token, and callers have no limits of their own. Only with the host 127.0.0.1."""
    cert: str | None = None
    """TLS: file of the server's certificate (PEM); needs access.key."""
    key: str | None = None
    """TLS: file of the private key of access.cert (PEM, without a passphrase)."""
    client_ca: str | None = None
    """Mutual TLS: file of the authority (PEM) whose clients are let in without a token; their common name stands in the
    log."""
    hosts: tuple[str, ...] = ()
    """Names that the server is asked by, beside the one it listens on and that of the machine: requests that name
    another host, and no address, are refused."""


@dataclass(frozen=True)
class ServeConfig:
    """A server."""

    models: tuple[str, ...] = ()
    """NAME=WHERE: a bundle's folder, s3://BUCKET/FOLDER, models:/NAME (its champion or, until there is one, its
    candidate) or models:/NAME@ALIAS, which are followed, or models:/NAME/VERSION. A CLIP's may go on with ,index=WHERE
    of the index that it searches."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 = all of this machine's, which wants access.cert and access.key."""
    port: int = 8000
    """0 = any that is free; it is printed."""
    limits: Limits = Limits()
    hardware: Hardware = Hardware()
    follow: Follow = Follow()
    access: Access = Access()
    keep: str | None = None
    """Folder in which input pixels and answers are kept; None = nowhere."""
    days: int = 30
    """How long they are kept."""
    batch_roots: tuple[str, ...] = ()
    """Folders of this machine from which jobs (`/v1/jobs`) may take images and manifests; none = there are no jobs."""
    batch_days: int = 7
    """How long the result of a job is kept."""
    storage: str | None = None
    """Where raymed keeps things; None = $RAYMED_HOME, else ~/.raymed."""
    tracking: str | None = None
    """MLflow tracking URI; None = $MLFLOW_TRACKING_URI, else the sqlite store in the storage."""

    def __post_init__(self) -> None:
        check_range("port", self.port, 0, 65535)
        check_range("days", self.days, 1)
        check_range("batch_days", self.batch_days, 1)
        for text in self.models:
            Wanted.parse(text)
        names = [Wanted.parse(text).name for text in self.models]
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(f"models: {min(twice)} is named twice")
        if self.access.open and self.host not in LOOPBACK:
            raise UserError(f"access.open lets anybody in, and is for 127.0.0.1 alone: host is {self.host}")


@dataclass(frozen=True)
class Wanted:
    """One model to serve: NAME=WHERE[,OPTION=VALUE...]."""

    name: str
    where: str
    options: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Wanted":
        """Raises UserError for another form."""
        name, is_there, rest = text.partition("=")
        where, *more = rest.split(",")
        options = {name: value for name, _, value in (part.partition("=") for part in more)}
        if not is_there or not where or not NAME.fullmatch(name) or not all(options.values()):
            raise UserError(f"models: NAME=WHERE is expected, such as hsg=models:/hsg-asl@champion, got {text!r}")
        return cls(name, where, options)
