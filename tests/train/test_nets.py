"""The networks of a phase: who is in training, who is frozen, and where weights come from."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from small import recipe
from torch import nn

from raymed.config import UserError
from raymed.tasks.task import Ema, Network, Optim, Phase, Task
from raymed.train.compute import Compute
from raymed.train.nets import Networks, _Mode, check_network_stages

COMPUTE = Compute(channels_last=False)


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


class Three(Task):
    """Two trained networks, one with an average, and a frozen one."""

    def networks(self):
        return {
            "maker": Network(block(), Optim("sgd", lr=0.1, schedule="constant", warmup=0.0, clip=None), Ema(0.5)),
            "critic": Network(block(), Optim("sgd", lr=0.1)),
            "frozen": Network(block()),
        }


@pytest.fixture
def nets() -> Networks:
    made = Networks(Phase("p", Three(), steps=4, batch_size=2), 1, COMPUTE)
    made.networks["critic"].module[0].bias.requires_grad_(False)  # as a task may have frozen it
    made.build_engines(4)
    return made


def state(nets: Networks) -> dict:
    return {name: (net.module.training, [p.requires_grad for p in net.module.parameters()])
            for name, net in nets.networks.items()}  # fmt: skip


def test_at_rest_everything_is_in_eval_mode_and_the_untrained_is_frozen(nets):
    seen = state(nets)
    assert not any(training for training, _ in seen.values())
    assert all(seen["maker"][1]) and not any(seen["frozen"][1])
    x = torch.randn(2, 3)
    assert all(torch.equal(nets[name](x), nets[name](x)) for name in nets.networks)  # no dropout
    assert set(nets.engines) == {"maker", "critic"} and set(nets.averages) == {"maker"}


def test_training_one_network_freezes_the_others_and_restores_them(nets):
    before = state(nets)
    x = torch.randn(8, 3)
    with nets.training("maker"):
        inside = state(nets)
        assert inside["maker"] == (True, [True] * 6)
        assert inside["critic"] == (False, [False] * 6) and inside["frozen"] == (False, [False] * 6)
        assert not torch.equal(nets["maker"](x), nets["maker"](x))  # dropout
        loss = nets["critic"](nets["maker"](torch.randn(8, 3))[:, [0, 1, 0]]).sum()
        nets.engines["maker"].backward(loss, last=True)
        assert all(p.grad is not None for p in nets.module("maker").parameters())
        assert all(p.grad is None for p in nets.module("critic").parameters())
        with nets.training("critic"):
            assert state(nets)["critic"][0] and not state(nets)["maker"][1][0]
        assert state(nets)["maker"][1] == [True] * 6
    assert state(nets) == before
    with pytest.raises(ZeroDivisionError), nets.training("maker"):
        raise ZeroDivisionError
    assert state(nets) == before
    with pytest.raises(UserError, match="network 'frozen' has no optimiser"), nets.training("frozen"):
        raise AssertionError


class Remembering(Task):
    """Not a dataclass; sets an attribute while its networks are made, and keeps a list that it should not."""

    def __init__(self):
        self.history = []

    def networks(self):
        self.width = 2
        return {"net": Network(nn.Linear(3, self.width), Optim())}

    def memory(self):
        return {"queue": torch.randn(4, 3), "seen": torch.zeros((), dtype=torch.int64)}


def remembering(task: Task, seed: int = 1) -> Networks:
    return Networks(Phase("p", task, steps=4, batch_size=2), seed, COMPUTE)


def test_memory_is_written_in_place_or_whole_and_survives():
    task = Remembering()
    first, second, other = remembering(task), remembering(task), remembering(task, seed=2)
    start = first.memory["queue"].clone()
    assert torch.equal(second.memory["queue"], start) and not torch.equal(other.memory["queue"], start)
    new = torch.ones(2, 3, requires_grad=True)
    first.memory["queue"] = torch.cat([new, first.memory["queue"]])[:4]
    first.memory["queue"][3].mul_(new[0] * 2)
    first.memory["seen"] += 2
    expected = torch.cat([torch.ones(2, 3), start[:1], 2 * start[1:2]])
    assert torch.equal(first.memory["queue"], expected) and first.memory["seen"] == 2
    assert not first.memory["queue"].requires_grad
    assert torch.equal(second.memory["queue"], start) and second.memory["seen"] == 0  # each has its own
    saved = first.saved_memory()
    first.memory["seen"] += 1
    second.load_memory(saved)
    assert {name: value.tolist() for name, value in second.memory.items()} == {"queue": expected.tolist(), "seen": 2}


def test_memory_keeps_its_names_shapes_and_types():
    memory = remembering(Remembering()).memory
    with pytest.raises(UserError, match="nets.memory has no 'pool': Task.memory.. names queue, seen"):
        memory["pool"] = torch.zeros(4, 3)
    with pytest.raises(UserError, match=r"nets.memory\['queue'\] is \(4, 3\) torch.float32 .* got \(5, 3\) torch.fl"):
        memory["queue"] = torch.zeros(5, 3)
    with pytest.raises(UserError, match=r"nets.memory\['seen'\] is \(\) torch.int64 and stays so, got \(\) torch.fl"):
        memory["seen"] = torch.tensor(1.0)
    with pytest.raises(UserError, match=r"nets.memory\['seen'\] .* got 3"):
        memory["seen"] = 3
    nets = remembering(Remembering())
    with pytest.raises(UserError, match="checkpoint's memory is not this task's: queue is missing; seen is missing"):
        nets.load_memory({})
    with pytest.raises(UserError, match=r"checkpoint's memory is not this task's: queue is \(3,\), wanted \(4, 3\)"):
        nets.load_memory(nets.saved_memory() | {"queue": torch.zeros(3)})


def test_a_task_is_sealed_once_it_has_networks():
    task = Remembering()
    task.rate = 1  # before: allowed
    nets = remembering(task)
    with pytest.raises(
        UserError, match=r"Remembering.rate is set while .*memory\(\) and keep it in nets.memory\['rate'\]"
    ):
        task.rate = 2
    with pytest.raises(UserError, match="Remembering.new is set"):
        task.new = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        remembering(task)  # built again: its networks may set what they set, and it is sealed as before
        nets.saved_memory()
    with pytest.raises(UserError, match="Remembering.width is set"):
        task.width = 3
    twin = copy.deepcopy(task)
    twin.rate = 3  # another task, not in training
    assert (task.rate, task.width, twin.rate) == (1, 2, 3)
    task.history.append(1)
    with pytest.warns(UserWarning, match="Remembering.history changed in place while .* belongs in nets.memory"):
        nets.saved_memory()


class Penalised(Three):
    double_backward = frozenset({"critic"})


def test_what_is_differentiated_twice_is_called_raw(monkeypatch):
    nets = Networks(Phase("p", Penalised(), steps=4, batch_size=2), 1, COMPUTE)
    nets.build_engines(4)
    called = []
    for name, engine in nets.engines.items():
        monkeypatch.setattr(engine, "forward", lambda x, name=name: called.append(name))
    for name in ("maker", "critic"):
        with nets.training(name):
            nets[name](torch.randn(4, 3))
    assert called == ["maker"]


def test_checkpointing_of_activations_is_switched_on_or_warned_of(phases, recwarn):
    single = phases[1][0]
    nets = Networks(single, 1, Compute(activation_checkpointing=True))
    assert not nets.module("classifier").encoder.net.grad_checkpointing
    nets.build_engines(4)
    assert nets.module("classifier").encoder.net.grad_checkpointing
    assert not [w for w in recwarn if "activation_checkpointing" in str(w.message)]
    three = Networks(Phase("p", Three(), steps=4, batch_size=2), 1, Compute(activation_checkpointing=True))
    with pytest.warns(UserWarning, match="activation_checkpointing has no effect on network 'critic'"):
        three.build_engines(4)


def test_stages_of_networks_that_no_phase_has_are_refused(phases):
    supcon_then_head, _ = phases
    stages = {"engine": "deepspeed", "network_stages": ("contrastive=1", "head=2")}
    check_network_stages(supcon_then_head, Compute(**stages))
    check_network_stages(supcon_then_head, Compute())
    with pytest.raises(UserError, match="no network 'contrastive'; there are encoder, head"):
        check_network_stages(supcon_then_head[1:], Compute(**stages))


def test_averaged_holds_averages_and_records_no_gradient(nets):
    weight = nets.module("maker")[0].weight
    with nets.training("maker"):
        nets.engines["maker"].backward(nets["maker"](torch.randn(8, 3)).square().sum(), last=True)
        nets.engines["maker"].step(0)
    first = nets.averages["maker"].shadow["0.weight"].clone()
    nets.averages["maker"].update()
    own = weight.detach().clone()
    expected = first.lerp(own, 0.9)  # the first update's decay is 1 / 10
    assert not torch.equal(own, first)
    with nets.averaged():
        torch.testing.assert_close(weight.detach(), expected)
        assert not nets["maker"](torch.randn(2, 3)).requires_grad
    assert torch.equal(weight, own)
    assert torch.equal(nets.weights(averaged=False)["maker.0.weight"], own)
    torch.testing.assert_close(nets.weights(averaged=True)["maker.0.weight"], expected)


def test_same_seed_same_weights_whatever_was_drawn_before():
    torch.manual_seed(1)
    first = Networks(Phase("p", Three(), steps=4, batch_size=2), 1, COMPUTE).weights(averaged=False)
    torch.rand(17)
    again = Networks(Phase("p", Three(), steps=4, batch_size=2), 1, COMPUTE).weights(averaged=False)
    other = Networks(Phase("p", Three(), steps=4, batch_size=2), 2, COMPUTE).weights(averaged=False)
    assert all(torch.equal(again[name], weight) for name, weight in first.items())
    assert not torch.equal(other["maker.0.weight"], first["maker.0.weight"])


@pytest.fixture(scope="module")
def phases(manifest, data):
    return recipe(manifest).phases(data), recipe(manifest, method="ce").phases(data)


def test_a_part_is_loaded_from_another_network(phases):
    """An encoder out of the contrastive network into one that stands alone, and into a classifier."""
    (supcon, head), (single,) = phases
    source = Networks(supcon, 1, COMPUTE).weights(averaged=False)
    for phase, prefix in ((head, "encoder."), (single, "classifier.encoder.")):
        target = Networks(phase, 2, COMPUTE)
        before = target.weights(averaged=False)
        target.load_part("encoder", source, Path("somewhere"))
        after = target.weights(averaged=False)
        for name, weight in after.items():
            if name.startswith(prefix):
                assert torch.equal(weight, source["contrastive.encoder." + name.removeprefix(prefix)])
            else:
                assert torch.equal(weight, before[name])


def test_a_part_that_does_not_fit_is_explained(manifest, data, phases):
    (supcon, head), _ = phases
    other = recipe(manifest, model__norm="group").phases(data)[0]
    target = Networks(head, 1, COMPUTE)
    grouped = Networks(other, 1, COMPUTE).weights(averaged=False)
    with pytest.raises(UserError, match="DIR does not fit encoder: .*running_mean is missing.*another encoder"):
        target.load_part("encoder", grouped, Path("DIR"))
    wide = {name: torch.zeros(5) if name.endswith("stem.0.weight") else w
            for name, w in Networks(supcon, 1, COMPUTE).weights(averaged=False).items()}  # fmt: skip
    with pytest.raises(UserError, match=r"DIR does not fit encoder: net.stem.0.weight is \(5,\), wanted \(16,"):
        target.load_part("encoder", wide, Path("DIR"))
    with pytest.raises(UserError, match="no network has a part 'decoder'; there are encoder, head"):
        target.load_part("decoder", grouped, Path("DIR"))


class Frozen(torch.nn.BatchNorm1d):
    """A layer that never trains, as some pretrained networks have them."""

    def train(self, mode: bool = True):
        return super().train(False)


@pytest.mark.parametrize("layer", [torch.nn.BatchNorm1d(3), Frozen(3)], ids=["plain", "own train()"])
def test_the_mode_is_set_as_train_and_eval_do(layer):
    module, twin = (torch.nn.Sequential(torch.nn.Linear(3, 3), copy.deepcopy(layer)) for _ in range(2))
    mode = _Mode(module)
    for training in (True, False, True):
        mode.set(training)
        twin.train(training)
        assert [m.training for m in module.modules()] == [m.training for m in twin.modules()]


def test_memory_order_of_images_begins_with_the_first_layer_of_grey_ones():
    """Weights of one input channel are in both orders at once, by their strides in one: it decides the output's."""
    module = Compute(channels_last=True).prepare(nn.Conv2d(1, 4, 3))
    assert module(torch.randn(2, 1, 8, 8)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d])
def test_memory_order_is_that_of_images_where_there_are_any(layer):
    """Volumes have another one, and torch refuses to give them this."""
    compute, module = Compute(channels_last=True), layer(2, 2, 3)
    is_image = module.weight.ndim == 4
    assert compute.prepare(module) is module
    assert module.weight.is_contiguous() != is_image
    assert not is_image or module.weight.is_contiguous(memory_format=torch.channels_last)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        compute.warn_where_useless([module])
    assert len(said) == (not is_image)
