"""The models of a server, each of which may be exchanged while it answers.

    fetch -> load -> check -> swap -> the old one goes when its last answer has left

A version that cannot be fetched, loaded or checked leaves the one before it in place, and is tried again: a bad bundle
after longer and longer pauses. A server that starts and cannot have the version in use answers by the last good one on
its disk.
"""

import asyncio
import gc
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from raymed.bundle import Bundle
from raymed.config import UserError
from raymed.serve.canary import is_in_share
from raymed.serve.config import Wanted
from raymed.serve.engine import Engine
from raymed.serve.handlers import Handler
from raymed.serve.kept import Kept
from raymed.serve.live import Live, Origin, load_live
from raymed.serve.problems import Problem, busy


class Source(Protocol):
    """Where the versions of a model come from."""

    name: str
    """Of the registered model; "" where there is no registry."""

    def newest(self, alias: str) -> Origin | None:
        """What bears the alias now (a source without aliases has one version, the champion); None where nothing does.
        Blocks. Raises UserError, or whatever the registry raises, where it cannot be asked."""
        ...

    def fetch(self, origin: Origin) -> Bundle:
        """The bundle. Blocks. Raises Unreachable, or whatever a store raises, where it cannot be had now, and another
        UserError where it is bad itself."""
        ...


class Unreachable(UserError):
    """A source does not give a bundle, which says nothing of the bundle."""


CHAMPION, CHALLENGER = "champion", "challenger"
_PAUSE_S, _LONGEST_S = 30.0, 3600.0
"""Before a version that was refused is tried again: the first pause, which is doubled for a bundle that is bad itself,
and the longest. A store that is out of reach, or a device that is full, may be well again soon."""


@dataclass(frozen=True)
class Refusal:
    """Why the version that bears an alias is not used. origin: None where it is not known which version that is."""

    reason: str
    origin: Origin | None
    pause: float
    until: float
    """Of time.monotonic(): no try before."""


@dataclass(eq=False)
class Served:
    """A model by name: the version in use and, where there is one, the one that some patients are answered by."""

    wanted: Wanted
    source: Source
    kept: Kept | None = None
    versions: dict[str, Live] = field(default_factory=dict)
    """By alias."""
    refused: dict[str, Refusal] = field(default_factory=dict)
    """By alias."""
    from_disk: bool = False
    """Whether the champion is the one that was kept, since its source could not be used."""
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    """Set where somebody says that an alias has moved."""

    def alias_of(self, live: Live) -> str:
        """The alias of a version in use, champion where it bears both; "" of one that has been exchanged."""
        return next((alias for alias in (CHAMPION, CHALLENGER) if self.versions.get(alias) is live), "")


class Models:
    """All of them. told(event, model, **what): of every change, for the log and the metrics."""

    def __init__(
        self,
        served: Mapping[str, Served],
        engine: Engine,
        canary: float = 0.0,
        told: Callable[..., None] = lambda *_, **__: None,
    ):
        self.served = dict(served)
        self.engine = engine
        self.canary = canary
        self.told = told
        self._left: list[weakref.ref[Handler]] = []
        """Of versions that are no longer used."""

    @property
    def names(self) -> list[str]:
        """Sorted."""
        return sorted(self.served)

    def get(self, name: str, patient: str = "") -> Live:
        """The version that answers for a patient: always the same one while aliases stay. Raises Problem.

        It stays loaded for as long as somebody refers to it.
        """
        if name not in self.served:
            raise Problem(
                404, f"there is no model {name!r}: there are {', '.join(self.names) or 'none'}", field="model"
            )
        versions = self.served[name].versions
        if CHAMPION not in versions:
            raise busy(f"{name} is not loaded yet", retry_after=5)
        if CHALLENGER in versions and is_in_share(name, patient, self.canary):
            return versions[CHALLENGER]
        return versions[CHAMPION]

    def is_shared(self, name: str) -> bool:
        """Whether it matters who the patient is: two versions answer."""
        return name in self.served and CHALLENGER in self.served[name].versions

    async def follow(self, name: str, every_s: float) -> None:
        """Refresh a model every so many seconds, and whenever somebody says that an alias has moved; for ever."""
        asked = self.served[name].asked
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(asked.wait(), every_s)
            asked.clear()
            await self.refresh(name)

    def look(self, registered: str) -> list[str]:
        """Have the models that are a registered one looked at now, those that were refused too; returns their names."""
        found = [name for name in self.names if self.served[name].source.name == registered]
        for name in found:
            self.served[name].refused.clear()
            self.served[name].asked.set()
        return found

    async def refresh(self, name: str) -> bool:
        """Bring a model up to what its source says now; returns whether something changed. Never raises for a version
        that cannot be used: the one before stays, and `Served.refused` says why."""
        served = self.served[name]
        async with served.changing:
            self._free()
            changed = await self._refresh_alias(served, CHAMPION)
            if self.canary:
                changed |= await self._refresh_alias(served, CHALLENGER)
            return changed

    async def _refresh_alias(self, served: Served, alias: str) -> bool:
        now, origin = served.versions.get(alias), None
        try:
            origin = await asyncio.to_thread(served.source.newest, alias)
            if origin is None:
                return self._without(served, alias)
            if _is_too_early(served.refused.get(alias), origin):
                return False
            if now is None or now.origin != origin:
                return await self._take(served, alias, origin)
        except Exception as error:  # whatever it is, the version before it goes on
            self._refuse(served, alias, origin, error)
        else:
            served.refused.pop(alias, None)
            served.from_disk &= alias != CHAMPION
            return False
        return alias == CHAMPION and now is None and await self._take_kept(served)

    def _without(self, served: Served, alias: str) -> bool:
        """Nothing bears the alias: nobody is answered by a challenger any more; a champion goes on."""
        if alias == CHAMPION:
            self._refuse(served, alias, None, UserError(f"{served.wanted.where}: there is no such version"))
            return False
        served.refused.pop(alias, None)
        return self._put(served, alias, None) is not None

    async def _take(self, served: Served, alias: str, origin: Origin) -> bool:
        """Put a version in its place: one that another alias has brought here already, or a new one."""
        live = next((live for live in served.versions.values() if live.origin == origin), None)
        if live is None:
            bundle = await asyncio.to_thread(served.source.fetch, origin)
            live = await self._load(served, bundle, origin)
        self._use(served, alias, live)
        served.refused.pop(alias, None)
        if alias == CHAMPION:
            served.from_disk = False
            await self._keep(served, live)
        return True

    async def _load(self, served: Served, bundle: Bundle, origin: Origin) -> Live:
        return await asyncio.to_thread(
            load_live, served.wanted.name, bundle, origin, served.wanted.options, self.engine
        )

    def _use(self, served: Served, alias: str, live: Live) -> None:
        self._put(served, alias, live)
        origin = live.origin
        self.told("loaded", served.wanted.name, alias=alias, version=origin.version, bundle=origin.digest[:12])

    def _put(self, served: Served, alias: str, live: Live | None) -> Live | None:
        """Exchange the version of an alias; returns the one before."""
        before = served.versions.get(alias)
        if live is not None:
            served.versions[alias] = live  # in one step: threads read it
        else:
            served.versions.pop(alias, None)
        if before is not None and before not in served.versions.values():
            self._left.append(weakref.ref(before.handler))
        return before

    def _free(self) -> None:
        """A version goes with its last answer, unless something in its handler refers to the handler: that goes when
        the collector of cycles comes by, which in a server at work may take hours."""
        if any(handler() is not None for handler in self._left):
            gc.collect()
        self._left = [handler for handler in self._left if handler() is not None]

    async def _take_kept(self, served: Served) -> bool:
        """Answer by the last good version, since the source could not be asked, or gave what cannot be used."""
        if served.kept is None:
            return False
        try:
            found = await asyncio.to_thread(served.kept.get)
            if found is None:
                return False
            live = await self._load(served, *found)
        except Exception as error:  # it is only a stand-in
            self.told("not kept", served.wanted.name, reason=_reason(error))
            return False
        self._use(served, CHAMPION, live)
        served.from_disk = True
        return True

    async def _keep(self, served: Served, live: Live) -> None:
        """A full disk stops no answer."""
        if served.kept is None:
            return
        try:
            await asyncio.to_thread(served.kept.put, live.handler.bundle, live.origin)
        except OSError as error:
            self.told("not kept", served.wanted.name, reason=error.strerror or type(error).__name__)

    def _refuse(self, served: Served, alias: str, origin: Origin | None, error: Exception) -> None:
        before, reason = served.refused.get(alias), _reason(error)
        if before is None or before.reason != reason:
            self.told("refused", served.wanted.name, alias=alias, reason=reason)
        again = before is not None and before.origin == origin and _is_of_the_bundle(error)
        pause = min(2 * before.pause, _LONGEST_S) if before and again else _PAUSE_S
        served.refused[alias] = Refusal(reason, origin, pause, time.monotonic() + pause)

    def state(self) -> dict[str, Any]:
        """For readiness: of each model what is loaded and from where, and what is refused and why."""
        return {name: _state(served) for name, served in self.served.items()}


def _state(served: Served) -> dict[str, Any]:
    versions = {alias: live.origin.version or live.origin.digest[:12] for alias, live in served.versions.items()}
    where = served.wanted.where if served.source.name else "a folder"
    return {
        "ready": CHAMPION in served.versions,
        "versions": versions,
        "from": "the last good version on this server's disk" if served.from_disk else where,
        "refused": {alias: refusal.reason for alias, refusal in served.refused.items()},
    }


def _is_too_early(refusal: Refusal | None, origin: Origin) -> bool:
    """Whether a version was refused not long ago."""
    return refusal is not None and refusal.origin == origin and time.monotonic() < refusal.until


def _is_of_the_bundle(error: Exception) -> bool:
    """Whether another try will find the same."""
    return isinstance(error, UserError) and not isinstance(error, Unreachable)


def _reason(error: Exception) -> str:
    """Only messages of our own: those of a client may hold a password."""
    return str(error) if isinstance(error, UserError) else type(error).__name__
