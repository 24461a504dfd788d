"""jobs/serve.py without a server: publishing, choosing the versions that answer, and error messages."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path

import pytest

from dpo4rec_ray.cli.serve import parse
from dpo4rec_ray.serving.haproxy import free_ports
from dpo4rec_ray.serving.registry import ROUTING_FILE, Registry, Routing
from dpo4rec_ray.store.artifacts import RunDir
from tests.serving_world import serve

IN_A_REGISTRY = (["status"], ["rollback"], ["promote", "v1"], ["split", "v1", "5"], ["shadow"])


def test_a_version_from_the_run_to_the_traffic(registry: Registry, served_run: RunDir) -> None:
    """What each command prints last, and which versions answer after all of them."""
    run = str(served_run.root)
    steps = {
        (
            "publish",
            run,
            "--as",
            "new",
            "--model",
            "prm-backbone-seed1",
        ): "published new: prm-backbone-seed1, 60 users, ",
        ("publish", run, "--as", "best", "--promote"): "answers: best; before: v1",
        ("split", "new", "12.5"): "answers: best; 12.5 % of the users: new; before: v1",
        ("shadow", "v2"): "answers: best; 12.5 % of the users: new; asked too: v2; before: v1",
        ("split", "new", "0"): "answers: best; asked too: v2; before: v1",
        ("promote", "v3"): "answers: v3; asked too: v2; before: best",
        ("shadow",): "answers: v3; before: best",
        ("rollback",): "answers: best; before: v1",
        ("publish", run): "published run-",
        ("status",): "answers: best; before: v1",
    }
    done = serve(*([*step, "--registry", str(registry.root)] for step in steps))
    for (code, out, errors), expected in zip(done, steps.values(), strict=True):
        assert (code, errors) == (0, "") and out.splitlines()[-1].startswith(expected), out + errors
    assert registry.routing() == Routing("best", ("v1",), number=8)
    lines = done[-1][1].splitlines()
    names = {line.split()[0] for line in lines[:-1]}
    (dated,) = names - {"v1", "v2", "v3", "mir", "best", "new"}
    assert len(names) == 7 and re.fullmatch(r"run-\d{8}-\d{6}", dated)
    assert re.search(r"60 users  test map_paper@5 0\.\d{4}, ndcg@5 0\.\d{4}$", lines[0])


def test_a_mistake_is_one_line(registry: Registry, served_run: RunDir, tmp_path: Path) -> None:
    """The exit code is 2, and nothing incomplete stays."""
    run, new, unfinished = str(served_run.root), Registry(tmp_path / "new"), tmp_path / "unfinished"
    shutil.copytree(registry.folder("v2"), registry.folder("cut"))
    (registry.folder("cut") / "user_standard.npy").write_bytes(b"")
    damaged = Registry(tmp_path / "damaged")
    damaged.root.mkdir()
    (damaged.root / ROUTING_FILE).write_text("{", encoding="utf-8")
    shutil.copytree(run, unfinished)
    (unfinished / "eval" / "manifest.json").unlink()
    (tmp_path / "file").touch()
    nowhere, blocked = Registry(tmp_path / "nowhere"), Registry(tmp_path / "file" / "registry")
    tokens = f"serving.token_file={tmp_path / 'tokens'}"
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    (free,) = free_ports(1)
    mistakes: list[tuple[Registry, list[str], str]] = [
        (registry, ["publish", "/nowhere"], "/nowhere: not a run folder; there is no such folder"),
        (registry, ["run", "/nowhere"], "/nowhere: not a run folder; there is no such folder"),
        (registry, ["publish", str(unfinished)], f"{unfinished}: an unfinished run: prepare, "),
        (registry, ["run", str(unfinished)], " done, bootstrap, "),
        (registry, ["publish", run, "--as", "../out"], "version '../out': use letters"),
        (registry, ["publish", run, "--as", "v1"], "versions never change"),
        (registry, ["publish", run, "--as", "x", "--model", "gpt"], "there are: mir-backbone-seed0"),
        (registry, ["promote", "v9"], "no published version"),
        (registry, ["promote", "cut"], "user_standard.npy"),
        (registry, ["split", "v2", "101"], "percent = 101"),
        (registry, ["split", "v2", "nan"], "percent = nan"),
        (registry, ["rollback"], "no version before 'v1'"),
        (registry, ["config", "serving.prot=80"], "unknown key serving.prot"),
        (registry, ["config", "reranker.epochs=3"], "only serving.key=value"),
        (registry, ["run", run, "serving.num_replicas=0"], "serving.num_replicas = 0"),
        (registry, ["run", f"serving.port={port}"], f"cannot listen at 127.0.0.1:{port}"),
        (new, ["run"], "no version is promoted"),
        (damaged, ["status"], ROUTING_FILE),
        (damaged, ["promote", "v1"], "no published version"),
        *((nowhere, command, f"{nowhere.root}: no registry; make one") for command in IN_A_REGISTRY),
        (blocked, ["publish", run], f"{blocked.root}: no registry can be written here: Not a directory"),
        (Registry("/proc/1/registry"), ["publish", run], "name a folder of yours with --registry"),
        (nowhere, ["run", run, f"serving.port={free}", tokens], "serving.token_file"),
    ]
    before = set(registry.root.rglob("*"))
    with taken:
        done = serve(*([*command, "--registry", str(where.root)] for where, command, _ in mistakes))
    for (code, _, errors), (_, command, words) in zip(done, mistakes, strict=True):
        assert code == 2 and words in errors, (command, errors)
        assert errors.startswith("error: ") and errors.count("\n") == 1, (command, errors)
    left = set(registry.root.rglob("*")) - before
    # Of a lease the last holder's file stays.
    assert {one.name for one in left if one.parent.name != ".lease"} <= {"serve.log", ".lock"}
    assert not nowhere.root.exists()


def test_a_run_that_does_not_answer_says_how_it_would(registry: Registry, served_run: RunDir) -> None:
    """No server is started: the version that answers is broken."""
    newest = registry.cards()[-1].version
    if newest == "v1":
        registry.promote("v2")
    current = registry.routing().current
    (registry.folder(current) / "user_standard.npy").write_bytes(b"")
    (port,) = free_ports(1)
    root = str(registry.root)
    run = ["run", str(served_run.root), f"serving.port={port}", "--registry", root]
    ((code, out, errors),) = serve(run)
    assert (code, out) == (
        2,
        f"this run is version {newest}, but version {current} stays the current one; to change that: "
        f"dpo4rec serve promote {newest} --registry {root}\n",
    )
    assert "user_standard.npy" in errors


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["run", "runs/demo", "--port", "8001"], "--port 8001; set serving.port=8001"),
        (["run", "--port"], "--port; set serving.port=..."),
        (["run", "--registry", "r", "--num-replicas=2"], "--num-replicas=2; set serving.num_replicas=2"),
        (["config", "--host", "::"], "--host; set serving.host=::"),
        (["run", "--threeds", "2"], "--threeds"),
        (["status", "--port", "8001"], "--port 8001"),
    ],
)
def test_an_option_that_is_a_setting(capsys: pytest.CaptureFixture[str], words: list[str], hint: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(words)
    assert capsys.readouterr().err.endswith(f"error: unrecognized arguments: {hint}\n")


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("run", "dpo4rec serve run runs/demo serving.port=8001"),
        ("promote", "of a published version"),
        ("split", "of the users, from 0 to 100"),
        ("shadow", "none: end it"),
    ],
)
def test_the_help_of_an_action(capsys: pytest.CaptureFixture[str], action: str, words: str) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse([action, "--help"])
    assert words in " ".join(capsys.readouterr().out.split())


def test_the_registry_is_plain_files(registry: Registry) -> None:
    assert json.loads((registry.root / ROUTING_FILE).read_text(encoding="utf-8"))["current"] == "v1"
    suffixes = {path.suffix for path in registry.root.rglob("*") if path.is_file() and path.name != ".lock"}
    assert suffixes == {".npy", ".arrow", ".safetensors", ".json", ".md"}, "nothing that has to be unpickled"
