"""A full disk is named, and no other failure is taken for one."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from dpo4rec_ray.cli.mistakes import user_mistake
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.workers.node_disk import full_disk_named


def free(monkeypatch: pytest.MonkeyPatch, mib: float) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=int(mib * 2**20)))


def test_a_failure_on_a_full_disk_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 0.0)
    with (
        pytest.raises(UserError, match=r"could not start an engine: its disk is full \(0 MiB left") as raised,
        full_disk_named("start an engine"),
    ):
        raise ValueError("Model architectures ['LlamaForCausalLM'] failed to be inspected.")
    assert str(raised.value) == user_mistake(raised.value), "the command says it in one line"


def test_another_failure_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 500.0)
    with pytest.raises(ValueError, match="wrong"), full_disk_named("start an engine"):
        raise ValueError("wrong")
    free(monkeypatch, 0.0)
    with pytest.raises(UserError, match=r"set llm\.path"), full_disk_named("start an engine"):
        raise UserError("set llm.path to something else")
