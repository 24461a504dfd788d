"""Parquet and Arrow files at any place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from upath import UPath

from dpo4rec_ray.storage.places import Place, is_remote, new_file


@contextlib.contextmanager
def opened(file: Place) -> Iterator[pa.NativeFile]:
    """The file for reading anywhere in it."""
    if is_remote(file):
        with file.open("rb") as remote, pa.PythonFile(remote, "r") as handle:
            yield handle
    else:
        with pa.OSFile(str(file), "rb") as handle:
            yield handle


def read_parquet(
    file: Place, columns: list[str] | None = None, filters: Sequence[tuple[str, str, Any]] | None = None
) -> pa.Table:
    """A Parquet file, or what of it meets all filters (column, operator, value)."""
    if is_remote(file):
        with opened(file) as handle:
            return pq.read_table(handle, columns=columns, filters=filters)
    return pq.read_table(file, columns=columns, filters=filters)


def read_folder(folder: Place, pattern: str = "*.parquet") -> pa.Table:
    """All Parquet files of a folder in name order."""
    return read_files(sorted(folder.glob(pattern)))


def read_files(
    files: Sequence[Place],
    columns: list[str] | None = None,
    filters: Sequence[tuple[str, str, Any]] | None = None,
) -> pa.Table:
    """Parquet files (at least one) as one table, or what of them meets all filters."""
    return pa.concat_tables([read_parquet(file, columns, filters) for file in files])


def parquet_metadata(file: Place) -> pq.FileMetaData:
    """The footer alone."""
    with opened(file) as handle:
        return pq.read_metadata(handle)


@contextlib.contextmanager
def parquet_file(file: Place) -> Iterator[pq.ParquetFile]:
    """A Parquet file to read row group by row group, or batch by batch."""
    with opened(file) as handle, pq.ParquetFile(handle) as parquet:
        yield parquet


def dataset(files: Sequence[Place]) -> ds.Dataset:
    """Parquet files as one data set, in their order."""
    if files and is_remote(files[0]):
        store = cast(UPath, files[0]).fs
        return ds.dataset([cast(UPath, file).path for file in files], filesystem=store, format="parquet")
    return ds.dataset([str(file) for file in files])


def write_parquet(table: pa.Table, file: Place, **options: Any) -> None:
    """Write a Parquet file, whole and synced. options: as `pq.write_table` has them."""
    with new_file(file, synced=True) as temporary:
        pq.write_table(table, temporary, **options)
