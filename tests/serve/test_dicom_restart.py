"""The job: a node that is killed loses nothing, and no two share a folder."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from dicom_helpers import Archive, free_port, is_assessment, is_over, send_study
from waiting import until

from raymed.serve.dicom.queue import Queue

ROOT = Path(__file__).resolve().parents[2]


def test_a_node_that_was_killed_goes_on(tmp_path, sent, server):
    """SIGKILL twice: while a study waits for its quiet time, and while its results wait for the archive."""
    port_of_pacs = free_port()

    @contextmanager
    def job(quiet):
        arguments = ["--endpoint", server, "--model", "hsg", "--port", "0", "--allow", "PACS1", "--longest-wait", "1"]
        arguments += ["--reply-to", f"PACS1@127.0.0.1:{port_of_pacs}", "--quiet", str(quiet)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "RAYMED_HOME": str(tmp_path)}
        command = [sys.executable, "jobs/serve_dicom_node.py", *arguments]
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout
                yield process, int(re.search(r"listening: RAYMED@127.0.0.1:(\d+)", process.stdout.readline())[1])
            finally:
                process.kill()

    folder = tmp_path / "dicom" / "RAYMED"
    with job(quiet=600) as (process, port):
        assert set(send_study(sent[0], port)) == {0}
        process.send_signal(signal.SIGKILL)
    with job(quiet=0.3) as (process, _):
        until(lambda: Queue(folder).ready(), 30)
        process.send_signal(signal.SIGKILL)
    with Archive(port=port_of_pacs) as pacs, job(quiet=0.3) as (process, _):
        until(lambda: is_over(folder), 30)
        assert is_assessment(*pacs.of("SR")) and len({ds.SOPInstanceUID for ds in pacs.received}) == len(pacs.received)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_a_folder_has_one_node(tmp_path):
    from raymed.storage import lock

    folder = tmp_path / "dicom" / "RAYMED"
    command = [sys.executable, "jobs/serve_dicom_node.py", "--model", "hsg", "--port", "0", "--allow", "PACS1"]
    command += ["--reply-to", "PACS1@127.0.0.1:104"]
    with lock(folder / "lock"):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "RAYMED_HOME": str(tmp_path)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "in use" in done.stderr
