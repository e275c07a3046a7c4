"""Say what a registered model is for and put it into use, or take that back.

    python jobs/promote_model.py --model hsg-supcon-asl --intended-use "Triage of HSG for a radiologist who reads all"
    python jobs/promote_model.py --model hsg-supcon-asl --gate.manifest external.csv     # only if it is no worse
    python jobs/promote_model.py --model hsg-supcon-asl --to challenger                  # for a share of the patients
    python jobs/promote_model.py --model hsg-supcon-asl --version 3 --release --by "the board" --why "study 12 is done"
    python jobs/promote_model.py --model hsg-supcon-asl --rollback --why "more false alarms since Monday"
    python jobs/promote_model.py --model hsg-supcon-asl --bundle RUN/model --to candidate   # register it later
    python jobs/promote_model.py --model hsg-supcon-asl --verify                         # is the record as it was?

The version in use has the alias `champion` (models:/NAME@champion), the one before it `rollback`. What is to become
champion must answer its golden inputs and, where there is another champion, must not be slower than that one and not
worse on the images of --gate.manifest; without such images, or where it does not pass, it takes --force --why "...".
Answers of every version are marked "research use only" until that version is released for the use that is stated;
--restrict, or another stated use, puts the mark back.
Every decision, a refusal too, is recorded in STORAGE/registry/audit.jsonl: when, by whom, from and to which version,
with which figures and why.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from raymed.bundle import NOT_STATED
from raymed.command import command
from raymed.config import UserError
from raymed.data.manifest import DataConfig
from raymed.registry.audit import Audit
from raymed.registry.card import write_card
from raymed.registry.config import check_name, is_stated
from raymed.registry.gates import GateConfig, is_passed
from raymed.registry.promote import (
    CANDIDATE,
    CHALLENGER,
    CHAMPION,
    anchors,
    challenge,
    nominate,
    promote,
    refuse,
    release,
    restrict,
    roll_back,
    stated_use,
    withdraw,
)
from raymed.registry.register import add, bundle_folder
from raymed.registry.store import alias_of, version_of
from raymed.results.gates import gates
from raymed.storage import resolve_storage
from raymed.tracking import connect
from raymed.train.runs.job import RunConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True)
class PromoteModel:
    """Which version, where to, and why."""

    model: str
    """Name of the registered model."""
    version: int | None = None
    """None = the one with the alias candidate."""
    to: Literal["champion", "challenger", "candidate"] = "champion"
    """champion: in use. challenger: answers the share of patients that servers were told (follow.canary). candidate:
    only registered."""
    intended_use: str = NOT_STATED
    """On whom, by whom and for which decision the model is meant to be used; needed unless stated for this version."""
    gate: GateConfig = GateConfig()
    data: DataConfig = DataConfig()
    """How the images of --gate.manifest are read."""
    force: bool = False
    """Promote what does not pass, or what is not compared with the champion that it replaces; --why is needed."""
    rollback: bool = False
    """Make the champion before this one champion again."""
    withdraw: bool = False
    """Take the alias challenger away: the champion answers everybody."""
    release: bool = False
    """Take the mark "research use only" away from --version, for the use that is stated; --by and --why are needed."""
    restrict: bool = False
    """Put that mark back on --version."""
    verify: bool = False
    """Only look whether every recorded decision, about whatever model, is there and as it was written."""
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
        alone = [name for name in ("rollback", "withdraw", "verify") if getattr(self, name)]
        if alone and (self.version is not None or self.bundle is not None or self.to != CHAMPION or len(alone) > 1):
            about = "goes back to the version with the alias rollback" if self.rollback else "is about no new version"
            raise UserError(f"--{alone[0]} {about}: leave out version, bundle, to, and others of its kind")
        if self.version is not None and self.bundle is not None:
            raise UserError("give --version or --bundle, not both")
        marks = [name for name in ("release", "restrict") if getattr(self, name)]
        if marks and (self.version is None or self.to != CHAMPION or len(alone + marks) > 1):
            raise UserError(f"--{marks[0]} is about one --version: name it, and leave out to, and others of its kind")
        if self.force and not is_stated(self.why):
            raise UserError('--force takes a responsibility: say why, --why "..."')


def change(config: PromoteModel) -> str:
    """Move the aliases; returns what has changed."""
    storage = resolve_storage(config.storage)
    client, audit, name = connect(config.tracking, storage), Audit(storage), config.model
    told = {"by": config.by, "why": config.why}
    if config.verify:
        held = anchors(client)
        num, others = audit.verify(held), len(audit.others(held))
        elsewhere = f"\n{others} more stand in the logs of other storages: verify them there" if others else ""
        return f"{num} recorded decision{'s' * (num != 1)}, each as it was written: {audit.path}{elsewhere}"
    if config.withdraw:
        return f"challenger: none (was {name} version {withdraw(client, name, **told, audit=audit)})"
    if config.rollback:
        record = roll_back(client, name, **told, audit=audit)
        return f"champion: {name} version {record['to_version']} (was {record['from_version']})"
    version = _version(client, config, audit)
    if config.release:
        release(client, version, config.intended_use, **told, audit=audit)
        return f"released from research use: {name} version {version.version}"
    if config.restrict:
        restrict(client, version, **told, audit=audit)
        return f"for research use only: {name} version {version.version}"
    if config.to == CANDIDATE:
        nominate(client, version, **told, audit=audit)
        return f"candidate: {name} version {version.version}"
    use = stated_use(version, config.intended_use)
    run = RunConfig(storage=config.storage, tracking=config.tracking)
    examined = gates(client, version, config.gate, config.data, run)
    replaces = config.to == CHAMPION and examined.champion not in (None, int(version.version))
    if not config.force and not is_passed(examined.gates, replaces):
        refuse(client, version, examined, **told, audit=audit)
    lines = "".join(f"\n    {gate}" for gate in examined.gates)
    if config.to == CHALLENGER:
        challenge(client, version, use, **told, examined=examined, audit=audit)
        return f"challenger: {name} version {version.version}{lines}"
    record = promote(client, version, use, **told, examined=examined, audit=audit)
    return f"champion: {name} version {record['to_version']} (was {record['from_version'] or 'none'}){lines}"


def _version(client: "MlflowClient", config: PromoteModel, audit: Audit) -> "ModelVersion":
    number = config.version
    if config.bundle is not None:
        with bundle_folder(config.bundle) as folder:
            write_card(folder, config.model)
            number = add(client, folder, config.model, audit=audit).version
    found = version_of(client, config.model, number) if number else alias_of(client, config.model, CANDIDATE)
    if found is None:
        raise UserError(f"{config.model} has no candidate: name a --version")
    return found


if __name__ == "__main__":
    command(PromoteModel, change)
