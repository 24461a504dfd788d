"""Peers of `python benchmarks/bench.py serve`: python benchmarks/serve_peers.py noop|noop-tuned|fastapi PORT REGISTRY.

noop: a Ray Serve deployment that answers at once, on Serve's HAProxy path as Serve ships it: the lowest cost possible there.
noop-tuned: the same with the settings of Serve that jobs/serve.py makes.
fastapi: the same model behind FastAPI and uvicorn, as a first version would be written, without Ray.
"""

from __future__ import annotations

import signal
import sys
import threading

from dpo4rec_ray.cli.serve_actions import serve_environment
from dpo4rec_ray.cli.session import start_ray

# Not inside `fastapi`: FastAPI looks up the annotations of a route among the names of its module.
from dpo4rec_ray.serving.api import Meta, RerankRequest, RerankResponse, Result


def main() -> int:
    what, port, registry = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    return fastapi(port, registry) if what == "fastapi" else noop(port, tuned=what == "noop-tuned")


def noop(port: int, tuned: bool) -> int:
    from dpo4rec_ray.serving import haproxy

    stop = threading.Event()
    folder = serve_environment(tuned=tuned)
    import ray

    start_ray(False)
    from ray import serve

    @serve.deployment(max_ongoing_requests=1024, ray_actor_options={"num_cpus": 1})
    class Noop:
        async def __call__(self, _: object) -> bytes:
            return b"{}"

    try:
        serve.start(proxy_location="EveryNode", http_options={"host": "127.0.0.1", "port": port})
        serve.run(Noop.bind(), logging_config={"enable_access_log": False, "log_level": "WARNING"})
        signal.signal(signal.SIGTERM, lambda *_: stop.set())  # after Ray has set its own
        stop.wait()
    finally:
        serve.shutdown()
        ray.shutdown()
        haproxy.end(folder)
    return 0


def fastapi(port: int, registry: str) -> int:
    import torch
    import uvicorn
    from fastapi import FastAPI

    from dpo4rec_ray.serving.loaded_version import RankTask
    from dpo4rec_ray.serving.registry import Registry
    from dpo4rec_ray.serving.version_check import load_version

    torch.set_num_threads(1)
    found = Registry(registry)
    version = load_version(found.folder(found.routing().current))
    app = FastAPI()

    @app.post("/v1/rerank")
    async def rerank(body: RerankRequest) -> RerankResponse:
        ids = [one if isinstance(one, str) else one.item_id for one in body.candidates]
        (ranking,) = version.rank([RankTask(ids, body.user_id or "")])
        return RerankResponse(
            id="",
            model=version.files.card.version,
            results=[
                Result(index=place, item_id=ids[place], relevance_score=score, known=score == score)
                for place, score in zip(ranking.order, ranking.scores[ranking.order], strict=True)
            ],
            meta=Meta(
                knowledge_version=version.files.card.knowledge,
                knowledge=ranking.knowledge,
                fallback=not ranking.known_user,
                latency_ms=0,
            ),
        )

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
