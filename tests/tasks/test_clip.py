"""CLIP as a task: which captions a step sees, what it computes from them, what leaves."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captioned_images import clip_recipe, load_captioned, write_captioned_images
from tiny_clip import write_tiny_clip

from raymed.config import UserError, from_dict, replace, to_dict
from raymed.data.preprocess import Preprocess
from raymed.models.clip import ClipConfig, from_architecture
from raymed.models.tokens import Tokenizer
from raymed.tasks.clip import LARGEST_SCALE, METHODS, ClipRecipe, ceiling
from raymed.tasks.task import Step
from raymed.tasks.texts import Texts, TextTable, fewest_tokens
from raymed.tracking.outbox import Outbox
from raymed.train.compute import Compute
from raymed.train.loop import Fit
from raymed.train.nets import Networks


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_captioned_images(tmp_path_factory.mktemp("captioned"))


@pytest.fixture(scope="module")
def recipe(manifest):
    return clip_recipe(manifest)


@pytest.fixture(scope="module")
def data(recipe):
    return load_captioned(recipe)


def words(texts):
    """A tokenizer that anybody can read: a word's length is its token; 6 of them at most."""
    rows = [[len(word) for word in text.split()] for text in texts]
    width = min(6, max(map(len, rows)))
    tokens = torch.tensor([row[:width] + [0] * (width - len(row)) for row in rows])
    return tokens, torch.tensor([len(row) for row in rows])


def test_a_step_draws_one_of_an_images_captions_anew(data):
    table = TextTable.of(data, words)
    index = torch.tensor(data.rows[5:15])
    drawn = [table.sampled(index, step, 3) for step in range(60)]
    assert torch.equal(
        drawn[7].tokens, table.sampled(index.flip(0), 7, 3).tokens.flip(0)
    )  # of the image, not its place
    for place, number in enumerate(range(5, 15)):
        expected = words(list(data.captions[number]))[0]
        seen = {tuple(texts.tokens[place].tolist()) for texts in drawn}
        wanted = {tuple((row + [0] * 6)[:6]) for row in expected.tolist()}
        assert seen == wanted and len(wanted) == len(data.captions[number])
    first = table.first_of(index)
    assert torch.equal(first.tokens, words([data.captions[i][0] for i in range(5, 15)])[0])
    assert table.truncated == sum(len(text.split()) > 6 for texts in data.captions for text in texts)


def test_images_of_one_case_and_equal_captions_say_the_same(data):
    """And equal pictures; a case and a caption of the same number have nothing in common."""
    captions, content = list(data.captions), data.content.copy()
    captions[3], content[5] = captions[8], content[20]
    changed = dataclasses.replace(data, captions=tuple(captions), content=content)
    said = TextTable.of(changed, words).first_of(torch.tensor(data.rows)).said
    same = (said[:, None] == said[None]).any(-1)
    expected = torch.arange(len(data))[:, None] // 2 == torch.arange(len(data)) // 2
    for a, b in ((3, 8), (5, 20)):
        expected[a, b] = expected[b, a] = True
    assert torch.equal(same, expected)


def test_shuffled_captions_are_those_of_other_training_images(data):
    plain, shuffled = TextTable.of(data, words), TextTable.of(data, words, shuffled=1)
    everything = torch.tensor(data.rows)
    same = (plain.first_of(everything).said == shuffled.first_of(everything).said)[:, 2].numpy()
    held_out = np.concatenate([data.splits["val"], data.splits["test"]])
    assert same[held_out].all() and same[data.splits["train"]].mean() < 0.2
    captions = [table.first_of(everything).said[data.splits["train"], 2].sort().values for table in (plain, shuffled)]
    assert torch.equal(*captions)


def test_texts_of_like_length_go_together():
    lengths = torch.tensor([3, 20, 5, 9, 4, 17, 6, 2, 18, 3, 21, 5, 8, 7, 30, 4, 4, 3, 9, 12, 6, 5, 4, 3])
    tokens = torch.arange(1, 31).repeat(len(lengths), 1) * (torch.arange(30) < lengths[:, None])
    by_length = Texts(tokens, lengths, torch.zeros(len(lengths), 3)).by_length()
    assert [tuple(part.shape) for part in by_length.parts] == [(16, 8), (3, 16), (4, 24), (1, 30)]
    sums = torch.cat([part.sum(1) for part in by_length.parts])[by_length.back]
    assert torch.equal(sums, tokens.sum(1))  # nothing is cut off, all are back in order
    alike = Texts(tokens, torch.full_like(lengths, 30), torch.zeros(len(lengths), 3)).by_length()
    assert [tuple(part.shape) for part in alike.parts] == [(24, 30)]


@pytest.mark.parametrize("num", [1, 2, 3, 4])
def test_as_many_parts_as_other_workers_have(num):
    lengths = torch.tensor([3, 3, 30, 3, 9, 3, 17, 3, 3, 3])
    tokens = torch.arange(1, 31).repeat(len(lengths), 1) * (torch.arange(30) < lengths[:, None])
    for of_one_length in (False, True):
        given = torch.full_like(lengths, 30) if of_one_length else lengths
        by_length = Texts(tokens, given, torch.zeros(len(lengths), 3)).by_length(num)
        assert len(by_length.parts) == num and all(len(part) for part in by_length.parts)
        sums = torch.cat([part.sum(1) for part in by_length.parts])[by_length.back]
        assert torch.equal(sums, tokens.sum(1))


def test_groups_are_those_of_the_fewest_tokens():
    """Against all ways to cut."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        lengths = np.sort(rng.choice(np.arange(1, 30), size=int(rng.integers(1, 7)), replace=False)) * 8
        counts = rng.integers(1, 9, size=len(lengths))
        texts = np.repeat(lengths, counts)

        def tokens(sizes, texts=texts):
            groups = np.split(texts, np.cumsum(sizes)[:-1])
            return sum(len(group) * group[-1] for group in groups) + 0.03 * texts[-1] * len(texts) * len(sizes)

        ends = range(1, len(texts))
        ways = [np.diff([0, *cuts, len(texts)]) for k in range(4) for cuts in itertools.combinations(ends, k)]
        assert tokens(fewest_tokens(lengths, counts)) == pytest.approx(min(map(tokens, ways)))


def networks_of(recipe: ClipRecipe, data) -> Networks:
    networks = Networks(recipe.phases(data)[0], 3, Compute(engine="torch", channels_last=False))
    networks.build_engines(4)
    return networks


def step_of(data, parts: int, rows: int = 12) -> Step:
    return Step(2, 9, 0, tuple(data.batch(part) for part in np.array_split(data.splits["train"][:rows], parts)))


def gradients(networks: Networks, step: Step) -> tuple[list[float], dict[str, torch.Tensor]]:
    values = []
    for loss in networks.task.losses(step, networks):
        networks.engines["clip"].backward(loss.value, last=loss.step)
        values.append(loss.metrics["loss"].item())
    return values, {n: p.grad.clone() for n, p in networks.module("clip").named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_of_several_micro_batches_sees_all_pairs(method, recipe, data):
    """Value and gradients of one micro-batch of 12 and of four of 3, the learned temperature and bias among them."""
    settled = replace(recipe, {"method": method, "learn_temperature": True})
    (whole,), expected = gradients(networks_of(settled, data), step_of(data, 1))
    parts, found = gradients(networks_of(settled, data), step_of(data, 4))
    assert sum(parts) == pytest.approx(whole, rel=1e-6) and len(parts) == 4
    assert found.keys() == expected.keys() and "log_scale" in found and ("bias" in found) == (method == "siglip")
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert expected["log_scale"].abs() > 1e-4


def test_a_replayed_micro_batch_has_the_dropout_of_its_features(recipe, data):
    """The gradient is that of the loss that was computed: along it the loss changes as it says."""
    networks = networks_of(recipe, data)
    clip = networks.module("clip")
    clip.register_module("visual", torch.nn.Sequential(clip.visual, torch.nn.Dropout(0.5)))
    step = step_of(data, 3)
    values, found = gradients(networks, step)
    name, gradient = max(found.items(), key=lambda item: item[1].norm())
    p = dict(clip.named_parameters())[name]
    size = 1e-2 / gradient.norm()
    shifted = []
    for sign in (1, -1):
        with torch.no_grad():
            p.add_(sign * size * gradient)
        networks.engines["clip"].optimizer.zero_grad()
        shifted.append(sum(gradients(networks, step)[0]))
        with torch.no_grad():
            p.sub_(sign * size * gradient)
    slope = (shifted[0] - shifted[1]) / 2 / size
    assert slope.item() == pytest.approx(gradient.norm().item() ** 2, rel=0.02)


def test_the_temperature_stays_unless_it_is_learned(recipe, data):
    for learned in (False, True):
        settled = replace(recipe, {"learn_temperature": learned, "losses.dhn_nce.temperature": 0.2})
        clip = networks_of(settled, data).module("clip")
        assert clip.log_scale.exp().item() == pytest.approx(5.0)
        assert clip.log_scale.requires_grad == learned and not clip.bias.requires_grad


def test_a_scale_over_its_ceiling_comes_down_and_goes_no_higher():
    for value, grad, kept in ((99.0, -1.0, True), (101.0, -1.0, False), (101.0, 1.0, True)):
        x = torch.tensor(value, requires_grad=True)
        ceiling(x, LARGEST_SCALE).backward(torch.tensor(grad))
        assert ceiling(x, LARGEST_SCALE).item() <= LARGEST_SCALE
        assert (x.grad.item() == grad) == kept


def test_predictions_are_of_unit_norm_and_of_the_first_caption(recipe, data):
    networks = networks_of(recipe, data)
    batch = data.batch(data.splits["val"])
    found = networks.task.predict(batch, networks)
    for name in ("image", "text"):
        torch.testing.assert_close(found[name].norm(dim=1), torch.ones(len(batch)))
    alone = networks.task.predict(data.batch(data.splits["val"][4:5]), networks)
    torch.testing.assert_close(found["text"][4:5], alone["text"], rtol=1e-4, atol=1e-5)
    assert torch.equal(found["groups"][:, 0], torch.tensor(3 * data.cases[data.splits["val"]]))


def test_what_leaves_gives_the_same_embeddings(recipe, data):
    networks = networks_of(recipe, data)
    bundle = networks.task.bundle(networks)
    preprocess = from_dict(Preprocess, bundle.preprocess)
    clip = from_architecture(bundle.model["architecture"], preprocess)
    clip.load_state_dict(bundle.weights)
    tokenizer = Tokenizer.from_json(bundle.model["tokenizer"])
    batch = data.batch(data.splits["test"])
    expected = networks.task.predict(batch, networks)
    with torch.no_grad():
        image = F.normalize(clip.eval().encode_image(preprocess.normalise(batch.unit_image())), dim=1)
        text = F.normalize(clip.encode_text(tokenizer([data.captions[i][0] for i in data.splits["test"]])[0]), dim=1)
    torch.testing.assert_close(image, expected["image"], rtol=0, atol=1e-6)
    torch.testing.assert_close(text, expected["text"], rtol=0, atol=1e-6)
    assert bundle.model["temperature"] == pytest.approx(0.07) and bundle.classes["names"] == ["bright", "dark"]


def test_a_learning_rate_that_is_high_for_published_weights_is_told(recipe, data, tmp_path):
    def notes(**changes) -> list[str]:
        told = dataclasses.replace(data, notes=[])
        replace(recipe, {name.replace("__", "."): value for name, value in changes.items()}).phases(told)
        return [note for note in told.notes if "stage.optim.lr" in note]

    tuned = f"local-dir:{write_tiny_clip(tmp_path / 'tiny')}"
    (note,) = notes(model__name=tuned, stage__optim__lr=1e-3)
    assert note.startswith("stage.optim.lr 0.001 is high for published weights: 1e-6 to 1e-5 is usual")
    assert not notes(model__name=tuned, stage__optim__lr=1e-5) and not notes(stage__optim__lr=1e-3)
    assert not notes(model__name=tuned, model__lora_rank=4, stage__optim__lr=1e-3)


def fit_of(recipe, data, folder) -> Fit:
    return Fit(recipe.phases(data), data, folder, 3, Compute(engine="torch"), Outbox(folder / "outbox.jsonl"))


def test_training_learns(recipe, data, tmp_path):
    """Seen over many steps, since a batch of these captions may hold eight kinds or three."""
    changes = {"stage.steps": 40, "stage.optim.name": "adamw", "stage.optim.lr": 2e-3, "stage.batch_size": 24}
    changes |= {f"augment.{name}": 0.0 for name in ("translate", "rotate", "brightness", "contrast", "gamma")}
    fit = fit_of(replace(recipe, changes | {"method": "info_nce"}), data, tmp_path)
    found = list(fit.run())
    records = [r["values"] for r in Outbox(tmp_path / "outbox.jsonl").records() if r["op"] == "metrics"]
    losses = [values["clip/loss"] for values in records if "clip/loss" in values]
    assert len(losses) == 40 and np.mean(losses[-10:]) < np.mean(losses[:5]) - 0.4
    assert found[-1].metrics["mean_recall"] > 0.58  # of 16 images of 8 patients, about 0.5 by chance


def test_a_step_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(recipe, data, tmp_path, monkeypatch):
    settled = replace(recipe, {"stage.steps": 8, "stage.evaluations": 4})
    fit = fit_of(settled, data, tmp_path)
    forward = type(fit.phases[0].task)._forward

    def broken(self, image, texts, network, num_parts):
        pairs = forward(self, image, texts, network, num_parts)
        if torch.is_grad_enabled():
            broken.steps += 1
        return dataclasses.replace(pairs, image=pairs.image * (torch.nan if broken.steps == 6 else 1))

    broken.steps = 0
    monkeypatch.setattr(type(fit.phases[0].task), "_forward", broken)
    with pytest.raises(
        UserError, match=r"not finite at step 6 of phase clip \(.*feature_norm nan.*last checkpoint is kept"
    ):
        list(fit.run())
    assert fit.checkpoints("clip").find("last").name == "step-000004"


def test_a_checkpoints_images_are_taken_as_it_was_trained_unless_stated(manifest, monkeypatch):
    from raymed.tasks import clip

    monkeypatch.setattr(
        clip, "clip_input", lambda config: {"size": 224, "channels": 3, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    )
    recipe = clip_recipe(manifest, data__preprocess__size=None)
    assert recipe.resolved_data.preprocess == Preprocess(224, channels=3, mean=(0.5,) * 3, std=(0.2,) * 3)
    assert clip_recipe(manifest).resolved_data.preprocess.size == 32  # stated


def test_recipes_come_back_from_json(recipe):
    changed = replace(recipe, {"losses.hn_nce.beta1": 0.5, "model": ClipConfig("ViT-B-32", lock_image=True)})
    assert from_dict(ClipRecipe, to_dict(changed)) == changed
    with pytest.raises(UserError, match="method must be one of .*did you mean 'dhn_nce'"):
        replace(recipe, {"method": "dhnnce"})
