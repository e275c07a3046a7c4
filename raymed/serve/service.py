"""What a server does with a request, whatever protocol brought it: decode, prepare, ask, answer.

files -> uploads (threads) -> items (threads) -> networks (one thread a device) -> Answer
"""

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from raymed.config import UserError
from raymed.serve.access import log
from raymed.serve.canary import patient_of
from raymed.serve.config import ServeConfig, Wanted
from raymed.serve.contract import check_contract, check_frames
from raymed.serve.described import Described
from raymed.serve.engine import Engine
from raymed.serve.handlers import Decision, Fields, Handler, Prepared, Result, Upload
from raymed.serve.jobs import Jobs
from raymed.serve.keep import Keeper
from raymed.serve.kept import kept_of
from raymed.serve.live import Asking, Live
from raymed.serve.metrics import Metrics
from raymed.serve.models import Models, Served
from raymed.serve.problems import Problem, TooLarge, busy, problem_of
from raymed.serve.sources import source_of
from raymed.serve.spans import span
from raymed.serve.uploads import File, decode, quiet
from raymed.serve.uploads.room import Room
from raymed.serve.waits import Waits

T = TypeVar("T")
_CHECK_S = 10.0
"""Between two looks at whether the device computes."""
_FORGET_S = 3600.0
"""Between two looks at whether something is kept that has become too old."""
Given = File | Upload
"""Of a request: what is decoded here, or has come as pixels (place and room are then seen to by whoever made it)."""


class Answer(Described):
    """What leaves the server: where the answer comes from, and what a kind of model says."""

    model: str
    version: str
    """Of the registry; empty where the model was served from a folder."""
    run_id: str
    bundle: str
    """sha256 of the bundle's description, which holds the hashes of its weights."""
    preprocessing: str
    intended_use: str
    research_only: bool
    decision: Decision | None
    """None of answers that decide nothing, such as embeddings."""
    reasons: list[str]
    """Why the decision is as it is, or why the model abstains, for people."""
    result: dict[str, Any]
    """The rest, by the kind of the model."""


@dataclass(frozen=True)
class Answered:
    """An answer, the images that it is about, in their order, and what gave it."""

    answer: Answer
    images: list[Upload]
    handler: Handler


class Service:
    """A server's models, threads and limits. Made once a process; `start` and `stop` in its event loop."""

    def __init__(self, config: ServeConfig):
        self.config = config
        self.metrics = Metrics()
        self.engine = Engine(config.hardware, config.limits.queue, self.metrics.observe)
        wanted = [Wanted.parse(text) for text in config.models]
        served = {each.name: Served(each, source_of(each, config), kept_of(each, config)) for each in wanted}
        self.models = Models(served, self.engine, config.follow.canary, self._told)
        self.metrics.watch(self.models, self.engine)
        self.jobs = Jobs(config, self.models, self.engine)
        self.keeper = Keeper(config.keep, config.days) if config.keep else None
        self.draining = False
        """Told to end: readiness says so, and what comes is still answered."""
        self.room = Room(config.limits.held_pixels)
        quiet()
        self._decoders = ThreadPoolExecutor(max(2, len(os.sched_getaffinity(0))), "decode")
        self._tasks: list[asyncio.Task[Any]] = []

    async def start(self) -> None:
        """Load every model; those that cannot be loaded are tried again, and readiness says so."""
        await asyncio.gather(*(self.models.refresh(name) for name in self.models.names))
        every_s = self.config.follow.every_s
        self._tasks = [asyncio.create_task(self.models.follow(name, every_s)) for name in self.models.names]
        self._tasks.append(asyncio.create_task(self._watch_device()))
        await asyncio.to_thread(self.jobs.start, asyncio.get_running_loop())
        if self.keeper is not None:
            self._tasks.append(asyncio.create_task(self._forget(self.keeper)))

    async def stop(self) -> None:
        """End what runs in the background, then the threads."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self.jobs.stop)
        self._decoders.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.engine.close)

    @property
    def is_ready(self) -> bool:
        """Every model is ready, and the server is not about to end."""
        return all(model["ready"] for model in self.state().values()) and not self.draining

    def state(self) -> dict[str, Any]:
        """`Models.state`; on a device that does not compute no model is ready."""
        computes = self.engine.computes
        return {name: {**model, "ready": model["ready"] and computes} for name, model in self.models.state().items()}

    async def _watch_device(self) -> None:
        """A device that a request waits for in vain for as long as it may is no better than one that fails."""
        while True:
            await asyncio.sleep(_CHECK_S)
            before = self.engine.computes
            try:
                await self.engine.check(self.config.limits.timeout_s)
            except Exception as error:  # whatever a device raises
                if before:
                    log.write(event="the device does not compute", error=type(error).__name__)
            else:
                if not before:
                    log.write(event="the device computes again")

    async def _forget(self, keeper: Keeper) -> None:
        while True:
            try:
                await asyncio.to_thread(keeper.forget)
            except OSError as error:  # it is tried again: what is too old must not stay
                log.write(event="not forgotten", error=error.strerror or type(error).__name__)
            await asyncio.sleep(_FORGET_S)

    def _told(self, event: str, model: str, **what: Any) -> None:
        self.metrics.told(event, model, **what)
        log.write(event=event, model=model, **what)

    async def predict(
        self, name: str, files: Sequence[Given], fields: dict[str, Any], patient: str = "", champion: bool = False
    ) -> Answer:
        """The answer for the files of one case.

        fields: of the handler's `Fields`. patient: whatever names the patient, for the canary; it is hashed and goes
        nowhere else. champion: whoever it is, by the version in use. Raises Problem, UserError.
        """
        return (await self.answered(name, files, fields, patient, champion)).answer

    async def answered(
        self, name: str, files: Sequence[Given], fields: dict[str, Any], patient: str = "", champion: bool = False
    ) -> Answered:
        """`predict`, with what the answer is about and who gave it, for answers that are drawn."""
        if not patient and not champion and self.models.is_shared(name):
            patient = await self._in_decoder(patient_of, [file for file in files if isinstance(file, File)])
        live = self.models.get(name, patient)
        limit, started = self.config.limits.timeout_s, time.perf_counter()
        alias, asking = self.models.served[name].alias_of(live), Asking(live)
        log.note(model=name, version=live.origin.version)
        try:
            async with asyncio.timeout(limit):
                images, result = await self._answer(asking, files, fields)
        except TimeoutError:
            raise _late(limit, asking, fields) from None
        self.metrics.answered(name, alias, result)
        self.metrics.observe("total", name, time.perf_counter() - started, len(images))
        rest = result.model_dump(exclude={"decision", "reasons"})
        answer = Answer(**live.identity, decision=result.decision, reasons=result.reasons, result=rest)
        answered = Answered(answer, [image.upload for image in images], live.handler)
        if self.keeper is not None:
            await self._keep(self.keeper, answered)
        return answered

    async def _keep(self, keeper: Keeper, answered: Answered) -> None:
        """A full disk is told of, and stops no answer."""
        pixels = [image.pixels for image in answered.images]
        try:
            await asyncio.to_thread(keeper.keep, log.request_id(), pixels, answered.answer.model_dump_json())
        except OSError as error:
            self.metrics.not_kept()
            log.write(event="not kept", id=log.request_id(), error=error.strerror or type(error).__name__)

    async def _answer(
        self, asking: Asking, files: Sequence[Given], fields: dict[str, Any]
    ) -> tuple[list[Prepared], Result]:
        live = asking.live
        asked = checked_fields(live.handler, fields)
        if not files and live.handler.needs_image:
            raise Problem(422, f"{live.name} needs an image", field="files")
        with span("prepare", model=live.name):
            images = await self.prepared(live, files, asked, asking.waits)
        with span("answer", model=live.name):
            return images, await live.handler.answer(images, asked, asking)

    async def prepared(self, live: Live, files: Sequence[Given], fields: Fields, waits: Waits) -> list[Prepared]:
        """Files decoded and made ready for the network, in threads."""
        limits, handler, case = self.config.limits, live.handler, self.room.case()
        if len(files) > limits.files:
            raise Problem(413, f"{len(files)} files: at most {limits.files} make a case", field="files")

        def of_file(place: int, file: Given, begun: Callable[[], None]) -> list[Prepared]:
            begun()
            started = time.perf_counter()
            try:
                if isinstance(file, File):
                    uploads = decode(file, place, limits, handler.window, fields.frames, case)
                else:
                    uploads = [file]
                check_contract(handler.bundle, uploads)
            except (Problem, UserError) as error:
                self.metrics.undecoded(live.name, problem_of(error).status)
                raise
            decoded = time.perf_counter()
            found = [Prepared(upload, handler.prepare(upload)) for upload in uploads]
            self.metrics.observe("decode", live.name, decoded - started, 1)
            self.metrics.observe("prepare", live.name, time.perf_counter() - decoded, len(found))
            return found

        async def in_turn(place: int, file: Given) -> list[Prepared]:
            with waits.piece() as begun:
                return await self._in_decoder(of_file, place, file, begun)

        parts = await asyncio.gather(*(in_turn(place, file) for place, file in enumerate(files)))
        images = [image for part in parts for image in part]
        check_frames(fields.frames, [image.upload for image in images])
        return images

    async def _in_decoder(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._decoders, work, *arguments)


def _late(limit: float, asking: Asking, fields: Mapping[str, Any]) -> Problem:
    """503, unless it is the explanation that was late, and most of the time went into the request's own work, on a busy
    server as on an idle one: it would be late however often it is asked for."""
    if not fields.get("explain") or not asking.works_alone or asking.waits.seconds >= limit / 2:
        return busy(f"no answer within {limit:g} s", retry_after=2)
    ways = "fewer images (the field frames), another method, or a server that is given longer (--limits.timeout-s)"
    return TooLarge(f"explain: no map within {limit:g} s: {ways} is expected", field="explain")


def checked_fields(handler: Handler, fields: dict[str, Any]) -> Any:
    """The handler's `Fields`. Raises Problem (422) that names the field."""
    from pydantic import ValidationError

    from raymed.serve.problems import of_validation

    try:
        return handler.Fields(**fields)
    except ValidationError as error:
        known = ", ".join(handler.Fields.model_fields)
        unknown = error.errors()[0]["type"] == "extra_forbidden"
        raise of_validation(error.errors(), f"there is no such field: {known} are known" if unknown else "") from None
    except TypeError as error:
        raise UserError(f"fields: {error}") from None
