"""cluster.yaml against Ray's own schema and validation, without a cloud, and against what the repository holds."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


def validate(cluster: dict[str, Any]) -> dict[str, Any]:
    from ray import autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(cluster, schema)
    prepared = prepare_config(cluster)
    validate_config(prepared)
    return prepared


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    prepared = validate(cluster)
    assert prepared["available_node_types"]["gpu_worker"]["max_workers"] == 4


def test_the_check_sees_a_typo_and_a_bad_head(cluster: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate({**cluster, "max_worker": 3})
    with pytest.raises(ValueError, match="head_node_type"):
        validate({**cluster, "head_node_type": "haed"})


def test_the_head_has_no_gpu_and_the_workers_have(cluster: dict[str, Any]) -> None:
    kinds = cluster["available_node_types"]
    assert "GPU" not in kinds[cluster["head_node_type"]]["resources"]
    assert all(
        kind["resources"]["GPU"] >= 1 for name, kind in kinds.items() if name != cluster["head_node_type"]
    )
    assert cluster["max_workers"] >= sum(kind["max_workers"] for kind in kinds.values())


def test_its_commands_agree_with_the_makefile(cluster: dict[str, Any]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = "\n".join(
        cluster["setup_commands"] + cluster["head_setup_commands"] + cluster["worker_setup_commands"]
    )
    version = re.search(r"^UV_VERSION := (\S+)$", makefile, re.MULTILINE)
    assert version is not None
    assert set(re.findall(r"uv==(\S+)", commands)) == {version.group(1)}
    assert "\ninstall: $(STAMP)" in makefile
    for extra in re.findall(r"EXTRA=(\w+)", commands):
        assert (ROOT / "requirements" / f"{extra}.txt").is_file()
    python = set(re.findall(r"uv python (?:install|find) (\S+?)[)\"\s]*$", commands, re.MULTILINE))
    assert len(python) == 1
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"].startswith(f">={python.pop()}")
