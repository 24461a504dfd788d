"""Places: the same on a folder and on a real S3 server."""

from __future__ import annotations

import pickle
from pathlib import Path

import pyarrow as pa
import pytest

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.storage import places
from dpo4rec_ray.storage.local_copies import local_copy
from dpo4rec_ray.storage.parquet import (
    dataset,
    opened,
    parquet_file,
    parquet_metadata,
    read_folder,
    read_parquet,
    write_parquet,
)
from dpo4rec_ray.storage.places import (
    Place,
    below,
    copy_folder,
    create,
    download,
    fetch,
    is_complete,
    is_remote,
    move_into,
    new_file,
    new_folder,
    place,
    remove,
    write_text,
)


@pytest.fixture(params=["folder", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return tmp_path
    return place(request.getfixturevalue("s3"))


@pytest.mark.parametrize("synced", [False, True])
def test_a_file_has_its_name_only_when_it_is_complete(root: Place, synced: bool) -> None:
    target = root / "a.json"
    write_text(target, "old")
    with pytest.raises(ZeroDivisionError), new_file(target, synced=synced) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert target.read_text() == "old" and list(root.iterdir()) == [target]
    with new_file(target, synced=synced) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new" and list(root.iterdir()) == [target]


def test_a_folder_is_complete_or_not_there(root: Place) -> None:
    target = root / "model"
    with pytest.raises(ZeroDivisionError), new_folder(target) as temporary:
        temporary.mkdir()
        raise ZeroDivisionError
    assert not is_complete(target)
    for content in ("first", "second"):
        with new_folder(target) as temporary:
            (temporary / "inner").mkdir(parents=True)
            (temporary / "inner/weights").write_text(content)
            if content == "first":
                (temporary / "old").write_text("")
        assert is_complete(target) and (target / "inner/weights").read_text() == content
    assert not (target / "old").exists()
    remove(target)
    assert not is_complete(target) and not target.exists()
    remove(target)


def test_a_folder_of_objects_that_was_not_copied_to_its_end_does_not_count(s3: str) -> None:
    write_text(place(s3) / "model/config.json", "{}")
    assert not is_complete(place(s3) / "model")


def test_of_several_creators_one_succeeds(root: Place) -> None:
    assert create(root / "x.json", b"1")
    assert not create(root / "x.json", b"2")
    assert (root / "x.json").read_bytes() == b"1" and [file.name for file in root.iterdir()] == ["x.json"]


def test_folders_travel_between_storages(root: Place, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "a/b").mkdir(parents=True)
    (source / "a/b/c.txt").write_text("c")
    (source / "d.txt").write_text("d")
    copy_folder(source, root / "there")
    copy_folder(root / "there", root / "again")
    copy_folder(root / "again", tmp_path / "back")
    assert (tmp_path / "back/a/b/c.txt").read_text() == "c"
    assert sorted(file.name for file in (tmp_path / "back").iterdir()) == ["a", "d.txt"]
    copy_folder(source, root / "to/work")
    move_into(root / "to/work", root / "to")
    assert (root / "to/a/b/c.txt").read_text() == "c" and (root / "to/d.txt").read_text() == "d"


def test_parquet_files(root: Place) -> None:
    for part in range(3):
        table = pa.table({"id": [part * 2, part * 2 + 1], "text": ["a", "b"]})
        write_parquet(table, root / f"part-{part:05d}.parquet", row_group_size=1)
    assert read_folder(root)["id"].to_pylist() == list(range(6))
    file = root / "part-00001.parquet"
    assert read_parquet(file, ["text"], [("id", "=", 3)]).to_pylist() == [{"text": "b"}]
    assert parquet_metadata(file).num_row_groups == 2
    with parquet_file(file) as parquet:
        assert parquet.read_row_group(1)["id"].to_pylist() == [3]
    assert dataset(sorted(root.glob("*.parquet"))).count_rows() == 6
    with opened(file) as handle:
        assert handle.read(4) == b"PAR1"


def test_a_place_travels_to_workers(root: Place) -> None:
    write_text(root / "a", "here")
    assert (pickle.loads(pickle.dumps(root)) / "a").read_text() == "here"


def test_what_is_not_there(root: Place) -> None:
    with pytest.raises(FileNotFoundError):
        (root / "nothing").read_text()
    (root / "nothing").unlink(missing_ok=True)
    assert not (root / "nothing").exists() and list((root / "nothing").glob("*")) == []


def test_paths_below_a_folder(root: Place) -> None:
    assert below(str(root / "a/b"), root) == "a/b"
    assert (
        below(f"{root}x/a", root) is None and below("owner/name", root) is None and below(None, root) is None
    )


def test_local_paths_are_absolute_and_unknown_schemes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert place("runs") == tmp_path / "runs" == place(f"file://{tmp_path}/runs")
    assert not is_remote(place("runs"))
    with pytest.raises(UserError, match=r"nosuch://x.*cannot be opened"):
        place("nosuch://x/y")


def test_local_copies(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once per content; a change is another copy; the oldest go when there is no room."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert local_copy(tmp_path) == tmp_path
    folder = place(s3) / "model"
    write_text(folder / "config.json", "one")
    write_text(folder / "sub/weights", "w" * 1000)
    copy = local_copy(str(folder))
    assert copy.name == "model" and (copy / "sub/weights").read_text() == "w" * 1000
    (copy / "mark").write_text("")
    assert local_copy(folder) == copy and (copy / "mark").exists()
    write_text(folder / "config.json", "two")
    other = local_copy(folder)
    assert other != copy and (other / "config.json").read_text() == "two" and (copy / "config.json").exists()
    assert local_copy(folder / "config.json").read_text() == "two"
    monkeypatch.setenv("DPO4REC_CACHE_GIB", "0")
    monkeypatch.setattr("dpo4rec_ray.storage.local_copies.IN_USE_S", 0.0)
    write_text(folder / "config.json", "three")
    assert (local_copy(folder) / "config.json").read_text() == "three" and not other.exists()
    with pytest.raises(FileNotFoundError):
        local_copy(place(s3) / "nothing")


def test_a_folder_of_a_web_server_that_tells_no_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = place("memory://web/model")
    write_text(source / "config.json", "{}")
    monkeypatch.setattr(places, "objects", lambda _: {"config.json": {"size": None}})
    download(source, tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "{}"
    with pytest.raises(OSError, match=r"config.json: changed while it was copied"):
        fetch(source, {"config.json": {"size": 3}}, tmp_path / "again")
