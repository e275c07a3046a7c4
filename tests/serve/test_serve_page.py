"""The page for people, in a real browser against a real server: what it shows is what the API answers."""

import base64
import re

import numpy as np
import pytest
from hostile import dicom
from page_helpers import ANSWERED, READY, WORDS, ask, needs_browser, predicted, with_decision

POINTS = ("point", "threshold", "band")


@needs_browser
@pytest.mark.parametrize("decision", ["positive", "negative"])
def test_it_shows_what_the_api_answers(on_page, pictures, decision):
    page, address = on_page()
    file, answer = with_decision(address, pictures, decision)
    page.wait(READY)
    page.run(
        "window.sent = []; const real = fetch; window.fetch = (u, o) => (o?.body && sent.push(...o.body), real(u, o))"
    )
    ask(page, file)
    result = answer["result"]
    assert page.text(".decision h2").split("\n") == [WORDS[decision], result["label"]]
    assert page.text(".scale-value") == f"{result['probability']:.3f}"
    assert page.text(".scale-word") == f"threshold {result['threshold']:.3f}"
    left = {name: float(page.run(f"document.querySelector('.scale-{name}').style.left")[:-1]) for name in POINTS}
    assert left["point"] == pytest.approx(100 * result["probability"], abs=0.01)
    assert left["threshold"] == pytest.approx(100 * result["threshold"], abs=0.01)
    low, high = result["uncertain_band"]
    assert left["band"] == pytest.approx(100 * low, abs=0.01)
    width = float(page.run("document.querySelector('.scale-band').style.width")[:-1])
    assert width == pytest.approx(100 * (high - low), abs=0.01)
    assert [text.rstrip(".").lower() for text in page.text(".reasons").split("\n")] == answer["reasons"]
    said = page.text("#said")
    assert said.startswith(f"{WORDS[decision]}: {result['label']}.") and f"{result['probability']:.3f}" in said
    page.run("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    assert answer["bundle"] in page.text(".origin") and answer["run_id"] in page.text(".origin")
    assert f"{result['images'][0]['distances']['knn']:.2f}" in page.text("#answer table")
    names = page.run("sent.filter(([, value]) => value instanceof File).map(([, value]) => value.name)")
    assert names == ["image-1"], "the reader's names of files stay where they are"
    assert all(url.startswith((address, "data:", f"blob:{address}")) for url in page.requested), page.requested
    assert len(page.requested) > 8 and not page.complaints


@needs_browser
def test_an_abstention_gives_its_reasons_and_no_decision(on_page, pictures):
    page, address = on_page()
    file, answer = with_decision(address, pictures, "abstain")
    ask(page, file)
    assert page.text(".decision h2") == "Abstains"
    assert "no decision" in page.text(".referred")
    assert [text.rstrip(".").lower() for text in page.text(".reasons").split("\n")] == answer["reasons"]
    assert "Positive" not in page.text("main") and "Negative" not in page.text("main")
    assert not page.complaints


@needs_browser
def test_the_slider_fades_the_map_that_the_server_sent(on_page, pictures):
    page, address = on_page()
    file, answer = with_decision(address, pictures, "positive")
    ask(page, file)
    told = answer["result"]["images"][0]["explanation"]
    values = np.frombuffer(base64.b64decode(told["map"]), np.uint8)
    drawn = page.run(
        "(() => { const c = document.querySelector('.map');"
        " return [c.width, c.height, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; })()"
    )
    assert drawn[:2] == told["shape"][::-1]
    alpha = np.array(drawn[5::4])
    order = np.argsort(values, kind="stable")
    assert (np.diff(alpha[order]) >= 0).all() and alpha[values == 255].min() == 255 and alpha[values == 0].max() == 0
    place = "document.querySelector('.map')"
    assert page.run(f"{place}.style.opacity") == "0.55"
    assert page.run("document.querySelector('.plate img').naturalWidth") == told["shape"][1]
    inside = (
        f"((a, b) => a.width === b.width && a.left === b.left && a.top === b.top)({place}.getBoundingClientRect(), "
    )
    assert page.run(inside + "document.querySelector('.plate img').getBoundingClientRect())")
    page.run("document.querySelector('#opacity').focus()")
    page.press("ArrowRight")
    assert page.run(f"{place}.style.opacity") == "0.6" and page.text("#opacity-value") == "60 %"
    page.press("Home")
    assert page.run(f"{place}.style.opacity") == "0"
    assert "no evidence of localisation" in page.text("#layers")


@needs_browser
def test_everything_can_be_done_with_the_keyboard(on_page, pictures):
    page, address = on_page()
    file, answer = with_decision(address, pictures, "positive")
    page.wait(READY)
    page.send("Page.setInterceptFileChooserDialog", enabled=True)
    focused = "document.activeElement.id || document.activeElement.className"
    visited = []
    while (visited or [""])[-1] != "drop":
        page.press("Tab")
        visited.append(page.run(focused))
        assert len(visited) < 20
        outline = page.run("getComputedStyle(document.activeElement).outlineWidth")
        assert float(outline[:-2]) >= 1, f"the focus on {visited[-1]} is not seen"
    assert visited == ["skip", "large", "dark", "model", "drop"]
    page.choosers.clear()
    page.press("Enter")
    page.wait("true")
    assert len(page.choosers) == 1, "Enter opens the window to choose files"
    page.send("DOM.setFileInputFiles", backendNodeId=page.choosers[0], files=[str(file)])
    page.wait("!document.querySelector('#go').disabled")
    for _ in range(20):
        if page.run(focused) == "go":
            break
        page.press("Tab")
    page.press("Enter")
    page.wait(ANSWERED)
    assert page.text(".decision h2").split("\n")[0] == WORDS[answer["decision"]]
    assert page.run(focused) == "go", "whoever asks stays where he was"
    page.send("Page.setInterceptFileChooserDialog", enabled=False)


@needs_browser
def test_escape_stops_what_takes_long(on_page, pictures):
    page, _ = on_page()
    page.wait(READY)
    page.choose_files("#files", pictures[:1])
    page.wait("!document.querySelector('#go').disabled")
    slow = {"offline": False, "latency": 60_000, "downloadThroughput": -1, "uploadThroughput": -1}
    page.send("Network.emulateNetworkConditions", **slow)
    try:
        page.click("#go")
        page.wait("!document.querySelector('#stop').hidden")
        page.press("Escape")
        page.wait("document.querySelector('#stop').hidden")
    finally:
        page.send("Network.emulateNetworkConditions", **slow | {"latency": 0})
    assert page.text("#problem") == "" and page.text("#answer") == ""
    ask(page)
    assert page.text(".decision h2")


@needs_browser
def test_several_images_are_one_case_and_an_answer_never_outlives_its_images(on_page, pictures):
    page, address = on_page()
    answer = predicted(address, *pictures[:3])
    page.wait(READY)
    page.choose_files("#files", pictures[:2])
    page.wait("document.querySelectorAll('.film').length === 2")
    ask(page, pictures[2])
    captions = page.run("[...document.querySelectorAll('.caption .number')].map((each) => each.innerText)")
    assert captions == [f"{image['probability']:.3f} {image['label']}" for image in answer["result"]["images"]]
    assert page.text(".scale-value") == f"{answer['result']['probability']:.3f}"
    page.click("#clear")
    page.wait("!document.querySelector('.film') && !document.querySelector('#drop').hidden")
    assert page.text("#answer") == "" and page.run("document.querySelector('#go').disabled")
    ask(page, pictures[0])
    page.select("#fields select", "occlusion")
    page.wait(f"!{ANSWERED}")
    assert not page.run("document.querySelector('.map')"), "a map by another method does not stay either"


@needs_browser
def test_a_file_that_a_browser_cannot_draw_comes_back_drawn(on_page, images, tmp_path):
    page, address = on_page()
    path = tmp_path / "one.dcm"
    path.write_bytes(dicom(images[0], Modality="XA", BodyPartExamined="UTERUS"))
    page.wait(READY)
    page.choose_files("#files", [path])
    page.wait("document.querySelector('.absent')")
    page.click("#go")
    page.wait("document.querySelector('.plate img')?.naturalWidth")
    assert not page.run("document.querySelector('.absent')")
    assert page.run("document.querySelector('.plate img').src").startswith("data:image/png;base64,")
    assert page.text(".decision h2").split("\n")[0] == WORDS[predicted(address, path)["decision"]]


@needs_browser
def test_what_is_wrong_with_a_file_is_said_beside_it(on_page, pictures, tmp_path):
    page, _ = on_page()
    broken = tmp_path / "broken.png"
    broken.write_bytes(pictures[0].read_bytes()[:100])
    page.wait(READY)
    page.choose_files("#files", [pictures[0], broken])
    page.wait("!document.querySelector('#go').disabled")
    page.click("#go")
    page.wait("!document.querySelector('#problem').hidden")
    assert re.fullmatch(r"broken\.png: .*decoded\.", page.text("#problem"))
    assert "decoded" in page.text(".film:nth-child(2) figcaption") and "decoded" not in page.text(".film:nth-child(1)")
    assert page.text("#answer") == "" and not page.run("document.querySelector('#go').disabled")
    page.click(".film:nth-child(2) [aria-label='Remove broken.png']")
    page.wait("document.querySelectorAll('.film').length === 1 && document.querySelector('#problem').hidden")


@needs_browser
def test_a_server_that_is_gone_is_said_to_be(on_page, pictures):
    page, _ = on_page()
    page.wait(READY)
    page.choose_files("#files", pictures[:1])
    page.wait("!document.querySelector('#go').disabled")
    gone = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.send("Network.emulateNetworkConditions", offline=True, **gone)
    page.click("#go")
    page.wait("document.querySelector('#problem').innerText.includes('cannot be reached')")
    page.send("Network.emulateNetworkConditions", offline=False, **gone)
    ask(page)
