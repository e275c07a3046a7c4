"""A checkpoint of BiomedCLIP's shape, with random weights and a few tokens: timm's ViT, a BERT text tower with an mlp
projection, its own WordPiece tokenizer, open_clip_config.json and a model card."""

import json
import string
from pathlib import Path

import torch

TEXT_TOWER = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
CONTEXT = 32
CARD = """---
language: en
license: mit
library_name: open_clip
---

# A tiny model of BiomedCLIP's shape
"""
_WORDS = (
    "a an the of in with and no is are on at right left upper lower lobe lung chest radiograph x ray scan ultrasound "
    "image shows finding findings effusion pneumonia nodule mass opacity cardiomegaly edema atelectasis pneumothorax "
    "normal small large two three one round bright dark heart liver kidney mild severe moderate patient view frontal"
).split()
_CHARACTERS = string.ascii_lowercase + string.digits
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = [
    *_SPECIAL,
    *string.punctuation,
    *_CHARACTERS,
    *("##" + c for c in _CHARACTERS),
    *dict.fromkeys(_WORDS[1:]),
]


def write_tiny_biomedclip(folder: Path, weights: str = "open_clip_pytorch_model.bin", seed: int = 0) -> Path:
    """Write the checkpoint into a folder, which is returned: `ClipConfig(f"local-dir:{folder}")`.

    weights: name of their file, one that ends in .bin or .safetensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text(json.dumps(_text_tower()))
    (folder / "open_clip_config.json").write_text(json.dumps(_config(), indent=2))
    _write_weights(folder, weights, seed)
    return folder


def _config() -> dict:
    return {
        "model_cfg": {
            "embed_dim": 32,
            "vision_cfg": {
                "timm_model_name": "test_vit",
                "timm_model_pretrained": False,
                "timm_pool": "",
                "timm_proj": "linear",
                "image_size": 160,
            },
            "text_cfg": {
                "hf_model_name": TEXT_TOWER,
                "hf_tokenizer_name": TEXT_TOWER,
                "hf_proj_type": "mlp",
                "hf_pooler_type": "cls_last_hidden_state_pooler",
                "context_length": CONTEXT,
            },
        },
        "preprocess_cfg": {
            "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711],
        },
    }


def _text_tower() -> dict:
    return {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import BertWordPieceTokenizer

    vocabulary = {token: number for number, token in enumerate(VOCABULARY)}
    BertWordPieceTokenizer(vocabulary, lowercase=True).save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    special = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), _SPECIAL, strict=True))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    described = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 1000, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


def _write_weights(folder: Path, file: str, seed: int) -> None:
    from open_clip import CustomTextCLIP
    from safetensors.torch import save_file

    model = _config()["model_cfg"]
    model["text_cfg"] |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = CustomTextCLIP(**model, init_logit_scale=4.4454).state_dict()
    if file.endswith(".safetensors"):
        save_file(state, folder / file)
    else:
        torch.save(state, folder / file)
