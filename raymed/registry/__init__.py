"""What becomes of a trained model: its card, its place in MLflow's registry, and its export.

`card` writes the model card into a bundle's folder. `register` logs a bundle to MLflow and registers it as `candidate`;
`promote` makes a version `champion` once somebody has said what it is for, and takes that back. `export` turns a
bundle into ONNX, torch.export or a MONAI bundle. Nothing here imports MLflow before it is used.
"""

from raymed.registry.card import provenance, write_card
from raymed.registry.config import RegisterConfig, default_name
from raymed.registry.register import Registered, register

__all__ = ["RegisterConfig", "Registered", "default_name", "provenance", "register", "write_card"]
