"""Bring up a cluster, use it, take it down.

    python -m raymed.cluster up PROVIDER [flags]     local, onprem, aws, gcp or kuberay
    python -m raymed.cluster status                  each part; exit code 1 where one is down
    python -m raymed.cluster submit JOB [flags]      run a job there, as jobs/train_classifier.py, and follow it
    python -m raymed.cluster logs [NAME] [--follow]  of the last job, or of a job, part or host by its name
    python -m raymed.cluster stop [NAME]             ask the last job that runs, or that one, to stop
    python -m raymed.cluster down                    end all of it; what it stored stays

`COMMAND --help`, and `up PROVIDER --help`, tell the flags. Exit codes: 0; 1 where a part is down; 2 for something that
was given; 130 when stopped by the user; of `submit` and `logs --follow`, the job's own.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

from tyro.conf import Positional, arg

from raymed.cluster import providers, state
from raymed.cluster.state import Cluster
from raymed.command import exit_code
from raymed.config import UserError, check_choice
from raymed.telemetry import telemetry_off

C = TypeVar("C")
_WIDE = 500
_MODULE = "python -m raymed.cluster"


@dataclass(frozen=True)
class Submit:
    """Run a job on the cluster. Flags before JOB are of this command, those behind it are of the job."""

    job: Positional[Annotated[str, arg(metavar="JOB")]]
    """The job's file in the project folder, as jobs/train_classifier.py."""
    wait: bool = True
    """Print what it writes until it ends, and end with its exit code."""


@dataclass(frozen=True)
class Logs:
    """What a job has written, or the last lines of a part of the cluster."""

    name: Positional[Annotated[str | None, arg(metavar="NAME")]] = None
    """A job or a part (`status` lists them), as head or raymed-worker@HOST; the last job else."""
    follow: Annotated[bool, arg(aliases=["-f"])] = False
    """Go on until the job ends, and end with its exit code."""


@dataclass(frozen=True)
class Stop:
    """Ask a job to stop: a training does so after a checkpoint. What has not ended after a minute is killed."""

    name: Positional[Annotated[str | None, arg(metavar="NAME")]] = None
    """The job; else the last one that runs."""


@dataclass(frozen=True)
class Nothing:
    """It has no flags."""


def up(words: Sequence[str]) -> int:
    """Bring a cluster up, or find it up."""
    if not words or words[0].startswith("-"):
        print(f"usage: {_MODULE} up {{{','.join(providers.PROVIDERS)}}} [--help] [flags]")
        return 0 if words else 2
    name, *flags = words
    place = providers.provider(name)
    config = _read(place.Config, flags, f"up {name}")
    before = state.load()
    if before is not None and before.provider != name:
        raise UserError(f"a cluster is up already, with {before.provider}: {_MODULE} down, then up {name}")
    try:
        cluster = place.up(config)
    except BaseException:
        if before is None and state.load() is not None:
            print(f"what was started is remembered: {_MODULE} down ends it", file=sys.stderr, flush=True)
        raise
    was_up = before is not None and before.facts == cluster.facts
    print(_block(cluster, "was up already" if was_up else "is up"), flush=True)
    return 0


def status(words: Sequence[str]) -> int:
    """Each part of the cluster, asked now."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    _read(Nothing, words, "status")
    cluster = state.required()
    parts = providers.provider(cluster.provider).status(cluster)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in (cluster.provider, "", ""):
        table.add_column(column, overflow="fold")
    for part in parts:
        shown = "[green]up[/]" if part.is_up else "[red]down[/]"
        table.add_row(escape(part.name), shown, escape(part.detail))
    _print(table)
    return int(not all(part.is_up for part in parts))


def submit(words: Sequence[str]) -> int:
    """Run a job on the cluster."""
    from raymed.cluster.submit import submit

    here = next((i + 1 for i, word in enumerate(words) if not word.startswith("-")), len(words))
    given = _read(Submit, words[:here], "submit")
    return submit(state.required(), given.job, words[here:], wait=given.wait)


def logs(words: Sequence[str]) -> int:
    """What a job or a part has written."""
    from raymed.cluster.logs import logs

    given = _read(Logs, words, "logs")
    return logs(state.required(), given.name, follow=given.follow)


def stop(words: Sequence[str]) -> int:
    """Ask a job to stop."""
    from raymed.cluster.logs import stop

    given = _read(Stop, words, "stop")
    return stop(state.required(), given.name)


def down(words: Sequence[str]) -> int:
    """End the cluster, or half of one."""
    _read(Nothing, words, "down")
    cluster = state.load()
    if cluster is None:
        print("no cluster is up")
        return 0
    providers.provider(cluster.provider).down(cluster)
    state.forget()
    print(f"the {cluster.provider} cluster is down; what it stored stays")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    command.__name__: command for command in (up, status, submit, logs, stop, down)
}


def main(words: Sequence[str]) -> int:
    """Do what the words say; the exit code."""
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if words else 2
    telemetry_off()
    return exit_code(lambda: _done(*words))


def _done(command: str, *words: str) -> int:
    check_choice("command", command, COMMANDS)
    return COMMANDS[command](words)


def _read(config: type[C], words: Sequence[str], command: str) -> C:
    import tyro

    return tyro.cli(config, args=list(words), prog=f"{_MODULE} {command}")


def _block(cluster: Cluster, how: str) -> str:
    """What a person wants to know of a cluster: where it is, where its secrets lie, what comes next. No secret."""
    environment, file = cluster.environment, state.folder() / state.FILE
    user = environment.get("MLFLOW_TRACKING_USERNAME")
    lines = [f"the {cluster.provider} cluster {how}"]
    lines += [f"  {name:<10} {where}" for name, where in cluster.addresses.items()]
    if user:
        lines += [f"  {'user':<10} {user} of MLflow, password: MLFLOW_TRACKING_PASSWORD in {file}"]
    if token := environment.get("RAY_AUTH_TOKEN_PATH"):
        lines += [f"  {'token':<10} of the dashboard: {token}"]
    lines += ["next:", *(f"  {_MODULE} {words}" for words in ("status", "submit jobs/train_classifier.py", "down"))]
    return "\n".join(lines)


def _print(table: object) -> None:
    """On a terminal as wide as that is; elsewhere without breaking lines."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDE
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n"), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
