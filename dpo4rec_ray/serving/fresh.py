"""Texts written for users whom no version knows: files that all replicas read, and the order for a text that is missing.

REGISTRY/fresh/VERSION/XX/HASH.json, one file per user. A user id is whatever a client sends, so the name is a hash of it.
Files are replaced as a whole; one that is damaged counts as none, and the text is written again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpo4rec_ray.serving.api import Event
from dpo4rec_ray.serving.ranker import NEUTRAL_RATING
from dpo4rec_ray.serving.service import Written
from dpo4rec_ray.serving.version_files import PublishedVersion
from dpo4rec_ray.store.artifacts import write_json

MAX_HELD = 10_000  # users whose texts, or lack of one, a process remembers
MAX_ORDERED = 10_000  # users whose orders a replica remembers
LOOK_AGAIN_S = 0.5  # for how long a process believes that there is no file
ROOM = 0.9  # of the bound is left after a sweep that met it, so that not every text is followed by one


@dataclass(frozen=True)
class Order:
    """What a text is to be written from. item_rows, ratings: the known part of the history, oldest first."""

    version: str
    user_id: str
    item_rows: list[int]
    ratings: list[float]


class FreshStore:
    """The files. Threads and processes may share them; one process alone should write, as it counts them."""

    def __init__(self, registry: Path, ttl_s: float, max_users: int = 100_000):
        """ttl_s: how long a text is good; max_users: files, over all versions; the oldest go first."""
        self._root, self._ttl_s, self._max_users = registry / "fresh", ttl_s, max_users
        self._held: OrderedDict[tuple[str, str], tuple[Written | None, float]] = OrderedDict()  # good until
        self._lock = threading.Lock()
        self._count: int | None = None  # files, as far as this process knows

    def held(self, version: str, user_id: str) -> tuple[Written | None] | None:
        """What memory holds of a user, text or lack of one; None where it holds neither, or nothing recent enough."""
        key = (version, user_id)
        with self._lock:
            written, until = self._held.get(key, (None, 0.0))
            if time.time() >= until:
                return None
            self._held.move_to_end(key)
            return (written,)

    def find(self, version: str, user_id: str) -> Written | None:
        """As `read`, from memory where that is recent enough."""
        if (held := self.held(version, user_id)) is not None:
            return held[0]
        key = (version, user_id)
        written, until = self._read(version, user_id) or (None, time.time() + LOOK_AGAIN_S)
        with self._lock:
            self._held[key] = (written, until)
            self._held.move_to_end(key)
            if len(self._held) > MAX_HELD:
                self._held.popitem(last=False)
        return written

    def read(self, version: str, user_id: str) -> Written | None:
        """A user's text and vector; None where there is no file, a damaged one, or one that is too old."""
        found = self._read(version, user_id)
        return found and found[0]

    def write(self, version: str, user_id: str, written: Written, encoder: str) -> None:
        """Keep a text, with the name of what encoded it."""
        file = self.file(version, user_id)
        file.parent.mkdir(parents=True, exist_ok=True)
        vector = [float(value) for value in written.vector]
        write_json(file, {"text": written.text, "vector": vector, "encoder": encoder, "written": time.time()})
        self._count = self.sweep() if self._count is None else self._count + 1
        if self._count > self._max_users:
            self._count = self.sweep()

    def sweep(self) -> int:
        """Remove what is too old or was left half written, and the oldest beyond the bound; how many files stay."""
        ages: list[tuple[float, Path]] = []
        for file in self._root.glob("*/*/*"):
            with contextlib.suppress(OSError):  # another process may be at it too
                age = time.time() - file.stat().st_mtime
                if age > self._ttl_s:
                    file.unlink()
                elif file.suffix == ".json":
                    ages.append((age, file))
        if len(ages) <= self._max_users:
            return len(ages)
        ages.sort()
        stay = max(1, int(self._max_users * ROOM))
        for _, file in ages[stay:]:
            file.unlink(missing_ok=True)
        return stay

    def file(self, version: str, user_id: str) -> Path:
        """Where a user's text is, or would be."""
        name = hashlib.blake2b(user_id.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()
        return self._root / version / name[:2] / f"{name}.json"

    def _read(self, version: str, user_id: str) -> tuple[Written, float] | None:
        """With the time (of time.time) until which it is good."""
        try:
            stored = json.loads(self.file(version, user_id).read_text(encoding="utf-8"))
            vector = np.array(stored["vector"], np.float32)
            text, until = stored["text"], stored["written"] + self._ttl_s
            sound = isinstance(text, str) and vector.ndim == 1 and bool(np.isfinite(vector).all())
            return (Written(text, vector), until) if sound and time.time() < until else None
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return None


class FreshTexts:
    """A replica's `FreshKnowledge`: what is in the store, and an order for what is not."""

    def __init__(self, store: FreshStore, order: Callable[[Order], None], retry_s: float):
        """order: must neither wait nor raise; retry_s: for how long a user is not ordered again, whatever came of it."""
        self._store, self._order, self._retry_s = store, order, retry_s
        self._ordered: OrderedDict[tuple[str, str], float] = OrderedDict()  # the last order of each user

    async def find(self, version: PublishedVersion, user_id: str, history: Sequence[Event]) -> Written | None:
        """What has been written; if nothing has, it is ordered and not waited for."""
        name = version.folder.name
        held = self._store.held(name, user_id)
        # A file is read in a thread: the storage that replicas share may be slow, and the loop answers others meanwhile.
        written = held[0] if held else await asyncio.to_thread(self._store.find, name, user_id)
        if written is not None and written.vector.shape == (version.vector_dim,):
            return written
        now = time.monotonic()
        last = self._ordered.get((name, user_id))
        if not history or (last is not None and now - last < self._retry_s):
            return None
        known = [
            (row, one.rating) for one in history if (row := version.item_rows.get(one.item_id)) is not None
        ]
        if known:
            self._ordered[name, user_id] = now
            self._ordered.move_to_end((name, user_id))
            if len(self._ordered) > MAX_ORDERED:
                self._ordered.popitem(last=False)
            # As the reranker reads a history: without all of the ratings, none counts.
            rated = all(one.rating is not None for one in history)
            ratings = [rating if rated and rating is not None else NEUTRAL_RATING for _, rating in known]
            self._order(Order(name, user_id, [row for row, _ in known], ratings))
        return None
