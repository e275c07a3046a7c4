"""Losses over pairs against official values, their formulas pair by pair, and limits. Several processes:
tests/losses/test_pair_losses_workers.py; memory: tests/losses/test_pair_memory.py."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from raymed.config import UserError, from_dict, to_dict
from raymed.losses import LOSSES, PAIR_LOSSES, DCLLoss, DHNNCELoss, HNNCELoss, InfoNCELoss, SigLIPLoss
from raymed.losses import _pairs as pairs_module
from raymed.losses._pairs import Pairs
from raymed.losses.decoupled import decoupled

NAMES = sorted(PAIR_LOSSES)
SOFTMAX = ("info_nce", "dcl", "hn_nce", "dhn_nce")
"""Those that are 0 without negatives; siglip asks about each pair by itself."""


def run(loss, image, text, dtype=torch.float64, **more):
    """(value, gradient of the image features, of the text features)."""
    image, text = (torch.as_tensor(x).to(dtype).clone().requires_grad_() for x in (image, text))
    value = loss(image, text, **more)
    value.backward()
    return value.item(), image.grad, text.grad


def features(num=7, width=5, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, num, width, generator=generator, dtype=torch.float64)


def parameter(value):
    return torch.tensor(float(value), dtype=torch.float64, requires_grad=True)


def check_tangent(found, expected, unit, tolerance=1e-6):
    """The gradient without its part along the unit features, which normalising inside takes away."""
    expected, unit = torch.as_tensor(expected).double(), torch.as_tensor(unit).double()
    tangent = expected - (expected * unit).sum(1, keepdim=True) * unit
    torch.testing.assert_close(found, tangent, rtol=tolerance, atol=tolerance)


def test_golden_infonce(golden):
    arrays = golden("clip_infonce")
    image, text, scale = arrays["image_features"], arrays["text_features"], parameter(arrays["logit_scale"])
    value, image_grad, text_grad = run(InfoNCELoss(), image, text, scale=scale)
    assert value == pytest.approx(float(arrays["loss64"]), rel=1e-7)
    assert scale.grad.item() == pytest.approx(float(arrays["grad64_scale"]), rel=1e-5)
    check_tangent(image_grad, arrays["grad64_I"], image)
    check_tangent(text_grad, arrays["grad64_T"], text)


def test_golden_siglip(golden):
    arrays = golden("clip_infonce")
    image, text = arrays["image_features"], arrays["text_features"]
    scale, bias = parameter(arrays["siglip_scale"]), parameter(arrays["siglip_bias"])
    value, image_grad, text_grad = run(SigLIPLoss(), image, text, scale=scale, bias=bias)
    assert value == pytest.approx(float(arrays["siglip_loss"]), rel=1e-6)
    assert scale.grad.item() == pytest.approx(float(arrays["siglip_grad_scale"]), rel=1e-5)
    assert bias.grad.item() == pytest.approx(float(arrays["siglip_grad_bias"]), rel=1e-5)
    check_tangent(image_grad, arrays["siglip_grad_I"], image, 1e-5)
    check_tangent(text_grad, arrays["siglip_grad_T"], text, 1e-5)
    fixed = SigLIPLoss(temperature=1 / scale.item(), bias=bias.item())
    assert run(fixed, image, text)[0] == pytest.approx(value, rel=1e-12)


def test_golden_dhn_nce_is_the_papers_and_officially_the_codes(golden):
    arrays = golden("dhn_nce")
    image, text = arrays["image_features"], arrays["text_features"]
    checked = 0
    for k, (temperature, beta1, beta2, alpha) in enumerate(arrays["cfg_tau_b1_b2_alpha"].tolist()):
        if alpha:  # adds the positives to the code's elementwise ratio: neither paper has such a term
            continue
        checked += 1
        paper = DHNNCELoss(temperature=temperature, beta1=beta1, beta2=beta2)
        value, image_grad, text_grad = run(paper, image, text)
        # The file's log(B - 1), once a direction, was taken in float32.
        constant = 2 * (float(np.log(np.float32(5))) - math.log(5))
        assert value + constant == pytest.approx(float(arrays[f"paperform_loss64_{k}"]), rel=1e-12)
        np.testing.assert_allclose(image_grad, arrays[f"paperform_gradI64_{k}"], rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(text_grad, arrays[f"paperform_gradT64_{k}"], rtol=1e-8, atol=1e-10)
        official = DHNNCELoss(temperature=temperature, beta1=beta1, beta2=beta2, official=True)
        value, image_grad, text_grad = run(official, image, text)
        assert value == pytest.approx(float(arrays[f"official_loss64_{k}"]), rel=1e-12)
        np.testing.assert_allclose(image_grad, arrays[f"official_gradI_{k}"], rtol=1e-4, atol=2e-6)
        np.testing.assert_allclose(text_grad, arrays[f"official_gradT_{k}"], rtol=1e-4, atol=2e-6)
    assert checked >= 4


def two_views(arrays):
    """(images, texts, cases) such that every view meets the other view of its sample as its pair, and both views of all
    other samples as negatives: the comparison of losses with one kind of input."""
    z1, z2 = (torch.as_tensor(arrays[name]).double() for name in ("z1", "z2"))
    return torch.cat([z1, z2]), torch.cat([z2, z1]), torch.arange(len(z1)).repeat(2)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_golden_dcl_of_two_views(temperature, golden):
    """The published loss takes first views only as anchors: half of the rows of one direction."""
    arrays = golden("dcl_hcl")
    image, text, cases = two_views(arrays)
    half = len(image) // 2
    z1, z2 = (x.clone().requires_grad_() for x in (image[:half], image[half:]))
    pairs = Pairs.gathered(torch.cat([z1, z2]), torch.cat([z2, z1]), cases)
    value = pairs.values(decoupled, 1 / temperature)[0, :half].mean()
    value.backward()
    assert value.item() == pytest.approx(float(arrays[f"dcl_{temperature}"]), rel=1e-5)
    check_tangent(z1.grad, arrays[f"dcl_{temperature}_g1"], z1.detach(), 1e-5)
    check_tangent(z2.grad, arrays[f"dcl_{temperature}_g2"], z2.detach(), 1e-5)


@pytest.mark.parametrize(
    ("key", "loss"),
    [
        ("hcl_hard_tp0.0_b1.0", HNNCELoss(temperature=0.5, beta1=1.0, beta2=1.0)),
        ("hcl_easy_tp0.0_b0.0", InfoNCELoss(temperature=0.5)),
        ("hcl_easy_tp0.0_b0.0", HNNCELoss(temperature=0.5, beta1=0.0, beta2=0.0)),
    ],
)
def test_golden_hard_negatives_of_two_views(key, loss, golden):
    """Without debiasing (tau_plus 0), which no formula of ours has, the published loss of hard negatives is HN-NCE."""
    arrays = golden("dcl_hcl")
    value, image_grad, text_grad = run(loss, *two_views(arrays)[:2], cases=two_views(arrays)[2])
    assert value == pytest.approx(float(arrays[key]), rel=1e-5)
    half = len(image_grad) // 2
    check_tangent(image_grad[:half] + text_grad[half:], arrays[f"{key}_g1"], arrays["z1"], 1e-5)


def by_hand(name, image, text, cases, temperature=0.3, beta=(0.4, 0.9), bias=-2.0):
    """Each pair's value, written out with exp and log. cases: a set of ids for each pair."""
    cosine = (F.normalize(image, dim=1) @ F.normalize(text, dim=1).T / temperature).tolist()
    values = []
    for i in range(len(cases)):
        others = [j for j in range(len(cases)) if not cases[j] & cases[i]]
        both = []
        for d in range(2):
            row = [cosine[i][j] if d == 0 else cosine[j][i] for j in range(len(cases))]
            exps = [math.exp(row[j]) for j in others]
            weights = [math.exp(beta[d] * row[j]) for j in others]
            hard = len(others) * sum(w * e for w, e in zip(weights, exps, strict=True)) / sum(weights)
            both.append(
                {
                    "info_nce": -row[i] + math.log(math.exp(row[i]) + sum(exps)),
                    "dcl": -row[i] + math.log(sum(exps)),
                    "hn_nce": -row[i] + math.log(math.exp(row[i]) + hard),
                    "dhn_nce": 2 * (-row[i] + math.log(hard)),
                    "siglip": math.log(1 + math.exp(-row[i] - bias))
                    + sum(math.log(1 + math.exp(row[j] + bias)) for j in others),
                }[name]
            )
        values.append(both[0] if name == "siglip" else sum(both) / 2)
    return values


def make(name, **more):
    extra = {"beta1": 0.4, "beta2": 0.9} if "hn" in name else {"bias": -2.0} if name == "siglip" else {}
    return PAIR_LOSSES[name](temperature=0.3, **extra, **more)


@pytest.mark.parametrize(
    "cases",
    [None, [4, 1, 4, 2, 3, 2, 4], [[4, 9], [1, 1], [8, 4], [2, 6], [3, 3], [6, 5], [7, 0]]],
    ids=["alone", "one id", "two ids"],
)
@pytest.mark.parametrize("name", NAMES)
def test_formula_pair_by_pair(name, cases):
    """Pairs that share an id are no negatives of each other."""
    image, text = features()
    ids = range(7) if cases is None else cases
    expected = by_hand(name, image, text, [set(np.atleast_1d(entry).tolist()) for entry in ids])
    cases = None if cases is None else torch.tensor(cases)
    np.testing.assert_allclose(make(name, reduction="none")(image, text, cases), expected, rtol=1e-12)
    assert make(name)(image, text, cases).item() == pytest.approx(np.mean(expected), rel=1e-12)
    assert make(name, reduction="sum")(image, text, cases).item() == pytest.approx(sum(expected), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    image, text = features(5, 4)
    scale, bias, cases = parameter(3.0), parameter(-1.0), torch.tensor([0, 1, 2, 0, 3])
    inputs = (image.clone().requires_grad_(), text.clone().requires_grad_(), scale, bias)
    assert torch.autograd.gradcheck(lambda x, y, s, b: make(name)(x, y, cases, s, b), inputs)
    if name == "dhn_nce":
        loss = make(name, official=True)
        assert torch.autograd.gradcheck(lambda x, y, s, b: loss(x, y, None, s, b), inputs)


@pytest.mark.parametrize("name", NAMES)
def test_some_rows_at_a_time_are_all_at_once(name, monkeypatch):
    image, text = features()
    cases = torch.tensor([0, 1, 0, 2, 3, 4, 5])
    whole_scale, parts_scale = parameter(3.0), parameter(3.0)
    whole = run(make(name), image, text, cases=cases, scale=whole_scale)
    blocks = []
    monkeypatch.setattr(pairs_module, "_ENTRIES", 0)
    monkeypatch.setattr(pairs_module, "_ROWS", 2)
    monkeypatch.setattr(pairs_module, "_block", counting(pairs_module._block, blocks))
    parts = run(make(name), image, text, cases=cases, scale=parts_scale)
    assert len(blocks) == 2 * 4  # of two rows, forth and back
    pairs = zip((*parts, parts_scale.grad), (*whole, whole_scale.grad), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-12, atol=1e-14)


def counting(function, calls):
    def call(*inputs, **more):
        calls.append(inputs)
        return function(*inputs, **more)

    return call


@pytest.mark.parametrize("cases", [None, [1, 1, 1]], ids=["batch of one", "all of one case"])
@pytest.mark.parametrize("name", SOFTMAX)
def test_pairs_without_negatives_cost_nothing_and_move_nothing(name, cases):
    image, text = features(1 if cases is None else 3)
    with torch.autograd.set_detect_anomaly(True):
        value, image_grad, text_grad = run(make(name), image, text, cases=cases and torch.tensor(cases))
    assert value == pytest.approx(0, abs=1e-12)
    assert image_grad.abs().max() < 1e-12 and text_grad.abs().max() < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_one_pair_without_negatives_among_others(name):
    """Pair 0 shares an id with every other."""
    image, text = features(3)
    cases = torch.tensor([[0, 1], [0, 2], [1, 3]])
    with torch.autograd.set_detect_anomaly(True):
        value, image_grad, _ = run(make(name), image, text, cases=cases)
    assert math.isfinite(value) and image_grad.isfinite().all()
    assert (image_grad[0].abs().max() < 1e-12) == (name in SOFTMAX)


@pytest.mark.parametrize("entries", [2**22, 0], ids=["whole", "in blocks"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_features_under_autocast_are_computed_in_float32(name, dtype, entries, monkeypatch):
    monkeypatch.setattr(pairs_module, "_ENTRIES", entries)
    image, text = (x.to(dtype) for x in features())
    loss = PAIR_LOSSES[name](temperature=0.01)
    image_leaf, scale = image.clone().requires_grad_(), torch.tensor(100.0, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(image_leaf, text, scale=scale)
        value.backward()
    assert value.dtype == torch.float32 and image_leaf.grad.dtype == dtype and image_leaf.grad.isfinite().all()
    expected, image_grad, _ = run(loss, image, text)
    assert value.item() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(image_leaf.grad.double(), image_grad, rtol=0.02, atol=0.02 * image_grad.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_a_temperature_that_runs_away_is_finite_or_seen(name):
    image, text = (x.float() for x in features())
    for scale in (0.0, 1e-30, 1e4, 1e30):
        scale = torch.tensor(scale, requires_grad=True)
        value, image_grad, _ = run(PAIR_LOSSES[name](), image, text, torch.float32, scale=scale)
        assert math.isfinite(value) and image_grad.isfinite().all() and scale.grad.isfinite()
    for scale in (math.inf, math.nan):
        assert not math.isfinite(run(PAIR_LOSSES[name](), image, text, torch.float32, scale=torch.tensor(scale))[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_feature_that_is_no_number_is_seen(name):
    image, text = features()
    image[2, 1] = math.nan
    assert math.isnan(PAIR_LOSSES[name]()(image, text, torch.arange(7)).item())


def test_hardness_nothing_is_the_plain_loss():
    image, text = features()
    dcl, infonce = DCLLoss(temperature=0.3)(image, text), InfoNCELoss(temperature=0.3)(image, text)
    assert DHNNCELoss(temperature=0.3, beta1=0, beta2=0)(image, text).item() == pytest.approx(2 * dcl.item())
    assert HNNCELoss(temperature=0.3, beta1=0, beta2=0)(image, text).item() == pytest.approx(infonce.item())


def test_each_beta_belongs_to_its_direction():
    image, text = features()
    forth, back = DHNNCELoss(beta1=0.9, beta2=0.0), DHNNCELoss(beta1=0.0, beta2=0.9)
    assert forth(image, text).item() == pytest.approx(back(text, image).item(), rel=1e-12)
    assert forth(image, text).item() != pytest.approx(back(image, text).item(), rel=1e-6)


def test_a_hard_negative_is_pushed_by_the_paper_and_pulled_by_the_code():
    """Image 0 is nearly text 1, and the only one that text 1 can turn to or from."""
    text = torch.eye(6, dtype=torch.float64)
    image = text.clone()
    image[0] = 0.1 * text[0] + text[1]
    pushed = run(DHNNCELoss(temperature=0.2), image, text)[2][1, 0].item()
    pulled = run(DHNNCELoss(temperature=0.2, official=True), image, text)[2][1, 0].item()
    assert pushed > 0 > pulled


@pytest.mark.parametrize(
    ("make_loss", "message"),
    [
        (lambda: InfoNCELoss(temperature=0), "temperature must be >= 0.0001"),
        (lambda: SigLIPLoss(temperature=math.nan), "temperature must be >= 0.0001"),
        (lambda: DHNNCELoss(beta1=-0.1), "beta1 must be >= 0"),
        (lambda: HNNCELoss(beta2=-0.1), "beta2 must be >= 0"),
        (lambda: DCLLoss(reduction="max"), "reduction must be one of"),
    ],
)
def test_hyper_parameters_out_of_range(make_loss, message):
    with pytest.raises(UserError, match=message):
        make_loss()


@pytest.mark.parametrize(
    ("image", "text", "cases"),
    [
        ((7, 5), (3, 5), None),
        ((7, 5), (7, 4), None),
        ((7,), (7,), None),
        ((7, 5), (7, 5), (3,)),
        ((2, 5), (2, 5), (2, 0)),
    ],
)
def test_features_of_other_shapes(image, text, cases):
    with pytest.raises(UserError, match=r"\(b, D\) both and cases \(b,\) or \(b, K\), got"):
        InfoNCELoss()(torch.ones(image), torch.ones(text), None if cases is None else torch.ones(cases))


def test_they_are_configs_with_a_space_and_no_head_losses():
    assert set(NAMES) == {"info_nce", "siglip", "dcl", "hn_nce", "dhn_nce"} and not set(NAMES) & set(LOSSES)
    for name, cls in PAIR_LOSSES.items():
        loss = cls()
        assert cls.name == name and from_dict(cls, to_dict(loss)) == loss
        assert all(dimension.contains(getattr(loss, key)) for key, dimension in cls.space.items())
