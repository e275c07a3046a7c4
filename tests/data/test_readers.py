"""Real files of every format, whole and broken."""

import gzip
import io
import warnings
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from raymed.data.formats import Inflated
from raymed.data.readers import ImageFile, ImageProblem, content_hash, read, read_mask

GREY8 = np.arange(48, dtype=np.uint8).reshape(6, 8)
GREY16 = (np.arange(48, dtype=np.uint16) * 1000).reshape(6, 8)
PYDICOM_FILES = Path(pydicom.data.__file__).parent / "test_files"


def write_dicom(path, frames, photometric="MONOCHROME2", **attributes):
    """frames: (H, W) or (F, H, W), uint8, uint16 or int16."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = SecondaryCaptureImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = "1.2.3"
    ds.Rows, ds.Columns = frames.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, photometric
    ds.BitsAllocated = ds.BitsStored = 8 * frames.itemsize
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(frames.dtype.kind == "i")
    if frames.ndim == 3:
        ds.NumberOfFrames = len(frames)
    ds.PixelData = frames.tobytes()
    for name, value in attributes.items():
        setattr(ds, name, value)
    ds.save_as(path, enforce_file_format=True)
    return path


def problem(path, **kwargs):
    with pytest.raises(ImageProblem) as info:
        read(path, **kwargs)
    return str(info.value)


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.bmp"])
def test_8_bit_is_kept(tmp_path, name):
    Image.fromarray(GREY8).save(tmp_path / name)
    np.testing.assert_array_equal(read(tmp_path / name), GREY8, strict=True)


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_16_bit_is_kept(tmp_path, name):
    Image.fromarray(GREY16).save(tmp_path / name)
    np.testing.assert_array_equal(read(tmp_path / name), GREY16, strict=True)


def test_colour_and_what_becomes_of_palettes_and_alpha(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    Image.fromarray(rgb).convert("RGBA").save(tmp_path / "rgba.png")
    palette = Image.fromarray(GREY8).convert("P")
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read(tmp_path / "rgb.png"), rgb, strict=True)
    np.testing.assert_array_equal(read(tmp_path / "rgba.png"), rgb)
    np.testing.assert_array_equal(read(tmp_path / "p.png"), np.asarray(palette.convert("RGB")))


def test_jpeg_and_its_exif_orientation(tmp_path):
    half = np.zeros((16, 32), np.uint8)
    half[:, 16:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    Image.fromarray(half).save(tmp_path / "a.jpg", exif=exif)
    pixels = read(tmp_path / "a.jpg")
    assert pixels.shape == (32, 16)
    assert pixels[:8].max() < 10 and pixels[-8:].min() > 245


def test_a_page_of_a_tiff(tmp_path):
    first, second = Image.fromarray(GREY8), Image.fromarray(GREY8[::-1].copy())
    first.save(tmp_path / "a.tiff", save_all=True, append_images=[second])
    np.testing.assert_array_equal(read(tmp_path / "a.tiff", frame=2), GREY8[::-1])
    assert problem(tmp_path / "a.tiff") == "holds 2 frames: name one, from 1, in a column (--data.frame COLUMN)"


def test_float_tiff_is_scaled(tmp_path):
    Image.fromarray(GREY8.astype(np.float32) / 47).save(tmp_path / "a.tiff")
    np.testing.assert_array_equal(read(tmp_path / "a.tiff"), np.round(GREY8 / 47 * 65535))


def test_content_not_name_tells_the_format(tmp_path):
    Image.fromarray(GREY8).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    np.testing.assert_array_equal(read(tmp_path / "a.jpg"), GREY8)
    write_dicom(tmp_path / "a.png", GREY8)
    assert read(tmp_path / "a.png").shape == (6, 8)


def test_dicom_rescale_and_windows(tmp_path):
    hounsfield = np.array([[-1000, -160, 40], [240, 1000, 50]])
    stored = (hounsfield + 1024).astype(np.uint16)
    rescale = {"RescaleSlope": "1", "RescaleIntercept": "-1024"}
    plain = write_dicom(tmp_path / "plain.dcm", stored, **rescale)
    window = {"WindowCenter": ["40", "300"], "WindowWidth": ["400", "1"]}
    windowed = write_dicom(tmp_path / "windowed.dcm", stored, **window, **rescale)
    np.testing.assert_array_equal(read(plain), np.round((hounsfield + 1000) / 2000 * 65535))
    # PS3.3 C.11.2.1.2.1 with center 40, width 400: all black up to -160, all white above 239.
    linear = np.clip((hounsfield - 39.5) / 399 + 0.5, 0, 1)
    np.testing.assert_array_equal(read(windowed), np.round(linear * 65535))
    np.testing.assert_array_equal(read(plain, window=(40, 400)), np.round(linear * 65535))
    assert read(windowed, window=(0, 4000))[0, 0] > 0


def test_dicom_sigmoid_window(tmp_path):
    values = np.array([[0, 50], [100, 150]], np.uint16)
    path = write_dicom(tmp_path / "a.dcm", values, WindowCenter="100", WindowWidth="100", VOILUTFunction="SIGMOID")
    np.testing.assert_array_equal(read(path), np.round(65535 / (1 + np.exp(-4 * (values - 100.0) / 100))))


def test_monochrome1_is_inverted(tmp_path):
    one = write_dicom(tmp_path / "one.dcm", GREY16, "MONOCHROME1")
    two = write_dicom(tmp_path / "two.dcm", GREY16, "MONOCHROME2")
    np.testing.assert_array_equal(read(one), 65535 - read(two))
    assert read(one)[0, 0] == 65535


def test_dicom_depth(tmp_path):
    assert read(write_dicom(tmp_path / "8.dcm", GREY8)).dtype == np.uint8
    assert read(write_dicom(tmp_path / "16.dcm", GREY16)).dtype == np.uint16
    signed = write_dicom(tmp_path / "signed.dcm", GREY8.astype(np.int16) - 20)
    np.testing.assert_array_equal(read(signed), np.round(GREY8 / 47 * 65535))


def test_one_frame_of_a_dicom_object(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", np.stack([GREY8, GREY8.T.reshape(6, 8), GREY8[::-1]]))
    np.testing.assert_array_equal(read(path, frame=3), np.round(GREY8[::-1] / 47 * 255))
    assert problem(path) == "holds 3 frames: name one, from 1, in a column (--data.frame COLUMN)"
    assert problem(path, frame=7) == "has no frame 7: it holds 3"
    assert problem(path, frame=0) == "has no frame 0: it holds 3"


def test_rescale_and_window_of_an_enhanced_object(tmp_path):
    def group(intercept, center):
        values, voi, item = Dataset(), Dataset(), Dataset()
        values.RescaleSlope, values.RescaleIntercept = "1", str(intercept)
        voi.WindowCenter, voi.WindowWidth = str(center), "101"
        item.PixelValueTransformationSequence, item.FrameVOILUTSequence = Sequence([values]), Sequence([voi])
        return item

    frames = np.stack([GREY16, GREY16])
    groups = Sequence([group(0, 10000), group(-1000, 10000)])
    path = write_dicom(tmp_path / "a.dcm", frames, PerFrameFunctionalGroupsSequence=groups)
    assert [int((read(path, frame=f) == 65535).sum()) for f in (1, 2)] == [37, 36]


def test_dicom_files_of_many_transfer_syntaxes():
    """The same MR slice in seven encodings decodes to the same pixels; colour comes out as RGB."""
    names = ["MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm"]
    names += ["MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_expb.dcm"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len({content_hash(read(PYDICOM_FILES / name)) for name in names}) == 1
        red_first = read(PYDICOM_FILES / "SC_rgb_dcmtk_+eb+cr.dcm")
    assert red_first.shape == (100, 100, 3)
    np.testing.assert_array_equal(red_first[5, 50], [255, 0, 0])


def test_broken_dicom(tmp_path):
    assert problem(PYDICOM_FILES / "rtplan.dcm") == "DICOM without pixel data"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert problem(PYDICOM_FILES / "MR_truncated.dcm").startswith("truncated or damaged: ")
        (tmp_path / "text.dcm").write_text("not DICOM at all " * 20)
        assert problem(tmp_path / "text.dcm") == "not a DICOM file"


def test_unsupported_transfer_syntax_is_named(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", GREY8)
    ds = pydicom.dcmread(path)
    ds.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML
    ds.PixelData = pydicom.encaps.encapsulate([b"0" * 64])
    ds["PixelData"].VR = "OB"
    ds.save_as(path)
    reason = problem(path)
    assert "MPEG2 Main Profile / Main Level (1.2.840.10008.1.2.4.100)" in reason and "gdcmconv --raw" in reason


def test_nifti(tmp_path):
    volume = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "a.nii.gz")
    plane = volume[:, :, 1].T
    expected = np.round((plane - plane.min()) / (plane.max() - plane.min()) * 65535)
    np.testing.assert_allclose(read(tmp_path / "a.nii.gz", frame=2), expected, atol=1)
    assert read(tmp_path / "a.nii.gz", frame=2).dtype == np.uint16
    assert read(tmp_path / "a.nii.gz", frame=2, window=(0.0, 0.5)).max() == 65535
    assert problem(tmp_path / "a.nii.gz").startswith("holds 3 slices")
    assert problem(tmp_path / "a.nii.gz", frame=4) == "has no slice 4: it holds 3"


def test_broken_nifti(tmp_path):
    image = np.ones((5, 4), np.float32)
    image[2, 2], image[0, 0] = np.nan, np.inf
    nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), tmp_path / "nan.nii")
    assert problem(tmp_path / "nan.nii") == "2 of its 20 values are NaN or infinite"
    nibabel.save(nibabel.Nifti1Image(np.zeros((5, 4, 3, 2)), np.eye(4)), tmp_path / "4d.nii")
    assert "(5, 4, 3, 2)" in problem(tmp_path / "4d.nii", frame=1)
    whole = (tmp_path / "4d.nii").read_bytes()
    (tmp_path / "cut.nii").write_bytes((tmp_path / "nan.nii").read_bytes()[:-20])
    assert problem(tmp_path / "cut.nii").startswith("truncated or damaged")
    (tmp_path / "no.nii").write_bytes(b"text" * 100 + whole[:10])
    assert problem(tmp_path / "no.nii") == "not a NIfTI file, or a damaged one"


def test_broken_pictures(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    for name in ("a.png", "a.jpg", "a.tiff"):
        Image.fromarray(noise).save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
    assert problem(tmp_path / "a.png").startswith("truncated or damaged")
    assert problem(tmp_path / "a.jpg").startswith("truncated or damaged")
    assert problem(tmp_path / "a.tiff")
    (tmp_path / "text.png").write_text("patient,label\n")
    assert problem(tmp_path / "text.png").startswith("not an image of a known format")
    (tmp_path / "empty.png").touch()
    assert problem(tmp_path / "empty.png") == "the file is empty (0 bytes)"
    assert problem(tmp_path / "missing.png") == "there is no such file"
    assert problem(tmp_path) == "is a folder"
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(tmp_path / "flat.png")
    assert problem(tmp_path / "flat.png") == "all pixels have one value (7)"


def test_identity_tells_files_and_frames_apart(tmp_path):
    files = [ImageFile(tmp_path / "a.png"), ImageFile(tmp_path / "a.png", frame=2), ImageFile("s3://b/a.png")]
    assert len({file.identity() for file in files}) == 3


def test_content_hash_sees_shape_and_depth():
    hashes = {content_hash(a) for a in (GREY8, GREY8.reshape(8, 6), GREY8.astype(np.uint16), GREY8[:, ::-1])}
    assert len(hashes) == 4
    assert content_hash(np.asfortranarray(GREY8)) == content_hash(GREY8)


def test_masks(tmp_path):
    """Any value but the lowest is inside; one value everywhere is fine."""
    mask = np.zeros((6, 8), bool)
    mask[1:4, 2:7] = True
    for name, pixels in {
        "binary.png": Image.fromarray(mask),
        "ones.png": Image.fromarray(mask.astype(np.uint8)),
        "labels.tif": Image.fromarray(np.where(mask, GREY8 + 1, 0).astype(np.uint16)),
        "colour.png": Image.fromarray(np.where(mask, 200, 0).astype(np.uint8)[..., None] * np.uint8([0, 1, 0])),
    }.items():
        pixels.save(tmp_path / name)
        np.testing.assert_array_equal(read_mask(tmp_path / name), mask, strict=True)
    np.testing.assert_array_equal(read_mask(tmp_path / "ones.png", frame=3), mask)
    Image.fromarray(np.zeros((6, 8), np.uint8)).save(tmp_path / "empty.png")
    assert not read_mask(tmp_path / "empty.png").any()
    volume = np.zeros((8, 6, 3), np.uint8)
    volume[..., 1] = 5 * mask.T
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.nii.gz", frame=2), mask)
    assert not read_mask(tmp_path / "mask.nii.gz", frame=1).any()


def test_masks_that_are_none(tmp_path):
    def reason(name):
        with pytest.raises(ImageProblem) as info:
            read_mask(tmp_path / name)
        return str(info.value)

    Image.fromarray(GREY8).save(tmp_path / "mask.jpg")
    assert reason("mask.jpg") == "a JPEG blurs the borders of a mask: store it as PNG"
    (tmp_path / "cut.png").write_bytes(b"\x89PNG but no more")
    assert "not an image" in reason("cut.png")
    assert reason("none.png") == "there is no such file" and reason(".") == "is a folder"


def test_content_is_read_as_its_file_is(tmp_path):
    """Bytes and open files of every format, gzipped NIfTI too, whatever they might be called."""
    volume = np.random.default_rng(0).integers(-500, 500, (8, 6, 1)).astype(np.int16)
    for name in ("a.png", "a.jpg", "a.tiff", "a.bmp"):
        Image.fromarray(GREY8).save(tmp_path / name)
    for name in ("a.nii", "a.nii.gz"):
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / name)
    nibabel.save(nibabel.Nifti2Image(volume, np.eye(4)), tmp_path / "second.nii")
    write_dicom(tmp_path / "a.dcm", GREY16)
    for path in tmp_path.iterdir():
        expected, content = read(path), path.read_bytes()
        np.testing.assert_array_equal(read(content), expected, strict=True)
        np.testing.assert_array_equal(read(io.BytesIO(content)), expected, strict=True)
        with path.open("rb") as file:
            np.testing.assert_array_equal(read(file), expected, strict=True)
    assert problem(b"patient,label\n").startswith("not an image of a known format")
    assert problem(b"") == "the file is empty (0 bytes)"
    assert problem((tmp_path / "a.png").read_bytes()[:48]).startswith("truncated or damaged")


def test_values_that_occur_often_are_windowed_as_those_that_do_not(tmp_path):
    """Few different values go through a table, many through the function itself."""
    stored = np.random.default_rng(0).integers(-1000, 1000, (90, 80)).astype(np.int16)
    rescale = {"RescaleSlope": "-1.5", "RescaleIntercept": "3"}
    many = write_dicom(tmp_path / "many.dcm", stored, **rescale)
    few = write_dicom(tmp_path / "few.dcm", stored[:20, :20].copy(), **rescale)
    values = stored * -1.5 + 3
    np.testing.assert_array_equal(read(many), np.round((values - values.min()) / np.ptp(values) * 65535))
    unit = ((values - 99.5) / 299 + 0.5).clip(0, 1)
    np.testing.assert_array_equal(read(many, window=(100, 300)), np.round(unit * 65535))
    np.testing.assert_array_equal(read(few, window=(100, 300)), np.round(unit[:20, :20] * 65535))


def test_nifti_scaling_and_byte_order(tmp_path):
    values = np.arange(48, dtype=np.int16).reshape(8, 6)
    for order in "<>":
        image = nibabel.Nifti1Image(values.astype(f"{order}i2"), np.eye(4), nibabel.Nifti1Header(endianness=order))
        image.header.set_slope_inter(2, -10)
        nibabel.save(image, tmp_path / "a.nii")
        assert read(tmp_path / "a.nii", window=(10.5, 40)).tolist() == [
            [round(min(max((2 * int(value) - 20) / 39 + 0.5, 0), 1) * 65535) for value in row] for row in values.T
        ]


def test_inflated_gives_what_is_asked_for(tmp_path):
    content = np.random.default_rng(0).integers(0, 50, 300_000, np.uint8).tobytes()
    packed = gzip.compress(content[:200_000]) + gzip.compress(content[200_000:]) + b"\0" * 20
    file = Inflated(io.BytesIO(packed))
    assert file.read(10) == content[:10]
    for place in (250_000, 7, 199_990, 299_990):
        file.seek(place)
        assert file.read(100) == content[place : place + 100]
    assert file.read(10) == b""
    with pytest.raises(zlib.error):
        Inflated(io.BytesIO(packed[:1000] + b"\xff" * 90_000)).read(300_000)


def test_a_file_that_goes_away_between_two_looks(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    with pytest.raises(ImageProblem, match="there is no such file"):
        read(tmp_path / "gone.png")
