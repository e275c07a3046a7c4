"""A model that has been loaded: its handler, its lanes on the device, and where it came from, as every answer says."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from raymed.bundle import NOT_STATED, Bundle
from raymed.models.folding import fold
from raymed.serve.compiled import compile_modules
from raymed.serve.engine import Engine, Lane, run_batch
from raymed.serve.handlers import Handler, handler_class
from raymed.serve.waits import Waits
from raymed.tasks.golden import check_golden

_BF16_TOLERANCE = 0.03


@dataclass(frozen=True)
class Origin:
    """Which bundle it is.

    where: what it is fetched by. version: of the registry, or "" of a folder. digest: sha256 of the bundle's content
    (`raymed.registry.register.identity`), the same wherever it lies. intended_use, research_only: people may state
    another one, and release a version.
    """

    where: str
    version: str
    digest: str
    intended_use: str = ""
    research_only: bool = True


@dataclass(eq=False)
class Live:
    """One version of one model, answering."""

    name: str
    origin: Origin
    handler: Handler
    lanes: Mapping[str, Lane]
    engine: Engine
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def at_once(self) -> int:
        """See `raymed.serve.handlers.Ask`."""
        return self.engine.at_once

    async def __call__(self, network: str, item: Tensor) -> Any:
        """See `raymed.serve.handlers.Ask`."""
        return await self.engine.ask(self.lanes[network], item)

    async def alone(self, work: Any) -> Any:
        """See `raymed.serve.handlers.Ask`."""
        return await self.engine.alone(self.name, work)


@dataclass(eq=False)
class Asking:
    """What a handler has for one request: see `raymed.serve.handlers.Ask`."""

    live: Live
    waits: Waits = field(default_factory=Waits)
    works_alone: bool = False
    """Whether work alone has been asked for: the networks have answered by then."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Of the version."""
        return self.live.identity

    @property
    def at_once(self) -> int:
        """See `Live`."""
        return self.live.at_once

    async def __call__(self, network: str, item: Tensor) -> Any:
        """See `Live`."""
        with self.waits.piece() as begun:
            return await self.live.engine.ask(self.live.lanes[network], item, begun)

    async def alone(self, work: Callable[[], Any]) -> Any:
        """See `Live`."""
        self.works_alone = True
        with self.waits.piece() as begun:
            return await self.live.engine.alone(self.live.name, work, begun)


def load_live(name: str, bundle: Bundle, origin: Origin, options: Mapping[str, str], engine: Engine) -> Live:
    """Build, check and warm up. Blocks for seconds. Raises UserError for a bundle that cannot be served, or that does
    not answer golden inputs as it did when it was made."""
    handler = handler_class(bundle.kind)(bundle, engine.device, options)
    _fold(handler)
    if engine.hardware.compile:
        _compile(handler, engine)
    tolerance = _BF16_TOLERANCE if engine.hardware.precision == "bf16" else None
    check_golden(bundle, engine.now(lambda: engine.precisely(handler.golden)), tolerance)
    lanes = engine.lanes(name, handler.networks, handler.examples())
    return Live(name, origin, handler, lanes, engine, identity=identity_of(name, bundle, origin))


def _fold(handler: Handler) -> None:
    """In full precision, whatever requests are answered in."""
    examples = handler.examples()
    for module in handler.modules:
        fold(module, lambda: _run(handler, examples))


def _compile(handler: Handler, engine: Engine) -> None:
    """For a lone item, for batches and, where it is stated, for the largest of them."""
    examples = handler.examples()
    sizes = sorted({1, 2, max(1, engine.hardware.max_batch)})

    def run(size: int) -> None:
        engine.precisely(lambda: _run(handler, examples, size))

    compile_modules(handler.modules, run, sizes, engine.threads)


def _run(handler: Handler, examples: Mapping[str, Tensor], size: int = 1) -> None:
    """Every network, on a batch."""
    for name, network in handler.networks.items():
        run_batch(network, [examples[name]] * size)


def identity_of(name: str, bundle: Bundle, origin: Origin) -> dict[str, Any]:
    """What stands in every answer: which weights, made by which run, with which preprocessing, for which use."""
    return {
        "model": name,
        "version": origin.version,
        "run_id": bundle.provenance.get("run_key", NOT_STATED),
        "bundle": origin.digest,
        "preprocessing": preprocessing_id(bundle.preprocess),
        "intended_use": bundle.intended_use,
        "research_only": origin.research_only,
    }


def preprocessing_id(preprocess: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits, equal for equal preprocessing."""
    return hashlib.sha256(json.dumps(preprocess, sort_keys=True).encode()).hexdigest()[:16]
