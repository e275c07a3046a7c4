"""Servers whose certificates are believed, and those that are not."""

import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from raymed.doctor.checks import tls
from raymed.doctor.place import Place

VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR", "AWS_CA_BUNDLE")


class Authority:
    """Signs certificates; `bundle` is its own."""

    def __init__(self, folder: Path):
        self.folder, self.key = folder, ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a hospital")])
        self.bundle = folder / "bundle.pem"
        self.bundle.write_bytes(self.sign(self.name, self.key, 30, is_authority=True))

    def sign(self, name: x509.Name, key: ec.EllipticCurvePrivateKey, days: int, host="127.0.0.1", is_authority=False):
        """A certificate that ends in so many days, as PEM."""
        now = datetime.now(UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=60))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(is_authority, None), True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), False)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(host))]), False)
        )
        return made.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def certified(self, days: int, host: str) -> Path:
        """A file with a certificate and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
        secret = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path = self.folder / f"server{days}{host}.pem"
        path.write_bytes(self.sign(name, key, days, host) + secret)
        return path


@pytest.fixture
def authority(tmp_path, monkeypatch) -> Authority:
    """One that this machine does not know."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return Authority(tmp_path)


@pytest.fixture
def server(authority) -> Iterator[Callable[..., str]]:
    """server(days=..., host=...) -> URL of an https server with such a certificate."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format, *args):
            pass

    running = []

    def start(days: int = 10, host: str = "127.0.0.1") -> str:
        made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(authority.certified(days, host))
        made.socket = context.wrap_socket(made.socket, server_side=True)
        threading.Thread(target=made.serve_forever, daemon=True).start()
        running.append(made)
        return f"https://127.0.0.1:{made.server_address[1]}"

    yield start
    for made in running:
        made.shutdown()
        made.server_close()


def test_an_authority_that_is_not_known(authority, server, monkeypatch):
    """What is to be done is done, for one library after the other."""
    place = Place(reach=(server(),))
    finding = tls.trusted(place)
    assert finding.level == "failure" and "requests: unable to get local issuer certificate" in finding.found
    assert "REQUESTS_CA_BUNDLE, SSL_CERT_FILE and AWS_CA_BUNDLE" in finding.remedy
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority.bundle))
    finding = tls.trusted(place)
    assert finding.level == "failure" and "urllib: unable to get local issuer certificate" in finding.found
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.bundle))
    finding = tls.trusted(place)
    assert finding.level == "ok", finding
    assert "REQUESTS_CA_BUNDLE: 1 certificates" in finding.found


def test_s3_has_a_bundle_of_its_own(authority, server, monkeypatch):
    url = server()
    for name, value in {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(name, value)
    finding = tls.trusted(Place(s3=url))
    assert finding.level == "failure" and "S3: unable to get local issuer certificate" in finding.found
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.bundle))
    assert tls.trusted(Place(s3=url)).level == "ok"


@pytest.mark.parametrize(
    ("made", "said", "remedy"),
    [
        ({"days": -1}, "certificate has expired", "renew the certificate"),
        ({"host": "127.0.0.9"}, "not valid for '127.0.0.1'", "by a name that its certificate has"),
    ],
)
def test_certificates_that_are_not_in_order(made, said, remedy, authority, server, monkeypatch):
    for name in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.setenv(name, str(authority.bundle))
    finding = tls.trusted(Place(mlflow=server(**made)))
    assert finding.level == "failure" and said in finding.found and remedy in finding.remedy


def test_bundles_that_are_none(authority, monkeypatch):
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.folder / "gone.pem"))
    assert "gone.pem is no bundle of certificates" in tls.trusted(Place()).found
    (authority.folder / "gone.pem").write_text("not a certificate")
    assert tls.trusted(Place()).level == "failure"
    (authority.folder / "gone.pem").write_bytes(authority.sign(authority.name, authority.key, -1))
    assert "all of them have expired" in tls.trusted(Place()).found
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.bundle))
    assert tls.trusted(Place()).level == "ok"
