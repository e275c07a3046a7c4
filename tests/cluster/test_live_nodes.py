"""The live nodes of a cluster, out of what Ray's own code makes of a head's answer."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from aiohttp import web
from ray.core.generated.gcs_pb2 import GcsNodeInfo  # pyright: ignore

from raymed.cluster.services import ray

DEAD, LIVE = 100, 120


class Head:
    """The GCS of a cluster in which a node has died DEAD times and LIVE others live."""

    async def get_all_node_info(self, timeout: int, filters: list[tuple[str, str, str]]):
        states = [GcsNodeInfo.DEAD] * DEAD + [GcsNodeInfo.ALIVE] * LIVE
        return {number: self.node(number, state) for number, state in enumerate(states)}, 0

    def node(self, number: int, state: int) -> GcsNodeInfo:
        name = f"worker-{number - DEAD}" if state == GcsNodeInfo.ALIVE else "worker-0"
        own = {"node_name": name, "node_manager_address": "10.0.0.1", "resources_total": {"CPU": 2.0}}
        return GcsNodeInfo(node_id=number.to_bytes(28, "big"), state=state, **own)


@pytest.fixture
def dashboard() -> Iterator[str]:
    """The URL of a dashboard whose list of nodes is Ray's, with Ray's filters and limits."""
    from ray.dashboard.state_aggregator import StateAPIManager
    from ray.dashboard.state_api_utils import handle_list_api

    manager = StateAPIManager(Head(), ThreadPoolExecutor(1))  # type: ignore[arg-type]

    async def nodes(request: web.Request) -> web.StreamResponse:
        return await handle_list_api(manager.list_nodes, request)  # pyright: ignore

    loop, app = asyncio.new_event_loop(), web.Application()
    app.router.add_get("/api/v0/nodes", nodes)
    runner = web.AppRunner(app)
    loop.run_until_complete(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.run_until_complete(runner.cleanup())
    loop.close()


def test_all_live_nodes_are_seen_however_many_have_died(dashboard, tmp_path):
    (tmp_path / "token").write_text("token")
    found = ray.nodes(dashboard, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")})
    assert set(found) == {f"worker-{number}" for number in range(LIVE)}
    assert ray.describe(found["worker-0"]) == "2 CPUs, 0 GPUs, 0.0 GiB at 10.0.0.1"
