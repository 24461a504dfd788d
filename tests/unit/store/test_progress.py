"""Bars on a real terminal (a pty), plain lines everywhere else, and a terminal that is left as it was."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dpo4rec_ray.store import progress
from dpo4rec_ray.store.progress import Progress, say
from tests.conftest import ROOT

WORK = """
import sys, threading, time
from dpo4rec_ray.store.progress import Progress, say
before = threading.active_count()
with Progress("generate", 540, "users", already=40) as bar:
    bar.starting = lambda: "1 importing vLLM"
    time.sleep(0.6)
    for done in range(90, 541, 50):
        bar.at(done, "1,204 tokens/s [x]")
        if done == 240:
            say("a line with [bold] and :smile: " + "/long/path" * 12)
            print("printed")
        time.sleep(0.1)
    print("READY", flush=True)
    if "wait" in sys.argv:
        time.sleep(60)
for _ in range(200):  # rich's thread ends by itself
    if threading.active_count() == before:
        break
    time.sleep(0.05)
assert threading.active_count() == before
print("END")
"""
LONG = "a line with [bold] and :smile: " + "/long/path" * 12
COLOUR = re.compile(r"\x1b\[(?:3|9)\d")
CURSOR = re.compile(r"\x1b\[\?25([lh])")


def clean_env(**more: str) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if key not in ("CI", "NO_COLOR", "FORCE_COLOR")}
    return {**env, "TERM": "xterm-256color", "COLUMNS": "100", "PYTHONPATH": str(ROOT), **more}


@contextmanager
def on_terminal(*arguments: str, **env: str) -> Iterator[tuple[subprocess.Popen[bytes], list[bytes]]]:
    """WORK on a terminal of its own, and the pieces of its output as they come; at the end all of it is there."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=clean_env(**env),
        start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # its controlling terminal
    )
    os.close(theirs)
    pieces: list[bytes] = []

    def read() -> None:
        try:
            while piece := os.read(ours, 65536):
                pieces.append(piece)
        except OSError:  # the other side is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield process, pieces
        process.wait(timeout=60)
    finally:
        process.kill()
        reader.join(timeout=10)
        os.close(ours)


def shown(**env: str) -> str:
    with on_terminal(**env) as (process, pieces):
        pass
    assert process.returncode == 0, b"".join(pieces)
    return b"".join(pieces).decode()


def test_a_bar_on_a_terminal() -> None:
    text = shown()
    assert "━" in text and COLOUR.search(text)
    assert re.search(r"workers are starting, \d s: 1 importing vLLM", text)
    assert re.search(r"[\d,]+/540 users  [\d,.]+/s  0:00:0\d left · 1,204 tokens/s \[x\]", text)
    assert f"{LONG}\r\n" in text, "what is said stands in one piece, as it is"
    assert "printed\r\n" in text
    assert text.rstrip().endswith("END")
    assert CURSOR.findall(text)[-1] == "h"


def test_a_narrow_terminal_cuts_the_numbers_and_wraps_nothing() -> None:
    text = shown(COLUMNS="60")
    assert "…" in text and "540 users" in text
    assert "1,204 tokens/s" not in text


def test_without_colours() -> None:
    text = shown(NO_COLOR="1")
    assert "━" in text and not COLOUR.search(text)


@pytest.mark.parametrize("env", [{"CI": "true"}, {"TERM": "dumb"}], ids=["CI", "dumb"])
def test_plain_where_nothing_can_be_drawn_over(env: dict[str, str]) -> None:
    text = shown(**env)
    assert "\x1b" not in text and "━" not in text and f"{LONG}\r\n" in text


def test_plain_in_a_pipe() -> None:
    done = subprocess.run([sys.executable, "-c", WORK], env=clean_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr and f"{LONG}\n" in done.stdout


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_cursor_is_there_however_it_ends(how: signal.Signals) -> None:
    with on_terminal("wait") as (process, pieces):
        deadline = time.monotonic() + 60
        while b"READY" not in b"".join(pieces):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(how)
    text = b"".join(pieces).decode()
    assert process.returncode != 0 and "END" not in text
    assert CURSOR.findall(text)[-1] == "h"
    if how is signal.SIGINT:
        assert "KeyboardInterrupt" in text.rpartition("\x1b[2K")[2], "the bar is gone before the last words"


def test_lines_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the first result what is waited for, then the numbers; nothing more once all is done."""
    monkeypatch.setattr(progress, "EVERY_S", 0.02)
    lines: list[str] = []

    def until(pattern: str) -> None:
        deadline = time.monotonic() + 20
        while not any(re.search(pattern, line) for line in lines):
            assert time.monotonic() < deadline, lines
            time.sleep(0.01)
            lines.extend(capsys.readouterr().out.splitlines())

    bar = Progress("fit", 10, "epochs")
    bar.starting = lambda: "2 waiting for a process"
    with bar:
        until(r"  fit: workers are starting, \d+ s: 2 waiting for a process$")
        bar.at(1)
        until(r"  fit: 1/10 epochs$")
        bar.at(3, "loss 0.5")
        until(r"  fit: 3/10 epochs, [\d.,]+/s, \d:\d\d:\d\d left, loss 0\.5$")


def test_more_than_one_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As Ray Train's follower and a stage may have: they share the terminal, and both end."""
    monkeypatch.setattr(progress, "draws_bars", lambda: True)
    with Progress("one", 2, "steps") as one, Progress("two", 2, "steps") as two:
        one.at(1)
        two.at(1)
        say("between")
    say("after")
    assert not progress._bars
    assert "between" in capsys.readouterr().out


def test_start_and_work_are_told_apart() -> None:
    progress.take_timings()
    with Progress("score", 100, "users", already=40) as bar:
        time.sleep(0.15)
        bar.at(50)
        bar.at(50)  # no news
        time.sleep(0.05)
        bar.at(100)
    (one,) = progress.take_timings()
    assert (one.label, one.unit, one.units, one.first_units) == ("score", "users", 60, 10)
    assert 0.15 <= one.first_s < one.last_s <= one.seconds
    assert progress.take_timings() == []


def test_a_progress_without_a_result_has_only_a_start() -> None:
    progress.take_timings()
    with Progress("score", 100, "users"):
        pass
    (one,) = progress.take_timings()
    assert (one.units, one.first_units) == (0, 0)
    assert one.first_s == one.seconds
