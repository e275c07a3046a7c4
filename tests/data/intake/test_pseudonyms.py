"""Pseudonyms, their key, and the vault that takes them back."""

import base64
import hashlib
import hmac
import stat
import unicodedata

import pytest

from raymed.config import UserError
from raymed.data.intake.pseudonyms import Pseudonyms, load_key, open_vault, vault_of

KEY = bytes(range(32))


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def message(call, *args):
    with pytest.raises(UserError) as info:
        call(*args)
    return str(info.value)


def test_a_pseudonym_is_a_keyed_hash():
    digest = hmac.new(KEY, b"patient\x0000123", hashlib.sha256).digest()
    assert Pseudonyms(KEY).of("patient", "00123") == "P-" + base64.b32encode(digest).decode()[:8]


def test_kind_key_and_zeros_matter_and_normal_form_does_not():
    of = Pseudonyms(KEY).of
    assert len({of("patient", "00123")[2:], of("case", "00123")[2:], of("patient", "0123")[2:]}) == 3
    assert of("patient", "00123") != Pseudonyms(KEY[::-1]).of("patient", "00123")
    assert of("patient", "김민지") == of("patient", f" {unicodedata.normalize('NFD', '김민지')} ")
    assert "must be one of 'patient', 'case', 'image'" in message(of, "person", "1")


def test_a_key_is_made_once_for_its_owner_only(tmp_path):
    path = tmp_path / "secret" / "my.key"
    key = load_key(path)
    assert len(key) == 32 and load_key(path) == key != load_key(tmp_path / "other.key")
    assert mode(path) == 0o600 and mode(path.parent) == 0o700


def test_keys_that_are_refused(tmp_path):
    project = tmp_path / "project"
    (project / "sub").mkdir(parents=True)
    assert f"must not lie in {project}" in message(load_key, project / "sub" / "my.key", [project])
    (project / ".git").mkdir()
    assert f"must not lie in {project}" in message(load_key, project / "sub" / "my.key")
    link = tmp_path / "link"
    link.symlink_to(project)
    assert "must not lie in" in message(load_key, link / "my.key", [project])
    assert not list(project.rglob("*.key"))

    path = tmp_path / "my.key"
    load_key(path)
    path.chmod(0o640)
    assert "chmod 600" in message(load_key, path)
    path.chmod(0o600)
    path.write_text("password")
    assert "64 hexadecimal digits" in message(load_key, path)


def test_a_lost_key_is_not_replaced_while_its_vault_is_there(tmp_path):
    path = tmp_path / "my.key"
    vault_of(path, load_key(path)).add({"P-AAAAAAAA": ["1"]})
    path.unlink()
    assert "would give every patient a new pseudonym" in message(load_key, path)
    assert "only where the key is" in message(open_vault, path)
    assert not path.exists()


def test_the_vault_adds_up_and_is_unreadable(tmp_path):
    path = tmp_path / "my.key"
    vault = vault_of(path, load_key(path))
    vault.add({"P-AAAAAAAA": ["00123", "A77"], "C-BBBBBBBB": ["S1"]})
    vault.add({"P-AAAAAAAA": ["A77", "B9"]})
    assert open_vault(path).whois("P-AAAAAAAA") == ["00123", "A77", "B9"]
    assert open_vault(path).whois("C-BBBBBBBB") == ["S1"]
    assert "P-ZZZZZZZZ is not in" in message(vault.whois, "P-ZZZZZZZZ")
    assert "two identifiers have the pseudonym C-BBBBBBBB" in message(vault.add, {"C-BBBBBBBB": ["S2"]})
    content = path.with_suffix(".vault").read_bytes()
    assert b"00123" not in content and b"AAAAAAAA" not in content
    assert mode(path.with_suffix(".vault")) == 0o600


def test_two_patients_with_one_pseudonym_are_noticed(tmp_path):
    """The shortest two numbers of eight digits for which it happens under this key."""
    vault, of = vault_of(tmp_path / "my.key", KEY), Pseudonyms(KEY).of
    assert of("patient", "01122495") == of("patient", "01392810") == "P-SGENVX67"
    vault.add({"P-SGENVX67": ["01122495", "A77", "00001"]})  # one person, whom others numbered otherwise
    told = message(vault.add, {"P-SGENVX67": ["01392810"]})
    assert "two identifiers have the pseudonym P-SGENVX67" in told and "--key-file" in told
    assert vault.whois("P-SGENVX67") == ["00001", "01122495", "A77"]


def test_a_vault_needs_its_own_key(tmp_path):
    path = tmp_path / "my.key"
    vault_of(path, load_key(path)).add({"P-AAAAAAAA": ["1"]})
    assert "belongs to another key" in message(vault_of(path, KEY).whois, "P-AAAAAAAA")
