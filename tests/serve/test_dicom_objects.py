"""An answer as DICOM: read back by pydicom and by highdicom's own parsers, and held against the standard's tables."""

import base64
import io
from dataclasses import replace

import highdicom
import numpy as np
import pydicom
import pytest
from dicom_helpers import content, flaws, ramp, texts
from pydicom.sr.codedict import codes

from raymed.config import UserError
from raymed.data.preprocess import Preprocess
from raymed.data.readers import read
from raymed.serve.dicom.geometry import to_source
from raymed.serve.dicom.objects import heat_maps, map_of, objects, predecessor, to_bytes
from raymed.serve.dicom.provenance import Case
from raymed.serve.handlers import Upload
from raymed.serve.service import Answer

SIZE = 16
ALL = ("report", "overlay", "segmentation")


def explanation(values: np.ndarray) -> dict:
    """As it stands in an answer."""
    raw = np.round(255 * values).astype(np.uint8).tobytes()
    return {"method": "gradcam", "shape": list(values.shape), "map": base64.b64encode(raw).decode()}


def case_of(study, *, bundle="a" * 64, research_only=True, decision="positive", explained=True) -> Case:
    images = []
    for place, ds in enumerate(study):
        raw = content(ds)
        header = pydicom.dcmread(io.BytesIO(raw), stop_before_pixels=True)
        for frame in range(1, int(ds.get("NumberOfFrames") or 1) + 1):
            number = frame if "NumberOfFrames" in ds else None
            images.append(Upload(read(raw, number), place, number, "DICOM", header))
    shown = explanation(ramp(SIZE)) if explained else None
    answer = Answer(
        model="hsg",
        version="3",
        run_id="tune-1/final",
        bundle=bundle,
        preprocessing="f" * 16,
        intended_use="to be tried",
        research_only=research_only,
        decision=decision,
        reasons=["the probability is at or above the threshold"],
        result={
            "probability": 0.83,
            "threshold": 0.41,
            "images": [{"probability": 0.1 * (i + 1), "explanation": shown} for i in range(len(images))],
        },
    )
    return Case(answer, images, "occluded")


def made(case, kinds=ALL, before=()):
    """The objects, written and read again."""
    found = objects(case, kinds, heat_maps(case, Preprocess(size=SIZE)), before)
    return [pydicom.dcmread(io.BytesIO(to_bytes(each))) for each in found]


def read_report(case):
    """By highdicom's own parser."""
    return highdicom.sr.srread(io.BytesIO(to_bytes(objects(case, ["report"], [])[0])))


def of(modality, found):
    return [ds for ds in found if ds.Modality == modality]


def test_the_iods_are_as_the_standard_demands(sent):
    seen = set()
    for study in sent:
        for ds in made(case_of(study)):
            seen.add(ds.Modality)
            assert flaws(ds) == []
    assert seen == {"SR", "OT", "SEG"}


def test_the_check_finds_what_is_missing(sent):
    report = made(case_of(sent[0]), ["report"])[0]
    del report.CompletionFlag
    report.ContributingEquipmentSequence[0].Manufacturer = ""
    assert len(flaws(report)) == 2


def test_patient_and_study_are_the_senders_in_every_object(sent):
    charsets = set()
    for study in sent:
        charsets.add(str(study[0].SpecificCharacterSet))
        for ds in made(case_of(study)):
            for name in ("PatientName", "PatientID", "PatientBirthDate", "StudyInstanceUID", "AccessionNumber"):
                assert ds[name].value == study[0][name].value, name
            assert ds.SpecificCharacterSet == "ISO_IR 192"
            assert str(ds.PatientName).encode("utf-8") in to_bytes(ds)
            assert ds.SeriesInstanceUID not in {image.SeriesInstanceUID for image in study}
    assert len(charsets) == 2


def test_the_report_says_what_the_answer_says(sent):
    case = case_of(sent[0])
    report = read_report(case)
    groups = report.content.get_image_measurement_groups()
    assert len(groups) == 1 + len(case.images)
    whole = groups[0]
    assert whole.tracking_identifier == "hsg case"
    assert whole.finding_type.value == "occluded" and whole.finding_type.scheme_designator == "99RAYMED"
    measured = {m.name: m.value for m in whole.get_measurements()}
    assert measured == {codes.DCM.Probability: 0.83, codes.DCM.ThresholdValue: 0.41}
    assert whole.get_qualitative_evaluations()[0].value == codes.SCT.Positive
    per_image = [group.get_measurements(codes.DCM.Probability)[0].value for group in groups[1:]]
    assert per_image == pytest.approx([0.1, 0.2])
    shown = texts(report)
    for text in ("RESEARCH USE ONLY", "at or above the threshold", "Intended use: to be tried", "hsg 3"):
        assert text in shown
    assert (report.VerificationFlag, report.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")


@pytest.mark.parametrize(
    ("decision", "code"),
    [("negative", codes.SCT.Negative), ("abstain", codes.SCT.Indeterminate), (None, codes.SCT.NotEvaluated)],
)
def test_decisions_have_codes(sent, decision, code):
    report = read_report(case_of(sent[0], decision=decision))
    group = report.content.get_image_measurement_groups()[0]
    assert group.get_qualitative_evaluations()[0].value == code


def test_reports_name_their_images_and_the_model(sent):
    report = made(case_of(sent[0]), ["report"])[0]
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert {item.ReferencedSOPInstanceUID for item in evidence} == {ds.SOPInstanceUID for ds in sent[0]}
    ours = [item for item in report.ContributingEquipmentSequence if item.Manufacturer == "raymed"]
    assert "a" * 64 in ours[0].ContributionDescription and "tune-1/final" in ours[0].ContributionDescription
    assert "hsg 3" in report.SoftwareVersions and report.DeviceSerialNumber == "a" * 64


def test_frames_of_a_run_are_named(sent):
    run = next([ds] for study in sent for ds in study if "NumberOfFrames" in ds)
    report = read_report(case_of(run))
    groups = report.content.get_image_measurement_groups()
    assert [group.source_images[0].referenced_frame_numbers for group in groups] == [[1, 2, 3], [1], [2], [3]]


def test_nothing_says_research_once_the_card_says_otherwise(sent):
    found = made(case_of(sent[0], research_only=False))
    assert not [ds for ds in found if b"RESEARCH" in to_bytes(ds)]
    marked, plain = (made(case_of(sent[0], research_only=told), ["overlay"])[0].pixel_array for told in (True, False))
    assert marked.shape[0] > plain.shape[0]


def test_uids_are_of_the_study_the_images_and_the_bundle(sent):
    def uids(*arguments, **named):
        return [ds.SOPInstanceUID for ds in made(case_of(*arguments, **named))]

    again = uids(sent[0])
    assert uids(sent[0]) == again and len(set(again)) == len(again)
    for other in (uids(sent[1]), uids(sent[0], bundle="b" * 64), uids(sent[0][:1])):
        assert not set(other) & set(again)
    report, reordered = (made(case_of(study), ["report"])[0] for study in (sent[0], sent[0][::-1]))
    assert report.SOPInstanceUID == reordered.SOPInstanceUID
    fewer = made(case_of(sent[0][:1]), ["report"])[0]
    assert fewer.SeriesInstanceUID == report.SeriesInstanceUID


def test_uids_are_of_the_release_and_the_use(sent):
    """What says something else, also in its series' description, is no object that an archive has already."""
    case = case_of(sent[0])

    def uids(**changes):
        found = made(replace(case, answer=case.answer.model_copy(update=changes)))
        return {uid for ds in found for uid in (ds.SOPInstanceUID, ds.SeriesInstanceUID)}

    told = [uids(), uids(research_only=False), uids(intended_use="triage")]
    assert len(set.union(*told)) == sum(map(len, told))


def test_a_study_that_is_refused_again_for_another_reason_is_told_so(sent):
    case = case_of(sent[0], decision=None)

    def refused(reason, before=()):
        return made(replace(case, answer=case.answer.model_copy(update={"reasons": [reason]})), ["report"], before)[0]

    first = refused("too large")
    before = [predecessor(first, f"{first.SeriesInstanceUID}/{first.SOPInstanceUID}")]
    again, other = refused("too large", before), refused("cut short", before)
    assert again.SOPInstanceUID == first.SOPInstanceUID != other.SOPInstanceUID
    assert "PredecessorDocumentsSequence" in other and "PredecessorDocumentsSequence" not in again


def test_a_new_report_names_the_one_before_it(sent):
    first = made(case_of(sent[0][:1]), ["report"])[0]
    before = predecessor(first, f"{first.SeriesInstanceUID}/{first.SOPInstanceUID}")
    later = made(case_of(sent[0]), ["report"], [before])[0]
    series = later.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0]
    assert series.SeriesInstanceUID == first.SeriesInstanceUID
    assert series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == first.SOPInstanceUID
    for wrong in ("1.2.3", "1.2.3/x", "../1"):
        with pytest.raises(UserError, match="two UIDs"):
            predecessor(first, wrong)


def test_overlays_lie_on_their_images(sent):
    case = case_of(sent[0][:1])
    (overlay,) = made(case, ["overlay"])
    assert overlay.PhotometricInterpretation == "RGB"
    assert overlay.SourceImageSequence[0].ReferencedSOPInstanceUID == sent[0][0].SOPInstanceUID
    assert "no evidence of localisation" in overlay.DerivationDescription
    pixels, times = overlay.pixel_array, overlay.Columns // 64
    picture, footer = pixels[: 64 * times], pixels[64 * times :]
    grey = np.round(255 * (case.images[0].pixels / np.iinfo(case.images[0].pixels.dtype).max)).astype(int)
    left = picture[::times, ::times][:, 0]  # where the map is 0
    assert np.abs(left.astype(int) - grey[:, :1]).max() <= 1
    right = picture[:, -1].astype(int)
    assert (right[:, 0] - right[:, 2]).mean() > 40  # inferno's bright end has little blue
    assert 0.02 < (footer > 128).mean() < 0.5


def test_overlays_share_a_series_where_their_images_do(sent):
    """What they say of their images is of the series: the side, the part of the body."""
    study = [pydicom.dcmread(io.BytesIO(content(sent[0][0]))) for _ in range(3)]
    for place, ds in enumerate(study):
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{place}"
        ds.SeriesInstanceUID, ds.Laterality = ("1.2.4", "L") if place < 2 else ("1.2.5", "R")
    found = made(case_of(study), ["overlay"])
    assert [ds.Laterality for ds in found] == ["L", "L", "R"]
    first, second, third = [ds.SeriesInstanceUID for ds in found]
    assert first == second != third and not {first, third} & {"1.2.4", "1.2.5"}


def test_segmentations_hold_what_is_high_in_the_map(sent):
    case = case_of(sent[0][:1])
    regions = heat_maps(case, Preprocess(size=SIZE))
    found = highdicom.seg.segread(io.BytesIO(to_bytes(objects(case, ["segmentation"], regions)[0])))
    assert (found.SegmentationType, found.number_of_segments) == ("FRACTIONAL", 1)
    values = found.get_pixels_by_source_instance([sent[0][0].SOPInstanceUID])[0, ..., 0]
    wanted = to_source(ramp(SIZE), Preprocess(size=SIZE), 64, 64)
    clear = np.abs(wanted - 0.5) > 0.01
    assert np.abs(values - np.where(wanted >= 0.5, wanted, 0))[clear].max() < 2 / 255
    segment = found.get_segment_description(1)
    assert segment.segmented_property_type.scheme_designator == "99RAYMED"
    assert segment.algorithm_identification.version == "3"
    assert "PixelMeasuresSequence" not in found.SharedFunctionalGroupsSequence[0]


@pytest.mark.parametrize(
    "kind", ["ComputedRadiographyImageStorage", "DigitalXRayImageStorageForPresentation", "UltrasoundImageStorage"]
)
@pytest.mark.parametrize("spacing", [{}, {"ImagerPixelSpacing": [0.1, 0.1]}, {"PixelSpacing": [0.1, 0.1]}])
def test_images_of_every_class_have_segmentations(sent, kind, spacing):
    ds = pydicom.dcmread(io.BytesIO(content(sent[0][0])))
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = getattr(pydicom.uid, kind)
    ds.update(spacing)
    report, found = made(case_of([ds]), ["report", "segmentation"])
    assert flaws(found) == [] and "no segmentation" not in texts(report)
    assert "PixelMeasuresSequence" not in found.SharedFunctionalGroupsSequence[0]


def test_a_slice_has_its_segmentation_in_space(sent):
    study = [pydicom.dcmread(io.BytesIO(content(sent[0][0])))]
    ds = study[0]
    ds.Modality, ds.SOPClassUID = "CT", pydicom.uid.CTImageStorage
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.FrameOfReferenceUID, ds.ImagePositionPatient = "1.2.3.4", [1, 2, 3]
    ds.ImageOrientationPatient, ds.PixelSpacing, ds.SliceThickness = [1, 0, 0, 0, 1, 0], [0.5, 0.5], 2
    (found,) = of("SEG", made(case_of(study)))
    assert found.FrameOfReferenceUID == "1.2.3.4" and flaws(found) == []
    assert found.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing == [0.5, 0.5]
    del ds.FrameOfReferenceUID
    report, *rest = made(case_of(study))
    assert of("SEG", rest) == [] and "no segmentation of an image whose header" in texts(report)


def test_the_report_says_why_a_run_has_no_segmentation(sent):
    run = next([ds] for study in sent for ds in study if "NumberOfFrames" in ds)
    found = made(case_of(run))
    assert [ds.Modality for ds in found] == ["SR", "OT", "OT", "OT"]
    assert [ds.SourceImageSequence[0].ReferencedFrameNumber for ds in found[1:]] == [1, 2, 3]
    assert "image 3: no segmentation of a frame of a run" in texts(found[0])


def test_answers_without_maps_are_reports_alone(sent):
    assert [ds.Modality for ds in made(case_of(sent[0], explained=False))] == ["SR"]


def test_odd_headers_are_no_obstacle(sent):
    ds = pydicom.dcmread(io.BytesIO(content(sent[0][0])))
    for name in ("PatientName", "PatientID", "PatientSex", "StudyDate", "PatientOrientation", "AccessionNumber"):
        del ds[name]
    ds.PatientSex, ds.FrameOfReferenceUID = "W", "1.2.3.4"
    found = made(case_of([ds]))
    assert {each.Modality for each in found} >= {"SR", "OT"}
    assert all(each.StudyInstanceUID == ds.StudyInstanceUID for each in found)
    assert flaws(of("OT", found)[0]) == []


def test_cases_are_of_one_study_and_of_dicom(sent):
    with pytest.raises(UserError, match="several studies"):
        case_of([sent[0][0], sent[1][0]])
    with pytest.raises(UserError, match="DICOM images alone"):
        Case(case_of(sent[0]).answer, [Upload(np.zeros((2, 2), np.uint8))])


@pytest.mark.parametrize("fit", ["letterbox", "crop", "stretch"])
@pytest.mark.parametrize(("height", "width"), [(60, 100), (101, 64), (48, 48), (16, 16), (10, 7)])
def test_maps_come_back_to_where_they_were(fit, height, width):
    """A spot in an image, seen by the network, lies in the same place when it has come back."""
    preprocess = Preprocess(size=48, fit=fit)
    y, x = np.mgrid[:height, :width]
    for row, column in ((0.5, 0.5), (0.4, 0.6), (0.55, 0.45)):
        spot = np.exp(-(((y - row * height) / (0.1 * height)) ** 2) - ((x - column * width) / (0.1 * width)) ** 2)
        seen = preprocess.to_array(np.round(65535 * spot).astype(np.uint16))[..., 0] / 65535
        back = to_source(seen, preprocess, height, width)
        assert back.shape == (height, width) and back.dtype == np.float32
        for axis, place in ((y, row * height), (x, column * width)):
            assert (axis * back).sum() / back.sum() == pytest.approx((axis * spot).sum() / spot.sum(), abs=0.6), place


def test_what_the_network_does_not_see_has_no_map():
    back = to_source(np.ones((8, 8)), Preprocess(size=8, fit="crop"), 20, 40)
    assert back[:, 10:30].min() == 1 and back[:, :10].max() == 0 and back[:, 30:].max() == 0
    whole = to_source(np.ones((8, 8)), Preprocess(size=8, fit="letterbox"), 20, 40)
    assert whole.min() == 1


def test_maps_are_read_as_they_stand_in_answers():
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    assert np.abs(map_of(explanation(values)) - values).max() <= 0.5 / 255 + 1e-6
    assert map_of(explanation(np.ones((2, 2)))).max() == 1
