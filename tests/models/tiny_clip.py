"""A checkpoint of open_clip's own towers, with random weights: a vision transformer of six blocks and a causal text
transformer of four, both on nn.MultiheadAttention."""

import json
from pathlib import Path

import torch

_MODEL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 6},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 4},
}


def write_tiny_clip(folder: Path) -> Path:
    """Write the checkpoint into a folder, which is returned: `ClipConfig(f"local-dir:{folder}")`."""
    from open_clip import CustomTextCLIP

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": _MODEL}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(CustomTextCLIP(**_MODEL).state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder
