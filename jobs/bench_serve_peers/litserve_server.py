"""The peer under LitServe: an API a model, a worker process each, batches of one.

    python litserve_server.py PORT NAME=FOLDER...

Imports nothing else of this project.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import litserve
from fastapi import Body
from plain_model import PlainModel

Raw = Annotated[bytes, Body(media_type="application/octet-stream")]


class Api(litserve.LitAPI):
    """A model."""

    def __init__(self, folder: Path, **named: Any):
        super().__init__(**named)
        self.folder = folder

    def setup(self, device: str) -> None:
        """In the worker."""
        self.model = PlainModel(self.folder)

    def decode_request(self, request: Raw) -> Any:
        """Bytes -> an image."""
        return self.model.read(request)

    def predict(self, x: Any) -> Any:
        """An image -> its probability."""
        return self.model.probabilities([x])[0]

    def encode_response(self, output: float) -> dict[str, float]:
        """As it leaves the server."""
        return {"probability": output}


def main(port: int, models: list[str]) -> None:
    """Serve until told to stop."""
    named = (text.partition("=") for text in models)
    apis: list[litserve.LitAPI] = [Api(Path(folder), api_path=f"/{name}") for name, _, folder in named]
    server = litserve.LitServer(apis, accelerator="cpu")
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False, access_log=False)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
