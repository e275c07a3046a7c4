"""CLIP for medical images and their captions: two towers, one contrastive loss over the global batch.

    info_nce    CLIP's own loss                          dcl       without the positive in its denominator
    siglip      every pair a question of its own         hn_nce    hard negatives weigh more
    dhn_nce     both (MedCLIP-SAMv2)

Both towers and the temperature are ONE network, "clip", since they share a loss. Images of one case and captions that
read the same are no negatives of each other. With several micro-batches a step the loss still sees all of them
(`ClipTask._replayed`). Sources: Radford et al. 2021 (CLIP), Koleilat et al. 2024 (MedCLIP-SAMv2), Gao et al. 2021
(GradCache).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from raymed.bundle import NOT_STATED, Bundle
from raymed.config import check_choice, to_dict
from raymed.data.augment import Augment
from raymed.data.captioned import write_captioned
from raymed.data.captions import CaptionConfig, CaptionSet, load_captions
from raymed.data.dataset import Batch, DataSet
from raymed.data.preprocess import Preprocess
from raymed.distributed import world_size
from raymed.losses import PAIR_LOSSES, DHNNCELoss, HNNCELoss
from raymed.metrics.meters import Meter
from raymed.metrics.retrieval import RetrievalMeter
from raymed.models.clip import (
    Clip,
    ClipConfig,
    build_clip,
    build_tokenizer,
    clip_architecture,
    clip_input,
    clip_licence,
    has_weights,
    lr_scales,
    merged_state,
)
from raymed.space import Float, Space
from raymed.tasks import recipe
from raymed.tasks.recipe import Outcome, Scored
from raymed.tasks.task import Loss, Nets, Network, Optim, Phase, Step, Task
from raymed.tasks.texts import Texts, TextTable, parts_in_a_group

METHODS = tuple(PAIR_LOSSES)
LARGEST_SCALE = 100.0
"""Of cosines, as in CLIP: a temperature of 0.01."""
LARGEST_TUNING_LR = 1e-4
"""Above it the user is told: published CLIPs of which all weights are trained are usually tuned with 1e-6 to 1e-5."""
SHUFFLE_SEED = 0

PairLosses = recipe.one_of_each("PairLosses", PAIR_LOSSES, __name__)


@dataclass(frozen=True)
class ClipStage(recipe.Stage):
    """How long and how the towers are trained: a small model from nothing. Published weights want a learning rate of
    1e-6 to 1e-5."""

    steps: int = 300
    optim: Optim = Optim(lr=5e-4, weight_decay=0.1, beta2=0.98, eps=1e-6, schedule="cosine", warmup=0.1)


@dataclass(frozen=True)
class CaptionedData(recipe.Recipe):
    """Images with captions, and nothing to train."""

    read: ClassVar[Callable[[Any, Path], DataSet]] = staticmethod(load_captions)

    data: CaptionConfig = CaptionConfig()

    def phantoms(self, folder: Path) -> tuple[Path, dict[str, Any]]:
        """Captioned digital phantoms."""
        manifest = write_captioned(folder / "captioned-48", size=48)
        columns = ("caption", "caption_2")
        return manifest, {"data.caption": columns, "data.findings": "findings", "data.deidentified": True}


@dataclass(frozen=True)
class ClipRecipe(CaptionedData):
    """Everything that decides what a CLIP model becomes. The defaults suit a small model trained from nothing."""

    metrics: ClassVar[Mapping[str, Literal["max", "min"]]] = dict.fromkeys(
        [*(f"{direction}_recall_{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10)), "mean_recall"], "max"
    )
    shown: ClassVar[tuple[str, ...]] = ("mean_recall", "i2t_recall_1")

    model: ClipConfig = ClipConfig()
    augment: Augment = Augment(flip=0.0)
    """Captions name sides: images are never mirrored unless asked."""
    method: str = "dhn_nce"
    """info_nce, siglip, dcl, hn_nce or dhn_nce."""
    losses: PairLosses = PairLosses(  # type: ignore[valid-type]
        hn_nce=HNNCELoss(temperature=0.07), dhn_nce=DHNNCELoss(temperature=0.07)
    )
    """All start at CLIP's temperature. The 0.6 of the DHN-NCE paper is for weights that know images already: from
    nothing it gives a mean recall of 0.40 on captioned phantoms after 300 steps; a tuned 0.11, 0.72 (five seeds)."""
    learn_temperature: bool = False
    """Whether the temperature is a parameter that starts at the loss's; False = it stays there."""
    stage: ClipStage = ClipStage()  # type: ignore[assignment]
    shuffled_captions: bool = False
    """A control: every training image has the captions of another one, so that nothing can be learned about images.
    What such a model still reaches on held-out images is chance, or leaks."""

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)

    @property
    def loss(self) -> Any:
        """The method's, with its hyper-parameters."""
        return getattr(self.losses, self.method)

    @property
    def label(self) -> str:
        """The method."""
        return self.method

    @property
    def space(self) -> Space:
        """The loss's own, and the learning rate, which a change of the temperature asks for."""
        own = {f"losses.{self.method}.{name}": dimension for name, dimension in self.loss.space.items()}
        lr = self.stage.optim.lr
        return own | {"stage.optim.lr": Float(lr / 10, lr * 10, log=True)}

    @property
    def swept(self) -> tuple[str, ...]:
        """All but the data."""
        return (f"losses.{self.method}.", "stage.", "model.", "augment.", "learn_temperature")

    @property
    def resolved_data(self) -> CaptionConfig:
        """Size, channels and normalisation of a checkpoint's images, where the user does not say otherwise."""
        stated, plain = self.data.preprocess, Preprocess()
        wanted = {
            name: value
            for name, value in clip_input(self.model).items()
            if getattr(stated, name) == getattr(plain, name)
        }
        return dataclasses.replace(self.data, preprocess=dataclasses.replace(stated, **wanted)) if wanted else self.data

    def phases(self, data: CaptionSet) -> tuple[Phase, ...]:
        """One."""
        tokenizer = build_tokenizer(self.model)
        table = TextTable.of(data, tokenizer, SHUFFLE_SEED if self.shuffled_captions else None)
        data.notes += [note for note in self._warnings(table, tokenizer.context_length) if note not in data.notes]
        licences = {
            "weights": clip_licence(self.model),
            "data": {"name": self.data.licence, "source": self.data.source},
        }
        use = {"tokenizer": tokenizer.to_json(), "method": self.method, "findings": list(data.findings)}
        task = ClipTask(
            self.model,
            self.stage,
            self.loss,
            self.method == "siglip",
            self.learn_temperature,
            self.augment,
            data.preprocess,
            table,
            use,
            licences,
        )
        return (self.stage.phase("clip", task, monitor="mean_recall"),)

    def _warnings(self, table: TextTable, context_length: int) -> list[str]:
        found = []
        if table.truncated:
            num = len(table.caption)
            found.append(
                f"{table.truncated} of {num} captions are longer than the model's {context_length} tokens and cut there"
            )
        lr = self.stage.optim.lr
        if lr > LARGEST_TUNING_LR and has_weights(self.model) and not self.model.lora_rank:
            found.append(
                f"stage.optim.lr {lr:g} is high for published weights: 1e-6 to 1e-5 is usual, or model.lora_rank 8"
            )
        return found

    def outcome(self, scored: Scored, data: CaptionSet) -> Outcome:
        """Retrieval over each whole split; the embeddings."""
        meters = {split: cast(RetrievalMeter, of_split["retrieval"]) for split, of_split in scored.items()}
        return Outcome(
            {split: meter.compute() for split, meter in meters.items()},
            {
                split: {"image": m.image, "text": m.text, "groups": m.groups, "rows": m.index}
                for split, m in meters.items()
            },
        )


@dataclass(frozen=True)
class ClipTask(Task):
    """Pulls an image and its caption together, and apart from those of others."""

    model: ClipConfig
    stage: ClipStage
    loss: Callable[..., Tensor]
    has_bias: bool
    learn_temperature: bool
    augment: Augment
    preprocess: Preprocess
    table: TextTable
    use: dict[str, Any]
    """What a bundle needs beside the weights: tokenizer, method, findings."""
    licences: dict[str, dict[str, str]]

    def networks(self) -> dict[str, Network]:
        """One: both towers, the scale of the cosines, and SigLIP's bias."""
        clip = build_clip(self.model, self.preprocess)
        with torch.no_grad():
            clip.log_scale.fill_(-math.log(self.loss.temperature))  # type: ignore[attr-defined]
        clip.log_scale.requires_grad_(self.learn_temperature)
        clip.bias.requires_grad_(self.has_bias)
        return {"clip": Network(clip, self.stage.optim, self.stage.ema, lr_scales(clip, self.model))}

    def losses(self, step: Step, nets: Nets) -> Iterator[Loss]:
        """One loss a micro-batch; with several, the loss still sees all of them."""
        with nets.training("clip"):
            if len(step.micro) > 1:
                yield from self._replayed(step, nets["clip"])
                return
            for _, batch in step.batches():
                pairs = self._pairs(batch, step, nets["clip"])
                loss = self._loss(pairs)
                yield Loss("clip", loss, self._metrics(loss, pairs))

    def _replayed(self, step: Step, network: Callable) -> Iterator[Loss]:
        """Features of all micro-batches without gradient; the loss over all of them and its gradient for the features,
        the scale and the bias; then each micro-batch again, with the same dropout, carrying its part of that gradient
        (Gao et al. 2021, GradCache)."""
        with torch.no_grad():
            parts = [self._pairs(batch, step, network) for _, batch in step.batches()]
        pairs = _Pairs.together(parts)
        loss = self._loss(pairs)
        gradient = _Pairs(*torch.autograd.grad(loss, pairs.differentiable, allow_unused=True), said=pairs.said)
        metrics = {name: value / len(parts) for name, value in self._metrics(loss, pairs).items()}
        for (k, batch), of_part in zip(step.batches(), gradient.apart([len(p) for p in parts]), strict=True):
            value = self._pairs(batch, step, network).dot(of_part)
            yield Loss("clip", value, metrics, step=k == len(parts) - 1)

    def _pairs(self, batch: Batch, step: Step, network: Callable) -> "_Pairs":
        image = self.augment(batch.unit_image(), batch.index, step.number, step.seed)
        texts = self.table.sampled(batch.index, step.number, step.seed)
        return self._forward(image, texts, network, parts_in_a_group(len(texts)))

    def _forward(self, image: Tensor, texts: Texts, network: Callable, num_parts: int | None) -> "_Pairs":
        by_length = texts.by_length(num_parts).to(image.device)
        image, text, scale, bias = network(self.preprocess.normalise(image), *by_length.parts)
        return _Pairs(image, text[by_length.back], scale, bias, said=texts.said.to(image.device))

    def _loss(self, pairs: "_Pairs") -> Tensor:
        scale = ceiling(pairs.scale, LARGEST_SCALE)
        return self.loss(pairs.image, pairs.text, pairs.said, scale, pairs.bias if self.has_bias else None)

    def _metrics(self, loss: Tensor, pairs: "_Pairs") -> dict[str, Tensor]:
        norms = (pairs.image.detach().float().norm(dim=1).mean() + pairs.text.detach().float().norm(dim=1).mean()) / 2
        metrics = {"loss": loss.detach(), "feature_norm": norms}
        return metrics | ({"temperature": 1 / pairs.scale.detach()} if self.learn_temperature else {})

    def predict(self, batch: Batch, nets: Nets) -> dict[str, Tensor]:
        """{"image": (B, D), "text": (B, D), unit norm, of the image as it is and of its first caption; "groups": (B, 2)
        int64, case and caption}."""
        # In one part among workers, since their last batches may have different numbers of images.
        num_parts = 1 if world_size() > 1 else None
        pairs = self._forward(batch.unit_image(), self.table.first_of(batch.index), nets["clip"], num_parts)
        image, text = (F.normalize(features.float(), dim=1) for features in (pairs.image, pairs.text))
        return {"image": image, "text": text, "groups": pairs.said}

    def meters(self) -> dict[str, Meter]:
        """Retrieval of captions by images and of images by captions."""
        return {"retrieval": RetrievalMeter()}

    def bundle(self, nets: Nets) -> Bundle:
        """Kind "clip": the weights of a `Clip` with what rebuilds it, and its tokenizer."""
        clip = cast(Clip, nets.module("clip"))
        return Bundle(
            kind="clip",
            weights=merged_state(clip),
            model={
                "architecture": clip_architecture(clip),
                "tokenizer": self.use["tokenizer"],
                "method": self.use["method"],
                "temperature": 1 / clip.log_scale.exp().clamp(max=LARGEST_SCALE).item(),
            },
            preprocess=to_dict(self.preprocess),
            classes={"names": self.use["findings"], "positive": NOT_STATED},
            licences=self.licences,
        )


@dataclass(frozen=True)
class _Pairs:
    """What the network makes of some pairs, or the gradient of a loss for it: image and text (B, D), scale and bias ();
    said: which pairs say the same, (B, K)."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor | None
    said: Tensor

    def __len__(self) -> int:
        return len(self.image)

    @property
    def differentiable(self) -> tuple[Tensor, ...]:
        """All but `said`."""
        assert self.bias is not None
        return self.image, self.text, self.scale, self.bias

    @classmethod
    def together(cls, parts: list["_Pairs"]) -> "_Pairs":
        """All parts as leaves of a new graph; scale and bias are the same in all of them."""
        leaves = [torch.cat([p.image for p in parts]), torch.cat([p.text for p in parts]), *parts[0].differentiable[2:]]
        image, text, scale, bias = (leaf.detach().clone().requires_grad_() for leaf in leaves)
        return cls(image, text, scale, bias, torch.cat([p.said for p in parts]))

    def apart(self, sizes: list[int]) -> list["_Pairs"]:
        """The gradient of each part; those of scale and bias are shared equally."""
        rows = zip(self.image.split(sizes), self.text.split(sizes), self.said.split(sizes), strict=True)
        num = len(sizes)
        scale, bias = (None if g is None else g / num for g in (self.scale, self.bias))
        return [_Pairs(image, text, cast(Tensor, scale), bias, said) for image, text, said in rows]

    def dot(self, gradient: "_Pairs") -> Tensor:
        """A scalar whose gradient for what is here is the one given."""
        given = (gradient.image, gradient.text, gradient.scale, gradient.bias)
        products = zip(self.differentiable, given, strict=True)
        return torch.stack([(x.to(g.dtype) * g).sum() for x, g in products if g is not None]).sum()


class _Ceiling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, largest: float) -> Tensor:
        ctx.over = x > largest
        return x.clamp(max=largest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.where(~ctx.over | (grad > 0), 0), None


def ceiling(x: Tensor, largest: float) -> Tensor:
    """min(x, largest), with the gradient of x where x is over it and would come down: plain clamping would hold what
    has once been over it for ever, and clamping the weight itself is not seen by engines that keep their own copy."""
    return cast(Tensor, _Ceiling.apply(x, largest))
