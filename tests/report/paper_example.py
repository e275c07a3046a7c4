"""A study that never was, of which every fact is known: no two numbers in it are alike unless they mean the same."""

import dataclasses

from raymed.report.paper import (
    Confusion,
    Curve,
    Curves,
    Flow,
    Group,
    Model,
    OperatingPoint,
    PaperRecord,
    Phase,
    Preprocessing,
    Recalibration,
    Split,
    Spread,
    Statistics,
    Study,
    Subgroup,
    Training,
)

STUDY = {field.name: f"words about {field.name} #&%" for field in dataclasses.fields(Study)}


def figure(mean, half=0.03):
    return {"mean": mean, "ci_low": mean - half, "ci_high": mean + half, "n": 1, "std": float("nan")}


def group(patients, cases, images, positive):
    return Group(
        {"patients": patients, "cases": cases, "images": images},
        cases,
        {"patent": cases - positive, "폐쇄": positive},
        {"site": {"서울": cases - 7, "A & B_1": 5, "": 2}, "scanner": {"Siemens": cases}, "modality": {"RF": cases}},
        {"age": Spread(34.25, 4.125, 21, 47, cases - 3)},
        (2019, 2022),
    )


def record(**changes):
    performance = {
        "Case": {"auroc": figure(0.9123), "auprc": figure(0.8345), "sensitivity": figure(0.9062)}
        | {"specificity": figure(0.8517), "lr_positive": figure(11.25, 4), "ppv_at_0.05": figure(0.2874)},
        "Image": {"auroc": figure(0.8876), "sensitivity": figure(0.8733)},
    }
    line = Curve([0, 0.4, 1], [0, 0.9, 1], [0, 0.8, 1], [0, 0.95, 1])
    fields = dict(
        study=Study(**STUDY),
        positive="폐쇄",
        cohort={
            "all": group(389, 410, 820, 103),
            "train": group(251, 264, 528, 66),
            "val": group(61, 67, 134, 17),
            "test": group(77, 79, 158, 20),
        },
        flow=Flow("case", 437, {"no label": 12, "equivocal <50 %": 9, "조영제 주입 전": 6}, 410),
        split=Split("random", "patient", 31, folds=5, repeats=3),
        preprocessing=Preprocessing(224, "letterbox", 1, "dataset", 58),
        model=Model("efficientnet_b0", 4008829, "none", "noisy_or"),
        training=Training(
            (
                Phase(
                    "supcon",
                    "supervised contrastive loss",
                    {"temperature": 0.11},
                    None,
                    1357,
                    64,
                    True,
                    "AdamW",
                    0.0043,
                    0.053,
                    "one_cycle",
                    0.987,
                ),
                Phase(
                    "head",
                    "asymmetric loss",
                    {"gamma_neg": 4.5, "clip": 0.07},
                    "encoder",
                    483,
                    256,
                    False,
                    "SGD",
                    0.013,
                    0.0001,
                    "cosine",
                ),
            ),
            {"rotate": 15.5, "scale": 0.2, "flip": 0.0, "noise": 0.045},
            "AUPRC",
            (2023, 2024, 2025),
        ),
        operating_point=OperatingPoint("sensitivity=0.96", 0.4321, "out-of-fold case scores"),
        recalibration=Recalibration("temperature", "out-of-fold case scores"),
        statistics=Statistics(0.9, 2002, "patient", True),
        performance=performance,
        comparison={"ce": performance["Image"], "supcon_asl": performance["Case"]},
        confusion=Confusion(18, 8, 2, 51),
        subgroups=[
            Subgroup("site", "서울", 71, 18, {"auroc": figure(0.91), "sensitivity": figure(0.9)}),
            Subgroup("site", "A & B_1", 8, 2),
        ],
        readers={"판독의 1": {"sensitivity": figure(0.85), "specificity": figure(0.94)}},
        agreement={"Kappa, A, B": figure(0.715)},
        curves=Curves(
            {"Case": line, "Image": line}, {"Case": line}, {"After": line}, {"Model": line, "Treat none": line}
        ),
        explanation="Grad-CAM with a weight-randomisation check",
        software={"torch": "2.13.0", "ray": None},
        hardware="one H100",
        command="python jobs/train_classifier.py --seeds 2023 2024 2025",
    )
    return PaperRecord(**(fields | changes))
