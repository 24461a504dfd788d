"""Unpacking a downloaded zip: only ordinary files below the folder, of a bounded size, each complete."""

from __future__ import annotations

import os
import re
import shutil
import stat
import zipfile
import zlib
from pathlib import Path

from dpo4rec_ray.datasets.fetch import set_aside, size_of
from dpo4rec_ray.errors import UserError

# The largest archive, ml-25m, holds 1.1 GiB.
MAX_UNPACKED_BYTES = 4 * 2**30
MAX_MEMBERS = 10_000


def unpack(archive: Path, folder: Path, max_bytes: int = MAX_UNPACKED_BYTES) -> Path:
    """Unpack a zip into `folder`. What is complete already is left alone; nothing is overwritten.

    Returns:
        The one folder that the archive holds, or `folder` when it holds several things.

    Raises:
        UserError: the archive is damaged or unsafe (it is kept as name.bad), or other files are in the way.
        OSError: the disk is full or cannot be written.
    """
    fresh = folder / f"{archive.name}.unpacking"
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = _checked_members(zipped, max_bytes)
            tops: dict[str, list[zipfile.ZipInfo]] = {}
            for member in members:
                tops.setdefault(member.filename.split("/")[0], []).append(member)
            todo = [top for top, inside in tops.items() if not all(_is_unpacked(m, folder) for m in inside)]
            for top in todo:
                if os.path.lexists(folder / top):
                    raise UserError(
                        f"{folder / top} is there already and is not what {archive.name} holds; move it away and run "
                        "the same command again"
                    )
            shutil.rmtree(fresh, ignore_errors=True)
            for top in todo:
                # zipfile never writes more than a member's declared bytes, and compares its CRC.
                zipped.extractall(fresh, tops[top])
            for top in todo:
                os.rename(fresh / top, folder / top)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        set_aside(archive, archive)
        raise UserError(
            f"{archive} is damaged or unsafe: {error}; it is kept as {archive.name}.bad, nothing was unpacked"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    only = folder / next(iter(tops)) if len(tops) == 1 else folder
    return only if only.is_dir() else folder


def _is_unpacked(member: zipfile.ZipInfo, folder: Path) -> bool:
    path = folder / member.filename
    return path.is_dir() if member.is_dir() else path.is_file() and size_of(path) == member.file_size


def _checked_members(zipped: zipfile.ZipFile, max_bytes: int) -> list[zipfile.ZipInfo]:
    """The members, all of them ordinary files and folders below the archive's root; else BadZipFile."""
    members = zipped.infolist()
    names = [member.filename.removesuffix("/") for member in members]
    if len(members) > MAX_MEMBERS:
        raise zipfile.BadZipFile(f"it has {len(members)} members, more than {MAX_MEMBERS}")
    if len(set(names)) < len(names):
        raise zipfile.BadZipFile("two of its members have the same name")
    total = sum(member.file_size for member in members)
    if total > max_bytes:
        raise zipfile.BadZipFile(f"unpacked it would be {total} bytes, more than {max_bytes}")
    for member, name in zip(members, names, strict=True):
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise zipfile.BadZipFile(f"its member {name!r} is a link or a device")
        outside = any(piece in ("", ".", "..") for piece in name.split("/"))
        if outside or "\\" in name or re.match("[A-Za-z]:", name):
            raise zipfile.BadZipFile(f"its member {name!r} points outside the folder")
        if member.flag_bits & 1:
            raise zipfile.BadZipFile(f"its member {name!r} is encrypted")
        if member.header_offset < 0:  # zipfile would seek there
            raise zipfile.BadZipFile(f"its member {name!r} begins before the archive")
    return members
