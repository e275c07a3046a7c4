"""The peer of jobs/bench_clip.py: open_clip's own trainer, with its loss, AdamW as its main.py groups it, its schedule.

Reads a folder: images.npy (N, C, H, W) uint8, tokens.npy (N, L) int64 padded to the model's context, order.npy
(steps, B) rows of every batch, checkpoint/ (open_clip's config and weights: `write_checkpoint`), and config.json. The
loader holds all of it on the device. Imports nothing else of this project.
"""

import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.loss import ClipLoss
from open_clip_train.scheduler import cosine_lr
from open_clip_train.train import train_one_epoch
from torch import Tensor


class RecordedLoss(ClipLoss):
    """open_clip's loss; the value of every step is kept."""

    def __init__(self) -> None:
        super().__init__(cache_labels=True)
        self.values: list[Tensor] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        losses: Any = super().forward(*args, **kwargs)
        self.values.append(losses["contrastive_loss"].detach())
        return losses


class OpenClipTraining:
    """One training, as many steps at a time as asked for."""

    def __init__(
        self,
        folder: Path,
        steps: int,
        warm_up: int,
        device: str = "cpu",
        precision: str = "fp32",
        compiled: bool = False,
    ):
        """steps, warm_up: of the whole schedule. precision: open_clip's name of it, fp32 or amp_bf16."""
        config = json.loads((folder / "config.json").read_text())
        self.images = torch.from_numpy(np.load(folder / "images.npy")).to(device)
        self.tokens = torch.from_numpy(np.load(folder / "tokens.npy")).to(device)
        self.order = torch.from_numpy(np.load(folder / "order.npy"))
        self.mean, self.std = (torch.tensor(config[name], device=device)[:, None, None] for name in ("mean", "std"))
        name = f"local-dir:{folder / 'checkpoint'}"
        self.model: Any = open_clip.create_model(name, precision=precision, device=device, output_dict=True)
        self.optimizer = _adamw(self.model, config)
        self.schedule = cosine_lr(self.optimizer, config["lr"], warm_up, steps)
        self.loss = RecordedLoss()
        self.compiled: Any = torch.compile(self.model) if compiled else self.model
        self.args = _arguments(device, precision, self.order.shape[1], config["clip"])
        self.done = 0

    def train(self, steps: int) -> None:
        """So many further steps: what train_one_epoch takes for an epoch."""
        data = {"train": SimpleNamespace(dataloader=_Loader(self, steps), set_epoch=lambda epoch: None)}
        schedule = self._schedule_from(self.done)
        train_one_epoch(self.compiled, data, self.loss, 0, self.optimizer, None, schedule, None, self.args)
        self.done += steps

    def _schedule_from(self, first: int) -> Any:
        return lambda step: self.schedule(first + step)

    @property
    def losses(self) -> list[float]:
        """Of all steps so far."""
        return torch.stack(self.loss.values).tolist()


class _Loader:
    """The next batches, normalised."""

    def __init__(self, training: OpenClipTraining, steps: int):
        self.training, self.num_batches = training, steps
        self.num_samples = steps * training.order.shape[1]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data = self.training
        for rows in data.order[data.done : data.done + self.num_batches]:
            rows = rows.to(data.images.device)
            yield (data.images[rows].float() / 255 - data.mean) / data.std, data.tokens[rows]


def _adamw(model: torch.nn.Module, config: dict[str, Any]) -> torch.optim.AdamW:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale")) for name, p in named]
    groups = [
        {"params": [p for (_, p), is_plain in zip(named, plain, strict=True) if is_plain], "weight_decay": 0.0},
        {
            "params": [p for (_, p), is_plain in zip(named, plain, strict=True) if not is_plain],
            "weight_decay": config["weight_decay"],
        },
    ]
    return torch.optim.AdamW(groups, lr=config["lr"], betas=(config["beta1"], config["beta2"]), eps=config["eps"])


def _arguments(device: str, precision: str, batch_size: int, clip: float | None) -> Namespace:
    """Of open_clip's command line, those that train_one_epoch reads, at their defaults."""
    return Namespace(
        device=device,
        precision=precision,
        batch_size=batch_size,
        grad_clip_norm=clip,
        accum_freq=1,
        log_every_n_steps=100,
        skip_scheduler=False,
        distill=False,
        horovod=False,
        wandb=False,
        rank=0,
        local_rank=0,
        world_size=1,
    )


def write_checkpoint(folder: Path, model: dict[str, Any], preprocess: dict[str, Any], seed: int) -> None:
    """What `local-dir:` reads: open_clip's configs and random weights."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    clip = open_clip.CustomTextCLIP(**model)
    state = {name: tensor.contiguous().clone() for name, tensor in clip.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    config = {"model_cfg": model | {"custom_text": True}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def write_bert(folder: Path, sizes: dict[str, int], words: Sequence[str]) -> None:
    """A BERT text tower's config and a WordPiece tokenizer that knows these words. Dropout is off."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig

    folder.mkdir(parents=True, exist_ok=True)
    fields: dict[str, Any] = {**sizes, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertConfig(vocab_size=30522, pad_token_id=0, **fields).save_pretrained(folder)
    special = {name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
    vocabulary = [*special.values(), "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertWordPieceTokenizer({word: k for k, word in enumerate(vocabulary)}).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(special | {"tokenizer_class": "BertTokenizer"}))
