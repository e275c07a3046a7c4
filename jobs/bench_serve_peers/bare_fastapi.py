"""The peer without a serving framework: FastAPI and uvicorn, a route a model.

    python bare_fastapi.py PORT NAME=FOLDER...

Imports nothing else of this project.
"""

import sys
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from plain_model import PlainModel


def main(port: int, models: list[str]) -> None:
    """Serve until told to stop."""
    app = FastAPI()
    for text in models:
        name, _, folder = text.partition("=")
        _add(app, name, PlainModel(Path(folder)))
    uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_level="warning")


def _add(app: FastAPI, name: str, model: PlainModel) -> None:
    @app.post(f"/{name}")
    async def predict(request: Request) -> dict[str, float]:
        return model.answer(await request.body())


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
