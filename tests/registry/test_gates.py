"""What a candidate must pass, from the command line to the record; with hospitals' images drawn for the purpose."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from external_hospital import make_bundle, write_hospital

from raymed.config import UserError
from raymed.registry.audit import Audit
from raymed.registry.card import write_card
from raymed.registry.gates import GateConfig, calibration_gate, golden_gate, latency_gate, not_worse_gate, p95
from raymed.registry.register import add
from raymed.tasks.golden import with_golden
from raymed.tasks.predictor import Predictor

MADE = {"run_key": "tune-1/final", "data": "d" * 64}


def aliases(client):
    return client.get_registered_model("m").aliases


def difference(mean, low, high):
    return {"mean": mean, "ci_low": low, "ci_high": high}


@pytest.mark.parametrize(
    ("low", "margin", "passed"),
    [(0.01, 0.02, True), (-0.019, 0.02, True), (-0.02, 0.02, False), (-0.021, 0.02, False), (None, 0.02, False)],
)
def test_not_worse_is_told_by_the_lower_end_of_the_interval(low, margin, passed):
    gate = not_worse_gate("AUROC", difference(0.0, low, 0.1), margin)
    assert gate.passed is passed and gate.name == "AUROC"
    assert "too few" in gate.said if low is None else f"-{margin:g}" in gate.said


@pytest.mark.parametrize(("mean", "passed"), [(-0.2, True), (0.05, True), (0.0501, False), (None, False)])
def test_calibration_may_be_worse_by_a_margin(mean, passed):
    assert calibration_gate(difference(mean, -0.5, 0.5), 0.05).passed is passed


def test_the_95th_percentile_leaves_out_the_warm_up_and_takes_turns():
    calls = []

    def work(name, seconds):
        def run():
            calls.append(name)
            time.sleep(seconds if calls.count(name) > 3 else 0.05)

        return run

    fast, slow = p95([work("a", 0.0), work("b", 0.004)], 20)
    assert fast < 0.004 <= slow < 0.05
    assert calls == ["a", "b"] * 23


def test_a_slow_candidate_does_not_pass(bundle):
    model, lame = Predictor.from_bundle(bundle), Predictor.from_bundle(bundle)
    network = lame.from_unit
    lame.from_unit = lambda batch: time.sleep(0.05) or network(batch)
    gate = latency_gate(lame, model, 2.0, 20)
    assert gate.passed is False and gate.figures["candidate_p95_ms"] > 50
    assert latency_gate(model, lame, 2.0, 20).passed is True


def test_golden_inputs_are_asked(bundle):
    good = with_golden(bundle)
    assert golden_gate(Predictor.from_bundle(good)).passed
    weights = {name: tensor + 1 if name == "head.linear.bias" else tensor for name, tensor in good.weights.items()}
    gate = golden_gate(Predictor.from_bundle(replace(good, weights=weights)))
    assert gate.passed is False and "does not answer as it did" in gate.said
    assert "holds none" in golden_gate(Predictor.from_bundle(bundle)).said


@pytest.mark.parametrize("field", [{"margin": 0}, {"margin": 2}, {"slower": 0}, {"predictions": 3}])
def test_gates_that_let_everything_through_are_refused(field):
    with pytest.raises(UserError, match="gate."):
        GateConfig(**field)


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """Images of patients whom nobody was trained on, whose labels follow the good model."""
    return write_hospital(tmp_path_factory.mktemp("hospital"))


@pytest.fixture
def registered(hospital, client, tmp_path):
    """register(a bundle) -> number of the version of m. The first, a poor model, is champion."""

    def register(bundle):
        plain = replace(bundle, calibration={}, uncertain_band={})  # reports of a training, which it has none of
        folder = with_golden(plain).save(tmp_path / f"bundle{bundle.provenance['seed']}")
        write_card(folder, "m")
        return add(client, folder, "m").version

    assert register(make_bundle(7, provenance=MADE | {"seed": 1})) == 1
    return register


def promoted(command, hospital, *flags):
    return command(["--model", "m", "--intended-use", "triage", "--gate.manifest", str(hospital.manifest), *flags])


def test_only_what_is_not_worse_becomes_champion(registered, client, command, hospital, place):
    assert promoted(command, hospital, "--version", "1")[0] == 0
    registered(replace(hospital.bundle, provenance=MADE | {"seed": 2}))
    code, out, _ = promoted(command, hospital, "--gate.slower", "50")
    told = out[out.index("champion: ") :]
    assert code == 0 and told.startswith("champion: m version 2 (was 1)\n    golden inputs: passed")
    assert all(f"{name}: passed" in told for name in ("AUROC", "calibration", "latency"))
    registered(make_bundle(8, provenance=MADE | {"seed": 3}))
    code, _, error = promoted(command, hospital, "--gate.slower", "50")
    assert code == 2 and "m version 3 does not become champion" in error and "AUROC: not passed" in error
    assert aliases(client) == {"candidate": 3, "champion": 2, "rollback": 1}
    first, second, third = Audit(place["storage"]).entries("m")
    assert [e["action"] for e in (first, second, third)] == ["promote", "promote", "refuse"]
    (not_compared,) = [gate for gate in first["gates"] if gate["name"] == "comparison"]
    assert not_compared["passed"] is None
    gates = {gate["name"]: gate for gate in third["gates"]}
    assert gates["AUROC"]["figures"]["ci_high"] < 0 and gates["AUROC"]["passed"] is False
    assert [gate["name"] for gate in second["gates"]] == ["golden inputs", "latency", "AUROC", "calibration"]
    assert second["gates"][2]["figures"]["ci_low"] > 0 and not second["forced"]
    code, out, _ = promoted(command, hospital, "--force", "--why", "the other one is withdrawn", "--gate.slower", "50")
    last = Audit(place["storage"]).entries("m")[-1]
    assert code == 0 and last["forced"] and last["why"] == "the other one is withdrawn"
    assert aliases(client)["champion"] == 3
    assert command(["--model", "m", "--verify"])[1].startswith("4 recorded decisions")


def test_a_patient_whom_one_was_trained_on_ends_the_comparison(registered, client, command, hospital, place):
    promoted(command, hospital, "--version", "1")
    seen = torch.from_numpy(hospital.data().content[[8]].view(np.int64))
    registered(replace(hospital.bundle, provenance=MADE | {"seed": 2}, extras={"trained_on": seen}))
    code, _, error = promoted(command, hospital, "--gate.slower", "50")
    assert code == 2 and "comparison: not passed" in error and "was trained" in error
    assert aliases(client)["champion"] == 1
    entry = Audit(place["storage"]).entries("m")[-1]
    assert entry["action"] == "refuse" and [gate["passed"] for gate in entry["gates"]] == [True, True, False]
    code, out, _ = promoted(command, hospital, "--data.on-problem", "skip", "--gate.slower", "50")
    assert code == 0 and aliases(client)["champion"] == 2


def test_without_images_the_latency_is_looked_at_and_another_champion_stays(registered, client, command, hospital):
    promoted(command, hospital, "--version", "1")
    registered(replace(hospital.bundle, provenance=MADE | {"seed": 2}))
    plain = ["--model", "m", "--intended-use", "triage"]
    code, _, error = command([*plain, "--gate.slower", "0.001"])
    assert code == 2 and "latency: not passed" in error and "comparison: not looked at (not compared" in error
    assert command([*plain, "--to", "challenger", "--gate.slower", "0.001"])[0] == 2
    code, out, _ = command([*plain, "--to", "challenger", "--gate.slower", "50"])
    assert code == 0 and "latency: passed" in out and "not compared" in out
    assert aliases(client) == {"candidate": 2, "champion": 1, "challenger": 2}


def test_a_champion_that_cannot_be_loaded_is_replaced_by_force_alone(registered, client, command, hospital):
    promoted(command, hospital, "--version", "1")
    registered(replace(hospital.bundle, provenance=MADE | {"seed": 2}))
    place_of = client.get_model_version_download_uri("m", "1").removeprefix("file://")
    Path(place_of, "artifacts", "bundle", "model.safetensors").unlink()
    code, _, error = promoted(command, hospital)
    assert code == 2 and "comparison: not passed (the champion cannot be used: " in error
    assert promoted(command, hospital, "--force", "--why", "the champion is damaged")[0] == 0
    assert aliases(client)["champion"] == 2


def test_images_that_are_not_there_are_no_comparison(registered, client, command, hospital):
    promoted(command, hospital, "--version", "1")
    registered(replace(hospital.bundle, provenance=MADE | {"seed": 2}))
    code, _, error = command(["--model", "m", "--intended-use", "triage", "--gate.manifest", "/nowhere.csv"])
    assert code == 2 and "comparison: not passed" in error and "/nowhere.csv" in error
    assert aliases(client)["champion"] == 1


def test_a_broken_bundle_does_not_pass(registered, client, command, hospital, place):
    promoted(command, hospital, "--version", "1")
    registered(replace(hospital.bundle, provenance=MADE | {"seed": 2}))
    place_of = client.get_model_version_download_uri("m", "2").removeprefix("file://")
    file = Path(place_of, "artifacts", "bundle", "model.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    code, _, error = command(["--model", "m", "--intended-use", "triage"])
    assert code == 2 and "golden inputs: not passed" in error and "is damaged" in error
    assert aliases(client)["champion"] == 1 and Audit(place["storage"]).entries("m")[-1]["action"] == "refuse"
