"""What trackers have on disk, read back: TensorBoard's event files and W&B's offline record; and trackers without an account."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def records(file: Path) -> list[bytes]:
    """The payloads of a TFRecord file: length (8 bytes), its checksum (4), payload, checksum (4).

    Less a last one that is half written.
    """
    data, found, at = file.read_bytes(), [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        found.append(data[at + 12 : at + 12 + size])
        at += 16 + size
    return found if at == len(data) else found[:-1]


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of the folder: files by name; a session's start drops its step and those after it."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    series: dict[str, list[tuple[int, float]]] = {}
    for file in sorted((folder / "tensorboard").iterdir()):
        for record in records(file):
            event = Event.FromString(record)
            if event.session_log.status == SessionLog.START:
                series = {
                    tag: [point for point in points if point[0] < event.step]
                    for tag, points in series.items()
                }
            for value in event.summary.value:
                series.setdefault(value.tag, []).append((event.step, value.simple_value))
    return series


def wandb_records(file: Path) -> list[bytes]:
    """The records of a .wandb file: LevelDB's log format in blocks of 32 KiB behind a header of 7 bytes.

    A record lies in pieces of checksum (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last) and data.
    """
    data, found, at = file.read_bytes(), [], 7
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768  # a piece's head does not fit the rest of the block
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if kind in (1, 2):
            found.append(b"")
        found[-1] += data[at + 7 : at + 7 + size]
        at += 7 + size
    return found


def wandb_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of all offline runs below the folder, in order: name -> value as JSON."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: list[dict[str, str]] = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in map(Record.FromString, wandb_records(file)):
            row = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            if row:
                found.append(row)
    return found


@pytest.fixture
def own_settings_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a developer's tracking server nor an account."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "WANDB_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
