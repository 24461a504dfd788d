"""Publishes a finished run: reads each artifact once and writes the files of a version (version_files.py).

Users and their knowledge are read and written part by part, so only one part is in memory.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.dataset as ds

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.keys import keys_of
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.evaluation.systems import HEADLINE
from dpo4rec_ray.rerankers.card import read_card
from dpo4rec_ray.rerankers.catalogue import Catalogue
from dpo4rec_ray.rerankers.fit import WEIGHTS_FILE, load_reranker
from dpo4rec_ray.rerankers.scorer import ListScorer
from dpo4rec_ray.serving.version_files import (
    ENCODER_FILE,
    ITEMS,
    RECORDED_FILE,
    TEXTS,
    UNKNOWN,
    USERS,
    WRITER_EXAMPLES,
    WRITER_FOLDER,
    WRITER_LLM,
    WRITER_LORA,
    KeyIndex,
    VersionCard,
    arrow_writer,
    table,
    write_card,
)
from dpo4rec_ray.stages.evaluate import system_name
from dpo4rec_ray.storage.lease import lease
from dpo4rec_ray.storage.parquet import dataset, parquet_file, read_parquet
from dpo4rec_ray.storage.places import Place, below, copy_folder, is_complete, new_folder, place
from dpo4rec_ray.store.artifacts import RunDir, write_json
from dpo4rec_ray.store.final import final_policy
from dpo4rec_ray.store.policies import base_llm_path
from dpo4rec_ray.store.progress import say
from dpo4rec_ray.store.reading import list_data, read_vectors, vectors_of
from dpo4rec_ray.texts.examples import draw_examples
from dpo4rec_ray.texts.policy_texts import served_weights

# Settings on which a user's text depends. Seed and sampling are among them: the same history gives the same text.
WRITER_CONFIG: Any = {
    "run": {"seed"},
    "data": {"max_history", "positive_rating"},
    "policy": {"lora_rank"},
    **dict.fromkeys(("llm", "prompt", "generate", "encoder"), True),
}
NUM_RECORDED = 32  # validation lists that a version has to rank as the evaluation does before it may answer


def publish(config: Config, store: RunDir, target: Place, version: str, model: str = "") -> VersionCard:
    """Write a version into the new folder `target`. If the process is killed, `target` does not exist.

    Args:
        version: the name of the version.
        model: a folder below eval/rerankers; "": the fit of the best round with the best validation metric.

    Raises:
        UserError: the run is not finished, or one for the study drift, there is no such model, or `target` exists.
    """
    exists = f"{target} exists; versions never change: publish under another name"
    if is_complete(target):
        raise UserError(exists)
    lost = threading.Event()

    def waiting(holder: str) -> None:
        say(f"{holder} publishes in {target.parent}; waiting for it")

    with lease(target.with_name(".publishing"), lost=lost.set, wait=True, waiting=waiting):
        if is_complete(target):  # by another command, meanwhile
            raise UserError(exists)
        return _publish(config, store, target, version, model, lost)


def _publish(
    config: Config, store: RunDir, target: Place, version: str, model: str, lost: threading.Event
) -> VersionCard:
    """lost: another command publishes there now."""
    if config.data.drift_windows:
        raise UserError(
            f"{store.root}: data.drift_windows = {config.data.drift_windows} writes its users several times; publish a run "
            "without windows"
        )
    source = store.require("per_list").fingerprint
    fit = store.path("per_list") / "rerankers" / (model or best_model(config, store, best_policy(store)))
    if not (fit / WEIGHTS_FILE).is_file():
        known = ", ".join(sorted(one.name for one in fit.parent.iterdir()))
        raise UserError(f"{fit}: no fitted reranker; there are: {known}")
    card = read_card(fit)
    system, knowledge = card["info"]["system"], card["knowledge"]
    round_id = _round_of(config, system) if knowledge else 0

    items = store.read("items").sort_by("item_id").select(ITEMS.names).cast(ITEMS).combine_chunks()
    item_vectors = read_vectors(store, 0, "item")[1]
    catalogue = Catalogue.from_items(items["attributes"].to_pylist(), item_vectors)
    scorer = ListScorer([load_reranker(fit, catalogue)], catalogue)
    lists = dataset(store.files("lists")).head(NUM_RECORDED, filter=ds.field("split") == "valid")
    list_users, user_rows = np.unique(lists["user_id"], return_inverse=True)

    with new_folder(target) as temporary:
        temporary.mkdir(parents=True)
        copy_folder(fit, temporary / "reranker")
        np.save(temporary / "item_vectors.npy", item_vectors)
        with arrow_writer(temporary / "items.arrow", ITEMS) as writer:
            writer.write_table(items)
        num_users = _write_users(store.files("users"), temporary)
        vectors = None
        if knowledge:
            files = store.files("knowledge", round_id)
            vectors = _write_knowledge(files, temporary, num_users, scorer, list_users)
            write_json(temporary / ENCODER_FILE, config.encoder.model_dump(mode="json"))
            if config.llm.source == "vllm":
                _write_writer(config, store, temporary / WRITER_FOLDER, round_id)
        data = list_data(lists)
        scores = scorer.score(data.item_ids, data.mask, vectors, user_rows, data.histories)
        user_ids = table(temporary / "users.arrow")["raw_id"].take(lists["user_id"]).to_pylist()
        recorded = _recorded(lists.to_pylist(), scores, user_ids, items["raw_id"].to_pylist())
        (temporary / RECORDED_FILE).write_text(json.dumps(recorded), encoding="utf-8")
        published = VersionCard(
            version=version,
            model=fit.name,
            knowledge=system if knowledge else "",
            run=store.root.name,
            source=source,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            num_users=num_users,
            num_items=len(items),
            reranker_history=config.data.reranker_history,
            encoder=config.encoder.path,
            metrics={name: card["info"]["metrics"][f"test {name}"] for name in HEADLINE},
        )
        write_card(temporary, published)
        if lost.is_set():
            raise UserError(f"{target}: another command took over; publish again")
    return published


def best_policy(store: RunDir) -> int:
    """The number of the policy that a finished run ended with; 0 is the base LLM, where no round improved on it."""
    promoted = final_policy(store)
    if promoted:
        return promoted.policy
    summary = json.loads((store.root / "summary.json").read_text(encoding="utf-8"))
    return int(summary.get("best_policy", summary["best_round"]))  # no rounds, or a run of an older version


def best_model(config: Config, store: RunDir, round_id: int) -> str:
    """Of the rerankers that read the texts of policy `round_id`, the best by validation metrics. Test metrics choose nothing."""
    best, folder = "", store.path("per_list") / "rerankers"
    system, highest = system_name(config, round_id), float("-inf")
    for one in sorted(folder.iterdir()):
        info = read_card(one)["info"]
        value = info["metrics"][f"valid {info['fit']['metric']}"]
        if info["system"] == system and value > highest:
            best, highest = one.name, value
    if not best:
        raise UserError(
            f"{folder}: no reranker that reads the texts of {system!r}, with which the run ended; run the recipe again"
        )
    return best


def _round_of(config: Config, system: str) -> int:
    for round_id in config.run.round_ends(config.run.num_turns):
        if system_name(config, round_id) == system:
            return round_id
    raise UserError(
        f"the model ranks with the texts of {system!r}, and only those of this run's rounds 0 to {config.run.max_rounds} can be "
        "published; name another model"
    )


def _write_users(files: Sequence[Place], folder: Path) -> int:
    """Write the users in the order of their ids, which is the order of the files. Returns how many there are."""
    keys, row = [], 0
    with arrow_writer(folder / "users.arrow", USERS) as writer:
        for file in files:
            with parquet_file(file) as parquet:
                for batch in parquet.iter_batches(columns=["user_id", *USERS.names]):
                    if not np.array_equal(batch["user_id"], np.arange(row, row + len(batch))):
                        raise UserError(
                            f"{file}: users are not in the order of their ids; prepare the data again"
                        )
                    row += len(batch)
                    keys.append(keys_of(batch["raw_id"]))
                    writer.write_batch(batch.select(USERS.names).cast(USERS))
    KeyIndex.write(folder, "user", np.concatenate(keys))
    return row


def _write_knowledge(
    files: Sequence[Place], folder: Path, num_users: int, scorer: ListScorer, wanted: npt.NDArray[np.int64]
) -> np.ndarray:
    """Write the first text of each user, and what the reranker makes of the text's vector.

    Args:
        wanted: [n] user ids, sorted.

    Returns:
        [n, D] vectors of the wanted users; zeros for a user without one.
    """
    first = (ds.field("subject") == "user") & (ds.field("sample_id") == 0)
    count = dataset(files).count_rows(filter=first)
    if not count:
        raise UserError(f"{files[0].parent} has no text of a user; run the encode stage again")
    nothing = np.zeros((len(wanted), scorer.catalogue.shape.vector_dim), np.float32)
    found, shapes = nothing.copy(), scorer.user_parts(nothing)

    def array(name: str, like: Any) -> np.ndarray:
        return np.lib.format.open_memmap(folder / name, "w+", np.float32, (count, like.shape[1]))

    standard, sides = array("user_standard.npy", shapes.standard), array("user_sides.npy", shapes.sides[0])
    rows, at = np.full(num_users, UNKNOWN, np.int64), 0
    with arrow_writer(folder / "texts.arrow", TEXTS) as writer:
        for file in files:
            part = read_parquet(file, columns=["subject_id", "text", "vector"], filters=first)
            if not len(part):
                continue
            users, vectors = part["subject_id"].to_numpy(), vectors_of(part["vector"]).copy()
            parts, here = scorer.user_parts(vectors), slice(at, at + len(part))
            standard[here], sides[here] = parts.standard.numpy(), parts.sides[0].numpy()
            has_text = pc.greater(pc.utf8_length(part["text"]), 0).to_numpy()
            rows[users[has_text]] = np.flatnonzero(has_text) + at
            _, theirs, mine = np.intersect1d(users, wanted, return_indices=True)
            found[mine] = vectors[theirs]
            writer.write_table(part.select(["text"]).cast(TEXTS))
            at += len(part)
    standard.flush()
    sides.flush()
    np.save(folder / "user_vector_rows.npy", rows)
    return found


def _write_writer(config: Config, store: RunDir, folder: Path, round_id: int) -> None:
    """Write what serving/writer.py needs: settings, and weights that are in the run folder. Others keep name or path."""
    folder.mkdir()
    weights = served_weights(config, store, round_id)
    for name, path in ((WRITER_LLM, weights.model), (WRITER_LORA, weights.lora)):
        if path and below(path, store.root) is not None:
            copy_folder(place(path), folder / name)
    config = config.model_copy(update={"generate": config.generate_by(round_id)})
    content = config.model_dump(mode="json", include=WRITER_CONFIG)
    if config.llm.path not in ("bundled", "bootstrap"):
        content["llm"]["path"] = base_llm_path(config, store)
    write_json(folder / "config.json", content)
    if examples := draw_examples(config, store):
        write_json(folder / WRITER_EXAMPLES, [example._asdict() for example in examples])


def _recorded(
    lists: Sequence[dict[str, Any]], scores: np.ndarray, user_ids: Sequence[str], item_ids: Sequence[str]
) -> list[dict[str, Any]]:
    """The lists as requests, with the evaluation's scores [n, L]. user_ids: raw, one per list; item_ids: all raw ids."""
    return [
        {
            "user_id": user,
            "history": [
                {"item_id": item_ids[item], "rating": rating}
                for item, rating in zip(row["history_item_ids"], row["history_ratings"], strict=True)
            ],
            "candidates": [item_ids[item] for item in row["candidate_item_ids"]],
            "scores": own[: len(row["candidate_item_ids"])].tolist(),
        }
        for row, own, user in zip(lists, scores, user_ids, strict=True)
    ]
