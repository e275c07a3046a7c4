"""The page's token, card and CLIP panel; that it can be read and used by everybody; and what it is made of."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from clip_bundles import TEXTS, clip_bundle, some_images
from fastapi.testclient import TestClient
from page_helpers import ANSWERED, READY, ask, needs_browser, predicted, with_decision
from PIL import Image

from raymed.registry.card import card
from raymed.serve.access.tokens import add_token
from raymed.serve.app import create_app
from raymed.tasks.embedder import Embedder
from raymed.tasks.index import Index, write_index

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "raymed" / "serve" / "page"

TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
CONTRAST = """(() => {
  const rgba = (text) => { const c = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    c.clearRect(0, 0, 1, 1); c.fillStyle = text; c.fillRect(0, 0, 1, 1); return [...c.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => { const f = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b); };
  const behind = (e) => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor);
    if (c[3] === 255) return c; } return [255, 255, 255]; };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.closest(":disabled, .unseen, .skip")) continue;
    const style = getComputedStyle(e), [a, b] = [light(rgba(style.color)), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), size = parseFloat(style.fontSize);
    if (ratio < (size >= 24 || (size >= 18.66 && style.fontWeight >= 600) ? 3 : 4.5))
      found.push(`${e.tagName} ${e.className} ${ratio.toFixed(2)}: ${e.textContent.slice(0, 30)}`);
  }
  return found; })()"""


@needs_browser
def test_it_asks_for_a_token_and_keeps_it_for_the_tab_alone(on_page, pictures, tmp_path):
    token = add_token(tmp_path / "tokens.json", "reading-room", 3)
    page, address = on_page(**{"access.open": False, "access.tokens": str(tmp_path / "tokens.json")})
    is_open = "document.querySelector('#token').open"
    page.wait(is_open)
    assert page.run("document.activeElement.id") == "token-text"
    page.press("Escape")
    page.wait("document.querySelector('#problem button')")
    assert "token" in page.text("#problem") and page.run(f"!{is_open}")
    page.click("#problem button")
    page.wait(is_open)
    page.write("of somebody else")
    page.press("Enter")
    page.wait("document.querySelector('#token-why').innerText.includes('not known')")
    page.wait(is_open)
    page.write(token)
    page.press("Enter")
    ask(page, pictures[0])
    assert page.text(".decision h2")
    assert page.run("Object.values(sessionStorage)") == [token]
    assert page.run("[localStorage.length, document.cookie, location.href]") == [0, "", f"{address}/"]
    assert not any(token in url for url in page.requested)
    page.click("#forget")
    assert page.run("sessionStorage.length") == 0 and page.text("#forget") == ""


@needs_browser
def test_the_card_is_text_whatever_stands_in_it(on_page, bundle, tmp_path):
    hostile = "<img src=x onerror=alert(1)> <script>alert(2)</script> [here](javascript:alert(3)) | a **bold** `word`"
    stated = replace(bundle, intended_use=hostile, contract=bundle.contract | {"research_only": False})
    page, _ = on_page(models=(f"hsg={stated.save(tmp_path / 'stated')}",))
    page.wait(READY)
    assert page.text("#research") == "", "what is no longer for research only is not said to be"
    page.click("#card summary")
    page.wait("document.querySelector('#card-text h2')")
    text = page.text("#card-text")
    assert hostile.replace("**", "").replace("`", "") in text
    assert not page.run("document.querySelector('#card-text :is(img, script, a)')")
    heads = page.run("[...document.querySelectorAll('#card-text :is(h2, h3)')].map((each) => each.innerText)")
    assert heads[0] == "hsg" and {"Intended use", "Performance", "Limitations", "Provenance"} <= set(heads)
    rows = page.run(
        "[...document.querySelectorAll('#card-text tr')].map((each) => [...each.cells].map((c) => c.innerText))"
    )
    auroc = next(row for row in rows if row[0] == "AUROC")
    figure = bundle.metrics["test"]["auroc"]
    assert auroc[2] == f"{figure['mean']:.3f} ({figure['ci_low']:.3f} to {figure['ci_high']:.3f})"
    assert ["Finds", "occluded, against patent"] in rows
    assert not page.complaints


@needs_browser
def test_what_is_for_research_only_says_so(on_page, pictures):
    page, _ = on_page()
    ask(page, pictures[0])
    assert "Research use only" in page.text("#research") and "Research use only" in page.text(".origin")


@needs_browser
def test_a_clip_is_asked_by_sentences_texts_and_an_index(on_page, tmp_path):
    clip = clip_bundle()
    embedder, pixels = Embedder.from_bundle(clip), some_images(1)[0]
    embedded = embedder.embed_texts(TEXTS)
    rows = np.arange(1, len(TEXTS) + 1)
    write_index(
        tmp_path / "i.parquet", Index(embedded, rows, TEXTS, ["0" * 16] * len(TEXTS), embedder.identity, of="text")
    )
    file = tmp_path / "one.png"
    Image.fromarray(pixels).save(file)
    page, address = on_page(models=(f"cxr={clip.save(tmp_path / 'clip')},index={tmp_path / 'i.parquet'}",))
    page.wait(READY)
    page.choose_files("#files", [file])
    page.wait("document.querySelector('.film')")
    prompts = {"nodule": ["a nodule", "a round spot"], "clear": ["nothing at all"], "mass": ["a large mass"]}
    page.click(".add")
    for place, (name, sentences) in enumerate(prompts.items(), start=1):
        assert page.run("document.querySelector('#go').disabled")
        page.click(f".row:nth-child({place}) input")
        page.write(name)
        page.click(f".row:nth-child({place}) textarea")
        page.write("\n".join(sentences))
    page.click("#go")
    page.wait(ANSWERED)
    answer = predicted(address, file, model="cxr", task="zero_shot", prompts=prompts)["result"]
    bars = page.run("[...document.querySelectorAll('.bar')].map((each) => each.innerText.split('\\n'))")
    assert bars == [[name, f"{share:.3f}"] for name, share in answer["probabilities"].items()]
    assert page.text(".bar.best").split("\n")[0] == answer["label"] and page.text(".decision") == ""

    page.click(".row:nth-child(3) button")
    page.wait(f"!{ANSWERED} && document.querySelectorAll('.row').length === 2")
    assert page.run("[...document.querySelectorAll('.row button')].every((each) => each.disabled)")

    page.click("[value=embed]")
    page.click("[data-field=texts]")
    page.write("\n".join(TEXTS[:2]))
    page.click("#go")
    page.wait(ANSWERED)
    answer = predicted(address, file, model="cxr", task="embed", texts=TEXTS[:2])["result"]
    cells = page.run("[...document.querySelectorAll('#answer tbody tr')].map((each) => each.cells[1].innerText)")
    assert cells == [f"{cosine:.3f}" for cosine in answer["images"][0]["similarity"]]

    page.click("[value=retrieve]")
    page.click("#go")
    page.wait(ANSWERED)
    answer = predicted(address, file, model="cxr", task="retrieve", k=10)["result"]
    found = page.run("[...document.querySelectorAll('.matches li div:first-child')].map((each) => each.innerText)")
    assert found == [match["caption"].strip() for match in answer["images"][0]["matches"]]
    assert not page.complaints


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_what_is_read_can_be_read(on_page, pictures, dark):
    page, address = on_page()
    page.size(1280, 900, dark=dark)
    page.open(f"{address}/")
    page.wait(READY)
    assert page.run("document.documentElement.classList.contains('dark')") == dark, "as the system is"
    assert page.run(CONTRAST) == []
    title = "document.querySelector('h1').style.color"
    page.run(f"{title} = 'light-dark(#ccc, #333)'")
    assert len(page.run(CONTRAST)) == 1, "what cannot be read is found"
    page.run(f"{title} = ''")
    file, _ = with_decision(address, pictures, "abstain")
    ask(page, file, pictures[1])
    page.run("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    page.wait("document.querySelector('#card-text h2')")
    assert page.run(CONTRAST) == []
    page.click("#large")
    assert float(page.run("getComputedStyle(document.body).fontSize")[:-2]) >= 24
    for width in (320, 1280):
        page.size(width, 900, dark=dark)
        assert page.run("document.documentElement.scrollWidth") <= width, "nothing is read sideways"


@needs_browser
def test_whatever_takes_input_has_a_name(on_page, pictures, tmp_path, bundle_folder):
    models = (f"hsg={bundle_folder}", f"cxr={clip_bundle().save(tmp_path / 'clip')}")
    page, _ = on_page(models=models)
    ask(page, *pictures[:2])
    nameless = names_missing(page)
    page.select("#model", "hsg" if page.run("document.querySelector('#model').value") == "cxr" else "cxr")
    page.wait("document.querySelector('#fields textarea')")
    assert nameless == [] and names_missing(page) == []
    ids = page.run("[...document.querySelectorAll('[id]')].map((each) => each.id)")
    assert len(ids) == len(set(ids))
    assert page.run("document.documentElement.lang") == "en" and page.run("document.title") == "raymed"
    assert page.run("[...document.images].every((each) => each.alt)")


def names_missing(page) -> list[str]:
    """Roles of what can be used and has no accessible name."""
    roles = {"button", "textbox", "combobox", "slider", "radio", "checkbox", "spinbutton", "image", "region", "form"}
    nodes = page.send("Accessibility.getFullAXTree")["nodes"]
    seen = [node for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
    assert len(seen) > 8
    return [node["role"]["value"] for node in seen if not node.get("name", {}).get("value")]


def test_the_page_is_open_and_all_else_is_not(app_config, tmp_path):
    add_token(tmp_path / "tokens.json", "pacs", 3)
    with TestClient(
        create_app(app_config(**{"access.open": False, "access.tokens": str(tmp_path / "tokens.json")}))
    ) as client:
        page = client.get("/")
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert "unsafe" not in page.headers["content-security-policy"]
        assert client.get("/v1/models/hsg/card").status_code == 401
        for path in PAGE.rglob("*.*"):
            found = client.get(f"/page/{path.relative_to(PAGE).as_posix()}")
            assert found.content == path.read_bytes() and found.status_code == 200
            assert found.headers["content-type"].split(";")[0] == TYPES[path.suffix]
        for other in ("none.js", "../page.py", "..%2froutes%2fpage.py", "panels", "panels/", "%2e%2e/app.py", "a%00b"):
            assert client.get(f"/page/{other}").status_code in (401, 404), other


def test_the_card_is_markdown_of_the_version_in_use(client, bundle):
    answer = client.get("/v1/models/hsg/card")
    assert answer.headers["content-type"] == "text/markdown; charset=utf-8"
    assert answer.text.strip() == card(bundle, "hsg").strip()
    assert client.get("/v1/models/none/card").status_code == 404


def test_nothing_of_the_page_is_inline_or_from_elsewhere():
    html = (PAGE / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]* src=)", html)
    for path in PAGE.rglob("*.*"):
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//\w+\.\w|innerHTML|outerHTML|insertAdjacentHTML|eval\(|localStorage", text), (
            path
        )


def test_every_file_of_the_page_is_installed():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["raymed"]
    package = ROOT / "raymed"
    packed = {path for pattern in patterns for path in package.glob(pattern)}
    assert {path for path in PAGE.rglob("*.*")} <= packed
