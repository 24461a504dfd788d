"""An HTTP proxy before the S3 server that fails when it is told to: python tests/flaky_proxy.py HOST PORT TARGET MODE_FILE.

While MODE_FILE holds "503" every request is answered so; while it holds "hang" none is answered. It prints what was asked then.
"""

from __future__ import annotations

import http.client
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit


def handler(target: str, mode: Path) -> type[BaseHTTPRequestHandler]:
    where = urlsplit(target).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def state(self) -> str:
            return mode.read_text().strip() if mode.exists() else ""

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if state := self.state():
                print(state, self.command, self.path, flush=True)
            while self.state() == "hang":
                time.sleep(0.2)
            if self.state() == "503":
                self.send_response(503, "Slow Down")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            connection = http.client.HTTPConnection(where, timeout=60)
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in (
                    "connection",
                    "transfer-encoding",
                    "content-length",
                    "server",
                    "date",
                ):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
            connection.close()

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


if __name__ == "__main__":
    host, port, target, mode = sys.argv[1:]
    ThreadingHTTPServer((host, int(port)), handler(target, Path(mode))).serve_forever()
