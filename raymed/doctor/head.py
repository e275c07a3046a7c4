"""The doctor on the head of a cluster that this machine is no node of: the way there, and a job by the dashboard."""

import dataclasses
import json
import secrets
import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from raymed.cluster import jobs, providers, state
from raymed.config import UserError, from_dict
from raymed.doctor.finding import Finding, failure

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_SECONDS = 900.0
_NAME, _WAY = "head", "way to the head"
_BEGINNING = '{\n  "ok"'  # of what the doctor prints
_INSTALL = "install raymed on the head, into the environment that `ray start` runs in; `make logs` shows this job's log"


@contextmanager
def way(cluster: state.Cluster) -> Iterator[Finding | None]:
    """Within: dashboard and MLflow can be asked from here; tunnels that have ended are opened before. Of what cannot be
    opened, the finding."""
    with ExitStack() as stack:
        try:
            stack.enter_context(providers.provider(cluster.provider).reached(cluster))
            problem = None
        except UserError as error:
            problem = dataclasses.replace(failure(str(error), "make cluster-status"), name=_WAY)
        yield problem


def on_head(cluster: state.Cluster, config: Any) -> list[Finding]:
    """What `python -m raymed.doctor` with these flags (`raymed.doctor.__main__.Doctor`) finds on the head."""
    name, until = f"{jobs.DOCTOR}-{secrets.token_hex(3)}", time.monotonic() + _SECONDS
    # There the environment of the nodes says what is to be looked at.
    elsewhere: dict[str, Any] = {"env_vars": {"RAYMED_CLUSTER": "/nowhere"}}
    try:
        with jobs.client(cluster) as ray, _stopped(ray, name):
            ray.submit_job(entrypoint=_command(config), runtime_env=elsewhere, submission_id=name)
            while not ray.get_job_status(name).is_terminal():
                if time.monotonic() > until:
                    slow = f"the doctor has not ended on the head within {_SECONDS:g} s"
                    return [_failed(slow, "make cluster-status")]
                time.sleep(1)
            log = ray.get_job_logs(name)
    except UserError as error:
        return [_failed(str(error), "make cluster-status")]
    return read(log)


@contextmanager
def _stopped(ray: "JobSubmissionClient", name: str) -> Iterator[None]:
    """Within, the job may run; afterwards it does not, however it was left: with Ctrl-C, or a connection that broke."""
    try:
        yield
    finally:
        with suppress(Exception):  # what ended the waiting is what is told
            ray.stop_job(name)  # does nothing to one that has ended


def read(log: str) -> list[Finding]:
    """The findings in the log of a doctor that printed JSON."""
    try:
        answer, _ = json.JSONDecoder().raw_decode(log, log.index(_BEGINNING))
    except ValueError:
        last = (log.strip().splitlines() or ["it said nothing"])[-1]
        return [_failed(f"the doctor did not run on the head: {last[:300]}", _INSTALL)]
    found = [from_dict(Finding, one) for one in answer["findings"]]
    return [dataclasses.replace(one, name=f"{_NAME}: {one.name}") for one in found]


def _failed(found: str, remedy: str) -> Finding:
    return dataclasses.replace(failure(found, remedy), name=_NAME)


def _command(config: Any) -> str:
    words = ["python", "-m", "raymed.doctor", "--json", "--nodes" if config.nodes else "--no-nodes"]
    for flag in ("trials", "workers", "cpus_per_worker", "gpus_per_worker", "storage"):
        value = getattr(config, flag)
        words += [f"--{flag.replace('_', '-')}", str(value)] if value is not None else []
    for flag in ("reach", "only"):
        words += [f"--{flag}", *getattr(config, flag)] if getattr(config, flag) else []
    return f"exec {shlex.join(words)}"
