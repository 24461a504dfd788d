"""Every key of a recipe is explained: what `dpo4rec config` and the docs show."""

from __future__ import annotations

import json
import tomllib

import pytest

from dpo4rec_ray.cli import explain
from dpo4rec_ray.config import Config, default_config, reference
from dpo4rec_ray.config.reference import Key

KEYS = reference.keys()


def test_every_key_is_there_once_in_the_order_of_the_recipe() -> None:
    defaults = default_config().model_dump()
    assert [key.path for key in KEYS] == [
        f"{section}.{name}" for section in Config.model_fields for name in defaults[section]
    ]


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.path)
def test_a_key_says_what_it_means(key: Key) -> None:
    assert len(key.meaning) >= 4 and key.meaning.endswith(".") and "\n" not in key.meaning
    assert key.kind
    value = default_config().model_dump(mode="json")[key.section][key.name]
    assert tomllib.loads(f"value = {key.default}")["value"] == value


@pytest.mark.parametrize(
    ("unit", "ends", "words"),
    [
        ("seconds", ("_s", "_seconds"), "second"),
        ("bytes", ("_bytes",), "bytes"),
        ("MiB", ("_mib",), "MiB of"),
        ("GiB", ("_gib",), "GiB of"),
        ("share", ("_frac", "_fraction", "_utilization"), "Share of"),
        ("tokens", ("_tokens",), "Most tokens"),
    ],
)
def test_quantities_have_units(unit: str, ends: tuple[str, ...], words: str) -> None:
    numbers = [key for key in KEYS if key.kind.startswith(("number", "whole number"))]
    meant = [key for key in numbers if key.name.endswith(ends) or words in key.meaning.partition(".")[0]]
    assert meant
    assert {key.path: key.unit for key in meant if key.path != "openai.input_price"} == {
        key.path: unit for key in meant if key.path != "openai.input_price"
    }


@pytest.mark.parametrize(
    ("path", "kind", "default", "unit"),
    [
        ("data.protocol", '"user", "paper" or "time"', '"user"', ""),
        ("data.test_frac", "number, above 0 and below 1", "0.1", "share"),
        ("data.num_candidates", "whole number, from 2 to 200", "10", ""),
        ("table.profile", "list of text", "[]", ""),
        ("table.attributes", "table of text", "{}", ""),
        ("policy.zero_stage", "0, 1, 2 or 3", "2", ""),
        ("run.trackers", 'list of "tensorboard", "mlflow" or "wandb"', "[]", ""),
        ("prompt.ratings", "true or false", "true", ""),
        ("reward.compare", "list of text", '["ndcg@5", "map@5", "mrr@10", "log_likelihood"]', ""),
        ("serving.max_body", "whole number, from 1024", "1048576", "bytes"),
        ("serving.poll_s", "number, above 0", "1.0", "seconds"),
        ("data.partition_mib", "whole number, from 1", "256", "MiB"),
    ],
)
def test_keys_in_plain_words(path: str, kind: str, default: str, unit: str) -> None:
    (key,) = reference.keys(path)
    assert (key.path, key.kind, key.default, key.unit) == (path, kind, default, unit)


def test_keys_that_only_say_where_the_work_runs() -> None:
    placement = {key.path for key in KEYS if key.placement}
    assert {
        "data.partition_mib",
        "policy.checkpoint_every",
        "policy.min_workers",
        "bootstrap.storage_path",
    } < placement
    assert not {"data.user_core", "policy.lr", "bootstrap.min_workers"} & placement


def test_the_command_in_its_forms(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert explain.main(["data.partition_mib"]) == 0
    assert capsys.readouterr().out == (
        "[data]\n"
        "# Source, splits and candidate lists (docs/method.md,\n"
        "# section 1).\n\n"
        "partition_mib = 256\n"
        "    (whole number, from 1, MiB) MiB of unpacked raw text\n"
        "    that one worker sorts at a time. A change of it keeps\n"
        "    complete stages.\n"
    )
    assert explain.main(["--json"]) == 0
    assert [key["name"] for key in json.loads(capsys.readouterr().out)] == [key.name for key in KEYS]
    assert explain.main(["--markdown"]) == 0
    page = capsys.readouterr().out
    assert page.count("\n## [") + 1 == len(Config.model_fields)
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == len(KEYS)
    assert {line.replace("\\|", "").count("|") for line in rows} == {5}
    assert explain.main([]) == 0
    printed = capsys.readouterr().out
    as_recipe = "\n".join(line for line in printed.splitlines() if not line.startswith(" "))
    assert tomllib.loads(as_recipe) == default_config().model_dump(mode="json")
