"""What the READMEs say can be typed: every job and every flag exists, and both languages say the same."""

import re
import runpy
import sys

import pytest
import tyro
from readme import FIVE, READMES, REPO, commands, five, sections

ALL = sorted({tuple(words) for name in READMES for words in commands((REPO / name).read_text(encoding="utf-8"))})


class Understood(Exception):
    """The command line could be read."""


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_command_is_understood_by_its_job(words, monkeypatch):
    read = tyro.cli

    def read_and_stop(*args, **options):
        read(*args, **options)
        raise Understood

    monkeypatch.setattr(tyro, "cli", read_and_stop)
    monkeypatch.setattr(sys, "argv", list(words[1:]))
    if "--from-run" in words:
        pytest.skip("repeats a run that is not here")
    with pytest.raises(Understood):
        runpy.run_path(str(REPO / words[1]), run_name="__main__")


@pytest.mark.parametrize("name", READMES)
def test_every_job_and_file_that_is_named_exists(name):
    text = (REPO / name).read_text(encoding="utf-8")
    jobs = set(re.findall(r"jobs/(\w+)\.py", text))
    links = set(re.findall(r"\]\(([^)#:]+)\)", text))
    assert len(jobs) > 15 and links
    assert not [job for job in jobs if not (REPO / "jobs" / f"{job}.py").is_file()]
    assert not [link for link in links if not (REPO / link).exists()]


@pytest.mark.parametrize("name", READMES)
def test_the_section_on_own_data_has_its_five_commands(name):
    jobs = list(five(name))
    assert jobs == ["import_data", "train_classifier", "evaluate_classifier", "predict", "paper_pack"]


def test_both_languages_state_the_same_commands_in_the_same_sections():
    english, korean = (sections(name) for name in READMES)
    assert [commands(text) for text in english.values()] == [commands(text) for text in korean.values()]
    assert list(english).index(FIVE["README.md"]) == list(korean).index(FIVE["README.ko.md"])


def test_the_korean_readme_is_in_korean():
    for heading, text in sections("README.ko.md").items():
        prose = re.sub(r"^    .*$|`[^`]*`", "", text, flags=re.MULTILINE)
        assert len(re.findall(r"[가-힣]", prose)) > 60, heading
