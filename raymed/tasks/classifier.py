"""The imbalanced-image classifier: a supervised contrastive encoder, then a linear head with an asymmetric loss.

The system of the HSG tubal-patency work (SupCon + ASL), with what it is compared with:

    ce, focal, asl                        one phase: encoder and head together, with that loss
    supcon_ce, supcon_focal, supcon_asl   two phases: the encoder by SupCon on two augmented views an image;
                                          then the encoder frozen, the projection dropped, a linear head with that loss

Binary: the stated positive class against all others, one logit an image. Every loss that `raymed.losses.LOSSES` names
is a method, and with "supcon_" before it another. Sources: Khosla et al. 2020 (SupCon), Ridnik et al. 2021 (ASL).
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from raymed.bundle import Bundle
from raymed.config import UserError, check_choice, from_dict, to_dict
from raymed.data.augment import Augment
from raymed.data.dataset import Batch, DataSet
from raymed.data.manifest import DataConfig
from raymed.data.phantoms import write_hsg
from raymed.data.preprocess import Preprocess
from raymed.losses import LOSSES, SupConLoss
from raymed.metrics.classification import binary_metrics
from raymed.metrics.embedding import EmbeddingMeter
from raymed.metrics.levels import unit_numbers
from raymed.metrics.meters import BinaryMeter, Meter
from raymed.models.encoder import Encoder, EncoderConfig, build_encoder
from raymed.models.head import LinearHead, ProjectionHead
from raymed.space import Space
from raymed.tasks import recipe
from raymed.tasks.attention import CaseImages, FeatureMeter, attention_tensors, fit_attention, image_energies
from raymed.tasks.decide import ATTENTION, Decide
from raymed.tasks.task import Loss, Nets, Network, Optim, Phase, Step, Task

SUPCON = "supcon_"
METHODS = tuple(LOSSES) + tuple(SUPCON + name for name in LOSSES)

Losses = recipe.one_of_each("Losses", LOSSES, __name__)


@dataclass(frozen=True)
class Stage(recipe.Stage):
    """How long and how one phase is trained."""

    balanced: bool = True
    """Equal numbers of both classes in a batch."""
    optim: Optim = Optim(lr=4e-3)
    ema_decay: float | None = 0.99
    """Of the running average of the weights that is evaluated and kept; None = off."""


@dataclass(frozen=True)
class ContrastiveStage(Stage):
    """The SupCon phase."""

    loss: SupConLoss = SupConLoss(temperature=0.1)
    projection: int = 128
    """Width of the projection that SupCon compares; dropped afterwards."""
    encoder_from: str | None = None
    """The folder of a checkpoint, or of a phase's checkpoints: its encoder is taken, and the phase left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience is not None:
            warnings.warn("supcon.patience has no effect: nothing is monitored in that phase", stacklevel=3)


@dataclass(frozen=True)
class ClassifierRecipe(recipe.Recipe):
    """Everything that decides what a classifier becomes. The defaults suit small radiographs."""

    metrics: ClassVar[Mapping[str, Literal["max", "min"]]] = {
        "auroc": "max",
        "auprc": "max",
        "accuracy_at_0.5": "max",
        "brier": "min",
        "ece": "min",
    }
    shown: ClassVar[tuple[str, ...]] = ("auroc", "auprc")

    data: DataConfig = DataConfig()
    model: EncoderConfig = EncoderConfig()
    augment: Augment = Augment()
    method: str = SUPCON + "asl"
    """ce, focal, asl, ..., or the same after a contrastive phase: supcon_ce, supcon_focal, supcon_asl, ..."""
    losses: Losses = Losses()  # type: ignore[valid-type]
    supcon: ContrastiveStage = ContrastiveStage()
    single: Stage = Stage()
    """The one phase of ce, focal and asl."""
    head: Stage = Stage(480, 256, balanced=False, optim=Optim(lr=1e-2, weight_decay=1e-4), ema_decay=None)
    """The second phase of supcon_*."""
    decide: Decide = Decide()

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)

    @property
    def two_stage(self) -> bool:
        """Whether the encoder has a phase of its own."""
        return self.method.startswith(SUPCON)

    @property
    def encoder_from(self) -> str | None:
        """What `supcon.encoder_from` names, where there is such a phase."""
        return self.supcon.encoder_from if self.two_stage else None

    @property
    def stage(self) -> Stage:
        """Of the head, or of the one phase."""
        return self.head if self.two_stage else self.single

    @property
    def label(self) -> str:
        """The method."""
        return self.method

    @property
    def loss_name(self) -> str:
        """Name of the head's loss in LOSSES."""
        return self.method.removeprefix(SUPCON)

    @property
    def space(self) -> Space:
        """The loss's own."""
        loss = getattr(self.losses, self.loss_name)
        return {f"losses.{self.loss_name}.{name}": dimension for name, dimension in loss.space.items()}

    @property
    def swept(self) -> tuple[str, ...]:
        """Trials of two stages share an encoder, and the features it gives each image."""
        return (f"losses.{self.loss_name}.", *(("head.",) if self.two_stage else ("single.", "augment.", "model.")))

    def phantoms(self, folder: Path) -> tuple[Path, dict[str, Any]]:
        """Digital HSG X-rays."""
        positive = self.data.positive or "occluded"
        return write_hsg(folder / "hsg-64", size=64), {"data.positive": positive, "data.deidentified": True}

    def phases(self, data: DataSet) -> tuple[Phase, ...]:
        """The phases of this recipe for a data set."""
        self.decide.check(data)
        if not self.two_stage:
            return (self._classify("single", self.single, data, joint=True),)
        encoder_from = self.supcon.encoder_from or "supcon.best"
        head = self._classify("head", self.head, data, joint=False)
        head = dataclasses.replace(head, cache=True, starts_from={"encoder": encoder_from})
        return (head,) if self.supcon.encoder_from else (self.encoder_phase(data), head)

    def encoder_phase(self, data: DataSet) -> Phase:
        """The SupCon phase alone: what several heads of one seed share."""
        task = SupConTask(self.model, self.supcon, self._augment(data), data.preprocess)
        return self.supcon.phase("supcon", task, None, balanced=self.supcon.balanced)

    def _classify(self, name: str, stage: Stage, data: DataSet, joint: bool) -> Phase:
        positive_rate = float(data.labels[data.splits["train"]].mean())
        loss = getattr(self.losses, self.loss_name)
        classes = {"names": list(data.classes), "positive": data.positive}
        augment = self._augment(data)
        prior = 0.5 if stage.balanced else positive_rate
        attention = self.decide.aggregate == ATTENTION
        task = ClassifierTask(self.model, stage, loss, augment, data.preprocess, joint, prior, classes, attention)
        return stage.phase(name, task, "auprc", balanced=stage.balanced)

    def _augment(self, data: DataSet) -> Augment:
        """Without mirroring where one side is decided about: a mirrored image would be of the other side."""
        if not self.augment.flip or self.decide.level(data) != "case+side":
            return self.augment
        note = "images are not mirrored (augment.flip 0): what is decided about is one side"
        data.notes += [note] if note not in data.notes else []
        return dataclasses.replace(self.augment, flip=0.0)

    @property
    def also_scored(self) -> tuple[str, ...]:
        """Attention is fitted on the training split."""
        return ("train",) if self.decide.aggregate == ATTENTION else ()

    def outcome(self, scored: recipe.Scored, data: DataSet) -> recipe.Outcome:
        """Figures of units (`decide`) at the threshold that the validation split gives, "image/..." those of images;
        scores and targets of images, and what attention makes of their features."""
        energies, report, extras = self._attention(scored, data)
        meters = {s: cast(BinaryMeter, of_split["binary"]) for s, of_split in scored.items() if s != "train"}
        where = {split: np.searchsorted(data.rows, meter.index) for split, meter in meters.items()}
        units = {s: self.decide.table(data, where[s], m.scores, energies=energies.get(s)) for s, m in meters.items()}
        images = {split: self.decide.table(data, where[split], m.scores, "image") for split, m in meters.items()}
        point = self.decide.point(units["val"], images["val"])
        figures = {s: binary_metrics(u.scores, u.targets, point["threshold"]) for s, u in units.items()}
        for split, of_images in images.items() if point["unit"] != "image" else ():
            found = binary_metrics(of_images.scores, of_images.targets, point["image_threshold"])
            figures[split] |= {f"image/{name}": value for name, value in found.items()}
        arrays = {s: {"scores": m.scores, "targets": m.targets, "rows": m.index} for s, m in meters.items()}
        arrays = {s: of_split | ({"energies": energies[s]} if energies else {}) for s, of_split in arrays.items()}
        return recipe.Outcome(figures, arrays, point | report, extras)

    def _attention(
        self, scored: recipe.Scored, data: DataSet
    ) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Tensor]]:
        """Split -> energies of its images; what is to be said of the fit; the tensors. Nothing without attention."""
        if self.decide.aggregate != ATTENTION:
            return {}, {}, {}
        meters = {split: cast(FeatureMeter, of_split["features"]) for split, of_split in scored.items()}
        train, val = (self._case_images(meters[split], data) for split in ("train", "val"))
        pool, report = fit_attention(train, val, seed=0)
        energies = {split: image_energies(pool, meter.features) for split, meter in meters.items() if split != "train"}
        return energies, {"attention": report}, attention_tensors(pool)

    def _case_images(self, meter: FeatureMeter, data: DataSet) -> CaseImages:
        where, level = np.searchsorted(data.rows, meter.index), self.decide.level(data)
        units = unit_numbers(level, data.patients, data.cases, data.sides, data.rows)[where]
        targets = self.decide.table(data, where, np.zeros(len(where))).targets
        return CaseImages(meter.features, meter.logits, units, targets)


@dataclass(frozen=True)
class SupConTask(Task):
    """An encoder that puts images of one class together: SupCon over two augmented views of each image."""

    encoder: EncoderConfig
    stage: ContrastiveStage
    augment: Augment
    preprocess: Preprocess

    def networks(self) -> dict[str, Network]:
        """One network with the parts `encoder` and `projection`."""
        return {"contrastive": Network(Contrastive(self), self.stage.optim, self.stage.ema)}

    def losses(self, step: Step, nets: Nets) -> Iterator[Loss]:
        """One loss a micro-batch; with several, the loss still sees all of them (see `_replayed`)."""
        network = nets["contrastive"]
        with nets.training("contrastive"):
            if len(step.micro) > 1:
                yield from self._replayed(step, network)
                return
            for _, batch in step.batches():
                loss = self.stage.loss(network(self._views(batch, step)), batch.label)
                yield Loss("contrastive", loss, {"loss": loss.detach()})

    def _replayed(self, step: Step, network: Callable) -> Iterator[Loss]:
        """Features of all micro-batches without gradient; the loss over all of them and its gradient for the features;
        then each micro-batch again, carrying its part of that gradient (Gao et al. 2021, GradCache). Normalisation
        layers see every micro-batch twice, so that their running statistics move twice a step."""
        with torch.no_grad():
            features = [network(self._views(batch, step)) for _, batch in step.batches()]
        together = torch.cat(features).requires_grad_()
        loss = self.stage.loss(together, torch.cat([batch.label for batch in step.micro]))
        (gradient,) = torch.autograd.grad(loss, together)
        parts = gradient.split([len(f) for f in features])
        for k, batch in step.batches():
            last = k == len(parts) - 1
            value = (network(self._views(batch, step)).to(parts[k].dtype) * parts[k]).sum()
            yield Loss("contrastive", value, {"loss": loss.detach() / len(parts)}, step=last)

    def _views(self, batch: Batch, step: Step) -> Tensor:
        """(B, C, H, W) pixels -> (B, 2, C, H, W): two independent augmentations, normalised."""
        image = batch.unit_image()
        views = [self.augment(image, batch.index, step.number, step.seed, f"view{v}") for v in range(2)]
        return torch.stack([self.preprocess.normalise(view) for view in views], dim=1)

    def predict(self, batch: Batch, nets: Nets) -> dict[str, Tensor]:
        """{"embedding": (B, D) unit norm}, of the image as it is."""
        image = self.preprocess.normalise(batch.unit_image())
        return {"embedding": nets["contrastive"](image[:, None])[:, 0]}

    def meters(self) -> dict[str, Meter]:
        """How well nearest class centres separate the embeddings."""
        return {"embedding": EmbeddingMeter()}


@dataclass(frozen=True)
class ClassifierTask(Task):
    """One logit an image. joint: encoder and head are one network; otherwise the encoder is frozen."""

    encoder: EncoderConfig
    stage: Stage
    loss: Callable[[Tensor, Tensor], Tensor]
    augment: Augment
    preprocess: Preprocess
    joint: bool
    prior: float
    """Fraction of positives in a training batch: where the head's bias starts."""
    classes: dict[str, object]
    attention: bool = False
    """Whether features are kept beside logits."""

    def networks(self) -> dict[str, Network]:
        """`classifier` (joint), or `encoder` without an optimiser beside `head`."""
        encoder = build_encoder(self.encoder, self.preprocess.channels)
        head = LinearHead(encoder.num_features, prior=self.prior)
        if self.joint:
            return {"classifier": Network(Classifier(encoder, head), self.stage.optim, self.stage.ema)}
        return {"encoder": Network(encoder), "head": Network(head, self.stage.optim, self.stage.ema)}

    def losses(self, step: Step, nets: Nets) -> Iterator[Loss]:
        """One loss a micro-batch: the mean over its images."""
        trained = "classifier" if self.joint else "head"
        with nets.training(trained):
            for k, batch in step.batches():
                logit = nets[trained](self._input(batch, nets, step))
                value = self.loss(logit, batch.label.to(logit.dtype)) / len(step.micro)
                yield Loss(trained, value, {"loss": value.detach()}, step=k == len(step.micro) - 1)

    def _input(self, batch: Batch, nets: Nets, step: Step | None = None) -> Tensor:
        if "encoder" in batch.cached:
            return batch.cached["encoder"]
        image = batch.unit_image()
        if step is not None:
            image = self.augment(image, batch.index, step.number, step.seed)
        image = self.preprocess.normalise(image)
        return image if self.joint else nets["encoder"](image)

    def predict(self, batch: Batch, nets: Nets) -> dict[str, Tensor]:
        """{"logit": (B,)}; the probability of the positive class is its sigmoid. With `attention`, also
        "features" (B, D)."""
        inside = self._input(batch, nets)
        if not self.attention:
            return {"logit": nets["classifier" if self.joint else "head"](inside)}
        if not self.joint:
            return {"logit": nets["head"](inside), "features": inside}
        logit, features = nets["classifier"](inside, True)
        return {"logit": logit, "features": features}

    def frozen(self, batch: Batch, nets: Nets) -> dict[str, Tensor]:
        """{"encoder": (B, D)} features of the image as it is."""
        return {"encoder": nets["encoder"](self.preprocess.normalise(batch.unit_image()))}

    def meters(self) -> dict[str, Meter]:
        """AUROC, AUPRC and calibration of the positive class."""
        binary: dict[str, Meter] = {"binary": BinaryMeter()}
        return binary | ({"features": FeatureMeter()} if self.attention else {})

    def parts(self, nets: Nets) -> tuple[Encoder, LinearHead]:
        """(encoder, head), raw."""
        if self.joint:
            classifier = cast(Classifier, nets.module("classifier"))
            return classifier.encoder, classifier.head
        return cast(Encoder, nets.module("encoder")), cast(LinearHead, nets.module("head"))

    def bundle(self, nets: Nets) -> Bundle:
        """Kind "classifier": the weights of a `Classifier` with what rebuilds it."""
        classifier = Classifier(*self.parts(nets))
        return Bundle(
            kind="classifier",
            weights=dict(classifier.state_dict()),
            model={"encoder": to_dict(dataclasses.replace(self.encoder, weights="none"))},
            preprocess=to_dict(self.preprocess),
            classes=dict(self.classes),
        )


class Contrastive(nn.Module):
    """Encoder and projection: (B, V, C, H, W) -> (B, V, D) of unit norm."""

    def __init__(self, task: SupConTask):
        super().__init__()
        self.encoder = build_encoder(task.encoder, task.preprocess.channels)
        self.projection = ProjectionHead(self.encoder.num_features, out=task.stage.projection)

    def forward(self, views: Tensor) -> Tensor:
        """All views of the batch go through the encoder together."""
        return self.projection(self.encoder(views.flatten(0, 1))).unflatten(0, views.shape[:2])


class Classifier(nn.Module):
    """Encoder and head: (B, C, H, W) normalised -> (B,) logits."""

    def __init__(self, encoder: Encoder, head: LinearHead):
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, image: Tensor, with_features: bool = False) -> Any:
        """The logit of the positive class; with_features: (logit, features)."""
        features = self.encoder(image)
        logit = self.head(features)
        return (logit, features) if with_features else logit


def load_classifier(bundle: Bundle) -> tuple[Classifier, Preprocess]:
    """Rebuild the network of a "classifier" bundle, in eval mode, and the preprocessing it needs."""
    if bundle.kind != "classifier":
        raise UserError(f"the bundle holds a {bundle.kind}, not a classifier")
    preprocess = from_dict(Preprocess, bundle.preprocess)
    encoder = build_encoder(from_dict(EncoderConfig, bundle.model["encoder"]), preprocess.channels)
    classifier = Classifier(encoder, LinearHead(encoder.num_features))
    classifier.load_state_dict(bundle.weights)
    return classifier.eval(), preprocess
