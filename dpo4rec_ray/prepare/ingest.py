"""Files of any source, streamed through Ray Data: into partitions of users on disk, or filtered into one table.

One operator reads and unpacks, the next parses: a compressed file is read by one task and parsed by many. The shuffle by
user happens on disk: every block becomes one Arrow file whose p-th record batch holds the users of partition p. A
partition is then read from all these files, and no row passes through the driver or twice through the object store. (Ray
Data's own hash shuffle keeps the whole data set in the memory of its aggregators.)
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo4rec_ray.config.placed import Placed
from dpo4rec_ray.core.kcore import contains
from dpo4rec_ray.core.keys import Keys, keys_of, partition_of
from dpo4rec_ray.datasets.files import BLOCK_BYTES, Split, plan_splits, read_blocks, read_row_group
from dpo4rec_ray.datasets.parsing import UNKNOWN_ITEM, UNKNOWN_USER
from dpo4rec_ray.datasets.source import MAX_SHOWN, BadLine, DataFile, Parsed
from dpo4rec_ray.prepare.partition_files import new_arrow
from dpo4rec_ray.storage.places import Place, remove
from dpo4rec_ray.store.progress import Progress, say
from dpo4rec_ray.workers.needs import Needs

# The numbers must differ: operators with equal ones are joined by Ray Data. Together they are one CPU.
READER_CPUS, PARSER_CPUS = 0.25, 0.75


@dataclass
class FileCounts:
    """What happened to the rows of some files, over all their blocks.

    Attributes:
        num_lines: more than `rows_read` where rows span lines.
        bad_lines: the first quarantined rows, each with path, line, reason and text.
        spans_lines: rows of some file span lines, and the counts are of lines.
        unwanted_ids: the first raw ids that were left out because nothing asked for them.
        by_file: path -> the counts of each file alone: rows read, and those quarantined.
    """

    rows_read: int = 0
    num_lines: int = 0
    rows_kept: int = 0
    num_blocks: int = 0
    quarantined: Counter[str] = field(default_factory=Counter[str])
    filtered: Counter[str] = field(default_factory=Counter[str])
    cleaned: Counter[str] = field(default_factory=Counter[str])
    bad_lines: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    spans_lines: bool = False
    unwanted_ids: list[str] = field(default_factory=list[str])
    by_file: dict[str, FileCounts] = field(default_factory=lambda: {})


def write_partitions(
    files: tuple[DataFile, ...],
    splits: list[Split],
    folder: Place,
    num_partitions: int,
    known: dict[str, Keys],
    label: str,
    where: Placed,
) -> FileCounts:
    """Parse event files (or logged lists) into `folder`: one Arrow file per block, one batch per partition of users.

    known: the sorted keys of "user" and "item", if the source lists all of them. Rows with other keys are quarantined.
    where: what the nodes of those who read must have.
    """
    import ray

    folder.mkdir(parents=True)
    known_ref = ray.put(known)

    def write(batch: pa.Table) -> pa.Table:
        rows = [
            _write_block(block, files, folder, num_partitions, ray.get(known_ref))
            for block in batch.to_pylist()
        ]
        return pa.table({"counts": [json.dumps(row) for row in rows]})

    counts = []
    with Progress(label, 0, "rows") as progress:
        for batch in _stream(files, splits, write, where):
            counts += [json.loads(text) for text in batch["counts"].to_pylist()]
            progress.at(sum(block["rows_read"] for block in counts))
    total = summed(counts, files)
    if total.spans_lines:
        remove(folder)
        files = _over_lines(files)
        return write_partitions(files, plan_splits(files), folder, num_partitions, known, label, where)
    return total


def read_rows(
    files: tuple[DataFile, ...], schema: pa.Schema, wanted: Keys | None, where: Placed
) -> tuple[pa.Table, FileCounts]:
    """Parse item or user files (ITEMS, USERS) into one table with a column `key`, in file order.

    wanted: sorted keys; rows with another one are left out.
    """
    import ray

    wanted_ref = ray.put(wanted)

    def select(batch: pa.Table) -> pa.Table:
        tables = []
        for block in batch.to_pylist():
            parsed = _parse(block, files)
            keys = keys_of(parsed.table["raw_id"])
            chosen = parsed.table.append_column("key", pa.array(keys))
            chosen = chosen.append_column(
                "order", pa.array(block["order"] + np.arange(len(keys)), pa.int64())
            )
            among = ray.get(wanted_ref)
            unwanted: list[str] = []
            if among is not None:
                asked = pa.array(contains(among, keys))
                unwanted = chosen["raw_id"].filter(pc.invert(asked)).slice(0, MAX_SHOWN).to_pylist()
                chosen = chosen.filter(asked)
            counts = _counts(block, parsed, chosen.num_rows) | {"unwanted_ids": unwanted}
            tables.append(_with_counts(chosen, json.dumps(counts)))
        return pa.concat_tables(tables)

    empty = schema.empty_table().append_column("key", pa.array([], pa.uint64()))
    tables, counts = [empty], []
    for batch in _stream(files, plan_splits(files), select, where):
        counts += [json.loads(text) for text in batch["counts"].to_pylist() if text]
        tables.append(batch.drop_columns("counts").filter(pc.is_valid(batch["raw_id"])))
    total = summed(counts, files)
    if total.spans_lines:
        return read_rows(_over_lines(files), schema, wanted, where)
    table = pa.concat_tables(tables, promote_options="default")
    return table.sort_by("order") if table.num_rows else table, total


def _over_lines(files: tuple[DataFile, ...]) -> tuple[DataFile, ...]:
    """The files once more, now as streams of rows that may span lines. (Only reading them tells: few files have such rows.)"""
    say("  rows span lines: the files are read again, row by row")
    return tuple(file.over_lines or file for file in files)


def _with_counts(table: pa.Table, counts: str) -> pa.Table:
    """The rows and one more row that holds the counts, so that a block without rows has counts too."""
    return pa.concat_tables([table, pa.table({"counts": [counts]})], promote_options="default")


def _stream(files: tuple[DataFile, ...], splits: list[Split], work: Any, where: Placed) -> Iterator[pa.Table]:
    """Read every block of the files and apply `work` to it. The results come in any order."""
    import ray.data

    def read(batch: pa.Table) -> Iterator[pa.Table]:
        for row in batch.to_pylist():
            split = Split(**row)
            if files[split.file].kind != "lines":
                yield _block_table(split, split.order, b"")
                continue
            for block in read_blocks(split, files[split.file]):
                yield _block_table(split, block.order, block.content)

    context = ray.data.DataContext.get_current()
    usual = context.target_max_block_size
    context.target_max_block_size = BLOCK_BYTES  # larger blocks would be spilled to disk
    dataset = ray.data.from_arrow([pa.Table.from_pylist([asdict(split)]) for split in splits])
    reader, parser = (Needs.of(where, cpus).options() for cpus in (READER_CPUS, PARSER_CPUS))
    dataset = dataset.map_batches(read, batch_size=None, batch_format="pyarrow", **reader)
    dataset = dataset.map_batches(work, batch_size=1, batch_format="pyarrow", **parser)
    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    finally:
        context.target_max_block_size = usual


def _block_table(split: Split, order: int, content: bytes) -> pa.Table:
    return pa.table(
        {
            "file": [split.file],
            "order": [order],
            "content": pa.array([content], pa.large_binary()),
            "split": [json.dumps(asdict(split))],
        }
    )


def _parse(block: dict[str, Any], files: tuple[DataFile, ...]) -> Parsed:
    file = files[block["file"]]
    if file.kind == "memory":
        assert file.table is not None
        return Parsed(file.table, file.table.num_rows)
    assert file.parse is not None
    if file.kind == "lines":
        return file.parse(block["content"])
    return file.parse(read_row_group(Split(**json.loads(block["split"])), file.columns))


def _write_block(
    block: dict[str, Any],
    files: tuple[DataFile, ...],
    folder: Place,
    num_partitions: int,
    known: dict[str, Keys],
) -> dict[str, Any]:
    parsed = _parse(block, files)
    table = parsed.table
    keys = {"user": keys_of(table["user"])}
    if "item" in table.column_names:
        keys["item"] = keys_of(table["item"])
    good = np.ones(table.num_rows, dtype=np.bool_)
    for name, reason in (("user", UNKNOWN_USER), ("item", UNKNOWN_ITEM)):
        if name in known and name in keys:
            strange = good & ~contains(known[name], keys[name])
            _set_aside(parsed, np.flatnonzero(strange), reason)
            good &= ~strange
    order = block["order"] + np.arange(table.num_rows)
    partition = partition_of(keys["user"], num_partitions)
    by_partition = np.argsort(partition, kind="stable")
    by_partition = by_partition[good[by_partition]]
    columns = {f"{name}_key": pa.array(values[by_partition]) for name, values in keys.items()}
    columns["order"] = pa.array(order[by_partition])
    rest = table.combine_chunks().take(pa.array(by_partition))
    columns |= {name: rest[name] for name in rest.column_names}
    whole = pa.table(columns).combine_chunks()
    bounds = np.searchsorted(partition[by_partition], np.arange(num_partitions + 1))
    with new_arrow(folder / f"{block['order']:020d}.arrow", whole.schema) as writer:
        for low, high in itertools.pairwise(bounds):
            part = whole.slice(low, high - low).combine_chunks()
            batches = part.to_batches()
            writer.write_batch(batches[0] if batches else pa.RecordBatch.from_pylist([], whole.schema))
    return _counts(block, parsed, len(by_partition))


def _set_aside(parsed: Parsed, places: np.ndarray, reason: str) -> None:
    for place in places[:MAX_SHOWN].tolist():
        values = parsed.table.slice(place, 1).to_pylist()[0]
        text = ", ".join(f"{name} {value}" for name, value in values.items())
        parsed.quarantined.add(place if parsed.row_of is None else int(parsed.row_of[place]), reason, text)
    parsed.quarantined.counts[reason] += max(0, len(places) - MAX_SHOWN)


def _counts(block: dict[str, Any], parsed: Parsed, rows_kept: int) -> dict[str, Any]:
    lines: list[BadLine] = parsed.quarantined.shown
    return {
        "file": block["file"],
        "order": block["order"],
        "rows_read": parsed.rows_read,
        "num_lines": parsed.rows_read if parsed.num_lines is None else parsed.num_lines,
        "spans_lines": parsed.spans_lines,
        "rows_kept": rows_kept,
        "quarantined": +parsed.quarantined.counts,
        "filtered": parsed.filtered,
        "cleaned": parsed.cleaned,
        "bad_lines": [asdict(line) for line in lines],
    }


def summed(counts: list[dict[str, Any]], files: tuple[DataFile, ...]) -> FileCounts:
    """The counts of all blocks together. The line number of a bad line follows from the lines of the blocks before."""
    total = FileCounts()
    line_of = {number: 2 if file.header else 1 for number, file in enumerate(files)}
    for block in sorted(counts, key=lambda block: block["order"]):
        total.num_blocks += 1
        total.rows_read += block["rows_read"]
        total.num_lines += block["num_lines"]
        total.rows_kept += block["rows_kept"]
        for name in ("quarantined", "filtered", "cleaned"):
            getattr(total, name).update(block[name])
        first, path = line_of[block["file"]], files[block["file"]].path
        alone = total.by_file.setdefault(path, FileCounts())
        alone.rows_read += block["rows_read"]
        alone.quarantined.update(block["quarantined"])
        for bad in block["bad_lines"]:
            found = {"path": path, "line": first + bad["row"], "reason": bad["reason"], "text": bad["text"]}
            total.bad_lines.append(found)
        line_of[block["file"]] = first + block["num_lines"]
        total.spans_lines |= block["spans_lines"]
        total.unwanted_ids += block.get("unwanted_ids", [])
    return total
