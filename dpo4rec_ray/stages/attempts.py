"""Who is to blame when engines die: a small file per shard that outlives the process that wrote it.

The first attempt at a shard takes all its users at once. After a death they go one at a time, alone in the engine,
so that the next death names its user; who is alone at two deaths is set aside. Deaths of an earlier job do not
count: it may have been stopped from outside.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dpo4rec_ray.artifacts import write_json
from dpo4rec_ray.errors import UserError

MAX_DEATHS_ALONE = 2  # of one user's prompt
MAX_DEATHS = 12  # in one shard: then it is not a prompt that is at fault


@dataclass
class Attempt:
    """One try of a shard. alone: user id -> deaths while it was alone in the engine."""

    folder: str
    shard: int
    job: str
    deaths: int = 0
    suspect: int | None = None
    alone: dict[str, int] = field(default_factory=dict)

    @classmethod
    def begin(cls, folder: str, shard: int, job: str) -> Attempt:
        """Read what an earlier try left, and count its death.

        Raises:
            UserError: engines die at this shard whoever is in it.
        """
        attempt = cls(folder, shard, job)
        try:
            found = json.loads(attempt.file.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            found = {}
        if found.get("job") == job:
            attempt.deaths, attempt.alone = found["deaths"] + 1, found["alone"]
            if found["suspect"] is not None:
                name = str(found["suspect"])
                attempt.alone[name] = attempt.alone.get(name, 0) + 1
        if attempt.deaths >= MAX_DEATHS:
            raise UserError(
                f"engines died {attempt.deaths} times at shard {shard} ({attempt.last_words or 'no reason known'}); lower "
                "generate.gpu_memory_utilization, kv_cache_gib or max_num_seqs, or look at the log with --verbose"
            )
        attempt._write()
        return attempt

    @property
    def file(self) -> Path:
        return Path(self.folder) / "attempts" / f"shard-{self.shard:05d}.json"

    @property
    def last_words(self) -> str:
        """Why the engine died last, where it or its watchdog could say."""
        notes = sorted(
            (Path(self.folder) / "attempts").glob("engine-*.txt"), key=lambda note: note.stat().st_mtime
        )
        return notes[-1].read_text(encoding="utf-8", errors="replace").strip()[:300] if notes else ""

    def poison(self, user_id: int) -> bool:
        """Whether this user has been alone in engines that died, once too often."""
        return self.alone.get(str(user_id), 0) >= MAX_DEATHS_ALONE

    def suspects(self, user_id: int) -> None:
        """From now on this user is alone in the engine."""
        self.suspect = user_id
        self._write()

    def end(self) -> None:
        """The shard is written."""
        self.file.unlink(missing_ok=True)

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, {key: value for key, value in asdict(self).items() if key != "folder"})


def note_of(folder: str, engine: str) -> Path:
    """Where an engine's last words go."""
    return Path(folder) / "attempts" / f"engine-{engine}.txt"
