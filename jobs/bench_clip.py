"""Benchmark: CLIP training against open_clip's own trainer, its losses against each other, and their memory.

    python jobs/bench_clip.py --out bench_clip.json

1. Images a second with InfoNCE over those of open_clip's train_one_epoch (bench_peers/open_clip_training.py, which
   imports nothing from raymed): same first weights, from one checkpoint that both read, images, texts, batches, loss,
   AdamW, schedule and clipping. Every caption fills the context, so that both compute the same.
2. DHN-NCE over InfoNCE, step against step.
3. A model of BiomedCLIP's shape (a BERT of 256 tokens beside a ViT of 197), on captions as long as MedPix's: a
   log-normal about 40 words. Texts in groups of like length over texts padded to the context, as open_clip has them.
4. Peak memory of losses at a global batch of 32,768 (bench_loss_memory.py).

All sides train in this process in turns of a few steps. Nothing is timed before the losses of the first 20 steps are
equal to 1e-4 (bf16: 1e-2). Models are small on a CPU; with a GPU they are ViT-B/16 and BiomedCLIP's own shape, in bf16
and compiled. MFU counts what each side computed, padding included. Figures are for a machine with nothing else to do.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from bench_loss_memory import PEER, BenchLossMemory, memory
from bench_peers.machine import environment
from bench_train import EQUAL_STEPS, SEED, Turns, num_steps, spread, summary
from torch import Tensor

from raymed.config import UserError, replace, to_json
from raymed.data.augment import Augment
from raymed.data.captions import CaptionConfig, CaptionSet
from raymed.models.clip import ClipConfig, build_tokenizer
from raymed.random import derive
from raymed.tasks.clip import ClipRecipe, ClipStage
from raymed.tasks.task import Phase, Step
from raymed.tasks.texts import ByLength, Texts
from raymed.tracking.outbox import Outbox
from raymed.train.compute import Compute
from raymed.train.evaluate import Feed
from raymed.train.loop import Fit, sampler_of, take_step
from raymed.train.nets import Networks
from raymed.train.plans.flops import flops_per_sample, mfu, peak_flops

TARGET_RATIO = 1.0
TARGET_LOSS_RATIO = 0.97
NORMALISATION = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
INFO_NCE, DHN_NCE, PADDED = "InfoNCE", "DHN-NCE", "InfoNCE, texts padded"
WORDS = (
    "chest abdomen pelvis skull spine knee shoulder ankle axial sagittal coronal frontal lateral contrast image shows "
    "mass nodule cyst lesion fracture effusion edema left right upper lower lobe within the small large normal bone "
    "soft tissue density signal margin border vessel artery vein patient history pain fever cough weight loss "
    "year old man woman child consistent with suggestive diffuse focal acute chronic mild severe"
).split()
SPLITS = {0: "val", 1: "test"}
"""Of every eight pairs; the others are for training."""
MEDPIX_WORDS = (40.0, 0.6)
"""Median and sigma of a log-normal."""


@dataclass(frozen=True)
class BenchClip:
    """How long to measure."""

    parts: tuple[Literal["vit", "biomedclip", "memory"], ...] = ("vit", "biomedclip", "memory")
    """1 and 2; 3; 4."""
    blocks: int = 11
    """Turns of each side."""
    steps: int = 6
    """Of a turn."""
    batch_size: int | None = None
    """None: 64 on a CPU, 256 on a GPU."""
    threads: int = os.cpu_count() or 1
    """Of torch."""
    out: Path | None = None
    """Where the figures are written as JSON too."""


@dataclass(frozen=True)
class Workload:
    """A model on pairs of an image and a text."""

    model: dict[str, Any]
    """open_clip's config."""
    bert: dict[str, int] | None
    """Sizes of the text tower, where it is a BERT."""
    words: tuple[float, float] | None
    """Median and sigma of the words of a caption; None = more than the context holds."""
    sides: tuple[str, ...]
    """That take turns with our loop."""
    compute: Compute
    batch_size: int
    num_pairs: int
    blocks: int
    steps: int

    @property
    def size(self) -> int:
        """Side of an image in pixels."""
        return self.model["vision_cfg"]["image_size"]

    @property
    def context(self) -> int:
        """Tokens of a text at most."""
        return self.model["text_cfg"]["context_length"]

    @property
    def tolerance(self) -> float:
        """Of the losses."""
        return 1e-4 if self.compute.precision == "fp32" else 1e-2


def main(config: BenchClip) -> None:
    """Measure and print."""
    torch.set_num_threads(config.threads)
    gpu = torch.cuda.is_available()
    if not gpu:
        print("no GPU: small models of their shape instead of ViT-B/16 and BiomedCLIP in bf16", flush=True)
    figures: dict[str, Any] = {"environment": environment(), "config": dataclasses.asdict(config)}
    with tempfile.TemporaryDirectory(prefix="bench-clip-") as scratch:
        for part, workload in workloads(config, "cuda" if gpu else "cpu").items():
            if part in config.parts:
                figures[part] = measure(workload, Path(scratch, part))
    if "memory" in config.parts:
        figures["memory"] = memory(BenchLossMemory(threads=config.threads))
    text = to_json(figures)
    print(text)
    if config.out:
        config.out.write_text(text)


def workloads(config: BenchClip, device: Literal["cpu", "cuda"]) -> dict[str, Workload]:
    """What is trained where."""
    on_gpu = device == "cuda"
    compute = Compute(device=device, engine="torch", precision="bf16" if on_gpu else "fp32", compile=on_gpu)
    batch_size = config.batch_size or (256 if on_gpu else 64)
    common = {"compute": compute, "batch_size": batch_size, "num_pairs": 8 * batch_size}
    common |= {"blocks": config.blocks, "steps": config.steps}
    vit, biomedclip = (vit_b_16(), biomedclip_shape()) if on_gpu else (small_vit(), small_biomedclip())
    return {
        "vit": Workload(vit, None, None, (PEER, INFO_NCE, DHN_NCE), **common),
        "biomedclip": Workload(*biomedclip, MEDPIX_WORDS, (PEER, INFO_NCE, PADDED), **common),
    }


def small_vit() -> dict[str, Any]:
    """4 million parameters beside the embedding of CLIP's vocabulary."""
    image = {"image_size": 48, "patch_size": 8, "width": 192, "layers": 4, "head_width": 64}
    text = {"context_length": 32, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 4}
    return {"embed_dim": 192, "vision_cfg": image, "text_cfg": text}


def vit_b_16() -> dict[str, Any]:
    """open_clip's."""
    import open_clip

    model = open_clip.get_model_config("ViT-B-16")
    assert model is not None
    model["text_cfg"].setdefault("context_length", 77)
    return model


def small_biomedclip() -> tuple[dict[str, Any], dict[str, int]]:
    """As many tokens and layers' proportions as BiomedCLIP has, in thin towers."""
    image = {"image_size": 224, "patch_size": 16, "width": 96, "layers": 2, "head_width": 32}
    return _with_bert(96, image), _bert_sizes(96, layers=2, heads=3)


def biomedclip_shape() -> tuple[dict[str, Any], dict[str, int]]:
    """BiomedCLIP's own, without its weights."""
    image = {"timm_model_name": "vit_base_patch16_224", "timm_model_pretrained": False, "timm_pool": "",
             "timm_proj": "linear", "image_size": 224}  # fmt: skip
    return _with_bert(512, image), _bert_sizes(768, layers=12, heads=12)


def _with_bert(embed_dim: int, image: dict[str, Any]) -> dict[str, Any]:
    text = {"hf_model_pretrained": False, "hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": 256}  # fmt: skip
    return {"embed_dim": embed_dim, "vision_cfg": image, "text_cfg": text}


def _bert_sizes(width: int, layers: int, heads: int) -> dict[str, int]:
    return {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
            "intermediate_size": 4 * width, "max_position_embeddings": 512}  # fmt: skip


# Data and weights that both sides read


def write_pairs(folder: Path, workload: Workload) -> Path:
    """Blocks of colours with captions that name them by their first words; returns the manifest."""
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(SEED)
    kinds = rng.integers(0, 256, (len(WORDS), 8, 8, 3))
    lines = ["image,patient,split,caption"]
    for k, num_words in enumerate(_caption_lengths(workload, rng)):
        topic = rng.integers(len(WORDS))
        blocks = (3 * kinds[topic] + rng.integers(0, 256, (8, 8, 3))) // 4
        pixels = blocks.astype(np.uint8).repeat(workload.size // 8, 0).repeat(workload.size // 8, 1)
        Image.fromarray(pixels).save(folder / f"{k}.png")
        words = [WORDS[topic]] * 2 + rng.choice(WORDS, num_words - 2).tolist()
        lines.append(f"{k}.png,p{k},{SPLITS.get(k % 8, 'train')},{' '.join(words)}")
    manifest = folder / "manifest.csv"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def _caption_lengths(workload: Workload, rng: np.random.Generator) -> np.ndarray:
    """Words of each caption."""
    if workload.words is None:
        return np.full(workload.num_pairs, workload.context + 8)
    median, sigma = workload.words
    drawn = rng.lognormal(np.log(median), sigma, workload.num_pairs)
    return drawn.round().clip(6, workload.context - 2).astype(int)


def prepare(workload: Workload, folder: Path) -> tuple[ClipRecipe, CaptionSet]:
    """Checkpoint, images and captions in a folder, and our recipe for them."""
    from bench_peers.open_clip_training import write_bert, write_checkpoint

    checkpoint, model = folder / "checkpoint", workload.model
    if workload.bert:
        write_bert(checkpoint, workload.bert, WORDS)
        tower = {"hf_model_name": str(checkpoint), "hf_tokenizer_name": str(checkpoint)}
        model = model | {"text_cfg": model["text_cfg"] | tower}
    write_checkpoint(checkpoint, model, {"size": workload.size} | NORMALISATION, SEED)
    recipe = ClipRecipe(
        data=CaptionConfig(manifest=str(write_pairs(folder / "pairs", workload)), deidentified=True),
        model=ClipConfig(name=f"local-dir:{checkpoint}"),
        augment=Augment.none(),
        method="info_nce",
        learn_temperature=True,
        stage=ClipStage(batch_size=workload.batch_size, evaluations=1),
    )
    return recipe, cast(CaptionSet, recipe.read(recipe.resolved_data, folder / "cache"))


def phase_of(recipe: ClipRecipe, data: CaptionSet, steps: int) -> Phase:
    """The recipe's only phase, of so many steps; the warm-up is a whole number of them, as open_clip has it."""
    (phase,) = replace(recipe, {"stage.steps": steps, "stage.optim.warmup": warm_up(steps) / steps}).phases(data)
    return phase


def warm_up(steps: int) -> int:
    """Steps in which the learning rate rises."""
    return max(1, steps // 10)


def export(folder: Path, workload: Workload, recipe: ClipRecipe, data: CaptionSet) -> None:
    """What the peer reads."""
    batch = data.batch(np.arange(len(data)))
    assert batch.image is not None
    tokens, _ = build_tokenizer(recipe.model)([texts[0] for texts in data.captions])
    phase = phase_of(recipe, data, max(num_steps(workload), EQUAL_STEPS))
    sampler = sampler_of(phase, data, SEED)
    np.save(folder / "images.npy", batch.image.numpy())
    np.save(folder / "tokens.npy", _padded(tokens, workload.context).numpy())
    np.save(folder / "order.npy", np.stack([sampler.indices(step) for step in range(phase.steps)]))
    optim = recipe.stage.optim
    config = {"lr": optim.lr, "weight_decay": optim.weight_decay, "clip": optim.clip, "eps": optim.eps}
    config |= {"beta1": optim.momentum, "beta2": optim.beta2}
    config |= {"mean": data.preprocess.mean, "std": data.preprocess.std}
    (folder / "config.json").write_text(json.dumps(config))


def _padded(tokens: Tensor, length: int) -> Tensor:
    """(N, L) with zeros behind, which both tokenizers pad with, up to that length."""
    return F.pad(tokens, (0, length - tokens.shape[1]))


# The sides


def peer_of(workload: Workload, folder: Path, steps: int) -> Any:
    """open_clip's training."""
    from bench_peers.open_clip_training import OpenClipTraining

    compute = workload.compute
    precision = "amp_bf16" if compute.precision == "bf16" else "fp32"
    return OpenClipTraining(folder, steps, warm_up(steps), compute.resolved_device().type, precision, compute.compile)


class Steps:
    """Our steps without what the loop does between them, so that two of them compare nothing but themselves."""

    def __init__(self, phase: Phase, data: CaptionSet, compute: Compute, context: int | None = None):
        """context: tokens that every text is padded to; None = texts in groups of like length, as the loop has them."""
        self.phase, self.context, self.done = phase, context, 0
        self.networks = Networks(phase, SEED, compute)
        self.networks.build_engines(phase.steps)
        self.feed = Feed(data, compute.resolved_device())
        self.sampler, self.seed = sampler_of(phase, data, SEED), derive(SEED, "phase", phase.name)

    def train(self, steps: int) -> None:
        """So many further steps."""
        with padded_to(self.context) if self.context else nullcontext():
            for _ in range(steps):
                batch = self.feed.batch(self.sampler.indices(self.done))
                take_step(self.phase, self.networks, Step(self.done, self.seed, 0, (batch,)))
                self.done += 1


@contextmanager
def padded_to(context: int) -> Iterator[None]:
    """Within: the texts of a batch go through the tower together, all of them so many tokens long."""

    def together(texts: Texts, num: int | None = None) -> ByLength:
        return ByLength((_padded(texts.tokens, context),), torch.arange(len(texts)))

    with mock.patch.object(Texts, "by_length", together):
        yield


def measure(workload: Workload, folder: Path) -> dict[str, Any]:
    """All figures of a model."""
    recipe, data = prepare(workload, folder)
    export(folder, workload, recipe, data)
    figures: dict[str, Any] = {"losses differ by": check_equal(workload, folder, recipe, data)}
    return figures | throughput(workload, folder, recipe, data)


def check_equal(workload: Workload, folder: Path, recipe: ClipRecipe, data: CaptionSet) -> float:
    """Largest relative difference of the losses of the first steps. Raises UserError where it is too large."""
    phase = phase_of(recipe, data, EQUAL_STEPS)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        fit = Fit([phase], data, Path(place), SEED, workload.compute, Outbox(Path(place, "outbox.jsonl")))
        list(fit.run())
        records = [r["values"] for r in fit.outbox.records() if r["op"] == "metrics"]  # type: ignore[union-attr]
    found = np.array([r[f"{phase.name}/loss"] for r in records if f"{phase.name}/loss" in r])
    peer = peer_of(workload, folder, phase.steps)
    peer.train(phase.steps)
    difference = float(np.max(np.abs(found / np.array(peer.losses) - 1)))
    if not difference <= workload.tolerance:
        raise UserError(f"the losses of both loops differ by {difference:.1e}: no timing would mean anything")
    return difference


def throughput(workload: Workload, folder: Path, recipe: ClipRecipe, data: CaptionSet) -> dict[str, Any]:
    """Images a second of all sides, ratios with their uncertainty, MFU."""
    compute, steps = workload.compute, num_steps(workload)
    phase = phase_of(recipe, data, steps)
    dhn_nce = phase_of(replace(recipe, {"method": "dhn_nce"}), data, steps)
    made = {
        PEER: lambda: peer_of(workload, folder, steps),
        INFO_NCE: lambda: Steps(phase, data, compute),
        DHN_NCE: lambda: Steps(dhn_nce, data, compute),
        PADDED: lambda: Steps(phase, data, compute, workload.context),
    }
    sides: dict[str, Any] = {name: made[name]() for name in workload.sides}
    turns = Turns(sides, workload.steps)
    with turns.taken():
        list(Fit([phase], data, folder, SEED, compute, Outbox(folder / "outbox.jsonl")).run())
    figures = turns.speeds(workload.steps * workload.batch_size)
    figures["ours over open_clip"] = summary(turns.ratio(PEER), TARGET_RATIO, "at least")
    seconds = {name: np.array(values) for name, values in turns.seconds.items()}
    if DHN_NCE in sides:
        figures["DHN-NCE over InfoNCE"] = summary(seconds[INFO_NCE] / seconds[DHN_NCE], TARGET_LOSS_RATIO, "at least")
    if PADDED in sides:
        figures["texts in groups over padded"] = spread(seconds[PADDED] / seconds[INFO_NCE])
    return figures | {"MFU": utilisation(workload, phase, data, figures)}


def utilisation(workload: Workload, phase: Phase, data: CaptionSet, figures: dict[str, Any]) -> dict[str, Any]:
    """What was computed, of what the device could."""
    compute = workload.compute
    peak, source = peak_flops(compute.resolved_device(), compute.precision)
    ours = flops_per_sample(phase, data, SEED, compute)
    with padded_to(workload.context):
        theirs = flops_per_sample(phase, data, SEED, compute)
    flops = {"ours": ours, PEER: theirs}
    each = {name: mfu(n, figures[f"{name}, images a second"], peak) for name, n in flops.items()}
    return each | {"FLOPs an image": flops, "peak": peak, "peak is": source}


if __name__ == "__main__":
    import tyro

    main(tyro.cli(BenchClip, description=__doc__))
