"""The Serve application for given settings, and the file for `serve deploy`. Nothing is started."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from dpo4rec_ray.config.serving import APPLICATION, ServingSection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.serving.deployment import build, metrics_folder
from dpo4rec_ray.serving.tokens import read_tokens
from tests.conftest import ROOT
from tests.serving_world import serve


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"replicas": 2}, "replicas"),
        ({"num_replicas": 0}, "num_replicas = 0"),
        ({"port": 70_000}, "port = 70000"),
        ({"poll_s": 0}, "poll_s = 0"),
        ({"max_batch": "many"}, "max_batch = .many"),
    ],
)
def test_settings_that_cannot_be(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"serving.*{words}"):
        build(arguments)


def test_the_deployment_of_the_settings() -> None:
    deployment = build({"num_replicas": 3, "cpus_per_replica": 0.5, "max_waiting": 80})._bound_deployment
    assert deployment.name == APPLICATION and deployment.num_replicas == 3
    assert deployment.ray_actor_options["num_cpus"] == 0.5 and deployment.max_ongoing_requests >= 80
    scaled = build({"num_replicas": 2, "max_replicas": 6})._bound_deployment._deployment_config
    assert (scaled.autoscaling_config.min_replicas, scaled.autoscaling_config.max_replicas) == (2, 6)


def test_tokens(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    assert read_tokens("") == frozenset()
    file.write_text("first\n\n  second  \r\n", encoding="utf-8")
    assert read_tokens(str(file)) == {"first", "second"}
    for content in (b"", b" \n\n", b"\xff\xfe\xfd"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"serving\.token_file"):
            read_tokens(str(file))
    file.unlink()
    with pytest.raises(UserError, match=r"serving\.token_file") as missing:
        read_tokens(str(file))
    assert str(missing.value) == (
        f"serving.token_file {file}: No such file or directory; name a file with one token per line"
    )


def test_the_config_file_is_what_serve_deploys(tmp_path: Path) -> None:
    """Its settings are those of the command line."""
    changes = ["serving.port=8123", "serving.num_replicas=2", "serving.token_file=tokens"]
    ((code, out, errors),) = serve(["config", "--registry", str(tmp_path), *changes])
    assert (code, errors) == (0, "")
    schema = ServeDeploySchema.model_validate(yaml.safe_load(out))
    (application,) = schema.applications
    assert schema.http_options.port == 8123 and application.route_prefix == "/"
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    settings = ServingSection.model_validate(application.args)
    assert (
        settings.registry == str(tmp_path)
        and settings.num_replicas == 2
        and settings.token_file == str(ROOT / "tokens")
    )
    assert build(application.args)._bound_deployment.num_replicas == 2


def test_the_folder_of_metrics_is_this_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"dpo4rec-metrics-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / f"dpo4rec-metrics-{os.getuid()}").chmod(0o777)
    with pytest.raises(UserError, match="other users own or may use this folder"):
        metrics_folder()
