"""deploy/kuberay against KubeRay's own schemas, Ray's autoscaler and Serve's schema, without a Kubernetes."""

from __future__ import annotations

import copy
import gzip
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dpo4rec_ray.config import load_config
from dpo4rec_ray.config.data import DataSection
from dpo4rec_ray.config.serving import APPLICATION, ServingSection
from dpo4rec_ray.serving.haproxy import ON_CLUSTERS
from dpo4rec_ray.workers.room import fits_labels

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "deploy" / "kuberay"
SCHEMAS = ROOT.parent / "shared" / "kuberay"  # KubeRay's custom resource definitions, commit feeaf72
CLUSTERS = {  # file -> where its cluster is
    "raycluster.yaml": ("spec",),
    "rayjob.yaml": ("spec", "rayClusterSpec"),
    "rayservice.yaml": ("spec", "rayClusterConfig"),
}


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def cluster(name: str) -> dict[str, Any]:
    found = read(name)
    for key in CLUSTERS[name]:
        found = found[key]
    return found


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def strict(schema: Any) -> Any:
    """The same schema, in which a field that is not named is a mistake: an API server drops such fields."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    found = {key: strict(value) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        found["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            found.setdefault("additionalProperties", False)
    return found


def crd_schema(kind: str) -> dict[str, Any]:
    file = SCHEMAS / f"ray.io_{kind.lower()}s.yaml.gz"
    if not file.is_file():
        pytest.skip("KubeRay's schemas are not at ../shared/kuberay")
    definition = yaml.load(gzip.decompress(file.read_bytes()), Loader=yaml.CSafeLoader)
    versions = {one["name"]: one for one in definition["spec"]["versions"]}
    found = strict(versions["v1"]["schema"]["openAPIV3Schema"])
    found["properties"]["metadata"] = {"type": "object"}  # the API server's own
    return found


@pytest.mark.parametrize("name", CLUSTERS)
def test_kuberay_accepts_it_and_not_with_a_typo(name: str) -> None:
    manifest = read(name)
    check = jsonschema.Draft202012Validator(crd_schema(manifest["kind"]))
    check.validate(manifest)

    def broken(path: tuple[str | int, ...], key: str, value: Any) -> str:
        wrong = copy.deepcopy(manifest)
        place = wrong
        for step in (*CLUSTERS[name], *path):
            place = place[step]
        place[key] = value
        return "\n".join(error.message for error in check.iter_errors(wrong))

    assert "idleTimeoutSecond'" in broken(("autoscalerOptions",), "idleTimeoutSecond", 5)
    pod = ("workerGroupSpecs", 2, "template", "spec")
    assert "toleration'" in broken(pod, "toleration", [])
    assert "'2' is not of type" in broken(("workerGroupSpecs", 0), "maxReplicas", "2")
    assert "is not one of" in broken(("authOptions",), "mode", "tokens")


@pytest.mark.parametrize("name", CLUSTERS)
def test_rays_autoscaler_makes_node_types_of_it(name: str) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.util import validate_config

    resource = {"metadata": {"name": "dpo4rec", "namespace": "default"}, "spec": cluster(name)}
    found = _derive_autoscaling_config_from_ray_cr(resource)
    validate_config(found)
    kinds = found["available_node_types"]
    head = kinds.pop(found["head_node_type"])
    assert head["resources"]["CPU"] == 0 and "GPU" not in head["resources"]
    for kind in kinds.values():
        assert kind["resources"].get("GPU", 0) in (0, 1) and kind["max_workers"] >= kind["min_workers"]
    spot = {kind: one for kind, one in kinds.items() if kind.endswith("-spot")}
    for kind, one in spot.items():  # a group on demand stands behind every spot group, with a lower priority
        behind = kinds[kind.removesuffix("-spot")]
        assert behind["resources"] == one["resources"] and behind["priority"] < one["priority"]
    assert {bool(one["resources"].get("GPU")) for one in spot.values()} == {True, False}


@pytest.mark.parametrize("name", CLUSTERS)
def test_what_the_operator_asks_beyond_the_schema(name: str) -> None:
    """Rules of ray-operator/controllers/ray/utils/validation.go at that commit."""
    spec = cluster(name)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = re.search(r"^ray\[.*\]==(.*)$", "\n".join(project["dependencies"]), re.MULTILINE)
    assert pinned and spec["rayVersion"] == pinned.group(1)  # tokens and priorities need it
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    assert all("restartPolicy" not in pod for pod in pods(spec))
    assert len({group["groupName"] for group in spec["workerGroupSpecs"]}) == len(spec["workerGroupSpecs"])
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        assert not {"labels", "resources"} & group["rayStartParams"].keys()
    assert len(read(name)["metadata"]["name"]) <= 47
    assert ("gcsFaultToleranceOptions" in spec) == (name != "rayjob.yaml")


def test_the_job_is_tried_again_on_a_new_cluster_and_leaves_nothing() -> None:
    spec = read("rayjob.yaml")["spec"]
    assert spec["backoffLimit"] >= 1 and "clusterSelector" not in spec  # the operator refuses both together
    assert spec["shutdownAfterJobFinishes"]
    program, action, recipe, *changes = spec["entrypoint"].split()
    assert (program, action) == ("dpo4rec", "run")
    config = load_config(recipe, changes)
    assert str(config.run.root).startswith("s3://")


def test_the_jobs_cluster_is_the_one_that_stays() -> None:
    stays = cluster("raycluster.yaml")
    del stays["gcsFaultToleranceOptions"]
    assert cluster("rayjob.yaml") == stays


def test_serve_accepts_the_service() -> None:
    from ray.serve.schema import ServeDeploySchema

    from dpo4rec_ray.cli.serve_actions import IMPORT_PATH

    config = yaml.safe_load(read("rayservice.yaml")["spec"]["serveConfigV2"])
    found = ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    assert (application["name"], application["import_path"]) == (APPLICATION, IMPORT_PATH)
    settings = ServingSection.model_validate(application["args"])  # names an unknown key
    serving = [
        group for group in cluster("rayservice.yaml")["workerGroupSpecs"] if "serve" in group["groupName"]
    ]
    limit = sum(
        group["maxReplicas"] * int(group["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"])
        for group in serving
    )
    assert settings.cpus_per_replica * settings.max_replicas <= limit
    assert found.http_options.port == 8000 and found.http_options.host == "0.0.0.0"
    for pod in pods(cluster("rayservice.yaml")):
        (container,) = pod["containers"]
        assert {"name": "serve", "containerPort": 8000} in container["ports"]
        assert ON_CLUSTERS.items() <= {one["name"]: one["value"] for one in container["env"]}.items()


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_pod_is_watched_bounded_and_has_no_rights(name: str) -> None:
    for pod in pods(cluster(name)):
        assert pod["securityContext"]["runAsNonRoot"]
        (container,) = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert {"livenessProbe", "readinessProbe"} <= container.keys()
        assert container["resources"]["requests"] == container["resources"]["limits"]
        gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert container["image"].endswith(":gpu" if gpu else ":cpu")
        assert any(one["key"] == "nvidia.com/gpu" for one in pod.get("tolerations", [])) == gpu


def test_redis_is_what_kubernetes_and_the_clusters_expect() -> None:
    import kubernetes_validate

    documents = list(yaml.safe_load_all((FOLDER / "redis.yaml").read_text(encoding="utf-8")))
    for document in documents:
        kubernetes_validate.validate(document, "1.34", strict=True)
    wrong = copy.deepcopy(documents[1])
    wrong["spec"]["template"]["spec"]["containers"][0]["port"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.34", strict=True)
    service = next(one for one in documents if one["kind"] == "Service")
    address = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    for name in ("raycluster.yaml", "rayservice.yaml"):
        assert cluster(name)["gcsFaultToleranceOptions"]["redisAddress"] == address


def test_no_secret_is_in_a_file() -> None:
    for file in FOLDER.glob("*.yaml"):
        for document in yaml.safe_load_all(file.read_text(encoding="utf-8")):
            assert document["kind"] != "Secret"
        assert not re.search(r"(AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20})", file.read_text(encoding="utf-8"))


def test_the_selector_of_the_docs_fits_what_is_shipped() -> None:
    docs = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    shown = re.search(r"^\| `label_selector` \| `(\{.*?\})`", docs, re.MULTILINE)
    assert shown
    selector = DataSection.model_validate(tomllib.loads(f"label_selector = {shown[1]}")).label_selector
    on_aws = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))["available_node_types"]
    groups = {"cluster.yaml": list(on_aws.values())}
    groups |= {name: cluster(name)["workerGroupSpecs"] for name in CLUSTERS}
    for name, kinds in groups.items():
        fit = [fits_labels(selector, kind.get("labels", {})) for kind in kinds]
        assert any(fit) and not all(fit), name
