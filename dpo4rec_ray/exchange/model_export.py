"""A run's policy, or its reranker, as a folder for the Hugging Face Hub: weights, what loads them, and a model card.

The folder has no user's data and no path of this machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCardData

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.intervals import signed
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.evaluation.ladder import Rung
from dpo4rec_ray.exchange.base_llm import base_llm, trained_from
from dpo4rec_ray.exchange.example_prompt import example_prompt
from dpo4rec_ray.exchange.model_card import card, eval_results, heldout_rows, public, test_rows
from dpo4rec_ray.policy.model import PolicyWeights, load_tokenizer, save_merged
from dpo4rec_ray.rerankers.card import CARD_FILE, read_card
from dpo4rec_ray.serving.publish import best_model, best_policy
from dpo4rec_ray.stages.evaluate import system_name
from dpo4rec_ray.storage.places import copy_folder, new_folder, place
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.policies import base_llm_path, policy_weights

Form = Literal["merged", "lora"]
ADAPTER_FILE = "adapter_config.json"
README = "README.md"


def chosen_policy(config: Config, store: RunDir) -> int:
    """The policy of the best round.

    Raises:
        UserError: the run trains no policy, or no round improved on the base LLM.
    """
    _check_policy(config, store)
    found = best_policy(store)
    if not found:
        raise UserError(
            f"{store.root}: no round improved on the base LLM, so there is no policy to export; --round exports a round's policy "
            "all the same"
        )
    return found


def export_policy(config: Config, store: RunDir, number: int, form: Form, target: Path) -> None:
    """Write policy `number` into the new folder `target`. If the process is killed, `target` does not exist.

    Raises:
        UserError: there is no such policy or it has no LoRA, its base is gone, or `target` holds files.
    """
    _check_policy(config, store)
    if not number:
        raise UserError("--round 0 is the base LLM, which is not this run's to export; rounds count from 1")
    weights, manifest = policy_weights(config, store, number), store.require("policy", number)
    if form == "lora" and not weights.lora:
        raise UserError(
            f"{store.path('policy', number)}: all weights were trained, so there is no LoRA; use --form merged"
        )
    base, summary = base_llm(config, store), _summary(store)
    row = next((one for one in summary.get("rounds", ()) if one.get("policy", one["round"]) == number), {})
    on_base = number == 1 or trained_from(store, number) == trained_from(store, 1)
    loads_on = base.hub if on_base else ""
    with _written(target) as folder:
        if form == "lora":
            copy_folder(place(str(weights.lora)), folder)
            _edit_json(folder / ADAPTER_FILE, base_model_name_or_path=loads_on or None)
        elif weights.merged or not weights.lora:
            copy_folder(place(weights.whole), folder)
        else:
            save_merged(_merge_base(config, store, weights, on_base), weights.lora, folder, config.llm.dtype)
        called, objective = config.run.called(number), config.policy.objective_of(number)
        system = system_name(config, number)
        data = ModelCardData(
            model_name=f"{config.run.name}-{called.replace(' ', '-')}",
            base_model=base.hub or None,
            library_name="transformers" if form == "merged" else "peft",
            pipeline_tag="text-generation",
            license=base.licence or None,
            tags=["dpo4rec", "recommendation", objective, *(["lora"] if form == "lora" else [])],
            eval_results=(eval_results(config, summary, system, "text-generation") if row else None) or None,
        )
        card(
            data,
            config,
            summary,
            policy=True,
            title=f"{config.run.name}: the policy of {called}",
            form=form,
            lora=weights.lora is not None,
            before=base.text if on_base else "a policy that the same run had trained before",
            loads_on=loads_on,
            called=called,
            objective=objective,
            steps=manifest.stats["steps"],
            reference=manifest.stats.get("reference", "the policy that training began with"),
            commit=manifest.commit,
            versions=manifest.versions,
            base=base,
            heldout=heldout_rows(row.get("figures", {})),
            kept=row.get("choice", {}).get("kept"),
            test=test_rows(summary, system) if row else [],
            rungs=[_rung(rung) for rung in row.get("ladder", ())],
            dtype=config.llm.dtype,
            rank=config.policy.lora_rank,
            prompt=example_prompt(config, load_tokenizer(str(folder))),
            sampling=config.generate_by(number),
        ).save(folder / README)


def export_reranker(config: Config, store: RunDir, number: int, target: Path) -> str:
    """Write the reranker that reads the texts of policy `number` best on validation into `target`; return its name.

    Raises:
        UserError: the run has no such reranker, or `target` holds files.
    """
    name = best_model(config, store, number)
    if not name:
        raise UserError(
            f"{store.root}: no reranker reads the texts of {config.run.called(number)}; leave --round out"
        )
    source, summary = store.path("per_list") / "rerankers" / name, _summary(store)
    found = public(read_card(source))
    info, backbone = found["info"], found["settings"]["backbone"]
    own = {"systems": [one for one in summary["systems"] if one["backbone"] == backbone]}
    with _written(target) as folder:
        copy_folder(source, folder)
        (folder / CARD_FILE).write_text(json.dumps(found, indent=1), encoding="utf-8")
        data = ModelCardData(
            model_name=f"{config.run.name}-{name}",
            library_name="dpo4rec_ray",
            tags=["dpo4rec", "recommendation", "reranker", backbone],
            eval_results=eval_results(config, own, info["system"], "text-ranking") or None,
        )
        card(
            data,
            config,
            summary,
            policy=False,
            title=f"{config.run.name}: reranker {name}",
            settings={
                "backbone": backbone,
                "reads": found["knowledge"],
                "system": info["system"],
                "seed": info.get("seed", 0),
                "num_items": found["catalogue"]["num_items"],
                "encoder": public(config.encoder.path),
            },
            commit=info.get("commit", ""),
            versions=info.get("versions", {}),
            base=base_llm(config, store) if config.has_policy and store.manifest("policy", 1) else None,
            test=test_rows(summary, info["system"], backbone),
        ).save(folder / README)
    return name


def _check_policy(config: Config, store: RunDir) -> None:
    if not config.has_policy:
        raise UserError(f"{store.root}: llm.source = {config.llm.source!r}, so the run trained no LLM")


@contextmanager
def _written(target: Path) -> Iterator[Path]:
    """Where to write what becomes `target` at the end.

    Raises:
        UserError: `target` is a file or holds files, or cannot be made.
    """
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"{target}: there is something already; name a new folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target}: cannot be made ({error.strerror}); name another folder") from None
    with new_folder(target) as folder:
        yield folder


def _merge_base(config: Config, store: RunDir, weights: PolicyWeights, on_base: bool) -> str:
    """Where the model is that the LoRA lies on; the folder may have moved since."""
    path = base_llm_path(config, store) if on_base else weights.base
    if path.startswith("/") and not Path(path).exists():
        raise UserError(
            f"{path}: the model that the LoRA was trained on is gone; put it back, or use --form lora"
        )
    return path


def _summary(store: RunDir) -> dict[str, Any]:
    file = store.root / "summary.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _edit_json(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) | values
    file.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


def _rung(rung: Rung) -> dict[str, str]:
    return {
        "name": rung["name"],
        "value": signed(rung["value"], rung["ci95"]),
        "bound": f"{rung['bound']:g}",
        "verdict": rung["verdict"],
    }
