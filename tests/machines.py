"""Several machines on this one, for tests of what needs many nodes. Needs root, iproute2 and util-linux.

Each node is a network namespace with an address of its own on a bridge, its own processes, and a private /tmp, /var/tmp, /dev/shm
and home (below /tmp). What nodes share is only what a test gives them: a folder, or an address. Nothing leaves this machine.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

BRIDGE, NET = "d4rtest", "10.79.0"
ROOT = Path(__file__).resolve().parents[1]
HOME = "/tmp/home"
NEEDED = ("ip", "unshare", "nsenter")


def missing() -> str:
    """Why there can be no machines here; "" if there can."""
    if os.geteuid() != 0:
        return "needs root"
    lacking = [name for name in NEEDED if shutil.which(name) is None]
    if lacking:
        return f"needs {', '.join(lacking)}"
    # In a network of its own: two test runs that ask at the same time must not find each other's bridge.
    probe = ["unshare", "--net", "ip", "link", "add", BRIDGE, "type", "bridge"]
    done = subprocess.run(probe, capture_output=True)
    return "" if done.returncode == 0 else "network namespaces are not allowed here"


@dataclass
class Machine:
    """One node. Its processes end with it."""

    number: int
    disk_mib: int
    shared: Path | None
    pid: int = 0
    env: dict[str, str] = field(default_factory=dict)
    _slow: threading.Event | None = None
    _base: Path | None = None  # of the folders that stay visible

    @property
    def address(self) -> str:
        return f"{NET}.{self.number + 1}"

    def boot(self) -> None:
        """Start the node, with empty private folders."""
        binds = [ROOT, Path(sys.prefix)]  # what all see although it may lie below a private folder
        base = self._base = Path(tempfile.mkdtemp(prefix="machine-", dir="/run"))
        lines = ["mount --make-rprivate /", "mount -t proc proc /proc"]
        for one in binds:
            lines += [f"mkdir -p {base}{one}", f"mount --bind {shlex.quote(str(one))} {base}{one}"]
        if self.shared is not None:
            lines += [
                f"mkdir -p {base}/shared",
                f"mount --bind {shlex.quote(str(self.shared))} {base}/shared",
            ]
        lines += [
            f"mount -t tmpfs -o size={self.disk_mib}m tmpfs /tmp",
            "mount -t tmpfs tmpfs /var/tmp",
            "mount -t tmpfs -o size=3g tmpfs /dev/shm",
        ]
        for one in binds:
            lines += [
                f"mkdir -p {shlex.quote(str(one))}",
                f"mount --bind {base}{one} {shlex.quote(str(one))}",
            ]
        if self.shared is not None:
            lines += ["mkdir -p /tmp/cluster", f"mount --bind {base}/shared /tmp/cluster"]
        lines += [f"mkdir -p {HOME}", "ip link set lo up", "exec sleep infinity"]
        outer = subprocess.Popen(
            ["unshare", "-m", "-n", "-p", "--fork", "--kill-child", "bash", "-ec", "\n".join(lines)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self.pid = _holder(outer)
        name = f"d4rt{self.number}"
        _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(self.pid))
        _ip("link", "set", name, "master", BRIDGE, "up")
        enter = ["nsenter", "-t", str(self.pid), "-n", "ip"]
        subprocess.run([*enter, "addr", "add", f"{self.address}/24", "dev", "eth0"], check=True)
        subprocess.run([*enter, "link", "set", "eth0", "up"], check=True)

    def power_off(self) -> None:
        """Every process of the node is killed; its private folders are gone."""
        self.normal_speed()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)  # process 1 of its namespace: everything in it goes
        while Path(f"/proc/{self.pid}").exists() and not _is_zombie(self.pid):
            time.sleep(0.05)
        subprocess.run(["ip", "link", "del", f"d4rt{self.number}"], capture_output=True)
        if self._base is not None:  # what was mounted there is gone with the node: empty folders
            for folder in sorted(self._base.rglob("*"), reverse=True):
                folder.rmdir()
            self._base.rmdir()
            self._base = None

    def cut(self) -> None:
        """Take its cable out."""
        _ip("link", "set", f"d4rt{self.number}", "down")

    def heal(self) -> None:
        """Put its cable back."""
        _ip("link", "set", f"d4rt{self.number}", "up")

    def slow(self, share: float = 0.1) -> None:
        """From now on its processes run for this share of the time."""
        stop = self._slow = threading.Event()

        def work() -> None:
            while not stop.wait(0.4 * share):
                pids = self.pids()
                _signal(pids, signal.SIGSTOP)
                stop.wait(0.4 * (1 - share))
                _signal(pids, signal.SIGCONT)

        threading.Thread(target=work, daemon=True).start()

    def normal_speed(self) -> None:
        if self._slow is not None:
            self._slow.set()
            time.sleep(0.5)
            _signal(self.pids(), signal.SIGCONT)
            self._slow = None

    def fill_disk(self) -> None:
        """Leave no room in its private /tmp."""
        self.run("dd if=/dev/zero of=/tmp/filler bs=1M || true")

    def empty_disk(self) -> None:
        self.run("rm -f /tmp/filler")

    def pids(self) -> list[int]:
        """Its processes, as this machine numbers them; without its first one."""
        space = os.stat(f"/proc/{self.pid}/ns/pid").st_ino
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "ns/pid").stat().st_ino == space:
                    found.append(int(entry.name))
        return [pid for pid in found if pid != self.pid]

    def command(self, text: str) -> list[str]:
        """The command line that runs a shell command on the node, in the checkout."""
        env = {"HOME": HOME, "XDG_CACHE_HOME": f"{HOME}/cache", **self.env}
        settings = [f"{name}={value}" for name, value in env.items()]
        enter = ["nsenter", "-t", str(self.pid), "-m", "-n", "-p", f"--wd={ROOT}"]
        return [*enter, "env", *settings, "bash", "-c", text]

    def run(self, text: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Run a shell command to its end."""
        return subprocess.run(self.command(text), capture_output=True, text=True, timeout=timeout)

    def write(self, path: str, content: bytes) -> None:
        """Write a file of the node, which may be private to it."""
        command = self.command(f"cat > {shlex.quote(path)}")
        subprocess.run(command, input=content, check=True, timeout=60)

    def popen(self, text: str, log: Path) -> subprocess.Popen[bytes]:
        """Start a shell command; its output goes to `log`."""
        with log.open("ab") as out:
            return subprocess.Popen(self.command(text), stdout=out, stderr=subprocess.STDOUT)


@contextlib.contextmanager
def machines(
    count: int, *, shared: Path | None = None, disk_mib: int = 6000, env: dict[str, str] | None = None
) -> Iterator[list[Machine]]:
    """So many nodes while the block runs. shared: a folder that all of them see as /tmp/cluster."""
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)
    _ip("link", "add", BRIDGE, "type", "bridge")
    _ip("addr", "add", f"{NET}.254/24", "dev", BRIDGE)
    _ip("link", "set", BRIDGE, "up")
    nodes = [Machine(number, disk_mib, shared, env=dict(env or {})) for number in range(count)]
    try:
        for node in nodes:
            node.boot()
        yield nodes.copy()  # a test may take one aside
    finally:
        for node in nodes:
            if node.pid:
                node.power_off()
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)


RAY_ENV = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef0123456789abcdef",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}


def start_ray(nodes: list[Machine], num_cpus: int = 2, *, dashboard: bool = True, resources: str = "") -> str:
    """A Ray cluster whose head is the first node; returns its address."""
    head = nodes[0]
    address = f"{head.address}:6379"
    common = f"--num-cpus={num_cpus} --object-store-memory=400000000 --disable-usage-stats"
    web = (
        f"--include-dashboard=true --dashboard-host={head.address}"
        if dashboard
        else "--include-dashboard=false"
    )
    for node in nodes:
        where = f"--head --port=6379 {web}" if node is head else f"--address={address}"
        start_ray_node(node, f"{where} {common} {resources}")
    return address


def start_ray_node(node: Machine, arguments: str) -> None:
    node.env |= RAY_ENV
    done = node.run(f"{Path(sys.executable).parent}/ray start --node-ip-address={node.address} {arguments}")
    assert done.returncode == 0, done.stdout + done.stderr


def _holder(outer: subprocess.Popen[bytes]) -> int:
    """The first process inside, once it has set everything up."""
    for _ in range(300):
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
        found = children.read_text().split() if children.exists() else []
        if found and Path(f"/proc/{found[0]}/comm").read_text().strip() == "sleep":
            return int(found[0])
        if outer.poll() is not None:
            raise RuntimeError(f"no machine: {outer.stderr.read().decode() if outer.stderr else ''}")
        time.sleep(0.05)
    raise RuntimeError("a machine did not start")


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
