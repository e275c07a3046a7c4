"""An answer as a Structured Report: TID 1500, Measurement Report, in a Comprehensive SR document.

    Imaging Measurement Report
      Device observer: the model, its version, its bundle
      Image Library: every image of the answer
      Measurement group "case": Finding = the positive class; Probability, Threshold Value; decision; reasons
      Measurement group "image 1", ... where there are several: Probability of each

Concepts are of DCM and SNOMED CT where those have them (Probability, Threshold Value, Positive, Negative,
Indeterminate, Not Evaluated), else of the scheme 99RAYMED. A document is preliminary and unverified: nobody has
read it.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from raymed.serve.dicom.provenance import MANUFACTURER, Case, bare, coding_scheme, headers_of, local_code
from raymed.serve.footer import RESEARCH_ONLY

if TYPE_CHECKING:
    from highdicom.sr import AlgorithmIdentification, ComprehensiveSR, MeasurementsAndQualitativeEvaluations
    from pydicom import Dataset
    from pydicom.sr.coding import Code

    from raymed.serve.handlers import Upload


def report(case: Case, before: "Sequence[Dataset]" = (), notes: Sequence[str] = ()) -> "ComprehensiveSR":
    """The report. before: earlier ones of the study (study, series, SOP class and SOP instance of each) that this takes
    the place of; of none where it is itself one of them, told again. notes: what else people are to know."""
    from highdicom import sr
    from pydicom.sr.codedict import codes

    document = sr.MeasurementReport(
        observation_context=_observer(case),
        procedure_reported=_procedure(case.first),
        imaging_measurements=_groups(case, notes),
        title=codes.DCM.ImagingMeasurementReport,
    )
    document[0].ContentSequence.insert(-1, _library(case))
    # A study may be refused twice, for different reasons, and then be answered.
    decided = case.answer.decision is not None
    common = case.common("report", 1, decided, *([] if decided else case.answer.reasons))
    earlier = [each for each in before if each.SOPInstanceUID != common["sop_instance_uid"]]
    made = sr.ComprehensiveSR(
        evidence=[bare(header) for header in case.headers],
        content=document,
        is_complete=True,
        is_final=False,
        is_verified=False,
        previous_versions=earlier or None,
        coding_schemes=[coding_scheme()],
        **common,
    )
    made.copy_patient_and_study_information(case.first)
    return made


def _observer(case: Case) -> Any:
    from highdicom import sr
    from pydicom.sr.codedict import codes

    answer = case.answer
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=case.series_uid("device"),
        name=f"{answer.model} {case.version}"[:64],
        manufacturer_name=MANUFACTURER,
        model_name=answer.model,
        serial_number=case.serial,
    )
    return sr.ObservationContext(observer_device_context=sr.ObserverContext(codes.DCM.Device, device))


def _procedure(header: "Dataset") -> "Code":
    """As the images state it, else simply imaging."""
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    for item in header.get("ProcedureCodeSequence") or []:
        if item.get("CodeValue") and item.get("CodingSchemeDesignator") and item.get("CodeMeaning"):
            with suppress(TypeError, ValueError):  # texts longer than the standard allows
                return CodedConcept(item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning)  # type: ignore[return-value]
    return codes.SCT.ImagingProcedure


def _library(case: Case) -> Any:
    """TID 1600. Not highdicom's own, which refuses images whose header lacks what merely describes them."""
    from highdicom import sr
    from pydicom.sr.codedict import codes

    contains = sr.RelationshipTypeValues.CONTAINS
    library = sr.ContainerContentItem(codes.DCM.ImageLibrary, relationship_type=contains)
    group = sr.ContainerContentItem(codes.DCM.ImageLibraryGroup, relationship_type=contains)
    library.ContentSequence, group.ContentSequence = sr.ContentSequence([group]), sr.ContentSequence()
    for header in case.headers:
        entry = sr.ImageContentItem(
            codes.SCT.Source, header.SOPClassUID, header.SOPInstanceUID, relationship_type=contains
        )
        with suppress(AttributeError, IndexError, KeyError, TypeError, ValueError):  # too little in the header
            entry.ContentSequence = sr.ContentSequence(sr.ImageLibraryEntryDescriptors(header))
        group.ContentSequence.append(entry)
    return library


def _groups(case: Case, notes: Sequence[str]) -> "list[MeasurementsAndQualitativeEvaluations]":
    groups = [_case_group(case, notes)]
    told = case.answer.result.get("images") or []
    if len(case.images) > 1 and len(told) == len(case.images):
        groups += [_image_group(case, place) for place in range(len(told))]
    return groups


def _case_group(case: Case, notes: Sequence[str]) -> "MeasurementsAndQualitativeEvaluations":
    from highdicom import sr
    from pydicom.sr.codedict import codes

    result = case.answer.result
    measured = [
        _number(name, result[key])
        for key, name in (("probability", codes.DCM.Probability), ("threshold", codes.DCM.ThresholdValue))
        if key in result
    ]
    decision = sr.QualitativeEvaluation(
        local_code("DECISION", "Decision of the model"), _decision(case.answer.decision)
    )
    group = _group(case, "case", measured, [decision], case.images)
    for text in [*_texts(case), *notes]:
        group[0].ContentSequence.append(sr.TextContentItem(codes.DCM.Comment, text, sr.RelationshipTypeValues.CONTAINS))
    return group


def _image_group(case: Case, place: int) -> "MeasurementsAndQualitativeEvaluations":
    from pydicom.sr.codedict import codes

    told = case.answer.result["images"][place]
    measured = [_number(codes.DCM.Probability, told["probability"])] if "probability" in told else []
    return _group(case, f"image {place + 1}", measured, [], [case.images[place]])


def _group(
    case: Case, name: str, measured: Sequence[Any], evaluated: Sequence[Any], images: "Sequence[Upload]"
) -> "MeasurementsAndQualitativeEvaluations":
    from highdicom import sr

    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(case.uid("tracking", name), f"{case.answer.model} {name}"[:64]),
        finding_type=_finding(case.finding),
        algorithm_id=_algorithm(case),
        measurements=measured,
        qualitative_evaluations=evaluated,
        source_images=[_source(images, header) for header in headers_of(images)],
    )


def _source(images: "Sequence[Upload]", header: "Dataset") -> Any:
    from highdicom.sr import SourceImageForMeasurementGroup

    uid = header.SOPInstanceUID
    frames = [image.frame for image in images if image.header.SOPInstanceUID == uid and image.frame is not None]
    return SourceImageForMeasurementGroup(header.SOPClassUID, header.SOPInstanceUID, frames or None)


def _algorithm(case: Case) -> "AlgorithmIdentification":
    from highdicom.sr import AlgorithmIdentification

    told = [f"{name}: {value}" for name, value in case.identity().items()]
    return AlgorithmIdentification(case.answer.model, case.version or "unknown", told, manufacturer=MANUFACTURER)


def _number(name: "Code", value: float) -> Any:
    from highdicom.sr import Measurement
    from pydicom.sr.codedict import codes

    return Measurement(name, float(value), codes.UCUM.NoUnits)


def _finding(positive: str | None) -> "Code | None":
    """What the probability is of."""
    return local_code(positive, positive) if positive else None


def _decision(decision: str | None) -> "Code":
    from pydicom.sr.codedict import codes

    known = {"positive": codes.SCT.Positive, "negative": codes.SCT.Negative, "abstain": codes.SCT.Indeterminate}
    return known.get(decision or "", codes.SCT.NotEvaluated)


def _texts(case: Case) -> list[str]:
    """What people are told, in the order of its weight."""
    answer = case.answer
    marks = [f"{RESEARCH_ONLY}: not for diagnosis"] if answer.research_only else []
    return [*marks, *answer.reasons, f"Intended use: {answer.intended_use}"]
