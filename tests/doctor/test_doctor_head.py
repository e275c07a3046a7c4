"""The doctor's job on a head: it does not go on when nobody waits for it any more. What Ray answers is given."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from raymed.cluster.state import Cluster
from raymed.config import UserError
from raymed.doctor import head
from raymed.doctor.__main__ import Doctor


class Dashboard:
    """Of a head on which a job runs until it is stopped, and waiting for it ends with an error."""

    def __init__(self, error: BaseException | None = None, *, cannot_stop: bool = False):
        self.error, self.cannot_stop, self.running = error, cannot_stop, set()

    def submit_job(self, *, entrypoint: str, runtime_env: dict, submission_id: str) -> None:
        self.running.add(submission_id)

    def get_job_status(self, name: str) -> SimpleNamespace:
        if self.error is not None:
            raise self.error
        return SimpleNamespace(is_terminal=lambda: name not in self.running)

    def stop_job(self, name: str) -> None:
        if self.cannot_stop:
            raise ConnectionError("it cannot be stopped either")
        self.running.discard(name)


@pytest.fixture
def asked(monkeypatch):
    """asked(dashboard): what the doctor finds on that head."""

    def on_head(dashboard: Dashboard):
        @contextmanager
        def client(_):
            yield dashboard

        monkeypatch.setattr(head.jobs, "client", client)
        return head.on_head(Cluster("gcp"), Doctor())

    return on_head


def test_a_job_that_nobody_waits_for_is_stopped(asked):
    dashboard = Dashboard(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        asked(dashboard)
    assert not dashboard.running

    dashboard = Dashboard(UserError("the dashboard does not answer: make logs"))
    [finding] = asked(dashboard)
    assert "the dashboard does not answer" in finding.found and not dashboard.running


def test_a_job_that_takes_too_long_is_stopped(asked, monkeypatch):
    monkeypatch.setattr(head, "_SECONDS", -1.0)
    dashboard = Dashboard()
    [finding] = asked(dashboard)
    assert "has not ended" in finding.found and not dashboard.running


def test_what_ended_the_waiting_is_told_also_where_the_job_cannot_be_stopped(asked):
    with pytest.raises(KeyboardInterrupt):
        asked(Dashboard(KeyboardInterrupt(), cannot_stop=True))
    [finding] = asked(Dashboard(UserError("the connection broke"), cannot_stop=True))
    assert finding.found == "the connection broke"
