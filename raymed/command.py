"""The command line of what is no run: one thing done, its exit code, and one message where it cannot be done."""

import sys
from collections.abc import Callable
from typing import TypeVar

from raymed.config import UserError
from raymed.telemetry import telemetry_off

C = TypeVar("C")


def command(config: type[C], work: Callable[[C], str]) -> None:
    """Read the flags of a config, a dataclass, do the work and print what it returns; Python ends with `exit_code`."""
    import tyro

    telemetry_off()

    def done() -> None:
        print(work(tyro.cli(config, description=sys.modules["__main__"].__doc__)), flush=True)

    if code := exit_code(done):
        sys.exit(code)


def exit_code(work: Callable[[], int | None]) -> int:
    """What the work returns, or 0; 2 for something the user gave (one clear message); 130 when stopped by the user."""
    try:
        return work() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
