"""The commands of README.md and docs/*.md: every one parses, and what can run here does.

The ```sh blocks of a page run one after the other in one empty folder. A comment right above a block says what it needs
beyond that; it is then only parsed. With `-m slow` those that need minutes, a finished run or a server run too.
    <!-- needs: run, server -->   one or more of: checkout, cluster, data NAME, gpu, hours, key, minutes, run, server
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from dpo4rec_ray.cli import front
from dpo4rec_ray.config import Config, default_config, load_config
from dpo4rec_ray.config.bundled_recipes import names as bundled_recipes
from dpo4rec_ray.stages import NAMES
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {"checkout", "cluster", "data", "gpu", "hours", "key", "minutes", "run", "server"}
OTHER_PROGRAMS = {"cd", "curl", "docker", "export", "kubectl", "pip", "printf", "ray", "serve", "set"}
BLOCK = re.compile(r"(?:<!-- needs: (.*) -->\n)?```sh\n((?:.*\n)*?)```")
OVERRIDE = re.compile(r"\w+\.[\w.]+=")
# `section.key` in prose; `table.csv` is a file.
KEY = re.compile(r"`(\w+)\.(\w+)(?:`|[ =.])")
ENDINGS = {"csv", "json", "jsonl", "md", "py", "tex", "toml"}


@dataclass(frozen=True)
class Block:
    """A ```sh block of a page."""

    page: Path
    needs: frozenset[str]
    text: str

    @property
    def commands(self) -> list[list[str]]:
        return [command for line in self.text.replace("\\\n", " ").splitlines() for command in split(line)]


def split(line: str) -> list[list[str]]:
    """A line of shell -> its commands as words, without what they are redirected to. `$(...)` must stand in quotes."""
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in words:
        if word in (">", ">>"):
            next(words)
        elif word in ("|", "&&", ";"):
            commands.append([])
        else:
            commands[-1].append(word)
    return [command for command in commands if command]


def blocks(page: Path) -> list[Block]:
    found = []
    for needs, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        words = {need.split()[0] for need in needs.split(",") if need.strip()}
        assert words <= NEEDS, f"{page.name}: needs {words - NEEDS}"
        found.append(Block(page, frozenset(words), text))
    return found


BLOCKS = {page.name: blocks(page) for page in PAGES}


def check(command: list[str]) -> None:
    """Raises or exits if the command would be refused for its words."""
    program, *arguments = command
    if program == "make":
        assert all(re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.M) for name in arguments)
    elif program == "python":
        assert (ROOT / arguments[0]).is_file(), arguments[0]
        if arguments[0] == "jobs/run.py":
            check(["dpo4rec", "run", *arguments[1:]])
    elif program == ".":
        assert (ROOT / arguments[0].rstrip(";")).is_file(), arguments[0]
    elif program == "dpo4rec":
        options, more = front.module(arguments[0]).parser().parse_known_args(arguments[1:])
        # argparse does not take positional arguments behind an option; the commands themselves do
        assert not [word for word in more if not OVERRIDE.match(word)], more
        changes = [word for word in arguments if OVERRIDE.match(word)]
        recipe = getattr(options, "recipe", "")
        load_config(recipe, changes) if recipe in bundled_recipes() else default_config(changes)
        assert {getattr(options, "only", ""), getattr(options, "since", "")} <= {"", *NAMES}
    elif program != "ray" or "--" not in arguments:
        assert program in OTHER_PROGRAMS or "/" in program, program
    else:  # ray job submit ... -- command
        check(arguments[arguments.index("--") + 1 :])


@pytest.mark.parametrize("page", BLOCKS)
def test_every_command_parses(page: str) -> None:
    for block in BLOCKS[page]:
        for command in block.commands:
            check(command)
    text = (ROOT / "docs" / page if (ROOT / "docs" / page).exists() else ROOT / page).read_text("utf-8")
    for inline in re.findall(r"`(dpo4rec [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        for command in split(inline):
            if len(command) == 2:  # the name of a command
                assert command[1] in {*front.COMMANDS, "COMMAND"}
            elif command[1] != "COMMAND":
                check(command)


@pytest.mark.parametrize("page", BLOCKS)
def test_every_key_exists(page: str) -> None:
    text = next(path for path in PAGES if path.name == page).read_text(encoding="utf-8")
    for section, key in KEY.findall(text):
        if section in Config.model_fields and key not in ENDINGS:
            assert key in type(getattr(default_config(), section)).model_fields, f"{section}.{key}"


@pytest.mark.parametrize(
    "command",
    [
        "dpo4rec rum demo",
        "dpo4rec run demo data.row_dir=shop",
        "dpo4rec run demo --only prepaer",
        "dpo4rec run demo --dry-rum",
        "dpo4rec serve publsh runs/demo",
        "make demos",
        "python jobs/runs.py demo",
        "ray job submit -- python jobs/run.py demo data.row_dir=shop",
        "wget x",
    ],
)
def test_what_is_wrong_is_found(command: str) -> None:
    with pytest.raises((Exception, SystemExit)):
        check(command.split())


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """With this checkout's `dpo4rec` on the PATH, and no cluster to join."""
    binary = tmp_path_factory.mktemp("bin") / "dpo4rec"
    binary.write_text(f'#!/bin/sh\nexec {sys.executable} -m dpo4rec_ray "$@"\n')
    binary.chmod(0o755)
    path = f"{binary.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""}


def run(block: Block, folder: Path, environment: dict[str, str]) -> None:
    shell = ["bash", "-euo", "pipefail", "-c", block.text]
    done = subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{block.text}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def runnable(page: str) -> list[Block]:
    return [
        block for block in BLOCKS[page] if not block.needs and "make" not in [c[0] for c in block.commands]
    ]


@pytest.mark.ray
@pytest.mark.parametrize("page", [page for page in BLOCKS if runnable(page)])
def test_what_runs_here_runs(page: str, tmp_path: Path, environment: dict[str, str]) -> None:
    for block in runnable(page):
        run(block, tmp_path, environment)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.timeout(1800)
def test_the_demo_and_what_needs_it(tmp_path: Path, environment: dict[str, str]) -> None:
    """The quickstart's demo, then every block that needs its run folder, then the requests while a server runs."""
    wanted = [block for found in BLOCKS.values() for block in found if block.needs]
    for needs in ({"minutes"}, {"run"}):
        done = [block for block in wanted if block.needs == needs]
        assert done
        for block in done:
            run(block, tmp_path, environment)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    start = next(
        block for block in wanted if block.needs == {"run", "server"} and block.page.name == "serving.md"
    )
    command = [*start.commands[0], f"serving.port={port}"]
    server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    try:
        assert any(" answers at http" in line for line in server.stdout), "the server ended"
        asked = [block for block in wanted if block.needs == {"server"}]
        assert asked
        for block in asked:
            run(Block(block.page, block.needs, block.text.replace("8000", port)), tmp_path, environment)
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
