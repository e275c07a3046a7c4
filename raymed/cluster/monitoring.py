"""What Prometheus and Grafana need to watch the cluster that is up: one folder.

    python -m raymed.cluster.monitoring FOLDER

    prometheus.yml      asks Ray which nodes there are, and with --server a server that is not on Ray, with their
                        tokens; what Ray tells holds the models on Ray Serve
    grafana/            a data source and the board, as Grafana reads them when it starts
    boards/             the board (cluster/monitoring/boards/raymed.json)

The programs are the user's own. Both listen on 127.0.0.1 as they are started below. Prometheus must reach the nodes:
where this machine does not, nothing is written, and it is said where Prometheus has to run.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlparse

import tyro

from raymed.cluster import state
from raymed.cluster.state import Cluster
from raymed.cluster.whole import keep_out
from raymed.command import command
from raymed.config import UserError, check_range
from raymed.storage import write_private

TOKEN = "RAYMED_SERVE_TOKEN"
"""Environment variable that has a token of the server of models."""
_ON_HEAD = (
    "start Prometheus on the head, with cluster/monitoring/prometheus.yml as it stands and the token, which is "
    "~/.ray/auth_token there, beside it as ray.token"
)
_IN_NAMESPACE = (
    "start Prometheus in a pod of its namespace, with cluster/monitoring/prometheus.yml, where raymed-head-svc takes "
    "the place of 127.0.0.1, and the token, auth_token of the secret raymed-token, beside it as ray.token"
)
_BEHIND = {"aws": _ON_HEAD, "gcp": _ON_HEAD, "kuberay": _IN_NAMESPACE}
"""Providers whose nodes have addresses that lead nowhere from here, and what to do."""
SOURCE = Path(__file__).resolve().parents[2] / "cluster" / "monitoring"


@dataclass(frozen=True)
class Monitoring:
    """Where it is written, and where the programs will listen."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Is made, and may be there from the time before."""
    server: str = ""
    """Address, such as http://127.0.0.1:8000, of a server of models that is not on Ray."""
    prometheus_port: int = 9090
    grafana_port: int = 3000

    def __post_init__(self) -> None:
        check_range("prometheus_port", self.prometheus_port, 1, 65535)
        check_range("grafana_port", self.grafana_port, 1, 65535)
        address = urlparse(self.server)
        if self.server and not (address.scheme in ("http", "https") and address.netloc):
            raise UserError(f"server: an address such as http://127.0.0.1:8000 is expected, got {self.server!r}")


def write(config: Monitoring, cluster: Cluster) -> list[str]:
    """Write the folder for a cluster. Returns the commands that start the programs.

    Raises UserError where this machine does not reach the nodes, the cluster has no dashboard that can be asked, or the
    folder cannot be written.
    """
    _check_reached(cluster)
    folder = config.folder.absolute()
    try:
        shutil.copytree(SOURCE, folder, dirs_exist_ok=True)
        keep_out(folder)  # the token of the server of models will be in it
        _change(folder / "prometheus.yml", lambda content: _prometheus(content, cluster, config))
        url = f"http://127.0.0.1:{config.prometheus_port}"
        _change(folder / "grafana/datasources/raymed.yaml", lambda content: content["datasources"][0].update(url=url))
        boards = str(folder / "boards")
        _change(
            folder / "grafana/dashboards/raymed.yaml",
            lambda content: content["providers"][0]["options"].update(path=boards),
        )
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error}): give another folder") from None
    return [
        f"prometheus --config.file={folder}/prometheus.yml --storage.tsdb.path={folder}/data "
        f"--web.listen-address=127.0.0.1:{config.prometheus_port}",
        f"GF_PATHS_PROVISIONING={folder}/grafana GF_SERVER_HTTP_ADDR=127.0.0.1 "
        f"GF_SERVER_HTTP_PORT={config.grafana_port} grafana server --homepath /usr/share/grafana",
    ]


def _check_reached(cluster: Cluster) -> None:
    what_to_do = _BEHIND.get(cluster.provider)
    if cluster.facts.get("isolated"):
        what_to_do = "nothing outside of its network namespace does; to watch one, bring it up without --isolated"
    if what_to_do:
        raise UserError(
            f"from this machine a Prometheus would not reach the nodes of this cluster ({cluster.provider}): "
            f"{what_to_do}; see Watching in cluster/README.md"
        )


def _prometheus(content: dict[str, Any], cluster: Cluster, config: Monitoring) -> None:
    """This cluster's addresses and tokens in place of the usual ones."""
    ray, serve = content["scrape_configs"]
    dashboard = cluster.addresses.get("dashboard")
    if dashboard is None:
        raise UserError(f"the cluster on {cluster.provider} has no dashboard here that could say which nodes it has")
    [discovery] = ray["http_sd_configs"]
    discovery["url"] = f"{dashboard}/api/prometheus/sd"
    discovery["authorization"]["credentials_file"] = cluster.environment["RAY_AUTH_TOKEN_PATH"]
    if not config.server:
        content["scrape_configs"] = [ray]
        return
    address = urlparse(config.server)
    serve["static_configs"] = [{"targets": [address.netloc]}]
    serve["scheme"] = address.scheme
    token = config.folder.absolute() / "serve.token"
    if os.environ.get(TOKEN) or not token.is_file():  # one that is there was put there by hand
        write_private(token, os.environ.get(TOKEN, ""))


def _change(path: Path, change: Callable[[Any], None]) -> None:
    import yaml

    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def main(config: Monitoring) -> str:
    """Write the folder for the cluster that is up; returns how to go on."""
    said = ["start these, each in a terminal of its own or as a service:\n", *write(config, state.required())]
    said += [f"\nthen open http://127.0.0.1:{config.grafana_port}/d/raymed"]
    if config.server and not os.environ.get(TOKEN):
        said += [f"for the server of models, put one of its tokens into {config.folder.absolute()}/serve.token"]
    return "\n".join(said)


if __name__ == "__main__":
    command(Monitoring, main)
