"""Exports of a policy that was made here, without a run: what can be loaded, what the card says, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoTokenizer

from dpo4rec_ray.cli import export_model
from dpo4rec_ray.config import Config, load_config
from dpo4rec_ray.config.training import PolicySection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.exchange.base_llm import base_llm
from dpo4rec_ray.exchange.example_prompt import HISTORY, ITEMS, example_prompt
from dpo4rec_ray.exchange.model_card import public, recipe_text
from dpo4rec_ray.exchange.model_export import chosen_policy, export_policy
from dpo4rec_ray.knowledge.catalogue_prompts import TokenizedPrompts
from dpo4rec_ray.models.published import PUBLISHED_MODELS
from dpo4rec_ray.policy.model import (
    PolicyWeights,
    add_lora,
    load_model,
    load_tokenizer,
    read_policy,
    save_complete,
    save_model,
    write_policy,
)
from dpo4rec_ray.store.artifacts import Manifest, RunDir, write_json
from dpo4rec_ray.store.policies import base_llm_path

CHANGE = {"before": 0.1, "after": 0.2, "change": 0.1, "change_ci95": [0.05, 0.15], "users": 7}


def make_run(folder: Path, *changes: str, full: bool = False, best: int = 1) -> tuple[Config, RunDir]:
    """A run of the demo with a policy whose LoRA (or weights) somebody moved at random, and a summary."""
    config, store = (
        load_config("demo", [f"run.root={folder}", "run.name=tiny", *changes]),
        RunDir(folder / "tiny"),
    )
    base, target = base_llm_path(config, store), store.start("policy", 1)
    write_json(store.root / "config.json", config.model_dump(mode="json"))
    model: Any = load_model(base, "float32")
    torch.manual_seed(0)
    if not full:
        model = add_lora(model, PolicySection())
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.02)
    if full:
        save_complete(model, base, target / "full")
        weights = PolicyWeights(base=str(target / "full"))
    else:
        save_model(model, base, target / "lora")
        weights = PolicyWeights(base=base, lora=str(target / "lora"))
    write_policy(target, weights, {"base_hash": "0123456789abcdef"})
    store.finish(Manifest("policy", "", 3, stats={"steps": 3, "reference": "base LLM"}, commit="abc"), 1)
    system = {"backbone": "prm", "system": "dpo4rec-round1", "seeds": 2, "map_paper@5": 0.4, "ndcg@5": 0.5}
    against = {"backbone": "prm", "system": "dpo4rec-round1", "against": "backbone", "metric": "ndcg@5"}
    row = {
        "round": 1,
        "policy": 1,
        "figures": {"reward": CHANGE},
        "choice": {"kept": bool(best)},
        "ladder": [],
    }
    write_json(
        store.root / "summary.json",
        {
            "best_policy": best,
            "best_round": best,
            "prepare": {"users": 60},
            "rounds": [row],
            "systems": [system],
            "comparisons": [against | {"delta": -0.01, "ci95": [-0.03, 0.01]}],
        },
    )
    return config, store


def own_policy(config: Config, store: RunDir, *, full: bool = False) -> Any:
    folder = store.path("policy", 1)
    if full:
        return load_model(str(folder / "full"), "float32")
    return PeftModel.from_pretrained(
        load_model(base_llm_path(config, store), "float32"), str(folder / "lora")
    )


def logits(model: Any, folder: Path, text: str) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**ids).logits


def no_path_in(folder: Path, root: Path) -> None:
    package = str(Path(export_model.__file__).parents[1])
    for file in folder.rglob("*"):
        content = file.read_bytes()
        assert str(root).encode() not in content and package.encode() not in content, file


@pytest.mark.parametrize("full", [False, True])
def test_the_merged_form_is_the_policy(tmp_path: Path, full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded by the code of its own card."""
    config, store = make_run(tmp_path, full=full)
    out = tmp_path / "out"
    export_policy(config, store, 1, "merged", out)
    text = example_prompt(config, load_tokenizer(str(out)))
    monkeypatch.chdir(out)
    loaded: dict[str, Any] = {}
    exec((out / "README.md").read_text().split("```python\n")[1].split("```")[0], loaded)
    found = logits(loaded["model"], out, text)
    assert torch.allclose(found, logits(own_policy(config, store, full=full), out, text), atol=1e-4)
    base = logits(load_model(base_llm_path(config, store), "float32"), out, text)
    assert (found - base).abs().max() > 0.1
    no_path_in(out, tmp_path)


def test_the_lora_form_is_the_policy_on_its_base(tmp_path: Path) -> None:
    config, store = make_run(tmp_path)
    out = tmp_path / "out"
    export_policy(config, store, 1, "lora", out)
    text = example_prompt(config, load_tokenizer(str(out)))
    model = PeftModel.from_pretrained(load_model(base_llm_path(config, store), "float32"), out)
    assert torch.allclose(logits(model, out, text), logits(own_policy(config, store), out, text), atol=1e-5)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert "names no base" in (out / "README.md").read_text()
    assert not (out / "model.safetensors").exists()
    no_path_in(out, tmp_path)


def test_a_base_on_the_hub_is_named(tmp_path: Path) -> None:
    """The policy itself says that its base had a name on the hub when it was trained, and at which commit."""
    config, store = make_run(tmp_path)
    config = config.model_copy(update={"llm": config.llm.model_copy(update={"path": "some/llm"})})
    file = store.path("policy", 1) / "policy.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_hash": "some/llm@c0ffee"}))
    export_policy(config, store, 1, "lora", tmp_path / "out")
    assert (
        json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"]
        == "some/llm"
    )
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.base_model == "some/llm" and "revision `c0ffee`" in card.text
    assert 'base = "some/llm"\n' in card.text and card.data.library_name == "peft"


def test_a_lora_on_an_earlier_policy_says_so(tmp_path: Path) -> None:
    """Round 2 began with round 1's merged policy, so the hub's LLM is not what its LoRA belongs on."""
    config, store = make_run(tmp_path)
    config = config.model_copy(update={"llm": config.llm.model_copy(update={"path": "some/llm"})})
    first, second = store.path("policy", 1), store.path("policy", 2)
    shutil.copytree(first, second)
    weights = PolicyWeights(base=str(first / "merged"), lora=str(second / "lora"))
    write_policy(first, read_policy(first), {"base_hash": "some/llm@c0ffee"})
    write_policy(second, weights, {"base_hash": "0123456789abcdef"})
    export_policy(config, store, 2, "lora", tmp_path / "out")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] is None
    text = (tmp_path / "out/README.md").read_text()
    assert "A LoRA on a policy that the same run had trained before" in text and 'base = "BASE"' in text
    with pytest.raises(UserError, match="the model that the LoRA was trained on is gone"):
        export_policy(config, store, 2, "merged", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_published_gguf_file_keeps_its_terms(tmp_path: Path) -> None:
    config, store = make_run(tmp_path)
    config = config.model_copy(update={"llm": config.llm.model_copy(update={"path": "/home/a/mine.gguf"})})
    file = store.path("policy", 1) / "policy.json"
    known = PUBLISHED_MODELS["gemma-3-270m"]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_hash": known.sha256[:16]}))
    found = base_llm(config, store)
    assert (found.licence, found.hub) == ("gemma", "") and known.link in found.terms
    assert "mine.gguf" in found.text and "/home" not in found.text
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_hash": ""}))
    assert base_llm(config, store).licence == ""


def test_the_card_has_figures_with_intervals_and_the_hub_reads_it(tmp_path: Path) -> None:
    config, store = make_run(tmp_path, best=0)
    export_policy(config, store, 1, "merged", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.license is None and card.data.model_name == "tiny-round-1"
    found = {one.metric_type: (one.metric_value, one.dataset_type) for one in card.data.eval_results or []}
    assert found == {"ndcg@5": (0.5, "sample"), "map_paper@5": (0.4, "sample")}
    for line in (
        "| reward of own texts | 0.1000 | 0.2000 | +0.1000 [+0.0500, +0.1500] | 7 |",
        "| PRM | NDCG@5 | 0.5000 | backbone | -0.0100 [-0.0300, +0.0100] |",
        "**not kept**",
        "Simulated users over an invented catalogue",
        "at commit abc",
        "First invented title",
    ):
        assert line in card.text, line


def test_the_recipe_in_the_card_is_one_without_paths(tmp_path: Path) -> None:
    config = load_config(
        "demo",
        ["data.raw_dir=/home/a/ml-1m", "encoder.path=s3://bucket/own-encoder", 'prompt.lead_in="Likes /x"'],
    )
    (tmp_path / "again.toml").write_text(recipe_text(config))
    again = load_config(tmp_path / "again.toml")
    assert (again.data.raw_dir, again.encoder.path, again.prompt.lead_in) == (
        "ml-1m",
        "own-encoder",
        "Likes /x",
    )
    assert again.dpo == config.dpo and again.policy == config.policy
    assert public({"a": ["~/b/c/", 1, "d/e"]}) == {"a": ["c", 1, "d/e"]}


def test_the_example_prompt_is_the_policys_own(tmp_path: Path) -> None:
    """Token by token what the run asks about such a user; with examples, these are invented too."""
    tokenizer = load_tokenizer(base_llm_path(load_config("demo"), RunDir(tmp_path)))
    config = load_config("demo")
    asked = TokenizedPrompts.of_recipe(config, tokenizer, ITEMS).user("invented profile", HISTORY, (4, 3, 4))[
        0
    ]
    text = example_prompt(config, tokenizer)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == asked
    assert asked[0] == tokenizer.bos_token_id and asked.count(tokenizer.bos_token_id) == 1
    with_examples = example_prompt(load_config("demo", ["prompt.examples=2"]), tokenizer)
    assert with_examples.count('"First invented title"') == 3


def test_what_cannot_be_exported_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, store = make_run(tmp_path, full=True, best=0)
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no round improved on the base LLM"):
        chosen_policy(config, store)
    with pytest.raises(UserError, match="there is no LoRA; use --form merged"):
        export_policy(config, store, 1, "lora", out)
    with pytest.raises(UserError, match="--round 0 is the base LLM"):
        export_policy(config, store, 0, "merged", out)
    statistics = config.model_copy(update={"llm": config.llm.model_copy(update={"source": "statistics"})})
    with pytest.raises(UserError, match="trained no LLM"):
        chosen_policy(statistics, store)
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    capsys.readouterr()
    assert export_model.main([str(store.root), str(out), "--round", "1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "there is something already" in error
    assert [file.name for file in out.iterdir()] == ["mine.txt"]


def test_the_command_says_how_to_upload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, store = make_run(tmp_path)
    out = tmp_path / "new" / "mine"
    assert export_model.main([str(store.root), str(out), "--round", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"hf upload YOUR_NAME/mine {out}"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {
        one.name for one in out.iterdir()
    }
    assert sorted(one.name for one in out.parent.iterdir()) == ["mine"]
