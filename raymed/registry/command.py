"""The command line of a short job: no run, no folder, one thing done."""

import sys
from collections.abc import Callable
from typing import TypeVar

from raymed.config import UserError

C = TypeVar("C")


def command(config: type[C], work: Callable[[C], str]) -> None:
    """Read the flags of a config, a dataclass, do the work and print what it returns.

    Exit codes: 0; 2 for something the user gave (one clear message); 130 when stopped by the user.
    """
    import tyro

    from raymed.tracking import telemetry_off

    telemetry_off()
    try:
        print(work(tyro.cli(config, description=sys.modules["__main__"].__doc__)), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
