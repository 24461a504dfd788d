"""The registry: a folder of published versions, and which of them answers whom.

versions/NAME never changes once it is there. traffic.json is replaced as a whole, so that readers see the old or the new
state, never half of one.
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dpo4rec_ray.config.section import first_mistake
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.serving.ranker import Ranker, RankRequest
from dpo4rec_ray.serving.version_files import PublishedVersion, VersionCard, read_card
from dpo4rec_ray.store.artifacts import write_json

TRAFFIC = "traffic.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
KEPT = 20  # versions that rollback can go back through
SAME_SCORE = 1e-4  # how far a recorded score may be from what the version gives now


@dataclass(frozen=True)
class Traffic:
    """Who answers. `number` grows with every change, so that a replica knows what it has loaded."""

    current: str = ""
    previous: tuple[str, ...] = ()  # the newest last
    split: str = ""  # a second version that answers `percent` of the users
    percent: float = 0.0
    shadow: str = ""  # a version that is asked too, and whose answers are only measured
    number: int = 0

    @property
    def versions(self) -> tuple[str, ...]:
        """Those that answer somebody, the current one first."""
        return tuple(dict.fromkeys(one for one in (self.current, self.split, self.shadow) if one))


class _Stored(BaseModel):
    """traffic.json."""

    model_config = ConfigDict(extra="forbid", strict=True)
    current: str
    previous: list[str]
    split: str
    percent: Annotated[float, Field(ge=0, le=100)]
    shadow: str
    number: int


class Registry:
    """A registry's folder; every change is made by one process at a time."""

    def __init__(self, root: str | Path):
        self.root = Path(root).resolve()

    def folder(self, version: str) -> Path:
        """Raises UserError if the name could leave the registry's folder."""
        if not NAME.fullmatch(version):
            raise UserError(f"version {version!r}: use letters, digits, '.', '_' and '-', at most 64")
        return self.root / "versions" / version

    def cards(self) -> list[VersionCard]:
        """All complete versions, oldest first."""
        found = []
        for folder in sorted((self.root / "versions").glob("[!.]*")):
            try:
                found.append(read_card(folder))
            except UserError:
                continue  # not complete: a publish that was killed
        return sorted(found, key=lambda card: (card.created, card.version))

    def traffic(self) -> Traffic:
        """Raises UserError if traffic.json is damaged; without one, nobody answers."""
        file = self.root / TRAFFIC
        try:
            stored = _Stored.model_validate_json(file.read_bytes())
            return Traffic(**{**stored.model_dump(), "previous": tuple(stored.previous)})
        except FileNotFoundError:
            return Traffic()
        except ValidationError as error:
            raise UserError(
                f"{file}: not a registry's traffic ({first_mistake(error)}); remove it and promote a version again"
            ) from None
        except OSError as error:
            raise UserError(f"{file}: {error}") from None

    def promote(self, version: str) -> Traffic:
        """The version answers from now on, after it has given its recorded answers here.

        Raises:
            UserError: it is not there, or broken.
        """
        check_version(self.folder(version))

        def change(now: Traffic) -> Traffic:
            if now.current == version:
                return now
            previous = (*now.previous, now.current) if now.current else now.previous
            now = replace(now, current=version, previous=previous[-KEPT:])
            if now.split == version:
                now = replace(now, split="", percent=0.0)
            return replace(now, shadow="") if now.shadow == version else now

        return self._change(change)

    def rollback(self) -> Traffic:
        """Back to the version before, if there is one; a split and a shadow end with it.

        Raises:
            UserError: there is none.
        """

        def change(now: Traffic) -> Traffic:
            if not now.previous:
                raise UserError(f"{self.root}: no version before {now.current!r} to roll back to")
            return Traffic(current=now.previous[-1], previous=now.previous[:-1], number=now.number)

        return self._change(change)

    def split(self, version: str, percent: float) -> Traffic:
        """`percent` of the users are answered by `version`; 0 ends a split.

        Raises:
            UserError: it is not there, or broken, or percent is outside [0, 100].
        """
        if not 0 <= percent <= 100:
            raise UserError(f"percent = {percent} is outside 0 to 100")
        if percent:
            check_version(self.folder(version))
        return self._change(
            lambda now: replace(now, split=version if percent else "", percent=float(percent))
        )

    def shadow(self, version: str) -> Traffic:
        """`version` is asked too and its answers are measured; "" ends it.

        Raises:
            UserError: it is not there, or broken.
        """
        if version:
            check_version(self.folder(version))
        return self._change(lambda now: replace(now, shadow=version))

    def _change(self, change: Callable[[Traffic], Traffic]) -> Traffic:
        with self._locked():
            now = self.traffic()
            then = change(now)
            if then != now:
                then = replace(then, number=now.number + 1)
                write_json(self.root / TRAFFIC, asdict(then))
            return then

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.root / ".lock", "a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def check_version(folder: Path, device: str = "cpu") -> Ranker:
    """The version's ranker, after it has given the scores that were recorded when it was published.

    Raises:
        UserError: it cannot be loaded, or answers otherwise.
    """
    read_card(folder)
    file = folder / "recorded.json"
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))
        requests = [recorded_request(one) for one in recorded]
        expected = [np.array(one["scores"], np.float32) for one in recorded]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: no recorded requests ({error}); publish the run again") from None
    try:
        ranker = Ranker(PublishedVersion(folder), device)
        rankings = ranker.rank(requests)
    except UserError as error:
        where = "" if str(folder) in str(error) else f"{folder}: "
        raise UserError(f"{where}{error}; the version is refused") from None
    except Exception as error:  # whatever a damaged file leads to: it must cost nobody else's answer
        raise UserError(
            f"{folder}: cannot be loaded ({type(error).__name__}: {error}); publish the run again"
        ) from error
    for number, (ranking, scores) in enumerate(zip(rankings, expected, strict=True)):
        if ranking.scores.shape != scores.shape or not np.allclose(
            ranking.scores, scores, atol=SAME_SCORE, rtol=0
        ):
            raise UserError(
                f"{folder}: request {number} of recorded.json is answered otherwise than when it was published; the version "
                "is refused"
            )
    return ranker


def recorded_request(one: dict[str, Any]) -> RankRequest:
    """A request of recorded.json."""
    return RankRequest(
        candidates=one["candidates"],
        user_id=one["user_id"],
        history=[event["item_id"] for event in one["history"]],
        ratings=[event["rating"] for event in one["history"]],
    )
