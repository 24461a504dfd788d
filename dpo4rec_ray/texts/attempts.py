"""Finds the prompt that ends engines, by a small file per shard that outlives the process that wrote it.

1. The first try of a shard shares the engine with other shards.
2. After a death during that try, the shard has the engine to itself. If the death was chance, this try succeeds.
3. After another death, its users have the engine one after the other, so that the next death names its user.
4. A user at whom an engine died twice is a poison: it is set aside, with the reason.

Deaths while a shard waited outside the engine do not count. Those of an earlier start of the job do not count either: it
may have been stopped from outside. "User" also stands for an item here.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.storage.places import Place, place, write_text
from dpo4rec_ray.store.artifacts import write_json

MAX_DEATHS_ALONE = 2  # of one user's prompt
MAX_POISON = 8  # users of a shard; with more, the cause is not their prompts
MAX_UNFINISHED_STARTS = 4  # of engines, beside those that are starting now
_HELP = (
    "lower generate.gpu_memory_utilization, kv_cache_gib or max_num_seqs, or look at the log with --verbose"
)


@dataclass
class Attempt:
    """One try of a shard.

    Attributes:
        job: changes with every start of the driver.
        engine: the process that makes this try.
        deaths: of engines that had several users of the shard in them.
        inside: whether users of the shard are in the engine now.
        suspect: the user who has the engine to itself now.
        alone: user id -> deaths while this user had the engine to itself.
        reason: of the last death, if its engine left one.
    """

    folder: str
    shard: int
    job: str
    engine: str = ""
    deaths: int = 0
    inside: bool = False
    suspect: int | None = None
    alone: dict[str, int] = field(default_factory=dict)
    reason: str = ""

    @classmethod
    def begin(cls, folder: str, shard: int, job: str, engine: str) -> Attempt:
        """Read what an earlier try left, and count its death.

        Raises:
            UserError: engines die at this shard with too many of its users.
        """
        attempt = cls(folder, shard, job, engine)
        try:
            found = json.loads(attempt.file.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            found = {}
        if found.get("job") == job:
            attempt.deaths, attempt.alone = found["deaths"], found["alone"]
            attempt.reason = _read(reason_file(folder, found["engine"])) or found["reason"]
            if found["suspect"] is not None:
                name = str(found["suspect"])
                attempt.alone[name] = attempt.alone.get(name, 0) + 1
            elif found["inside"]:
                attempt.deaths += 1
        if sum(map(attempt.is_poison, map(int, attempt.alone))) > MAX_POISON:
            raise UserError(
                f"engines die at shard {shard} with more than {MAX_POISON} of its users, each alone in the engine "
                f"({attempt.reason or 'no reason known'}); {_HELP}"
            )
        attempt._write()
        return attempt

    @property
    def file(self) -> Place:
        return place(self.folder) / "attempts" / f"shard-{self.shard:05d}.json"

    @property
    def one_by_one(self) -> bool:
        """Whether the users of the shard must have the engine one after the other."""
        return self.deaths >= 2 or bool(self.alone)

    def is_poison(self, user_id: int) -> bool:
        """Whether engines died too often while this user had them to itself."""
        return self.alone.get(str(user_id), 0) >= MAX_DEATHS_ALONE

    def enter(self, suspect: int | None = None) -> None:
        """From now on the shard is in the engine, or only this user."""
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


def reason_file(folder: str, engine: str) -> Place:
    """Where an engine's process writes why it ends."""
    return place(folder) / "attempts" / f"engine-{engine}.txt"


class Start:
    """Counts the starts of engines that never came to an end: a process that is killed while it loads raises nothing."""

    def __init__(self, folder: str, job: str, engine: str, num_engines: int):
        """Raises:
        UserError: too many of this job's engines ended while they started.
        """
        self._file = place(folder) / "attempts" / f"start-{job}-{engine}"
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._file, "")
        starting = list(self._file.parent.glob(f"start-{job}-*"))
        if len(starting) > num_engines + MAX_UNFINISHED_STARTS:
            raise UserError(
                f"{len(starting) - num_engines} engines ended while they loaded the model, and gave no reason: is there "
                f"enough memory? {_HELP}"
            )

    def done(self) -> None:
        """The engine is ready."""
        self._file.unlink(missing_ok=True)


def _read(file: Place) -> str:
    try:
        return " ".join(file.read_text(encoding="utf-8", errors="replace").split())[:300]
    except OSError:
        return ""
