"""Say what a registered model is for and put it into use, or take that back.

    python jobs/promote_model.py --model hsg-supcon-asl --intended-use "Triage of HSG for a radiologist who reads all"
    python jobs/promote_model.py --model hsg-supcon-asl --rollback --why "more false alarms since Monday"
    python jobs/promote_model.py --model hsg-supcon-asl --bundle RUN/final/bundle --to candidate   # register it later

The version in use has the alias `champion` (models:/NAME@champion), the one before it `rollback`. Every change is
recorded: when, from and to which version, with which figures, and by whom and why where that is stated.
"""

from dataclasses import dataclass
from typing import Literal

from raymed.bundle import NOT_STATED
from raymed.config import UserError
from raymed.registry.card import write_card
from raymed.registry.command import command
from raymed.registry.config import check_name
from raymed.registry.promote import CANDIDATE, promote, roll_back
from raymed.registry.register import add, bundle_folder
from raymed.registry.store import alias_of, version_of
from raymed.storage import resolve_storage
from raymed.tracking import connect


@dataclass(frozen=True)
class PromoteModel:
    """Which version, where to, and why."""

    model: str
    """Name of the registered model."""
    version: int | None = None
    """None = the one with the alias candidate."""
    to: Literal["champion", "candidate"] = "champion"
    """champion: in use. candidate: only registered."""
    intended_use: str = NOT_STATED
    """On whom, by whom and for which decision the model is meant to be used; needed unless stated for this version."""
    rollback: bool = False
    """Make the champion before this one champion again."""
    bundle: str | None = None
    """Register this bundle first (a folder or s3:// location), as one that could not be registered by its job."""
    by: str = NOT_STATED
    """Who decided; recorded."""
    why: str = NOT_STATED
    """The reason; recorded."""
    storage: str | None = None
    """Where raymed keeps things; None = $RAYMED_HOME, else ~/.raymed."""
    tracking: str | None = None
    """MLflow tracking URI; None = $MLFLOW_TRACKING_URI, else the sqlite store in the storage."""

    def __post_init__(self) -> None:
        check_name(self.model)
        if self.rollback and (self.version is not None or self.bundle is not None or self.to != "champion"):
            raise UserError(
                "--rollback goes back to the version with the alias rollback: leave out version, bundle, to"
            )
        if self.version is not None and self.bundle is not None:
            raise UserError("give --version or --bundle, not both")


def change(config: PromoteModel) -> str:
    """Move the aliases; returns what has changed."""
    client = connect(config.tracking, resolve_storage(config.storage))
    if config.rollback:
        record = roll_back(client, config.model, by=config.by, why=config.why)
        return f"champion: {config.model} version {record['to_version']} (was {record['from_version']})"
    if config.bundle is not None:
        with bundle_folder(config.bundle) as folder:
            write_card(folder, config.model)
            number = add(client, folder, config.model).version
    else:
        number = config.version
    version = version_of(client, config.model, number) if number else alias_of(client, config.model, CANDIDATE)
    if version is None:
        raise UserError(f"{config.model} has no candidate: name a --version")
    if config.to == CANDIDATE:
        client.set_registered_model_alias(config.model, CANDIDATE, version.version)
        return f"candidate: {config.model} version {version.version}"
    record = promote(client, version, config.intended_use, by=config.by, why=config.why)
    return f"champion: {config.model} version {record['to_version']} (was {record['from_version'] or 'none'})"


if __name__ == "__main__":
    command(PromoteModel, change)
