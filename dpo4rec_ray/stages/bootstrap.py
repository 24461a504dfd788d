"""A small LLM for machines that have none, trained from scratch over the run's catalogue (llm.path = "bootstrap").

Users are simulated over the catalogue, a template teacher writes texts from their histories, and the trainer that runs DPO
learns prompt -> text. The teacher sees only the history, and how well it reads varies, so that DPO has texts to choose from.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.candidates import knowledge_cut
from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.datasets.synthetic import simulate_users
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.knowledge.catalogue_prompts import CataloguePrompts
from dpo4rec_ray.knowledge.engine_spec import EngineSpec, ServedWeights
from dpo4rec_ray.knowledge.generator import VLLMGenerator
from dpo4rec_ray.knowledge.prompts import encode_chat
from dpo4rec_ray.knowledge.teacher import EVERY_FACET, popular_values, teacher_text, text_accuracy
from dpo4rec_ray.policy.deepspeed_config import read_extra
from dpo4rec_ray.policy.model import load_tokenizer
from dpo4rec_ray.policy.small_llm import SPECIAL_TOKENS, build_tokenizer, supervised_rows
from dpo4rec_ray.storage.parquet import write_parquet
from dpo4rec_ray.storage.places import Place, move_into, new_folder, remove
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.metrics_file import read_metrics
from dpo4rec_ray.store.outcome import Outcome
from dpo4rec_ray.store.progress import Progress, say
from dpo4rec_ray.train.launch import launch
from dpo4rec_ray.train.supervised_loop import MODEL, ROWS, TOKENIZER, WORK, SupervisedTask, supervised_loop
from dpo4rec_ray.workers.placement import engine_env
from dpo4rec_ray.workers.stage_workers import engine_needs
from dpo4rec_ray.workers.tasks import in_worker

RECIPE_OF = {"sample": "demo", "movielens": "ml1m_small"}
TOKENIZER_LESSONS = 5000  # hold every word of a catalogue's frequent items
# Simulated users, none of them trained on, whose texts are compared with their true tastes.
NUM_CHECK_USERS = 300


@dataclass(frozen=True)
class Lesson:
    """One prompt and one text of the teacher per simulated user, and the users' true tastes."""

    prompts: list[str]
    texts: list[str]
    tastes: list[list[str]]


def run(config: Config, store: RunDir, round_id: int) -> Outcome:
    """Write `base_llm`: a model folder with its tokenizer."""
    section, folder = config.bootstrap, store.start("base_llm")
    (folder / WORK).mkdir()
    say(f"  bootstrap: writing {section.num_users} lessons over {store.require('items').rows} items")
    lesson = _lesson(config, store, section.num_users, seed_of(config.run.seed, "lessons"))
    with new_folder(folder / TOKENIZER) as local:
        tokenizer = build_tokenizer(
            lesson.prompts[:TOKENIZER_LESSONS] + lesson.texts[:TOKENIZER_LESSONS], local
        )
    prompt_ids, text_ids = supervised_rows(tokenizer, lesson.prompts, lesson.texts)
    write_parquet(pa.table({"prompt_token_ids": prompt_ids, "completion_token_ids": text_ids}), folder / ROWS)
    task = SupervisedTask(
        config=config,
        seed=seed_of(config.run.seed, "bootstrap"),
        deepspeed=read_extra(section, "float32", "bootstrap"),
        folder=folder,
    )
    launch(supervised_loop, {"task": task}, folder=folder, section=section, label="bootstrap", unit="steps")
    move_into(folder / MODEL, folder)
    remove(folder / WORK)
    steps = read_metrics(folder)
    stats: dict[str, Any] = {
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "steps": len(steps),
    }
    stats |= check_texts(config, store, folder)
    say(
        f"  bootstrap: {stats['text_accuracy']:.3f} of the named tastes are true, chance {stats['text_chance']:.3f}"
    )
    (folder / "README.md").write_text(_model_card(config, stats), encoding="utf-8")
    return Outcome(rows_in=section.num_users, rows_out=len(steps), stats=stats)


def _model_card(config: Config, stats: dict[str, Any]) -> str:
    section, dataset = config.bootstrap, config.data.dataset
    recipe = RECIPE_OF.get(dataset, "RECIPE.toml")
    return CARD.format(
        layers=section.num_layers,
        width=section.hidden_size,
        dataset=dataset,
        command=f"dpo4rec train-llm {recipe} --out FOLDER run.seed={config.run.seed}",
        lessons=section.num_users,
        batch=f"{section.batch_size * section.gradient_accumulation_steps} x {section.num_workers} workers",
        lr=section.lr,
        users=NUM_CHECK_USERS,
        **stats,
    )


CARD = """# A small LLM of dpo4rec_ray's own

Llama architecture, {layers} layers, {width} wide, float32; every word of its training texts is one token. Trained from
scratch on simulated users over the catalogue of `data.dataset = "{dataset}"`: prompt -> template knowledge text. It can do
nothing else and knows no other catalogue.

- Made by `{command}`; the seed is the last number.
- {lessons} lessons, {steps} steps of {batch}, AdamW, lr {lr:g}; loss {first_loss:.3f} -> {last_loss:.3f}.
- Of the tastes that its sampled texts name for {users} new simulated users, {text_accuracy:.3f} are true;
  by chance {text_chance:.3f}.
- Users and texts are made by this project's own code. Licence of the weights: Apache-2.0, like the project.
"""


def check_texts(config: Config, store: RunDir, model: Place) -> dict[str, Any]:
    """Sample one text per new simulated user with vLLM: the share of named tastes that are true, and what chance gives."""
    lesson = _lesson(config, store, NUM_CHECK_USERS, seed_of(config.run.seed, "check"))
    spec = EngineSpec(ServedWeights(str(model)), config.llm, config.generate_by(0))
    needs, env = engine_needs(config), engine_env(config)
    texts = in_worker(_sample_texts, spec, lesson.prompts, needs=needs, env=env)
    found = text_accuracy([[text] for text in texts], lesson.tastes)[EVERY_FACET]
    return {"text_accuracy": found.accuracy, "text_chance": found.chance}


def _sample_texts(spec: EngineSpec, prompts: list[str]) -> list[str]:
    tokenizer = load_tokenizer(spec.weights.model)
    generator = VLLMGenerator(spec)
    token_ids = [encode_chat(tokenizer, prompt) for prompt in prompts]
    answers = generator.generate(token_ids, list(range(len(prompts))), [1] * len(prompts))
    return [answer.samples[0].text if answer.samples else "" for answer in answers]


def _lesson(config: Config, store: RunDir, num_users: int, seed: int) -> Lesson:
    """Simulated users over the run's catalogue. Items are drawn as often as the real training users met them."""
    items = store.read("items", columns=["title", "attributes"])
    attributes = items["attributes"].to_pylist()
    if not any(attributes):
        raise UserError(
            'llm.path = "bootstrap": this LLM learns to name attributes of items, and no item has one; set table.attributes, or '
            "llm.path"
        )
    met = (
        store.read("users", split="train", columns=["history_item_ids"])["history_item_ids"]
        .combine_chunks()
        .flatten()
    )
    popularity = np.bincount(met.to_numpy(), minlength=len(attributes)) + 1.0
    users = simulate_users(attributes, popularity / popularity.sum(), num_users, seed, stream="bootstrap")
    prompts = CataloguePrompts(items, SPECIAL_TOKENS, config.prompt, like_at=config.like_at)
    popular = popular_values(attributes)
    rng = np.random.default_rng([seed, 1])
    bounds = np.searchsorted(users.user_index, np.arange(num_users + 1))
    lesson = Lesson([], [], users.tastes)
    with Progress("lessons", num_users, "users") as progress:
        for low, high in itertools.pairwise(bounds):
            seen = slice(low, low + knowledge_cut(high - low, config.data.max_history))
            history, ratings = users.item_index[seen].tolist(), users.rating[seen].tolist()
            lesson.prompts.append(prompts.user("", history, ratings))
            lesson.texts.append(teacher_text([attributes[item] for item in history], ratings, popular, rng))
            progress.at(len(lesson.texts))
    return lesson
