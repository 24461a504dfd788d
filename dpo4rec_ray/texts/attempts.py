"""Who is to blame when engines die: a small file per shard that outlives the process that wrote it.

The first attempt at a shard shares the engine with others. After a death the shard goes alone, all its users at once: what
died by chance is done after that. After another, its users go one at a time, each alone in the engine, so that the next
death names its user; who is alone at two deaths is set aside. Deaths while a shard was not in the engine do not count,
nor do those of an earlier job: it may have been stopped from outside.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.store.artifacts import write_json

MAX_DEATHS_ALONE = 2  # of one user's prompt
MAX_POISON = 8  # users of a shard; more, and it is not their prompts that are at fault
MAX_UNFINISHED_STARTS = 4  # of engines, beside those that are starting now
_HELP = (
    "lower generate.gpu_memory_utilization, kv_cache_gib or max_num_seqs, or look at the log with --verbose"
)


@dataclass
class Attempt:
    """One try of a shard.

    Attributes:
        engine: whose process makes it; its last words are asked for when it dies.
        deaths: of engines that had several users of the shard in hand.
        inside: whether users of the shard are in the engine now.
        suspect: the user who is alone there.
        alone: user id -> deaths while it was.
    """

    folder: str
    shard: int
    job: str
    engine: str = ""
    deaths: int = 0
    inside: bool = False
    suspect: int | None = None
    alone: dict[str, int] = field(default_factory=dict)
    last_words: str = ""

    @classmethod
    def begin(cls, folder: str, shard: int, job: str, engine: str) -> Attempt:
        """Read what an earlier try left, and count its death.

        Raises:
            UserError: engines die at this shard whoever is in it.
        """
        attempt = cls(folder, shard, job, engine)
        try:
            found = json.loads(attempt.file.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            found = {}
        if found.get("job") == job:
            attempt.deaths, attempt.alone = found["deaths"], found["alone"]
            attempt.last_words = _read(note_of(folder, found["engine"])) or found["last_words"]
            if found["suspect"] is not None:
                name = str(found["suspect"])
                attempt.alone[name] = attempt.alone.get(name, 0) + 1
            elif found["inside"]:
                attempt.deaths += 1
        if sum(map(attempt.poison, map(int, attempt.alone))) > MAX_POISON:
            raise UserError(
                f"engines die at shard {shard} whoever of its users is alone in them "
                f"({attempt.last_words or 'no reason known'}); {_HELP}"
            )
        attempt._write()
        return attempt

    @property
    def file(self) -> Path:
        return Path(self.folder) / "attempts" / f"shard-{self.shard:05d}.json"

    def poison(self, user_id: int) -> bool:
        """Whether this user has been alone in engines that died, once too often."""
        return self.alone.get(str(user_id), 0) >= MAX_DEATHS_ALONE

    def enter(self, suspect: int | None = None) -> None:
        """From now on the shard is in the engine, or this user alone."""
        self.inside, self.suspect = True, suspect
        self._write()

    def leave(self) -> None:
        """Nothing of the shard is in the engine."""
        self.inside, self.suspect = False, None
        self._write()

    def end(self) -> None:
        """All users of the shard have been tried."""
        self.file.unlink(missing_ok=True)

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, {key: value for key, value in asdict(self).items() if key != "folder"})


def note_of(folder: str, engine: str) -> Path:
    """Where an engine's last words go."""
    return Path(folder) / "attempts" / f"engine-{engine}.txt"


class Start:
    """Counts the starts of engines that never came to an end: a process killed while it loads raises nothing."""

    def __init__(self, folder: str, job: str, engine: str, num_engines: int):
        """Raises:
        UserError: too many of this job's engines ended while they started.
        """
        self._file = Path(folder) / "attempts" / f"start-{job}-{engine}"
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.touch()
        starting = list(self._file.parent.glob(f"start-{job}-*"))
        if len(starting) > num_engines + MAX_UNFINISHED_STARTS:
            raise UserError(
                f"{len(starting) - num_engines} engines ended while they loaded the model, without a word: is there enough "
                f"memory? {_HELP}"
            )

    def done(self) -> None:
        """The engine is ready."""
        self._file.unlink(missing_ok=True)


def _read(note: Path) -> str:
    try:
        return " ".join(note.read_text(encoding="utf-8", errors="replace").split())[:300]
    except OSError:
        return ""
