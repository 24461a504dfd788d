"""The environment for HAProxy and the script that starts it. HAProxy runs in tests/integration/test_serving.py."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from dpo4rec_ray.serving import haproxy

# What Serve writes, shortened.
CONFIG = """\
defaults
    errorfile 502 /x/500.http
    errorfile 503 /x/500.http
    errorfile 500 /x/500.http
frontend prometheus
    bind :{metrics}
frontend http_frontend
    bind {host}:8000
listen stats
  bind *:{stats}
"""


def changed(folder: Path, host: str, tuned: bool = True) -> str:
    """The configuration after the script has run, without HAProxy."""
    variables = haproxy.environment(folder, tuned=tuned)
    script = Path(variables["RAY_SERVE_HAPROXY_BINARY_PATH"])
    *head, last = script.read_text(encoding="utf-8").splitlines()
    assert last.startswith("exec ")
    script.write_text("\n".join([*head, "exit 0", ""]), encoding="utf-8")
    file = folder / "haproxy.cfg"
    ports = {name: variables[f"RAY_SERVE_HAPROXY_{name.upper()}_PORT"] for name in ("metrics", "stats")}
    file.write_text(CONFIG.format(host=host, **ports), encoding="utf-8")
    subprocess.run([script, "-db", "-f", file], check=True)
    return file.read_text(encoding="utf-8")


@pytest.mark.parametrize("host", ["127.0.0.1", "*", "10.0.0.7"])
def test_statistics_stay_on_localhost_and_the_service_listens_where_it_is_told(
    tmp_path: Path, host: str
) -> None:
    lines = [line.strip() for line in changed(tmp_path, host).splitlines()]
    binds = [line for line in lines if line.startswith("bind")]
    assert binds[1] == f"bind {host}:8000"
    assert binds[0].startswith("bind 127.0.0.1:") and binds[2].startswith("bind 127.0.0.1:")


def test_statuses_are_not_turned_into_500_and_clients_are_not_watched(tmp_path: Path) -> None:
    found = changed(tmp_path, "127.0.0.1")
    assert "errorfile 502" not in found and "errorfile 503" not in found and "errorfile 500" in found
    after = found.split("frontend http_frontend\n")[1]
    assert after.startswith("    http-request set-header x-request-disconnect-disabled ?1\n")


def test_untuned_leaves_the_rest_as_serve_has_it(tmp_path: Path) -> None:
    found = changed(tmp_path, "127.0.0.1", tuned=False)
    assert "errorfile 503" in found and "disconnect" not in found


def test_free_ports_are_free_and_differ() -> None:
    ports = haproxy.free_ports(5)
    assert len(set(ports)) == 5
    for port in ports:
        with socket.socket() as one:
            one.bind(("127.0.0.1", port))


def test_end_kills_what_was_started_from_the_folder_and_removes_it(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "haproxy.cfg").touch()
    process = subprocess.Popen(["sleep", "60"], executable="/bin/sleep")
    ours = subprocess.Popen(["tail", "-f", str(folder / "haproxy.cfg")])
    try:
        haproxy.end(folder)
        assert ours.wait(10) == -9 and process.poll() is None and not folder.exists()
    finally:
        process.kill()
        ours.kill()
