"""A finished run -> a version that serving can load (dpo4rec_ray.serving.version_files), part by part."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.keys import keys_of
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.evaluation.systems import HEADLINE
from dpo4rec_ray.rerankers.card import read_card
from dpo4rec_ray.rerankers.fit import WEIGHTS_FILE, load_reranker
from dpo4rec_ray.rerankers.scorer import ListScorer
from dpo4rec_ray.serving.version_files import (
    ITEMS,
    TEXTS,
    UNKNOWN,
    USERS,
    WRITER_ADAPTER,
    WRITER_FOLDER,
    WRITER_LLM,
    KeyIndex,
    VersionCard,
    arrow_writer,
    write_card,
)
from dpo4rec_ray.stages.evaluate import system_name
from dpo4rec_ray.store.artifacts import RunDir, write_json
from dpo4rec_ray.store.policies import base_llm_path
from dpo4rec_ray.store.reading import list_data, read_catalogue, read_vectors
from dpo4rec_ray.texts.policy_texts import served_weights

# Settings that shape the text of one user; seed and sampling too, so that the same history gives the same text.
CARRIED: Any = {
    "run": {"seed"},
    "data": {"max_history"},
    "dpo": {"lora_rank"},
    **dict.fromkeys(("llm", "prompt", "generate", "encoder"), True),
}
RECORDED = 32  # validation lists whose scores a version carries, to be checked before it takes requests


def publish(config: Config, store: RunDir, target: Path, version: str, model: str = "") -> VersionCard:
    """Write the version into `target`, which must not exist; a kill leaves nothing that looks like one.

    Args:
        version: its name.
        model: folder below eval/rerankers; empty: the fit with the best validation figure among those of the best round.

    Raises:
        UserError: the run is not finished, the model is not there, or the target exists.
    """
    if target.exists():
        raise UserError(f"{target} exists; versions never change: publish under another name")
    source = store.require("per_list").fingerprint
    folder = store.path("per_list") / "rerankers" / (model or _best_model(config, store))
    if not (folder / WEIGHTS_FILE).is_file():
        known = ", ".join(sorted(one.name for one in folder.parent.iterdir()))
        raise UserError(f"{folder}: no fitted reranker; there are: {known}")
    card = read_card(folder)
    system = card["info"]["system"]
    temporary = target.with_name(f".{target.name}.tmp{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        shutil.copytree(folder, temporary / "reranker")
        catalogue = read_catalogue(store)
        scorer = ListScorer([load_reranker(folder, catalogue)], catalogue)
        _write_items(store, temporary)
        num_users = _write_users(store, temporary)
        knowledge = system if card["knowledge"] else ""
        if knowledge:
            _write_knowledge(store, temporary, _round_of(config, system), num_users, scorer)
            if config.llm.source == "vllm":
                _write_writer(config, store, temporary, _round_of(config, system))
        _record(store, temporary, scorer, _round_of(config, system) if knowledge else None)
        written = VersionCard(
            version=version,
            model=folder.name,
            knowledge=knowledge,
            run=store.root.name,
            source=source,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            num_users=num_users,
            num_items=store.require("items").rows,
            max_history=config.data.reranker_history,
            encoder=config.encoder.path,
            figures={name: card["info"]["metrics"][f"test {name}"] for name in HEADLINE},
        )
        write_card(temporary, written)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return written


def _best_model(config: Config, store: RunDir) -> str:
    """Chosen on validation: test figures choose nothing."""
    best, folder = "", store.path("per_list") / "rerankers"
    round_id = json.loads((store.root / "summary.json").read_text(encoding="utf-8"))["best_round"]
    system, highest = system_name(config, round_id), float("-inf")
    for one in sorted(folder.iterdir()):
        info = read_card(one)["info"]
        value = info["metrics"][f"valid {info['fit']['metric']}"]
        if info["system"] == system and value > highest:
            best, highest = one.name, value
    return best


def _round_of(config: Config, system: str) -> int:
    for round_id in range(config.run.num_rounds + 1):
        if system_name(config, round_id) == system:
            return round_id
    raise UserError(f"no round of this run is {system!r}")


def _write_items(store: RunDir, folder: Path) -> None:
    items = store.read("items").sort_by("item_id").select(ITEMS.names).cast(ITEMS).combine_chunks()
    with arrow_writer(folder / "items.arrow", ITEMS) as writer:
        writer.write_table(items)
    ids, vectors = read_vectors(store, 0, "item")
    if len(ids) == len(items):
        np.save(folder / "item_vectors.npy", vectors)


def _write_users(store: RunDir, folder: Path) -> int:
    """Users in the order of their ids, which is that of the parts."""
    keys, row = [], 0
    with arrow_writer(folder / "users.arrow", USERS) as writer:
        for file in store.files("users"):
            for batch in pq.ParquetFile(file).iter_batches(columns=["user_id", *USERS.names]):
                if not np.array_equal(batch["user_id"], np.arange(row, row + len(batch))):
                    raise UserError(
                        f"{file}: users are not in the order of their ids; prepare the data again"
                    )
                row += len(batch)
                keys.append(keys_of(batch["raw_id"]))
                writer.write_batch(
                    pa.RecordBatch.from_arrays([batch[name] for name in USERS.names], schema=USERS)
                )
    KeyIndex.write(folder, "user", np.concatenate(keys))
    return row


def _write_knowledge(store: RunDir, folder: Path, round_id: int, num_users: int, scorer: ListScorer) -> None:
    """Each user's first text, what the reranker makes of its vector, and where each user's are."""
    columns = ["subject", "subject_id", "sample_id", "text", "vector"]
    only = [("subject", "=", "user"), ("sample_id", "=", 0)]
    rows = np.full(num_users, UNKNOWN, np.int64)
    files = store.files("knowledge", round_id)
    count = sum(len(pq.read_table(file, columns=["subject_id"], filters=only)) for file in files)
    if not count:
        raise UserError(
            f"{store.path('knowledge', round_id)} holds no user's text; run the encode stage again"
        )
    written: dict[str, np.ndarray] = {}
    place = 0
    with arrow_writer(folder / "texts.arrow", TEXTS) as writer:
        for file in files:
            part = pq.read_table(file, columns=columns, filters=only).combine_chunks()
            if not len(part):
                continue
            vectors = part["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            parts = scorer.user_parts(
                np.array(vectors).reshape(len(part), -1)
            )  # a copy: Arrow's own is read-only
            (sides,) = parts.sides
            for name, values in (("user_standard", parts.standard), ("user_sides", sides)):
                if name not in written:
                    shape = (count, values.shape[1])
                    file = folder / f"{name}.npy"
                    written[name] = np.lib.format.open_memmap(file, "w+", np.float32, shape)
                written[name][place : place + len(part)] = values.numpy()
            written_texts = pc.greater(
                pc.utf8_length(part["text"]), 0
            ).to_numpy()  # "": the text did not come
            rows[part["subject_id"].to_numpy()[written_texts]] = np.flatnonzero(written_texts) + place
            writer.write_table(part.select(["text"]).cast(TEXTS))
            place += len(part)
    for values in written.values():
        values.flush()
    np.save(folder / "user_vector_rows.npy", rows)


def _write_writer(config: Config, store: RunDir, folder: Path, round_id: int) -> None:
    """What serving/writer needs: settings, and of the LLM what lies in the run folder; the rest has a name or a path."""
    own = folder / WRITER_FOLDER
    own.mkdir()
    weights = served_weights(config, store, round_id)
    for name, path in ((WRITER_LLM, weights.model), (WRITER_ADAPTER, weights.lora)):
        if path and Path(path).is_relative_to(store.root):
            shutil.copytree(path, own / name)
    carried = config.model_dump(mode="json", include=CARRIED)
    if config.llm.path not in ("bundled", "bootstrap"):
        carried["llm"]["path"] = base_llm_path(config, store)
    write_json(own / "config.json", carried)


def _record(store: RunDir, folder: Path, scorer: ListScorer, knowledge: int | None) -> None:
    """The first validation lists as requests, with the scores that the evaluation's own path gives them."""
    lists = ds.dataset(store.files("lists")).head(RECORDED, filter=ds.field("split") == "valid")
    data = list_data(lists)
    distinct, rows = np.unique(data.user_rows.numpy(), return_inverse=True)
    users = store.read("users", where=[("user_id", "in", distinct)], columns=["user_id", "raw_id"])
    raw_ids = dict(zip(users["user_id"].to_pylist(), users["raw_id"].to_pylist(), strict=True))
    items = store.read("items", columns=["raw_id"])
    vectors = None
    if knowledge is not None:
        vectors = read_vectors(store, knowledge, "user", subject_ids=distinct)[1].copy()
    scores = scorer.score(data.item_ids, data.mask, vectors, rows, data.histories)
    recorded = [
        {
            "user_id": raw_ids[row["user_id"]],
            "history": [
                {"item_id": items["raw_id"][item].as_py(), "rating": rating}
                for item, rating in zip(row["history_item_ids"], row["history_ratings"], strict=True)
            ],
            "candidates": [items["raw_id"][item].as_py() for item in row["candidate_item_ids"]],
            "scores": scores[place, : len(row["candidate_item_ids"])].tolist(),
        }
        for place, row in enumerate(lists.to_pylist())
    ]
    (folder / "recorded.json").write_text(json.dumps(recorded), encoding="utf-8")
