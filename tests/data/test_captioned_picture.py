"""Pictures of captioned phantoms: what the facts say can be measured in the pixels."""

from itertools import product

import numpy as np
import pytest
from scipy.ndimage import label

from raymed.config import UserError
from raymed.data.captioned_facts import VALUES, Facts, Lesion
from raymed.data.captioned_picture import draw

SIZE = 96
ORGANS, FINDINGS = VALUES["organ"], VALUES["finding"]


def added(facts: Facts, patient: int = 0, size: int = SIZE) -> np.ndarray:
    """What the lesions change in an image, in grey levels."""
    with_lesions, without = (draw(f, patient=patient, size=size) for f in (facts, Facts(facts.organ)))
    return with_lesions.astype(float) - without


def one(finding="nodule", side="left", count="1", size="large", severity="severe") -> tuple[Lesion]:
    return (Lesion(finding, side, count, size, severity),)


@pytest.mark.parametrize("organ", ORGANS)
@pytest.mark.parametrize("finding", FINDINGS)
def test_lesions_lie_on_the_stated_side(organ, finding):
    """The patient's right is on the left of the picture."""
    middle = SIZE // 2
    for patient, (count, size) in enumerate(product(VALUES["count"], VALUES["size"])):
        for side, here in (("right", np.s_[:, :middle]), ("left", np.s_[:, middle:])):
            change = np.abs(added(Facts(organ, one(finding, side, count, size)), patient))
            assert change[here].sum() > 0.85 * change.sum() > 0


def test_two_groups_lie_on_both_sides():
    nodule, cyst = one("nodule", "left") + one("cyst", "right")
    both = added(Facts("brain", (nodule, cyst)))
    assert (both[:, SIZE // 2 :].max() > 60) and (both[:, : SIZE // 2].max() > 60)
    assert both[:, SIZE // 2 :].min() > -10 > both[:, : SIZE // 2].min()  # the cyst's dark middle is on the right


@pytest.mark.parametrize("size", VALUES["size"])
@pytest.mark.parametrize("organ", ORGANS)
def test_lesions_can_be_counted(organ, size):
    """As separate bright parts, at the size of the default set."""
    hits = [
        label(added(Facts(organ, one(count=count, size=size)), patient, 48) > 50)[1] == int(count)
        for patient, count in product(range(20), VALUES["count"])
    ]
    assert np.mean(hits) > 0.95


@pytest.mark.parametrize("finding", FINDINGS)
def test_a_large_lesion_covers_more(finding):
    def width(size, patient):
        rows, columns = np.nonzero(added(Facts("breast", one(finding, size=size)), patient) > 25)
        return max(np.ptp(rows), np.ptp(columns)) + 1

    ratios = [width("large", patient) / width("small", patient) for patient in range(20)]
    assert min(ratios) > 1.25 and 1.35 < np.median(ratios) < 2


@pytest.mark.parametrize("finding", FINDINGS)
def test_a_severe_lesion_has_two_and_a_half_times_the_contrast(finding):
    for organ, patient in product(ORGANS, range(5)):
        mild, severe = (
            added(Facts(organ, one(finding, severity=severity)), patient).max() for severity in ("mild", "severe")
        )
        assert 2 < severe / mild < 3


def test_findings_look_different():
    """Brightness in the middle of a lesion and share of its outline that it fills: where each finding lies alone."""
    looks = {finding: [] for finding in FINDINGS}
    for finding, organ, patient in product(FINDINGS, ORGANS, range(10)):
        change = added(Facts(organ, one(finding)), patient)
        bright = change > 0.4 * change.max()
        y, x = np.nonzero(bright)
        middle = change[round(np.mean(y)), round(np.mean(x))] / change.max()
        outline = np.pi * (np.hypot(y - y.mean(), x - x.mean()).max() + 0.5) ** 2
        looks[finding].append((middle, bright.sum() / outline))
    middle, fill = np.array([looks[finding] for finding in FINDINGS]).transpose(2, 0, 1)
    nodule, mass, cyst, calcification = range(4)
    assert middle[[nodule, mass]].min() > 0.7 and np.abs(middle[calcification]).max() < 0.35 and middle[cyst].max() < 0
    assert fill[nodule].min() > fill[mass].max() + 0.1


@pytest.mark.parametrize("organ", ORGANS)
def test_other_facts_change_nothing_else(organ):
    for finding in FINDINGS:
        change = added(Facts(organ, one(finding)))
        assert 0 < np.mean(change != 0) < 0.15


def test_organs_look_different_and_alike_between_patients():
    """The nearest mean picture, of patients 0 to 9, is that of the own organ."""
    images = np.array([[draw(Facts(o), patient=p) for p in range(20)] for o in ORGANS], float).reshape(4, 20, -1)
    means = images[:, :10].mean(1)
    nearest = np.linalg.norm(images[:, 10:, None] - means, axis=-1).argmin(-1)
    assert (nearest == np.arange(4)[:, None]).all()


def test_brightness_does_not_tell_the_side():
    images = {side: np.array([draw(Facts("lung", one(side=side)), patient=p).mean() for p in range(60)])
              for side in VALUES["side"]}  # fmt: skip
    higher = (images["left"][:, None] > images["right"]).mean()
    assert 0.35 < higher < 0.65


def test_patients_images_and_seeds_differ():
    first = draw(Facts("brain")).astype(float)
    assert (draw(Facts("brain")) == first).all()
    others = [draw(Facts("brain"), **{what: 1}) for what in ("patient", "image", "seed")]
    assert all(np.abs(other - first).mean() > 3 for other in others)


@pytest.mark.parametrize("size", [32, 48, 64])
def test_size_scales_the_same_scene(size):
    facts = Facts("uterus", one("mass", count="2"))
    large, small = draw(facts, size=4 * size), draw(facts, size=size)
    blocks = large.reshape(size, 4, size, 4).mean((1, 3))
    assert small.shape == (size, size) and np.corrcoef(blocks.ravel(), small.ravel())[0, 1] > 0.95


def test_arguments_are_checked():
    with pytest.raises(UserError, match="organ must be one of .* got 'lungs' .did you mean 'lung'"):
        draw(Facts("lungs"))
    with pytest.raises(UserError, match="size must be >= 32, got 16"):
        draw(Facts("lung"), size=16)
