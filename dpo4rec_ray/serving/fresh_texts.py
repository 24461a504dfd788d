"""Texts for users whom no version knows: the files that all replicas read, and the jobs for texts that are missing.

The text of a user is in REGISTRY/fresh/VERSION/XX/HASH.json. HASH is a hash of the user id, because a client may send any
string as an id. A file is replaced as a whole. A damaged file counts as missing, and the text is written again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cachetools import TLRUCache, TTLCache

from dpo4rec_ray.config.serving import ServingSection
from dpo4rec_ray.serving.api import Event
from dpo4rec_ray.serving.loaded_version import NEUTRAL_RATING
from dpo4rec_ray.serving.version_files import VersionFiles
from dpo4rec_ray.storage.places import Place, written_at
from dpo4rec_ray.store.artifacts import write_json

MAX_CACHED = 10_000  # users whose text, or lack of one, a process remembers
MAX_SUBMITTED = 10_000  # users whose last job a replica remembers
LOOK_AGAIN_S = 0.5  # how long a process believes that a file is missing
# A store that takes longer than this is not waited for, nor asked again for a while: the list is ranked without a text.
MAX_READ_S, PAUSE_S = 0.5, 1.0
READERS = 32  # threads
# A sweep that finds too many files leaves this share of the most allowed, so that not every new text needs a sweep.
KEPT_SHARE = 0.9


@dataclass(frozen=True)
class FreshText:
    """A text written for a user whom no version knows. vector: [D]."""

    text: str
    vector: npt.NDArray[np.float32]


@dataclass(frozen=True)
class TextJob:
    """A text to write. item_rows, ratings: the known items of the user's history, oldest first."""

    version: str
    user_id: str
    item_rows: list[int]
    ratings: list[float]


class FreshTextStore:
    """The files. Threads and processes may share them, but only one process should write, because it counts the files."""

    def __init__(self, registry: Place, settings: ServingSection):
        self._root, self._settings = registry / "fresh", settings
        # Per version and user: a text or None, and until when (time.time) this is believed.
        self._cached: TLRUCache[tuple[str, str], tuple[FreshText | None, float]] = TLRUCache(
            MAX_CACHED, ttu=lambda _key, found, _now: found[1], timer=time.time
        )
        self._lock = threading.Lock()
        self._count: int | None = None  # files, as far as this process knows

    def cached(self, version: str, user_id: str) -> tuple[FreshText | None] | None:
        """What memory has of a user: (text,), or (None,) if there is no file; None: memory has nothing recent."""
        with self._lock:
            found = self._cached.get((version, user_id))
        return found and found[:1]

    def find(self, version: str, user_id: str) -> FreshText | None:
        """As `read`, but from memory where that is recent enough."""
        if (cached := self.cached(version, user_id)) is not None:
            return cached[0]
        found = self._read(version, user_id) or (None, time.time() + LOOK_AGAIN_S)
        with self._lock:
            self._cached[version, user_id] = found
        return found[0]

    def read(self, version: str, user_id: str) -> FreshText | None:
        """The stored text of a user; None if the file is missing, damaged or too old."""
        found = self._read(version, user_id)
        return found and found[0]

    def write(self, version: str, user_id: str, fresh: FreshText, encoder: str) -> None:
        """Store a text. encoder: the name of the model that made its vector."""
        file = self.file(version, user_id)
        file.parent.mkdir(parents=True, exist_ok=True)
        vector = [float(value) for value in fresh.vector]
        write_json(file, {"text": fresh.text, "vector": vector, "encoder": encoder, "written": time.time()})
        self._count = self.sweep() if self._count is None else self._count + 1
        if self._count > self._settings.fresh_max_users:
            self._count = self.sweep()

    def sweep(self) -> int:
        """Remove files that are too old or incomplete, and the oldest if there are too many. Returns how many stay."""
        ages: list[tuple[float, Place]] = []
        now = time.time()
        for file, written in written_at(self._root).items():
            if now - written > self._settings.fresh_ttl_s:
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)
            elif file.suffix == ".json":
                ages.append((now - written, file))
        if len(ages) <= self._settings.fresh_max_users:
            return len(ages)
        ages.sort(key=lambda one: one[0])
        stay = max(1, int(self._settings.fresh_max_users * KEPT_SHARE))
        for _, file in ages[stay:]:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
        return stay

    def file(self, version: str, user_id: str) -> Place:
        """The file of a user's text, which may not exist."""
        name = hashlib.blake2b(user_id.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()
        return self._root / version / name[:2] / f"{name}.json"

    def _read(self, version: str, user_id: str) -> tuple[FreshText, float] | None:
        """The text and when (time.time) it becomes too old."""
        try:
            stored = json.loads(self.file(version, user_id).read_text(encoding="utf-8"))
            vector = np.array(stored["vector"], np.float32)
            text, until = stored["text"], stored["written"] + self._settings.fresh_ttl_s
            sound = isinstance(text, str) and vector.ndim == 1 and bool(np.isfinite(vector).all())
            return (FreshText(text, vector), until) if sound and time.time() < until else None
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return None


class FreshTextLookup:
    """Finds a user's text for a replica, and submits a job if there is none."""

    def __init__(self, store: FreshTextStore, submit: Callable[[TextJob], None], retry_s: float):
        """
        Args:
            submit: must return at once and raise nothing.
            retry_s: seconds until a second job is submitted for the same user, whatever became of the first.
        """
        self._store, self._submit = store, submit
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="fresh")
        self._ask_at = 0.0  # not before (time.monotonic) is the store asked
        self._submitted: TTLCache[tuple[str, str], bool] = TTLCache(MAX_SUBMITTED, ttl=retry_s)

    async def find(self, version: VersionFiles, user_id: str, history: Sequence[Event]) -> FreshText | None:
        """The stored text. If there is none, a job is submitted; the text is not waited for, and a slow store hardly."""
        name = version.folder.name
        if cached := self._store.cached(name, user_id):
            text = cached[0]
        elif time.monotonic() < self._ask_at:
            return None
        else:
            # In threads of its own: a store that hangs holds neither the event loop up nor what else runs in threads.
            reading = self._readers.submit(self._store.find, name, user_id)
            try:
                text = await asyncio.wait_for(asyncio.wrap_future(reading), MAX_READ_S)
            except TimeoutError:
                if not reading.cancelled():  # the store was asked: it did not only wait for a thread
                    self._ask_at = time.monotonic() + PAUSE_S
                return None
        if text is not None and text.vector.shape == (version.vector_dim,):
            return text
        if not history or (name, user_id) in self._submitted:
            return None
        known = [
            (row, one.rating) for one in history if (row := version.item_rows.get(one.item_id)) is not None
        ]
        if known:
            self._submitted[name, user_id] = True
            # As the reranker reads a history: if one rating is missing, all count as neutral.
            rated = all(one.rating is not None for one in history)
            ratings = [rating if rated and rating is not None else NEUTRAL_RATING for _, rating in known]
            self._submit(TextJob(name, user_id, [row for row, _ in known], ratings))
        return None
