"""Whether the certificates of the servers are believed here, by the libraries that will ask them."""

import os
import warnings
from datetime import UTC, datetime
from pathlib import Path

from raymed.config import UserError
from raymed.doctor.finding import Finding, failure, ok
from raymed.doctor.place import Place

_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "AWS_CA_BUNDLE")
_BUNDLE = (
    "put the certificate of that authority (PEM; the hospital's own, or of a proxy that opens TLS) at the end of a "
    "bundle and let REQUESTS_CA_BUNDLE, SSL_CERT_FILE and AWS_CA_BUNDLE name it, here and where Ray's nodes are started"
)
_REMEDIES = {
    "expired": "renew the certificate of the server, or of the authority in the bundle; or set this machine's clock",
    "not yet valid": "set this machine's clock",
    "ostname mismatch": "ask the server by a name that its certificate has",
    "not valid for": "ask the server by a name that its certificate has",
}


def trusted(place: Place) -> Finding:
    """The bundles that are named can be read, and each https server is asked with them."""
    problems, counts = [], []
    for name in _VARIABLES:
        if path := os.environ.get(name):
            try:
                counts.append(f"{name}: {_valid(Path(path))} certificates")
            except (OSError, ValueError) as error:
                problems.append(f"{name}={path} is no bundle of certificates ({error})")
    if problems:
        return failure("; ".join(problems), "name a PEM file with at least one certificate that has not expired")
    asked = [(name, url) for name, url in place.services().items() if url.startswith("https://")]
    problems = [f"{name}: {problem}" for name, url in asked if (problem := _refused(name, url))]
    if problems:
        text = "; ".join(problems)
        return failure(text, next((remedy for sign, remedy in _REMEDIES.items() if sign in text), _BUNDLE))
    believed = f"believed: {', '.join(name for name, _ in asked)}" if asked else "no server here is asked by https"
    return ok("; ".join([believed, *counts]))


def _valid(path: Path) -> int:
    """How many certificates a bundle has that are valid now. Raises ValueError or OSError for what is no bundle."""
    from cryptography import x509

    if path.is_dir():  # of hashed names, as OpenSSL has them
        return len(list(path.iterdir()))
    with warnings.catch_warnings(action="ignore"):  # of authorities that are odd and known
        certificates = x509.load_pem_x509_certificates(path.read_bytes())
    now = datetime.now(UTC)
    valid = [c for c in certificates if c.not_valid_before_utc <= now <= c.not_valid_after_utc]
    if not valid:
        raise ValueError("all of them have expired")
    return len(valid)


def _refused(name: str, url: str) -> str:
    """Why a server's certificate is not believed, by the client that will ask it; "" where it is, or nothing answers,
    which is another check's."""
    if name == "S3":
        return _refused_by_s3()
    import ssl
    import urllib.error
    import urllib.request

    import requests

    try:
        requests.get(url, timeout=10, allow_redirects=False)
    except requests.exceptions.SSLError as error:
        return f"requests: {_reason(error)}"
    except requests.exceptions.RequestException:
        return ""
    try:
        urllib.request.build_opener().open(url, timeout=10).close()
    except urllib.error.HTTPError:
        return ""
    except OSError as error:
        cause = getattr(error, "reason", error)
        return f"urllib: {_reason(cause)}" if isinstance(cause, ssl.SSLError) else ""
    return ""


def _refused_by_s3() -> str:
    from botocore.exceptions import BotoCoreError, ClientError, SSLError

    from raymed.storage.client import client, patience

    try:
        with patience(5):
            client().list_buckets()
    except SSLError as error:
        return _reason(error)
    except (ClientError, BotoCoreError, UserError):
        return ""
    return ""


def _reason(error: object) -> str:
    text = str(error)
    start = text.rfind("verify failed: ")
    return text[start + len("verify failed: ") :].split(" (_ssl")[0].rstrip("')") if start >= 0 else text[:200]
