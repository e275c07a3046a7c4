"""The peer under Ray Serve, used naively: JSON with base64 in it, `serve.batch` and deployments as they come.

    python naive_serve.py PORT NAME=FOLDER...

Imports nothing else of this project.
"""

import base64
import signal
import sys
from pathlib import Path

import ray
from plain_model import PlainModel
from ray import serve
from starlette.requests import Request


@serve.deployment
class Model:
    """A replica."""

    def __init__(self, folder: str):
        self.model = PlainModel(Path(folder))

    @serve.batch
    async def probabilities(self, bodies: list[bytes]) -> list[float]:
        """Of the images of several requests."""
        return self.model.probabilities([self.model.read(body) for body in bodies])

    async def __call__(self, request: Request) -> dict[str, float]:
        """{"image": base64} -> {"probability": p}"""
        body = base64.b64decode((await request.json())["image"])
        return {"probability": await self.probabilities(body)}  # type: ignore[call-arg]


def main(port: int, models: list[str]) -> None:
    """Serve until told to stop."""
    stop = {signal.SIGINT, signal.SIGTERM}
    ray.init(address="local", num_cpus=max(8, 2 * len(models)), include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    for text in models:
        name, _, folder = text.partition("=")
        serve.run(Model.bind(folder), name=name, route_prefix=f"/{name}")
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    signal.sigwait(stop)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
