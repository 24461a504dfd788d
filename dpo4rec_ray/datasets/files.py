"""Files anywhere: local paths and URIs, listed, cut into splits, and read as blocks of whole lines.

A plain file is cut into byte ranges that can be read side by side; a compressed one is one stream. Local, s3, gs and
hdfs go through pyarrow, every other scheme (hf, http, memory, ...) through fsspec.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from dpo4rec_ray.datasets.source import DataFile
from dpo4rec_ray.errors import UserError, first_line

# Text without compression: what one parser holds at a time.
BLOCK_BYTES = 32 * 2**20
# How much larger text is than its compressed form, roughly. Only the number of partitions depends on it.
UNPACKED = 6
# The lines of a split are numbered by their bytes: a split may hold a terabyte.
_LINE_BITS = 40
_PYARROW_SCHEMES = ("file", "s3", "gs", "gcs", "hdfs")
_COMPRESSION = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
# Bytes that are looked at before a file is read.
HEAD_BYTES = 2**16
# A file up to this size is known by its content: a fifth of a second.
HASHED_BYTES = 256 * 2**20
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Listed:
    """One file of a folder; `path` is a local path or URI."""

    name: str
    path: str


@dataclass(frozen=True)
class Split:
    """What one task reads: bytes [start, end) of a file, or a row group.

    Attributes:
        file: place in the list of files.
        whole: the file is one stream: it is compressed, or its rows do not end where lines do.
        order: grows from split to split in the order of the files.
        size: bytes without compression, roughly.
    """

    file: int
    path: str
    start: int
    end: int
    whole: bool
    order: int
    size: int


@dataclass(frozen=True)
class Block:
    """Whole lines of one split. `order` grows in file order, by at least one per line."""

    order: int
    content: bytes


def open_filesystem(path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system of a path or URI, and the path within it.

    Raises:
        UserError: an unknown scheme, or a file system that cannot be set up.
    """
    scheme, separator, _ = path.partition("://")
    if not separator:
        return pyarrow.fs.LocalFileSystem(), str(Path(path).expanduser().absolute())
    try:
        if scheme in _PYARROW_SCHEMES:
            return pyarrow.fs.FileSystem.from_uri(path)
        import fsspec

        filesystem, inner = fsspec.url_to_fs(path)
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), inner
    except (OSError, ValueError, ImportError, pa.ArrowException) as error:
        raise UserError(f"{path}: this file system cannot be opened ({error})") from None


def list_files(folder: str) -> list[Listed]:
    """The files of a folder, by name; of a path to one file, that file.

    Raises:
        UserError: there is nothing at the path, or it cannot be listed.
    """
    filesystem, inner = open_filesystem(folder)
    with _failures(folder):
        info = filesystem.get_file_info(inner)
        if info.type == pyarrow.fs.FileType.NotFound:
            raise UserError(f"{folder}: not found; set data.raw_dir to the folder of the dataset")
        # Over http a folder looks like a file.
        if info.type == pyarrow.fs.FileType.File and not inner.endswith("/"):
            return [Listed(PurePosixPath(inner).name, folder)]
        found = filesystem.get_file_info(pyarrow.fs.FileSelector(inner))
    names = [(PurePosixPath(file.path).name, file) for file in found if file.is_file]
    return sorted(
        (Listed(name, join(folder, name)) for name, file in names if not name.startswith(".")),
        key=lambda file: file.name,
    )


def absolute(path: str) -> str:
    """A local path from the root on, since workers have another working directory; a URI or "" unchanged."""
    return path if not path or "://" in path else str(Path(path).expanduser().absolute())


def without_query(path: str) -> str:
    """A URI without its query, such as ?endpoint_override=...; a local path unchanged."""
    return path.partition("?")[0] if "://" in path else path


def join(folder: str, name: str) -> str:
    """The path of a name within a folder; a URI's query stays at the end."""
    path, mark, query = folder.partition("?") if "://" in folder else (folder, "", "")
    return f"{path if not path or path.endswith('/') else path + '/'}{name}{mark}{query}"


def file_identity(path: str) -> str:
    """What changes when the content does: of a local file of up to HASHED_BYTES its name and a hash, so that a copy of it is the
    same file; of others path, size and time of the last change, as far as the file system has them."""
    filesystem, inner = open_filesystem(path)
    with _failures(path):
        info = filesystem.get_file_info(inner)
        if isinstance(filesystem, pyarrow.fs.LocalFileSystem) and info.is_file and info.size <= HASHED_BYTES:
            with open(inner, "rb") as file:
                return f"{info.base_name} {hashlib.file_digest(file, 'sha256').hexdigest()}"
    return f"{path} {info.size} {info.mtime_ns}"


def is_empty(path: str) -> bool:
    """Whether the file is known to hold nothing."""
    filesystem, inner = open_filesystem(path)
    with _failures(path):
        return filesystem.get_file_info(inner).size == 0


def compression_of(path: str) -> str | None:
    """pyarrow's name of the compression, by the suffix of the file, or None."""
    return _COMPRESSION.get(PurePosixPath(without_query(path)).suffix)


def plan_splits(files: tuple[DataFile, ...], split_bytes: int = BLOCK_BYTES) -> list[Split]:
    """Splits of all files, in file order. Of several files empty ones are left out.

    Raises:
        UserError: a file is missing, or the only one is empty.
    """
    found: list[Split] = []

    def add(file: int, start: int, end: int, size: int, *, whole: bool = False) -> None:
        order = len(found) << _LINE_BITS
        found.append(Split(file, files[file].path, start, end, whole, order, size))

    for number, file in enumerate(files):
        if file.kind == "memory":
            add(number, 0, 0, file.table.nbytes if file.table is not None else 0, whole=True)
            continue
        filesystem, inner = open_filesystem(file.path)
        with _failures(file.path):
            size = filesystem.get_file_info(inner).size
            if size is None:  # the file is missing, or the server does not give the size
                with filesystem.open_input_file(inner) as handle:
                    size = handle.size()
        if not size and len(files) > 1:
            continue
        if not size:
            raise UserError(f"{file.path}: is empty; download or unpack it again")
        if file.kind == "parquet":
            for group, group_bytes in enumerate(_row_group_sizes(file.path)):
                add(number, group, group + 1, group_bytes)
        elif compression_of(file.path) or file.stream_encoding or file.join:
            add(number, 0, size, size * UNPACKED if compression_of(file.path) else size, whole=True)
        else:
            for start in range(0, size, split_bytes):
                end = min(start + split_bytes, size)
                add(number, start, end, end - start)
    return found


def _row_group_sizes(path: str) -> list[int]:
    filesystem, inner = open_filesystem(path)
    with _failures(path), filesystem.open_input_file(inner) as handle:
        metadata = pq.ParquetFile(handle).metadata
        return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]


def read_row_group(split: Split, columns: tuple[str, ...]) -> pa.Table:
    """The row group of a Parquet split; its `columns`, all of them where none is named."""
    filesystem, inner = open_filesystem(split.path)
    with _failures(split.path), filesystem.open_input_file(inner) as handle:
        return pq.ParquetFile(handle).read_row_group(split.start, columns=list(columns) or None)


@contextlib.contextmanager
def _failures(path: str) -> Iterator[None]:
    """Any error of a file system becomes one line. (Each file system of fsspec has its own exceptions.)"""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path}: cannot be read, or is truncated or damaged ({first_line(error)}); download it again"
        ) from None


def read_blocks(split: Split, file: DataFile, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """The lines that begin within a split, as blocks of whole lines, without the file's header.

    Raises:
        UserError: the file cannot be read or unpacked, ends within a line where it may not, or holds a line that is
            longer than a block.
    """
    filesystem, inner = open_filesystem(split.path)
    with _failures(split.path):
        if split.whole:
            pieces = _stream(filesystem, inner, file, block_bytes)
        else:
            pieces = _range(filesystem, inner, split, block_bytes)
        order = split.order
        first = split.start == 0
        for piece in pieces:
            if first:
                first = False
                piece = piece.removeprefix(BOM)
                if file.header:
                    header, _, piece = piece.partition(b"\n")
                    order += len(header) + 1
            if piece:
                if file.complete and not piece.endswith(b"\n"):
                    tail = piece[piece.rfind(b"\n") + 1 :][:100].decode("utf-8", "backslashreplace")
                    raise UserError(
                        f"{split.path}: the file is truncated: it ends within the line {tail!r}; download or unpack it "
                        "again"
                    )
                yield Block(order, piece)
                order += len(piece)


def _stream(
    filesystem: pyarrow.fs.FileSystem, path: str, file: DataFile, block_bytes: int
) -> Iterator[bytes]:
    compression = compression_of(file.path)
    with filesystem.open_input_stream(path, compression=compression, buffer_size=2**20) as stream:
        parts = iter(lambda: stream.read(block_bytes), b"")
        if file.stream_encoding:
            parts = _as_utf8(parts, file.stream_encoding)
        pieces = _whole_lines(parts, path, block_bytes)
        yield from file.join(pieces) if file.join else pieces


def _as_utf8(parts: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """UTF-8 with line ends \\n, whatever they were. What is not in the encoding becomes a byte that is not UTF-8."""
    # ("surrogateescape" itself cannot stand for every byte of UTF-16.)
    codecs.register_error("unreadable", lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)("unreadable"), True)
    for part in parts:
        yield decoder.decode(part).encode("utf-8", "surrogateescape")
    yield decoder.decode(b"", final=True).encode("utf-8", "surrogateescape")


def _range(filesystem: pyarrow.fs.FileSystem, path: str, split: Split, block_bytes: int) -> Iterator[bytes]:
    """The lines that begin in a range: the first starts behind the first line end at or after byte start - 1."""
    with filesystem.open_input_file(path) as handle:
        begin = max(0, split.start - 1)
        handle.seek(begin)
        data = handle.read(split.end - begin)
        if split.start > 0:
            cut = data.find(b"\n")
            if cut < 0:  # one line of an earlier range covers the whole range
                return
            data = data[cut + 1 :]
        if not data:
            return
        parts = [data]
        while parts[-1] and not parts[-1].endswith(b"\n"):  # finish the last line
            more = handle.read(64 * 1024)
            cut = more.find(b"\n")
            parts.append(more if cut < 0 else more[: cut + 1])
            if sum(map(len, parts)) > split.end - begin + block_bytes:
                raise UserError(f"{path}: a line is longer than {block_bytes} bytes; is it a text file?")
        yield b"".join(parts)


def _whole_lines(parts: Iterator[bytes], path: str, block_bytes: int) -> Iterator[bytes]:
    rest = b""
    for data in parts:
        cut = data.rfind(b"\n") + 1
        if not cut:
            rest += data
            if len(rest) > 4 * block_bytes:
                raise UserError(f"{path}: a line is longer than {4 * block_bytes} bytes; is it a text file?")
            continue
        yield rest + data[:cut]
        rest = data[cut:]
    if rest:
        yield rest


def read_header(path: str) -> bytes:
    """The first line of a text file, without its line end and byte order mark.

    Raises:
        UserError: the file cannot be read.
    """
    return read_head(path).partition(b"\n")[0].rstrip(b"\r").removeprefix(BOM)


def read_head(path: str) -> bytes:
    """The first 64 KiB of a file, unpacked.

    Raises:
        UserError: the file cannot be read.
    """
    filesystem, inner = open_filesystem(path)
    with _failures(path), filesystem.open_input_stream(inner, compression=compression_of(path)) as stream:
        return stream.read(HEAD_BYTES)
