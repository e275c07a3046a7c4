"""SeaweedFS as the cluster's S3: whoever has no key gets in by none of its ports.

S3 itself asks for keys. Behind it are a master, a volume server and a filer, which ask for nothing by default: here
HTTP is off or wants a signature, and gRPC wants the certificate. Both are made anew each time it starts.
"""

import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from raymed.cluster.services import Silent
from raymed.storage import write_private

BUCKET = "raymed"
_YEARS = timedelta(days=3650)


def command(folder: Path, ports: Sequence[int], keys: tuple[str, str]) -> list[str]:
    """What starts it with its data in `folder`, where it must run too; writes there who may do what.

    Args:
        ports: of S3, master, volume and filer.
        keys: access key and secret key.

    Raises:
        UserError: the program is missing.
    """
    from raymed.storage import server

    words = server.command(folder, ports)
    server.write_identities(folder, keys)
    _write_security(folder)
    return [*words, "-disableHttp"]


def _write_security(folder: Path) -> None:
    certificate = folder / "certificate.pem"
    lines = ["[cors.allowed_origins]", 'values = "http://127.0.0.1"']  # no page of the web
    for part in ("signing", "signing.read", "filer_signing", "filer_signing.read"):
        lines += [f"[jwt.{part}]", f'key = "{secrets.token_hex(32)}"']
    lines += ["[grpc]", f'ca = "{certificate}"']
    for part in ("master", "volume", "filer", "s3", "client"):
        lines += [f"[grpc.{part}]", f'cert = "{certificate}"', f'key = "{certificate}"']
    write_private(certificate, _certificate())
    write_private(folder / "security.toml", "\n".join(lines))


def _certificate() -> bytes:
    """A certificate that signs itself, with its key: both sides of every connection show the same one."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "raymed")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + _YEARS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return certificate.public_bytes(pem) + key.private_bytes(pem, pkcs8, serialization.NoEncryption())


def ask(environment: Mapping[str, str]) -> str:
    """How it is, asked as a client with this environment: it must take an object. Raises Silent."""
    from botocore.exceptions import BotoCoreError, ClientError

    from raymed.storage import server

    url = environment["AWS_ENDPOINT_URL"]
    try:
        server.check_writes(server.client_of(environment), BUCKET)
    except (BotoCoreError, ClientError) as error:
        raise Silent(f"{url} takes no object: {error}") from None
    return f"{url}, asks for keys; bucket {BUCKET}"
