"""What is uploaded: read as training reads it, and refused before it costs anything."""

import base64
import gc
import gzip
import signal
import tempfile
import time

import hostile
import numpy as np
import pydicom
import pytest
from fastapi.testclient import TestClient
from hostile import GREY, NAME, RGB
from waiting import until

from raymed.bundle import Bundle
from raymed.data.readers import read
from raymed.serve.app import create_app
from raymed.serve.config import Limits
from raymed.serve.contract import check_contract
from raymed.serve.handlers import Upload
from raymed.serve.problems import Problem
from raymed.serve.uploads import File, apart, decode, quiet
from raymed.serve.uploads.room import Room

HARMLESS = "exif.jpg loop.tif zeros.nii.gz slope.nii window.dcm charset.dcm tiles.j2k.dcm elements.dcm".split()
FRAMES = np.stack([np.roll(GREY, i, axis=1) for i in range(6)])


def decoded(content, limits=None, window=None, frames=None, case=None, place=1):
    return decode(File(content, f"{NAME}.png"), place, limits or Limits(), window, frames, case)


def problem(content, **kwargs) -> Problem:
    with pytest.raises(Problem) as info:
        decoded(content, **kwargs)
    assert NAME not in str(info.value) and "/" not in str(info.value)
    return info.value


@pytest.mark.parametrize("name", hostile.SOUND)
def test_what_can_be_read_is_read_as_training_reads_it(name):
    content = hostile.sound(name)
    uploads = decoded(content, window=(300, 900))
    several = len(uploads) > 1
    assert [upload.frame for upload in uploads] == ([*range(1, len(uploads) + 1)] if several else [None])
    for upload in uploads:
        np.testing.assert_array_equal(upload.pixels, read(content, upload.frame, (300, 900)), strict=True)
        assert upload.file == 1
    kinds = {"png": "PNG", "jpg": "JPEG", "tif": "TIFF", "dcm": "DICOM", "nii": "NIfTI", "gz": "NIfTI"}
    assert uploads[0].kind == kinds[name.rpartition(".")[2]]


def test_an_object_comes_with_its_header_and_without_its_pixels():
    (upload,) = decoded(hostile.dicom())
    assert upload.header.PatientName == NAME and upload.header.Rows == 40
    assert "PixelData" not in upload.header
    assert decoded(hostile.picture(GREY, "PNG"))[0].header is None


def test_frames():
    content = hostile.dicom(FRAMES)
    uploads = decoded(content, frames=[5, 2, 5])
    assert [upload.frame for upload in uploads] == [2, 5]
    np.testing.assert_array_equal(uploads[1].pixels, read(content, 5))
    for frames in ([0], [7], [-1, 2], []):
        refused = problem(content, frames=frames)
        assert (refused.status, refused.field) == (422, "frames")
    refused = problem(content, limits=Limits(frames=5))
    assert (refused.status, refused.field) == (413, "frames") and "name those that count" in refused.detail
    assert len(decoded(content, limits=Limits(frames=5), frames=[1, 2, 3, 4, 6])) == 5
    assert decoded(hostile.dicom(), frames=[9])[0].frame is None  # a file that holds one image has no frames to choose


def test_only_the_frames_that_count_are_decoded():
    """The others may be damaged, or not even there."""
    runs = pydicom.dcmread(hostile.PYDICOM_FILES / "SC_rgb_rle_2frame.dcm")
    good = list(pydicom.encaps.generate_frames(runs.PixelData, number_of_frames=2))[0]
    mixed = hostile.encapsulated("SC_rgb_rle_2frame", NumberOfFrames=3)
    mixed = pydicom.dcmread(hostile.io.BytesIO(mixed))
    mixed.PixelData = pydicom.encaps.encapsulate([b"\0" * 200, good, b"\xff" * 200])
    file = hostile.io.BytesIO()
    mixed.save_as(file)
    content = file.getvalue()
    np.testing.assert_array_equal(decoded(content, frames=[2])[0].pixels, runs.pixel_array[0])
    assert problem(content).status == problem(content, frames=[3]).status == 422

    noise = np.random.default_rng(0).integers(0, 1000, (40, 40, 60)).astype(np.int16)
    cut = gzip.compress(hostile.nifti(noise))[:50_000]
    assert decoded(cut, frames=[3])[0].pixels.shape == (40, 40)
    assert "fewer values" in problem(cut, frames=[60]).detail

    pages = hostile.pages([GREY, GREY[::-1].copy()], compression="tiff_adobe_deflate")
    first, second = pages.index(b"\x78\x9c"), pages.rindex(b"\x78\x9c")
    broken = pages[:second] + b"\0" * 40 + pages[second + 40 :]
    assert first != second
    np.testing.assert_array_equal(decoded(broken, frames=[1])[0].pixels, GREY)
    assert problem(broken, frames=[2]).status == 422


@pytest.mark.parametrize("name", hostile.HOSTILE)
def test_what_asks_for_too_much_is_refused_or_harmless(name, capfd, caplog, recwarn):
    """In a short time, with a reason that says nothing of the patient, and without a word in any log."""
    quiet()
    content, started = hostile.hostile(name), time.perf_counter()
    try:
        uploads = decoded(content, frames=[1] if name.endswith(("nii", "gz")) else None)
    except Problem as refused:
        assert refused.status in (413, 415, 422) and refused.field == "files[1]"
        assert NAME not in refused.detail and "Traceback" not in refused.detail
    else:
        assert name in HARMLESS
        assert all(upload.pixels.size < 100_000 for upload in uploads)
    assert time.perf_counter() - started < 5
    told = capfd.readouterr()
    assert NAME not in told.out + told.err + caplog.text
    assert not recwarn.list


TOO_MUCH = "size.png absurd.png chunks.png size.jpg scans.jpg segments.jpg pages.tif size.tif tile.tif strips.tif"
TOO_MUCH += " huge.nii.gz extension.nii.gz private.dcm fragments.dcm"
UNKNOWN = "codec.tif zeros.gz deflated.dcm inflate.dcm"


@pytest.mark.parametrize(("status", "names"), [(413, TOO_MUCH), (415, UNKNOWN)])
def test_statuses(status, names):
    assert {name: problem(hostile.hostile(name)).status for name in names.split()} == dict.fromkeys(
        names.split(), status
    )


@pytest.mark.parametrize(
    "content",
    [b"\0" * 1000, b"GIF89a" + b"\0" * 50, b"%!PS-Adobe-3.0 EPSF-3.0", b"<svg/>", b"BM" + b"\0" * 60, b"\x1f\x8b"],
)
def test_other_kinds_are_not_taken(content):
    refused = problem(content)
    assert refused.status == 415
    assert refused.detail == "files[1]: PNG, JPEG, TIFF, DICOM or NIfTI is expected"


def test_a_file_of_nothing_is_said_to_be_empty():
    refused = problem(b"")
    assert (refused.status, refused.field, refused.detail) == (422, "files[1]", "files[1]: the file is empty")


def test_the_limit_of_pixels_is_exact():
    content = hostile.picture(GREY, "PNG")
    assert decoded(content, limits=Limits(pixels=40 * 48))
    assert problem(content, limits=Limits(pixels=40 * 48 - 1)).status == 413
    assert problem(hostile.dicom(), limits=Limits(pixels=40 * 48 - 1)).status == 413
    assert problem(hostile.nifti(hostile.volume()), limits=Limits(pixels=40 * 48 - 1)).status == 413
    small_first = hostile.pages([GREY[:5].copy(), GREY])
    assert problem(small_first, limits=Limits(pixels=1000)).status == 413


def test_nothing_is_inflated_that_nobody_asked_for():
    """A volume of a gibibyte in a file of a megabyte is passed through in pieces."""
    import tracemalloc

    header = hostile.nifti(np.zeros((16, 16, 1), np.int16), dim=(3, 1000, 1000, 530, 1, 1, 1, 1))[:352]
    ramp = np.arange(1_000_000, dtype=np.int16).tobytes()
    with tempfile.TemporaryFile() as file:
        with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1) as packed:
            packed.write(header)
            for i in range(100):
                packed.write(ramp if i == 99 else bytes(2_000_000))
        file.seek(0)
        content = file.read()
    tracemalloc.start()
    try:
        assert decoded(content, frames=[100])[0].pixels.shape == (1000, 1000)
        assert tracemalloc.get_traced_memory()[1] < 50e6  # what comes before the slice is 198 MB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["palette.dcm", "segments.dcm", "indirect.dcm"])
def test_tables_of_a_palette_are_not_expanded_without_end(name):
    import tracemalloc

    content = hostile.hostile(name)
    tracemalloc.start()
    try:
        refused = problem(content)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()
    assert refused.status == 422
    assert refused.detail.startswith("files[1]: SegmentedRedPaletteColorLookupTableData: 65536 entries at most")


def test_room_is_given_back_when_the_pixels_are_gone():
    room, content = Room(3 * GREY.size), hostile.picture(GREY, "PNG")
    held = [decoded(content, case=room.case()) for _ in range(3)]
    busy = problem(content, case=room.case())
    assert busy.status == 503 and busy.headers["Retry-After"] == "1" and busy.field is None
    held.pop()
    assert room.free == GREY.size
    assert decoded(content, case=room.case())
    problem(hostile.picture(np.full_like(GREY, 3), "PNG"), case=room.case())
    held.clear()
    gc.collect()
    assert room.free == 3 * GREY.size


def test_a_case_that_never_finds_room_is_told_so_before_any_of_it_is_decoded():
    room, content = Room(3 * GREY.size - 1), hostile.picture(GREY, "PNG")
    volume = hostile.nifti(hostile.volume())
    refused = problem(content, case=Room(GREY.size - 1).case())
    assert (refused.status, refused.field) == (413, "files") and not refused.headers
    case = room.case()
    held = decoded(content, case=case), decoded(content, case=case)
    assert problem(content, case=case).status == 413
    assert problem(content, case=room.case()).status == 503, "another case is told to come again"
    assert problem(volume, case=Room(hostile.volume().size - 1).case()).status == 413
    assert len(held) == 2


def test_files_of_one_request_count_together(app_config, png):
    pixels = decoded(png)[0].pixels.size
    with TestClient(create_app(app_config(**{"limits.held_pixels": 2 * pixels}))) as client:
        for _ in range(2):
            assert ask(client, files=[("file", png)] * 2).status_code == 200
            refused = ask(client, files=[("file", png)] * 3)
            assert refused.status_code == 413 and "retry-after" not in refused.headers
            assert refused.json()["field"] == "files"
            until(lambda: client.app.state.service.room.free == 2 * pixels)  # the others' threads may be at it still


def bundle_for(**contract) -> Bundle:
    return Bundle("classifier", {}, {}, {}, {}, contract=contract)


def refused_by(content: bytes, **contract) -> str | None:
    """The field that an image is refused for."""
    try:
        check_contract(bundle_for(**contract), decoded(content))
    except Problem as refused:
        assert refused.status == 422 and NAME not in refused.detail
        return refused.field
    return None


def test_contract():
    angiogram, png = hostile.dicom(BodyPartExamined="UTERUS"), hostile.picture(GREY, "PNG")
    assert refused_by(angiogram) is None
    for modality in ("XA", "xa", "RF, XA", "XA/RF", "not stated", "", "X-ray of the uterus"):
        assert refused_by(angiogram, modality=modality) is None, modality
    assert refused_by(angiogram, modality="CT") == "files[1].modality"
    assert refused_by(hostile.dicom(Modality=""), modality="CT") is None
    assert refused_by(png, modality="CT", body_part="CHEST") is None
    assert refused_by(angiogram, body_part="CHEST") == "files[1].body_part"
    assert refused_by(angiogram, body_part="PELVIS, UTERUS") is None
    assert refused_by(angiogram, body_part="the uterus and its tubes") is None
    assert refused_by(png, file_kinds=["DICOM", "NIfTI"]) == "files[1].kind"
    assert refused_by(angiogram, file_kinds=["DICOM", "NIfTI"]) is None
    assert refused_by(hostile.picture(RGB, "PNG"), channels=1, photometric="MONOCHROME2", bits=16) is None
    with pytest.raises(Problem, match=r"^files\[0\].modality: XA or RF is expected$"):
        check_contract(
            bundle_for(modality="XA RF"), [Upload(GREY, 0, header=decoded(hostile.dicom(Modality="MG"))[0].header)]
        )


def ask(client, **request):
    return client.post("/v1/models/hsg:predict", **request)


def test_a_model_answers_for_what_it_was_made_for(client):
    """The bundle states XA of the uterus, as PNG or DICOM."""
    mine = hostile.dicom(BodyPartExamined="UTERUS")
    assert ask(client, content=mine).status_code == 200
    files = [("file", mine), ("file", hostile.dicom(Modality="CT"))]
    answer = ask(client, files=files)
    assert answer.status_code == 422
    assert answer.json()["field"] == "files[1].modality"
    assert answer.json()["detail"] == "files[1].modality: XA is expected"
    assert ask(client, content=hostile.nifti(hostile.volume(1))).json()["field"] == "files[0].kind"


def test_forms(client, png, monkeypatch):
    def on_disk(self):
        raise AssertionError("an image was written to a disk")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", on_disk)
    large = hostile.picture(np.random.default_rng(0).integers(0, 255, (1500, 1500), np.uint8), "PNG")
    assert len(large) > 2**21
    assert ask(client, files=[("file", large), ("other", ("../../etc/passwd", png))]).status_code == 200
    frames = hostile.dicom(FRAMES)
    for data in ({"frames": "2"}, {"frames": ["2"]}, {"frames": "[2]"}):
        found = ask(client, files=[("file", frames)], data=data).json()["result"]["images"]
        assert [image["frame"] for image in found] == [2]
    found = ask(client, files=[("file", frames)], data={"frames": ["2", "4"]}).json()["result"]["images"]
    assert [image["frame"] for image in found] == [2, 4]
    assert ask(client, files=[("file", frames)], data={"frames": "7"}).json()["field"] == "frames"


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("multipart/form-data", b"x", 422),
        ("multipart/form-data; boundary=", b"x", 422),
        ("multipart/form-data; boundary=" + "b" * 1000, b"x", 422),
        ("multipart/form-data; boundary=b", b"", 422),
        ("multipart/form-data; boundary=b", b"no boundary", 422),
        ("multipart/form-data; boundary=b", b"--b\r\n\r\nx\r\n--b--\r\n", 422),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="f"; filename="x"\r\n\r\n',
            422,
        ),
        ("multipart/form-data; boundary=b", b"--b\r\n" + b"A: b\r\n" * 100 + b"\r\nx\r\n--b--\r\n", 422),
        (
            "multipart/form-data; boundary=b; charset=idna",
            b'--b\r\nContent-Disposition: form-data; name="\xff"\r\n\r\n',
            422,
        ),
        ("application/json", b'{"files": ["!"]}', 422),
        ("application/json", b'{"files": "AAAA"}', 422),
        ("application/json", b'{"files": [], "a": NaN}', 422),
        ("application/json", b'{"\\ud800": 1}', 422),
        ("application/json", b"[" * 100_000, 422),
        ("application/json", b'{"a":' * 5_000 + b"1" + b"}" * 5_000, 422),
        ("application/json", b'{"' + b"n" * 10_000 + b'": 1}', 422),
        ("application/json", b"1" * 10_000, 422),
        ("text/plain", b"hello", 415),
    ],
)
def test_bodies_that_are_none(client, kind, body, status):
    answer = ask(client, content=body, headers={"Content-Type": kind})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json" and len(answer.content) < 500


def test_too_much_of_a_form(client, png):
    limits = Limits()
    assert ask(client, files=[("file", png)] * limits.files).status_code == 200
    assert ask(client, files=[("file", png)] * (limits.files + 1)).status_code == 413
    assert ask(client, files=[("file", png)], data={f"f{i}": "x" for i in range(100)}).status_code == 413
    assert ask(client, files=[("file", png)], data={"explain": "x" * 300_000}).status_code == 413


def test_json_is_answered_as_the_file_is(client, png):
    text = base64.b64encode(png).decode()
    raw, wrapped = ask(client, content=png).json(), ask(client, json={"files": [text]}).json()
    assert raw["result"] == wrapped["result"]


def test_a_decoder_may_be_lost(monkeypatch):
    """Compressed pixels are decoded in another process: it may end, hang, or grow."""
    content = hostile.sound("MR_small_jp2klossless.dcm")
    while apart._idle:
        apart._idle.pop().kill()
    expected = decoded(content)[0].pixels
    (process,) = apart._idle
    process.kill()
    process.wait()
    np.testing.assert_array_equal(decoded(content)[0].pixels, expected)
    (process,) = apart._idle
    process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(apart, "SECONDS", 0.2)
    assert problem(content).status == 422 and process.wait() == -signal.SIGKILL
    monkeypatch.undo()
    np.testing.assert_array_equal(decoded(content)[0].pixels, expected)
    (process,) = apart._idle
    without_tables = hostile.codestream("SC_rgb_jpeg_gdcm").replace(b"\xff\xc4", b"\xff\xfe")
    broken = hostile.encapsulated("SC_rgb_jpeg_gdcm", without_tables)
    assert problem(broken).status == 422 and apart._idle == [process]
    monkeypatch.setattr(apart, "LARGEST", 0)
    assert problem(broken).status == 422 and apart._idle == []


def test_the_decoder_learns_nothing_of_the_patient():
    ds = pydicom.dcmread(hostile.PYDICOM_FILES / "SC_rgb_jpeg_gdcm.dcm")
    ds.PatientName = NAME
    small = apart._small_object(ds, hostile.codestream("SC_rgb_jpeg_gdcm"))
    assert NAME.encode() not in small and len(small) < len(hostile.codestream("SC_rgb_jpeg_gdcm")) + 700
