"""Ask for reranks until a file is there: python tests/asking.py URL THREADS STOP_FILE REQUESTS_FILE [--once].

REQUESTS_FILE: JSON, a list of {"user_id", "candidates"}. --once: without the client's retry. Prints one JSON line.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import requests

from dpo4rec_ray.serving.client import Client, Unavailable


def main(url: str, threads: str, stop: str, bodies: str, *once: str) -> None:
    lists: list[dict[str, Any]] = json.loads(Path(bodies).read_text())
    answered, failed, longest = [0] * int(threads), [], [0.0]

    def work(number: int) -> None:
        client, session = Client(url), requests.Session()
        turn = number
        while not Path(stop).exists():
            body = lists[turn % len(lists)]
            began = time.monotonic()
            try:
                if once:
                    session.post(f"{url}/v1/rerank", json=body, timeout=20).raise_for_status()
                else:
                    client.rerank(body["candidates"], user_id=body["user_id"])
                answered[number] += 1
            except (Unavailable, requests.RequestException) as error:
                failed.append([round(time.time(), 2), str(error)[:200]])
            longest[0] = max(longest[0], time.monotonic() - began)
            turn += 1

    workers = [threading.Thread(target=work, args=(number,)) for number in range(int(threads))]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    print(json.dumps({"answered": sum(answered), "failed": failed, "longest_s": round(longest[0], 2)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
