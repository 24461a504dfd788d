"""The registry: a folder of published versions, and which of them answers which users.

versions/NAME never changes after it was published. traffic.json is replaced as a whole, so a reader sees the old state or
the new one, never a mixture.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, get_type_hints

from pydantic import ConfigDict, Field, ValidationError, create_model

from dpo4rec_ray.config.section import first_mistake
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.serving.version_check import load_version
from dpo4rec_ray.serving.version_files import VersionCard, read_card
from dpo4rec_ray.storage.lease import lease
from dpo4rec_ray.storage.places import Place, is_complete, place
from dpo4rec_ray.store.artifacts import write_json

ROUTING_FILE = "traffic.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
KEPT = 20  # earlier versions that rollback can return to


@dataclass(frozen=True)
class Routing:
    """Which versions answer which users: the content of traffic.json.

    Attributes:
        current: answers all users that no split takes; "": nothing is promoted.
        previous: the current versions before it, oldest first.
        split: a second version, which answers `percent` of the users.
        shadow: a version that ranks the same lists; its answers are only compared, not sent.
        number: grows by one with every change.
    """

    current: str = ""
    previous: tuple[str, ...] = ()
    split: str = ""
    percent: Annotated[float, Field(ge=0, le=100)] = 0.0
    shadow: str = ""
    number: int = 0

    @property
    def versions(self) -> tuple[str, ...]:
        """All versions that rank something, the current one first."""
        return tuple(dict.fromkeys(one for one in (self.current, self.split, self.shadow) if one))


# Reads traffic.json: the same fields, but all of them have to be there.
_STORED = create_model(
    "Routing",
    __config__=ConfigDict(extra="forbid", strict=True),
    **{name: (kind, ...) for name, kind in get_type_hints(Routing, include_extras=True).items()},
)


class Registry:
    """The folder of a registry. One process at a time changes it."""

    def __init__(self, root: str | Path):
        self.root = place(root)
        self._versions = self.root / "versions"

    def folder(self, version: str) -> Place:
        """Raises UserError if the name could lead out of the registry's folder."""
        if not NAME.fullmatch(version):
            raise UserError(f"version {version!r}: use letters, digits, '.', '_' and '-', at most 64")
        return self._versions / version

    def exists(self) -> bool:
        """Whether anything was ever published or promoted here."""
        return self._versions.is_dir() or (self.root / ROUTING_FILE).is_file()

    def cards(self) -> list[VersionCard]:
        """Of all complete versions, oldest first."""
        found = []
        for folder in sorted(self._versions.glob("[!.]*")):
            if not is_complete(folder):
                continue  # its publishing was killed
            try:
                found.append(read_card(folder))
            except UserError:
                continue  # of another format, or not ours
        return sorted(found, key=lambda card: (card.created, card.version))

    def routing(self) -> Routing:
        """The present state; an empty one where there is no traffic.json.

        Raises:
            UserError: traffic.json is damaged or cannot be read.
        """
        file = self.root / ROUTING_FILE
        try:
            return Routing(**dict(_STORED.model_validate_json(file.read_bytes())))
        except FileNotFoundError:
            return Routing()
        except ValidationError as error:
            raise UserError(
                f"{file}: not the state of a registry ({first_mistake(error)}); remove it and promote a version again"
            ) from None
        except OSError as error:
            raise UserError(f"{file}: {error}") from None

    def check(self, version: str) -> None:
        """That a version can be loaded and gives its recorded scores.

        Raises:
            UserError: the version is missing or broken.
        """
        folder = self.folder(version)
        if not folder.is_dir():
            known = ", ".join(card.version for card in self.cards())
            there = f"there are: {known}" if known else "there is none; publish a run first"
            raise UserError(f"{self.root}: no published version {version!r}; {there}")
        load_version(folder)

    def promote(self, version: str) -> Routing:
        """Make a version the current one, after it has passed `check` here.

        Raises:
            UserError: the version is missing or broken.
        """
        self.check(version)

        def change(now: Routing) -> Routing:
            if now.current == version:
                return now
            previous = (*now.previous, now.current) if now.current else now.previous
            now = replace(now, current=version, previous=previous[-KEPT:])
            if now.split == version:
                now = replace(now, split="", percent=0.0)
            return replace(now, shadow="") if now.shadow == version else now

        return self._change(change)

    def rollback(self) -> Routing:
        """Return to the version before the current one. A split and a shadow end.

        Raises:
            UserError: there is no version before, or it is missing or broken.
        """
        version = self._before(self.routing())
        self.check(version)

        def change(now: Routing) -> Routing:
            if self._before(now) != version:
                raise UserError(
                    f"{self.root}: it was changed by another command meanwhile; look and try again"
                )
            return Routing(current=version, previous=now.previous[:-1], number=now.number)

        return self._change(change)

    def _before(self, now: Routing) -> str:
        """The version before the current one. Raises UserError if there is none."""
        if not now.current:
            raise UserError(
                f"{self.root}: no version is promoted, so there is no version before it to roll back to"
            )
        if not now.previous:
            raise UserError(f"{self.root}: no version before {now.current!r} to roll back to")
        return now.previous[-1]

    def split(self, version: str, percent: float) -> Routing:
        """Let `version` answer `percent` of the users; 0 ends the split.

        Raises:
            UserError: the version is missing or broken, or percent is outside [0, 100].
        """
        if not 0 <= percent <= 100:
            raise UserError(f"percent = {percent} is outside 0 to 100")
        if percent:
            self.check(version)
        return self._change(
            lambda now: replace(now, split=version if percent else "", percent=float(percent))
        )

    def shadow(self, version: str) -> Routing:
        """Let `version` rank the same lists, for comparison only; "" ends it.

        Raises:
            UserError: the version is missing or broken.
        """
        if version:
            self.check(version)
        return self._change(lambda now: replace(now, shadow=version))

    def _change(self, change: Callable[[Routing], Routing]) -> Routing:
        with self._locked():
            now = self.routing()
            then = change(now)
            if then != now:
                then = replace(then, number=now.number + 1)
                write_json(self.root / ROUTING_FILE, asdict(then))
            return then

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with lease(
            self.root, lost=lambda: None, wait=True
        ):  # a change takes a moment, a lost lease many seconds
            yield
