"""A config as the command line that gives it."""

import shlex
from typing import Any

from raymed.config import flatten


def command_line(job: str, config: Any, default: Any = None) -> str:
    """`python jobs/JOB.py` and, quoted for a shell, every flag of the config that is not the job's default.

    Flags that say where or under which name things are kept (`run`) are left out. default: the config the job starts
    from; None = every flag is stated.
    """
    known = {} if default is None else flatten(default)
    fields = {field: value for field, value in flatten(config).items() if not field.startswith("run.")}
    changed = {field: value for field, value in fields.items() if field not in known or known[field] != value}
    flags = [part for field, value in changed.items() for part in _flag(field, value)]
    return shlex.join(["python", f"jobs/{job}.py", *flags])


def _flag(field: str, value: Any) -> list[str]:
    *parents, name = field.removeprefix("recipe.").replace("_", "-").split(".")
    if isinstance(value, bool):
        return ["--" + ".".join([*parents, name if value else f"no-{name}"])]
    flag = "--" + ".".join([*parents, name])
    return [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
