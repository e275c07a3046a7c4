"""Under which name a model is registered, and what it is meant for."""

import re
from dataclasses import dataclass

from raymed.bundle import NOT_STATED
from raymed.config import UserError

_LEGAL = re.compile(r"[^\W_][\w .\-]{0,99}")


@dataclass(frozen=True)
class RegisterConfig:
    """The entry of a job's best model in MLflow's registry."""

    name: str | None = None
    """Name of the registered model; None = made from the data set and the method, such as scans-supcon-asl."""
    intended_use: str = NOT_STATED
    """On whom, by whom and for which decision the model is meant to be used. Only people can say it, and a model does
    not become `champion` before they do."""
    register: bool = True
    """Log the model to MLflow and register it."""

    def __post_init__(self) -> None:
        if self.name is not None:
            check_name(self.name)

    @property
    def is_stated(self) -> bool:
        """Whether somebody has said what the model is for."""
        return is_stated(self.intended_use)


def is_stated(intended_use: str) -> bool:
    """Whether the text says anything; "..." does not."""
    return intended_use.strip(" .\n\t").lower() not in ("", NOT_STATED)


def check_name(name: str) -> None:
    """Raise UserError for a name that MLflow's registry, a search in it or the URI models:/NAME@ALIAS cannot take."""
    if not _LEGAL.fullmatch(name):
        raise UserError(
            "the name of a registered model must begin with a letter or digit and be up to 100 letters, digits, spaces "
            f"and . _ -, got {name!r}"
        )


def default_name(manifest: str, method: str) -> str:
    """What a model is called unless told: the manifest's name without folders and ending, then the method.

    default_name("/data/HSG 2024.csv", "supcon_asl") == "hsg-2024-supcon-asl". Models of one method on one data set are
    versions of one registered model.
    """
    stem = re.split(r"[/\\]", manifest)[-1].split(".")[0]
    return "-".join(re.findall(r"[a-z0-9]+", f"{stem}-{method}".lower()))[:100].strip("-")
