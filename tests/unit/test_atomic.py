from __future__ import annotations

from pathlib import Path

import pytest

from dpo4rec_ray.atomic import new_file


@pytest.mark.parametrize("synced", [False, True])
def test_a_file_has_its_name_only_when_it_is_complete(tmp_path: Path, synced: bool) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), new_file(target, synced=synced) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    with new_file(target, synced=synced) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]
