"""Where everything of a run lives, and when it counts as complete.

An artifact is a folder. Its manifest.json is written last and atomically, so its presence means complete; it carries a
fingerprint of what the artifact depends on (config sections, seed, which production of each input, schema version), so a re-run
knows whether it can be kept. Nothing guesses "the latest".
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.storage.parquet import parquet_metadata, read_parquet, write_parquet
from dpo4rec_ray.storage.places import (
    Place,
    described,
    is_remote,
    objects,
    place,
    remove,
    size_of,
    write_text,
)
from dpo4rec_ray.store.schemas import SCHEMA_VERSION, SCHEMAS, validate_table

MANIFEST = "manifest.json"
ROWS_PER_GROUP = 32_768  # of a Parquet part: what a reader of few users has to decode
_NOTES = b"dpo4rec_ray"  # key of a part's notes in its Parquet metadata

# name -> path below the run folder; "{round:02d}" is filled in. Read this to find any file of a run.
PATHS = {
    "users": "data/users",
    "items": "data/items",
    "lists": "data/lists",
    "truth": "data/truth",
    "base_llm": "llm",
    "references": "references",
    "reward": "reward",
    "knowledge": "rounds/{round:02d}/knowledge",
    "generations": "rounds/{round:02d}/generations",
    "scores": "rounds/{round:02d}/scores",
    "metric_scores": "rounds/{round:02d}/metric_scores",
    "pairs": "rounds/{round:02d}/pairs",
    "policy": "rounds/{round:02d}/policy",
    "heldout": "rounds/{round:02d}/heldout",
    "per_list": "eval",
}
# Where it lies elsewhere when it was made again for a later round.
LATER_PATHS = {"reward": "rounds/{round:02d}/reward"}


@dataclass
class Manifest:
    """What is known of a complete artifact.

    Attributes:
        fingerprint: hash of everything it depends on; equal to the present one means that it can be kept.
        produced: new with every production, so that what was made from an older production is redone.
        stats: whatever the stage measured on the way.
        bytes: of all files of the artifact.
        timings: as store.progress.Timing, of each Progress that the stage showed.
        inputs, settings, outside: as in store.dependencies; empty where an older version made the artifact.
    """

    artifact: str
    fingerprint: str
    rows: int
    produced: str = ""
    peak_rss_mb: float = 0.0
    seconds: float = 0.0
    rows_in: int = 0
    stats: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    commit: str = ""
    bytes: int = 0
    timings: list[dict[str, Any]] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION


class RunDir:
    """Paths, reads and writes of one run folder, on any storage. Picklable: workers get it as it is."""

    def __init__(self, root: str | Path):
        self.root: Place = place(root)
        self.fingerprint = ""  # of the stage that is running: what its half-written parts belong to

    def path(self, name: str, round_id: int = 0) -> Place:
        paths = PATHS | LATER_PATHS if round_id else PATHS
        return self.root / paths[name].format(round=round_id)

    def manifest(self, name: str, round_id: int = 0) -> Manifest | None:
        """The artifact's manifest, or None when the artifact is not complete.

        Raises:
            UserError: it is damaged, or a file is in the place of one of its folders.
        """
        file = self.path(name, round_id) / MANIFEST
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if "figures" in content:  # the former name
                content["stats"] = content.pop("figures")
            return Manifest(**content)
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            raise UserError(
                f"{file}: one of its folders is a file; remove it, or set run.root to another folder"
            ) from None
        except (json.JSONDecodeError, TypeError) as error:
            raise UserError(f"{file}: not a manifest ({error}); remove the folder and run again") from None

    def require(self, name: str, round_id: int = 0) -> Manifest:
        """The manifest of an artifact that must be there.

        Raises:
            UserError: the artifact is missing or incomplete.
        """
        manifest = self.manifest(name, round_id)
        if manifest is None:
            raise UserError(
                f"{self.path(name, round_id)} is missing or incomplete; run the stage that writes {name} first"
            )
        return manifest

    def start(self, name: str, round_id: int = 0, *, keep: bool = False) -> Place:
        """Make the artifact's folder for writing. What an interrupted run left is removed unless `keep`."""
        folder = self.path(name, round_id)
        (folder / MANIFEST).unlink(missing_ok=True)
        if not keep:
            remove(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def finish(self, manifest: Manifest, round_id: int = 0) -> None:
        write_json(self.path(manifest.artifact, round_id) / MANIFEST, asdict(manifest))

    def size(self, name: str, round_id: int = 0) -> int:
        """Bytes of all files of an artifact."""
        return size_of(self.path(name, round_id))

    def files(self, name: str, round_id: int = 0) -> list[Place]:
        """The artifact's Parquet files in name order."""
        self.require(name, round_id)
        return sorted(self.path(name, round_id).glob("*.parquet"))

    def read(
        self,
        name: str,
        round_id: int = 0,
        *,
        split: str | tuple[str, ...] | None = None,
        where: Sequence[tuple[str, str, Any]] = (),
        columns: list[str] | None = None,
    ) -> pa.Table:
        """A complete artifact as one table.

        `split` is explicit, so that a search for the name of a split finds who reads it. `where`: more conditions
        (column, operator, value), as pyarrow has them; row groups and rows that do not meet all are never held.
        """
        filters = list(where)
        if split is not None:
            filters.append(("split", "in", [split] if isinstance(split, str) else list(split)))
        tables = [
            read_parquet(file, columns=columns, filters=filters or None)
            for file in self.files(name, round_id)
        ]
        if not tables:
            raise UserError(
                f"{self.path(name, round_id)} holds no Parquet file; remove the folder and run again"
            )
        return pa.concat_tables(tables)

    def failed(self, name: str, round_id: int = 0) -> pa.Table:
        """Who got no texts in an artifact, and why: columns of the schema "failed"."""
        self.require(name, round_id)
        tables = [
            read_parquet(file) for file in sorted((self.path(name, round_id) / "failed").glob("*.parquet"))
        ]
        return pa.concat_tables([SCHEMAS["failed"].empty_table(), *tables])

    def write(self, name: str, table: pa.Table, round_id: int = 0, part: int = 0) -> None:
        """Write one part of an artifact: to a temporary file first, then renamed."""
        write_part(self.path(name, round_id), name, table, part)


def part_file(folder: str | Path, part: int) -> Place:
    """Where a part of an artifact is."""
    return place(folder) / f"part-{part:05d}.parquet"


def write_part(
    folder: str | Path, name: str, table: pa.Table, part: int, notes: dict[str, Any] | None = None
) -> Place:
    """Atomically write one Parquet part; a crash leaves no file that looks complete. notes: for `part_notes`."""
    target = part_file(folder, part)
    table = validate_table(name, table)
    if notes is not None:
        table = table.replace_schema_metadata({_NOTES: json.dumps(notes, sort_keys=True)})
    write_parquet(table, target, compression="zstd", row_group_size=ROWS_PER_GROUP)
    return target


def part_notes(file: Place) -> tuple[int, dict[str, Any]]:
    """Rows and notes of a part, from its footer alone."""
    footer = parquet_metadata(file)
    return footer.num_rows, json.loads((footer.metadata or {}).get(_NOTES, b"{}"))


def write_json(file: Place, content: Any) -> None:
    """Atomically write JSON; NaN and infinities, which JSON does not know, become null."""
    write_text(file, json.dumps(_finite(content), indent=1, sort_keys=True, allow_nan=False), synced=True)


def _finite(content: Any) -> Any:
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, dict):
        return {str(key): _finite(value) for key, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, list | tuple) else content


def fingerprint_of(*parts: str) -> str:
    """Hash of everything an artifact depends on, in order."""
    return hashlib.sha256("\n".join([str(SCHEMA_VERSION), *parts]).encode()).hexdigest()[:16]


def folder_hash(folder: str | Path) -> str:
    """Hash of a model folder: content of its small files; name, size and time of the large ones, which is cheap.

    On an object store: names, sizes and the store's own hashes.
    """
    digest, root = hashlib.sha256(), place(folder)
    if is_remote(root):
        for line in described(objects(root)):
            digest.update(f"{line}\n".encode())
        return digest.hexdigest()[:16]
    for file in sorted(root.rglob("*")):
        if not file.is_file():
            continue
        stat = file.stat()
        digest.update(f"{file.relative_to(root)} {stat.st_size}\n".encode())
        digest.update(file.read_bytes() if stat.st_size < 16 * 2**20 else str(stat.st_mtime_ns).encode())
    return digest.hexdigest()[:16]
