"""raymed under Ray Serve, on a Ray of its own.

    python raymed_on_ray.py PORT NAME=BUNDLE...

The token is that of $RAYMED_SERVE_TOKEN. With RAY_SERVE_ENABLE_HA_PROXY=1 requests come through HAProxy.
"""

import os
import signal
import sys

import ray
from ray import serve

from raymed.serve.on_ray import build


def main(port: int, models: list[str]) -> None:
    """Serve until told to stop."""
    stop = {signal.SIGINT, signal.SIGTERM}
    cpus = os.cpu_count() or 1
    limits = {"per_minute": 10**6, "at_once": 10**4}
    ray.init(address="local", num_cpus=max(8, cpus), include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build({"models": models, "limits": limits, "replicas": {"cpus": cpus}}), name="raymed")
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    signal.sigwait(stop)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
