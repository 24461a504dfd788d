"""cluster.yaml against Ray's own schema and validation, without a cloud, and against what the repository holds."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dpo4rec_ray.serving.haproxy import ON_CLUSTERS

ROOT = Path(__file__).resolve().parents[3]


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
    assert prepared["available_node_types"]["gpu_spot"]["max_workers"] == 8


def test_the_check_sees_a_typo_and_a_bad_head(cluster: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate({**cluster, "max_worker": 3})
    with pytest.raises(ValueError, match="head_node_type"):
        validate({**cluster, "head_node_type": "haed"})


def test_the_head_takes_no_work_and_every_spot_type_has_one_on_demand_behind_it(
    cluster: dict[str, Any],
) -> None:
    kinds = cluster["available_node_types"]
    assert kinds.pop(cluster["head_node_type"])["resources"] == {"CPU": 0}
    spot = {name: kind for name, kind in kinds.items() if name.endswith("_spot")}
    assert {"GPU" in kind["resources"] for kind in spot.values()} == {True, False}
    for name, kind in spot.items():
        behind = kinds[name.removesuffix("_spot")]
        assert kind["node_config"] == {
            **behind["node_config"],
            "InstanceMarketOptions": {"MarketType": "spot"},
        }
        assert kind["resources"] == behind["resources"]
    assert cluster["max_workers"] >= sum(kind["max_workers"] for kind in spot.values())


@pytest.mark.parametrize(
    ("demand", "lately_refused", "started"),
    [
        ({"CPU": 1}, [], "cpu_spot"),
        ({"CPU": 1, "GPU": 1}, [], "gpu_spot"),
        ({"CPU": 1}, ["cpu_spot"], "cpu"),
        ({"CPU": 1, "GPU": 1}, ["gpu_spot"], "gpu"),
    ],
)
def test_what_rays_autoscaler_starts(
    cluster: dict[str, Any], demand: dict[str, float], lately_refused: list[str], started: str
) -> None:
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    config = AutoscalingConfig(cluster, skip_content_hash=True)
    wanted = [ResourceRequestUtil.make(demand)]
    reply = ResourceDemandScheduler(event_logger=None).schedule(
        SchedulingRequest(
            node_type_configs=config.get_node_type_configs(),
            disable_launch_config_check=True,
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count(wanted),
            recoverable_resource_availabilities=dict.fromkeys(lately_refused, 0.0),
        )
    )
    # The head is no instance of this request, so the scheduler may add it.
    assert [launch.instance_type for launch in reply.to_launch if launch.instance_type != "head"] == [started]


def test_ec2_knows_every_field(cluster: dict[str, Any]) -> None:
    """The fields of each node against the API that botocore has; what Ray adds itself is left out."""
    import botocore.session
    from botocore.validate import ParamValidator

    shape = (
        botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    )
    for kind in cluster["available_node_types"].values():
        request = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
        assert not ParamValidator().validate(request, shape).has_errors()
        request["InstanceTyp"] = "m5"
        assert "InstanceTyp" in ParamValidator().validate(request, shape).generate_report()


def test_tokens_are_on_everywhere_and_in_no_file(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert all("RAY_AUTH_MODE=token" in line for line in cluster[commands] if "ray start" in line)
    assert "RAY_AUTH_TOKEN=" not in (ROOT / "cluster.yaml").read_text(encoding="utf-8")


def test_nodes_start_ray_with_what_serve_reads(cluster: dict[str, Any]) -> None:
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [line for line in cluster[commands] if "ray start" in line]
        assert starts and all("set -a; . ~/dpo4rec_ray/deploy/serve.env; set +a; " in line for line in starts)
    read = "set -a; . deploy/serve.env; env"
    done = subprocess.run(["bash", "-c", read], cwd=ROOT, env={}, capture_output=True, text=True, check=True)
    found = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert {name: value for name, value in found.items() if name.startswith("RAY_")} == ON_CLUSTERS


def test_its_commands_agree_with_the_makefile(cluster: dict[str, Any]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    kinds = cluster["available_node_types"].values()
    commands = "\n".join(
        cluster["setup_commands"]
        + cluster["head_setup_commands"]
        + cluster["worker_setup_commands"]
        + [line for kind in kinds for line in kind.get("worker_setup_commands", [])]
    )
    # A type's own commands stand in place of those for all.
    assert all(
        set(cluster["setup_commands"]) <= set(kind.get("worker_setup_commands", cluster["setup_commands"]))
        for kind in kinds
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


def test_nodes_know_the_region_of_the_bucket(cluster: dict[str, Any]) -> None:
    """Without it the store's client signs its requests for us-east-1."""
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [line for line in cluster[commands] if "ray start" in line]
        assert starts
        assert all(f" AWS_REGION={cluster['provider']['region']};" in line for line in starts)
