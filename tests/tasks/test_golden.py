"""Golden inputs find a network that answers otherwise."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from raymed.bundle import Bundle
from raymed.config import UserError, to_dict
from raymed.data.preprocess import Preprocess
from raymed.models.encoder import EncoderConfig, build_encoder
from raymed.models.head import LinearHead
from raymed.tasks.classifier import Classifier
from raymed.tasks.golden import check_golden, golden_values, patterns, with_golden
from raymed.tasks.predictor import Predictor


@pytest.fixture(scope="module")
def made() -> Bundle:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(), 1)
    classifier = Classifier(encoder, LinearHead(encoder.num_features))
    nn.init.normal_(classifier.head.linear.weight, std=10.0)
    return with_golden(
        Bundle(
            kind="classifier",
            weights=dict(classifier.state_dict()),
            model={"encoder": to_dict(EncoderConfig())},
            preprocess=to_dict(Preprocess(size=32, mean=(0.4,), std=(0.2,))),
            classes={"names": ["a", "b"], "positive": "b"},
            operating_point={"threshold": 0.5},
        )
    )


def test_patterns_are_drawn_alike_everywhere():
    drawn = patterns()
    assert len(drawn) == 4 and all(p.shape == (96, 96) and p.dtype == np.uint8 and np.ptp(p) > 150 for p in drawn)
    assert [int(p.astype(np.int64).sum()) for p in drawn] == [1175041, 1175041, 1175041, 1218720]


def test_a_bundle_that_was_saved_and_loaded_passes(made, tmp_path):
    loaded = Bundle.load(made.save(tmp_path))
    values = golden_values(Predictor.from_bundle(loaded))
    assert len(values) == 4 and np.ptp(values) > 0.01
    check_golden(loaded, values)


def test_other_weights_and_another_preprocessing_are_found(made):
    head = "head.linear.weight"
    assert head in made.weights
    for changed in (
        replace(made, weights=made.weights | {head: made.weights[head] * 1.05}),
        replace(made, preprocess=made.preprocess | {"mean": (0.45,)}),
    ):
        with pytest.raises(UserError, match="does not answer as it did when it was made"):
            check_golden(changed, golden_values(Predictor.from_bundle(changed)))


def test_numbers_that_are_none_are_found_in_any_bundle(made):
    old = replace(made, golden={})
    check_golden(old, [0.1, 0.2])
    with pytest.raises(UserError, match="does not answer"):
        check_golden(old, [float("nan")])
    with pytest.raises(UserError, match="does not answer"):
        check_golden(made, made.golden["values"][:2])
