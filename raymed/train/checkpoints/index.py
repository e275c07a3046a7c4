"""Which checkpoints of a phase are whole, and which of them are kept: the content of `index.json`."""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from raymed.train.checkpoints.files import sealed, unsealed


@dataclass(frozen=True)
class Index:
    """Names of checkpoint folders. Nothing that is not named here is a checkpoint."""

    last: str | None = None
    best: str | None = None
    recent: list[str] = field(default_factory=list)
    """The newest ones, in the order they were saved."""
    pinned: dict[str, str] = field(default_factory=dict)
    """Name -> why it is never removed."""

    @classmethod
    def parse(cls, text: bytes) -> "Index | None":
        """The index that `text` says, or None where the text is damaged."""
        content: dict[str, Any] | None = unsealed(text)
        if content is None or content.keys() != {f.name for f in fields(cls)}:
            return None
        return cls(**content)

    def text(self) -> str:
        """What `parse` reads."""
        return sealed(asdict(self))

    @property
    def step(self) -> int:
        """Of the last one; -1 where there is none."""
        return step_of(self.last) if self.last else -1

    def names(self) -> set[str]:
        """All that are kept."""
        return {*self.recent, *self.pinned} | {name for name in (self.last, self.best) if name}

    def within(self, whole: set[str]) -> "Index":
        """What is left of it where only these folders are whole.

        Where the best one is lost, those after it are of no use: whoever went on from them would never have it again.
        """
        usable = self.names() & whole
        if self.best and self.best not in whole:
            usable = {name for name in usable if step_of(name) < step_of(self.best)}
        return Index(
            last=self.last if self.last in usable else max(usable, key=step_of, default=None),
            best=self.best if self.best in usable else None,
            recent=[name for name in self.recent if name in usable],
            pinned={name: reason for name, reason in self.pinned.items() if name in whole},
        )

    def free_name(self, step: int) -> str:
        """Name of a checkpoint after so many steps. A folder that counts is never written over."""
        name, number = f"step-{step:06d}", 1
        while name in self.names():
            number += 1
            name = f"step-{step:06d}-{number}"
        return name

    def saved(self, name: str, best: bool, keep_last: int) -> "Index":
        """With a new last one, which is also the best where it is or where there is none."""
        recent = [*self.recent, name][-keep_last:]
        return replace(self, last=name, best=name if best or self.best is None else self.best, recent=recent)


def step_of(name: str) -> int:
    """Steps done at a checkpoint of that name."""
    return int(name.split("-")[1])
