"""What tests of the page share: asking it, and asking the API the same."""

import json
from pathlib import Path

import httpx
import pytest
from browser import CHROMIUM

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (Debian's package chromium)")
WORDS = {"positive": "Positive", "negative": "Negative", "abstain": "Abstains"}
READY = "document.querySelector('#fields').childElementCount"
ANSWERED = "document.querySelector('#answer .origin')"


def predicted(address: str, *files: Path, model: str = "hsg", **fields) -> dict:
    parts = [("file", ("x", path.read_bytes())) for path in files]
    data = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    answer = httpx.post(f"{address}/v1/models/{model}:predict", files=parts, data=data, timeout=30)
    answer.raise_for_status()
    return answer.json()


def with_decision(address: str, files: list[Path], decision: str) -> tuple[Path, dict]:
    """The first of the files that is decided so, and its answer."""
    answers = ((file, predicted(address, file, explain="gradcam", explain_as="array")) for file in files)
    return next((file, answer) for file, answer in answers if answer["decision"] == decision)


def ask(page, *files: Path) -> None:
    """Choose files, press the button, and wait for the answer."""
    page.wait(READY)
    page.choose_files("#files", list(files))
    page.wait("!document.querySelector('#go').disabled")
    page.click("#go")
    page.wait(ANSWERED)
