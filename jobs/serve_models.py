"""Serve trained models over HTTP, with a page for people at /.

    python jobs/serve_models.py                                          # whatever is registered
    python jobs/serve_models.py --models hsg=models:/hsg-asl@champion cxr=runs/cxr/model --port 8000
    python jobs/serve_models.py --access.open                            # without tokens, on this machine alone

Who asks needs a token: python jobs/serve_tokens.py add NAME. A promotion or a rollback in the registry is followed
without losing a request.
"""

from raymed.command import command
from raymed.serve.config import ServeConfig
from raymed.serve.run import serve
from raymed.serve.sources import registered

if __name__ == "__main__":
    command(ServeConfig, lambda config: serve(registered(config)))
