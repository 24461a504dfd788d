"""A finished run, continued with trackers: its figures are there, and only once; and its models in the form for others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo4rec_ray.cli import export_model
from dpo4rec_ray.config import read_config
from dpo4rec_ray.exchange.example_prompt import example_prompt
from dpo4rec_ray.policy.model import load_model, load_tokenizer, read_policy
from dpo4rec_ray.rerankers.catalogue import Catalogue
from dpo4rec_ray.rerankers.fit import load_reranker
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.reading import read_vectors
from tests.conftest import DEMO, TINY, Finished, run_job
from tests.tracker_records import shown

pytestmark = [pytest.mark.ray, pytest.mark.vllm]


def test_a_continued_run_sends_every_figure_once(tiny_run: Finished, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    shutil.copytree(tiny_run.folder, tmp_path / "run")
    for _ in range(2):
        done = run_job(tmp_path, DEMO, *TINY, 'run.trackers=["tensorboard", "mlflow"]')
        assert done.code == 0, done.stderr
        assert all(stage["skipped"] for stage in done.summary["stages"])
    (row,) = done.summary["rounds"]
    expected = {
        "reward/mean": row["diagnosis"]["mean_reward"],
        "pairs/train": row["pairs"],
        "heldout/reward_before": row["heldout_reward_before"],
        "heldout/reward_change_high": row["heldout_reward_delta_ci95"][1],
        "heldout/round_kept": float(row["choice"]["kept"]),
        **{
            f"test/{system['backbone']}/{system['system']}/ndcg_at_5": system["ndcg@5"]
            for system in done.summary["systems"]
        },
    }
    found = shown(done.folder)
    client = mlflow.MlflowClient(f"sqlite:///{done.folder}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("dpo4rec-ray").experiment_id])
    for name, value in expected.items():
        assert found[name] == [(1, pytest.approx(value, abs=1e-6))], name
        history = client.get_metric_history(run.info.run_id, name)
        assert [(point.step, point.value) for point in history] == [(1, pytest.approx(value))], name
    assert run.info.status == "FINISHED"
    assert run.data.tags["summary"] == (done.folder / "summary.json").as_uri()


def test_the_exported_policy_is_the_runs(tiny_run: Finished, tmp_path: Path) -> None:
    """Merged and as LoRA: the same logits as base and LoRA of the run; and the reranker's folder beside them."""
    for arguments in (["merged"], ["lora", "--form", "lora"], ["reranker", "--what", "reranker"]):
        out = str(tmp_path / arguments[0])
        number = [] if "--what" in arguments else ["--round", "1"]
        assert export_model.main([str(tiny_run.folder), out, *arguments[1:], *number]) == 0
    policy = read_policy(tiny_run.folder / "rounds/01/policy")
    base = load_model(policy.base, "float32")
    text = example_prompt(read_config(tiny_run.folder), load_tokenizer(str(tmp_path / "merged")))
    ids = AutoTokenizer.from_pretrained(tmp_path / "lora")(
        text, add_special_tokens=False, return_tensors="pt"
    )
    with torch.no_grad():
        before = base(**ids).logits
        own = PeftModel.from_pretrained(load_model(policy.base, "float32"), str(policy.lora))(**ids).logits
        lora = PeftModel.from_pretrained(load_model(policy.base, "float32"), tmp_path / "lora")(**ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(**ids).logits
    assert torch.allclose(own, lora, atol=1e-5) and torch.allclose(own, merged, atol=1e-4)
    assert (own - before).abs().max() > 1e-3
    store = RunDir(tiny_run.folder)
    attributes = store.read("items").sort_by("item_id")["attributes"].to_pylist()
    catalogue = Catalogue.from_items(attributes, read_vectors(store, 0, "item")[1])
    assert load_reranker(tmp_path / "reranker", catalogue).knowledge
    for name in ("merged", "lora", "reranker"):
        card = ModelCard.load(tmp_path / name / "README.md")
        assert card.data.library_name and card.data.eval_results
        content = b"".join(file.read_bytes() for file in (tmp_path / name).iterdir())
        assert str(tiny_run.folder.parent).encode() not in content
