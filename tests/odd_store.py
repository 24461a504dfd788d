"""A small object store in this process that fails as a test wants: S3's and Google's protocol as far as obstore uses them.

A hook sees each request before it is answered, and may answer it. moto's server (tests/object_store.py) is the one that behaves.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

from tests.object_store import store_at

NOW = "2026-01-01T00:00:00.000Z"


class Request(BaseHTTPRequestHandler):
    """One request; `key` is BUCKET/PATH."""

    protocol_version = "HTTP/1.1"
    store: OddStore
    key: str
    query: dict[str, str]
    body: bytes

    @property
    def is_listing(self) -> bool:
        return self.command == "GET" and "list-type" in self.query

    def answer(self, status: int, body: bytes = b"", size: int | None = None, **headers: str) -> None:
        """size: that of the object, where the answer to HEAD has no body."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if size is None else size))
        self.end_headers()
        self.wfile.write(body)

    def break_off(self) -> None:
        """Begin an answer, then close the connection."""
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"<?xml")
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _do(self) -> None:
        address = urlsplit(self.path)
        self.key = unquote(address.path).strip("/")
        self.query = {
            name: found[0] for name, found in parse_qs(address.query, keep_blank_values=True).items()
        }
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.store.hook(self):
            self.store.do(self)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _do


class OddStore:
    """
    Attributes:
        objects: BUCKET/PATH -> content.
        hook: sees a request, and returns whether it has answered it.
        strict: 404 to a DELETE of what is not there, as Google's store has it.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.hook: Callable[[Request], bool] = lambda request: False
        self.strict = False

    def do(self, request: Request) -> None:
        """Answer as a store that behaves."""
        key, objects = request.key, self.objects
        if request.command == "POST" and "delete" in request.query:
            found = [unquote(one) for one in re.findall("<Key>(.*?)</Key>", request.body.decode())]
            for one in found:
                objects.pop(f"{key}/{one}", None)
            deleted = "".join(f"<Deleted><Key>{escape(one)}</Key></Deleted>" for one in found)
            request.answer(200, f"<DeleteResult>{deleted}</DeleteResult>".encode())
        elif request.is_listing:
            request.answer(200, self._listed(key, request.query))
        elif request.command in ("GET", "HEAD") and key in objects:
            self._read(request)
        elif request.command == "PUT":
            new = request.headers.get("If-None-Match") == "*"
            if new and key in objects:
                request.answer(412)
            else:
                objects[key] = request.body
                request.answer(200, ETag=tag(request.body), x_goog_generation="1")
        elif request.command == "DELETE" and (key in objects or not self.strict):
            objects.pop(key, None)
            request.answer(204)
        else:
            request.answer(404)

    def _read(self, request: Request) -> None:
        content = self.objects[request.key]
        about = {
            "ETag": tag(content),
            "Last_Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
            "x_goog_generation": "1",
        }
        if request.command == "HEAD":
            request.answer(200, size=len(content), **about)
        elif wanted := re.match(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or ""):
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            where = f"bytes {first}-{last}/{len(content)}"
            request.answer(206, content[first : last + 1], Content_Range=where, **about)
        else:
            request.answer(200, content, **about)

    def _listed(self, bucket: str, query: dict[str, str]) -> bytes:
        prefix, mark = f"{bucket}/{query.get('prefix', '')}", query.get("delimiter", "")
        found, folders = "", dict[str, None]()
        for key, content in sorted(self.objects.items()):
            rest = key.removeprefix(prefix)
            if not key.startswith(prefix):
                continue
            if mark and mark in rest:
                folders[f"{query.get('prefix', '')}{rest.split(mark)[0]}{mark}"] = None
                continue
            name = escape(key.removeprefix(f"{bucket}/"))
            found += (
                f"<Contents><Key>{name}</Key><LastModified>{NOW}</LastModified><ETag>{tag(content)}</ETag>"
                f"<Size>{len(content)}</Size></Contents>"
            )
        found += "".join(
            f"<CommonPrefixes><Prefix>{escape(one)}</Prefix></CommonPrefixes>" for one in folders
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>".encode()


def tag(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


@contextmanager
def odd_store() -> Iterator[OddStore]:
    """s3:// and gs:// of this process are the store while the block runs."""
    from dpo4rec_ray.storage.object_store import GS

    store = OddStore()
    handler = type("Handler", (Request,), {"store": store})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    account = {"private_key": "key", "private_key_id": "id", "client_email": "email", "disable_oauth": True}
    with store_at(address), pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account | {"gcs_base_url": address}))
        GS.clear_instance_cache()
        try:
            yield store
        finally:
            GS.clear_instance_cache()
            server.shutdown()
            server.server_close()
