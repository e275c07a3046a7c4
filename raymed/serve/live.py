"""A model that has been loaded: its handler, its lanes on the device, and where it came from, as every answer says."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from raymed.bundle import NOT_STATED, Bundle
from raymed.models.folding import fold
from raymed.serve.compiled import compile_modules
from raymed.serve.engine import Engine, Lane, run_batch
from raymed.serve.handlers import Handler, handler_class
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
    in_flight: int = 0
    identity: dict[str, Any] = field(default_factory=dict)

    async def __call__(self, network: str, item: Tensor) -> Any:
        """See `raymed.serve.handlers.Ask`."""
        return await self.engine.ask(self.lanes[network], item)

    async def alone(self, work: Any) -> Any:
        """See `raymed.serve.handlers.Ask`."""
        return await self.engine.alone(self.name, work)


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
    network, example = handler.networks["image"], handler.examples()["image"]
    for module in handler.modules:
        fold(module, lambda: run_batch(network, [example]))


def _compile(handler: Handler, engine: Engine) -> None:
    """For a lone item, for batches and, where it is stated, for the largest of them."""
    network, example = handler.networks["image"], handler.examples()["image"]
    sizes = sorted({1, 2, max(1, engine.hardware.max_batch)})

    def run(size: int) -> None:
        engine.precisely(lambda: run_batch(network, [example] * size))

    compile_modules(handler.modules, run, sizes, engine.threads)


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
