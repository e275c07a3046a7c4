"""The files of a published CLIP, and what they say of its architecture, weights, tokenizer, images and licence.

    ViT-B-16             an architecture of open_clip; `pretrained` is one of its tags, or a file
    hf-hub:ORG/NAME      a repository of the Hugging Face hub
    local-dir:PATH       the same files in a folder, as `hf download ORG/NAME --local-dir PATH` leaves them

Such a repository or folder holds open_clip_config.json, the weights and, where the text tower is not open_clip's own,
tokenizer files and the text tower's config.json. What lies in the hub's cache is not asked of the hub again.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymed.bundle import NOT_STATED
from raymed.config import UserError
from raymed.models.clip_config import FOLDER, HUB, ClipConfig
from raymed.models.tokens import Tokenizer, open_clip_tokenizer, transformers_tokenizer
from raymed.storage import is_remote, local_copy, local_folder_copy

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
TOKENIZER = ("tokenizer.json", "vocab.txt", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model")
HUB_TIMEOUT = 5.0  # seconds
_MODEL_FIELDS = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias")

_BERT_BASE = {
    "model_type": "bert", "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512, "type_vocab_size": 2, "initializer_range": 0.02, "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}  # fmt: skip
_KNOWN_TEXT_TOWERS = {  # BiomedCLIP's: its repository holds all but this
    "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract": _BERT_BASE,
    "microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract": _BERT_BASE,
}


@dataclass(frozen=True)
class Published:
    """What is published under a name.

    Attributes:
        name: as the user gave it.
        model: open_clip's model_cfg.
        preprocess: its preprocess_cfg: mean and std, of the images that the weights were trained with.
        source: where the other files are: hf-hub:ORG/NAME or local-dir:PATH; None: nowhere.
        weights: names of the weights' file in the source, the first that is there; without a source, one file's place.
    """

    name: str
    model: dict[str, Any]
    preprocess: dict[str, Any]
    source: str | None
    weights: tuple[str, ...]


def published(config: ClipConfig) -> Published:
    """Look up config.name, which is not "small". Raises UserError where files cannot be had or are damaged."""
    name = config.name
    if not name.startswith((HUB, FOLDER)):
        return _architecture(name, config.pretrained)
    path = find(name, CONFIG)
    if path is None:
        raise UserError(f"model.name {name} has no {CONFIG}. {_needed(name)}")
    found = _json(path)
    model = found.get("model_cfg", {})
    if not {"embed_dim", "vision_cfg", "text_cfg"} <= model.keys():
        raise UserError(f"model.name {name}: {CONFIG} has no model_cfg with embed_dim, vision_cfg and text_cfg")
    return Published(name, _plain(model), found.get("preprocess_cfg", {}), name, WEIGHTS)


def weights_file(found: Published) -> Path | None:
    """The weights; None where the name is an architecture without any. Raises UserError where they are missing."""
    if not found.weights:
        return None
    if found.source is None:
        place = found.weights[0]
        if place.startswith(("https:", "http:")):
            return _downloaded(found, place)
        return local_copy(place if is_remote(place) else Path(place).expanduser())
    path = find(found.source, *found.weights)
    if path is None:
        wanted = " or ".join(found.weights)
        raise UserError(f"model.name {found.name} has no weights: {wanted} is missing. {_needed(found.source)}")
    return path


def text_tower_config(found: Published) -> dict[str, Any] | None:
    """config.json of a text tower of the transformers library; None for open_clip's own."""
    tower = found.model["text_cfg"].get("hf_model_name")
    if not tower:
        return None
    beside = find(found.name, "config.json") if found.name.startswith(FOLDER) else None
    if beside is not None and "model_type" in (config := _json(beside)):
        return config
    if tower in _KNOWN_TEXT_TOWERS:
        return dict(_KNOWN_TEXT_TOWERS[tower])
    if Path(tower, "config.json").is_file():
        return _json(Path(tower, "config.json"))
    try:
        path = _from_hub(tower, "config.json")
    except UserError as error:
        place = f"{_folder(found.name)}/config.json" if found.name.startswith(FOLDER) else "the hub's cache"
        url = f"https://huggingface.co/{tower}/resolve/main/config.json"
        raise UserError(f"model.name {found.name}: its text tower is {tower}: put {url} at {place}") from error
    if path is None:
        raise UserError(f"model.name {found.name}: its text tower {tower} has no config.json")
    return _json(path)


def tokenizer_of(found: Published) -> Tokenizer:
    """The tokenizer that goes with the text tower."""
    text = found.model["text_cfg"]
    options = {"context_length": text.get("context_length", 77), **(text.get("tokenizer_kwargs") or {})}
    unknown = sorted(options.keys() - {"context_length", "clean", "strip_sep_token"})
    unknown += ["tokenizer_mode"] if text.get("tokenizer_mode") else []
    if unknown:
        raise UserError(f"model.name {found.name}: its tokenizer's option {unknown[0]} is not supported")
    if not text.get("hf_tokenizer_name"):
        return open_clip_tokenizer(**options)
    place = _tokenizer_place(found, text["hf_tokenizer_name"])
    try:
        return transformers_tokenizer(place, **options)
    except UserError:
        raise
    except Exception as error:  # transformers raises whatever the reader of that kind of file raises
        raise UserError(
            f"model.name {found.name}: its tokenizer cannot be read from {place} ({_first_line(error)}). "
            f"Wanted are tokenizer.json and tokenizer_config.json{_and_bring(found)}"
        ) from error


_FITS = {"shortest": "crop", "longest": "letterbox", "squash": "stretch"}  # open_clip's names, and ours


def image_input(found: Published) -> dict[str, Any]:
    """{"size", "channels"}, with weights also {"mean", "std", "fit"}: what the image tower was built for and trained
    with, as fields of `Preprocess`."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    size = found.model["vision_cfg"].get("image_size", 224)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    if height != width:
        raise UserError(f"model.name {found.name} sees images of {height} x {width} pixels; only squares are supported")
    seen: dict[str, Any] = {"size": int(height), "channels": 3}
    if found.weights:
        seen["mean"] = tuple(found.preprocess.get("mean") or OPENAI_DATASET_MEAN)
        seen["std"] = tuple(found.preprocess.get("std") or OPENAI_DATASET_STD)
        seen["fit"] = _FITS.get(found.preprocess.get("resize_mode", "shortest"), "crop")
    return seen


def licence_of(found: Published) -> dict[str, str]:
    """{"name", "source"} of the weights' licence, from the front matter of the model card."""
    from huggingface_hub import metadata_load

    if not found.weights:
        return {"name": "none needed", "source": f"{found.name}, trained from random weights"}
    if found.source is None:
        return {"name": NOT_STATED, "source": found.weights[0].rpartition("/")[2]}
    source = found.source if found.source.startswith(HUB) else f"{FOLDER}{_folder(found.source).name}"
    try:
        card = find(found.source, "README.md")
        stated = (metadata_load(card) if card else None) or {}
    except Exception as error:  # the hub is away, or the front matter is no YAML: no reason to stop
        return {"name": NOT_STATED, "source": f"{source}, whose model card cannot be read ({type(error).__name__})"}
    names = stated.get("license_name") or stated.get("license") or NOT_STATED
    return {"name": ", ".join(names) if isinstance(names, list) else str(names), "source": source}


def find(source: str, *files: str) -> Path | None:
    """The first of these files that a source has, on this machine; None where it has none of them."""
    if source.startswith(FOLDER):
        folder = _folder(source)
        return next((folder / file for file in files if (folder / file).is_file()), None)
    found = (_from_hub(source.removeprefix(HUB), file) for file in files)
    return next((path for path in found if path is not None), None)


def _architecture(name: str, pretrained: str | None) -> Published:
    import open_clip

    model = _plain(open_clip.get_model_config(name) or {})
    tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    if not tag:
        return Published(name, model, {}, None, (pretrained,) if pretrained else ())
    model["quick_gelu"] = tag.get("quick_gelu", False)  # the activation that these weights were trained with
    if not tag["hf_hub"]:
        return Published(name, model, tag, None, (tag["url"],))
    repo, file = os.path.split(tag["hf_hub"])
    return Published(name, model, tag, HUB + repo, (file,) if file else WEIGHTS)


def _plain(model: dict[str, Any]) -> dict[str, Any]:
    """A model_cfg without what is not for the two encoders: captioning heads, weights of the towers alone."""
    kept: dict[str, Any] = {field: model[field] for field in _MODEL_FIELDS if field in model}
    for tower, pretrained in (("vision_cfg", "timm_model_pretrained"), ("text_cfg", "hf_model_pretrained")):
        kept[tower] = {**kept.get(tower, {}), pretrained: False, "output_tokens": False}
    return kept


def _folder(source: str) -> Path:
    place = source.removeprefix(FOLDER)
    if is_remote(place):
        return local_folder_copy(place)
    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise UserError(f"model.name {source}: there is no folder {folder}. {_needed(source)}")
    return folder


def _from_hub(repo: str, file: str) -> Path | None:
    """A file of a repository, from the hub's cache if it is there; None where the repository has no such file."""
    import huggingface_hub as hub
    from huggingface_hub.errors import RemoteEntryNotFoundError

    cached = hub.try_to_load_from_cache(repo, file)
    if cached is not None:
        return Path(cached) if isinstance(cached, str) else None  # else: known to be missing
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(repo, file), timeout=HUB_TIMEOUT)
        return Path(hub.hf_hub_download(repo, file))
    except RemoteEntryNotFoundError:
        return None
    except Exception as error:  # whatever the hub's client and its transport raise
        raise UserError(
            f"model.name: cannot get {file} of {repo} from the hub ({type(error).__name__}). On a machine that can, "
            f"run: hf download {repo} --local-dir FOLDER. Bring the folder here and set --model.name {FOLDER}FOLDER. "
            f"{_needed(HUB + repo)}"
        ) from error


def _downloaded(found: Published, url: str) -> Path:
    from open_clip import download_pretrained_from_url

    try:
        return Path(download_pretrained_from_url(url))
    except Exception as error:  # urllib's errors, and a wrong checksum
        raise UserError(
            f"model.pretrained: cannot download the weights of {found.name} ({type(error).__name__}). On a machine "
            f"that can, get {url}, bring the file here and set --model.pretrained FILE"
        ) from error


def _tokenizer_place(found: Published, repo: str) -> str:
    """The folder itself, or the hub's repository after a look whether it can be reached."""
    if not found.name.startswith(FOLDER):
        _from_hub(repo, "tokenizer_config.json")
        return repo
    if find(found.name, *TOKENIZER) is None:
        raise UserError(
            f"model.name {found.name}: the tokenizer is missing: put tokenizer.json and tokenizer_config.json of "
            f"{repo} into {_folder(found.name)}"
        )
    return str(_folder(found.name))


def _and_bring(found: Published) -> str:
    return f" in {_folder(found.name)}" if found.name.startswith(FOLDER) else f". {_needed(found.name)}"


def _needed(source: str) -> str:
    """What a folder must hold."""
    return (
        f"{'Such a folder' if source.startswith(FOLDER) else 'That folder'} must hold {CONFIG}, {WEIGHTS[0]} or "
        f"{WEIGHTS[-1]} and, where the text tower is not open_clip's own, tokenizer.json, tokenizer_config.json and "
        "the text tower's config.json"
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not JSON ({_first_line(error)}). Copy it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object. Copy it again")
    return found


def _first_line(error: Exception) -> str:
    lines: Iterable[str] = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {next(iter(lines))[:200]}"
