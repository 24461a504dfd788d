"""What a reranker makes of users' texts: a list of each user ranked without a text and with the text of each policy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.metrics import list_metrics
from dpo4rec_ray.rerankers.catalogue import Catalogue
from dpo4rec_ray.rerankers.fit import WEIGHTS_FILE, ListData, load_reranker
from dpo4rec_ray.rerankers.scorer import ListScorer
from dpo4rec_ray.stages.evaluate import fit_name
from dpo4rec_ray.stages.train_reward import PLAIN
from dpo4rec_ray.storage.places import Place
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.store.reading import fold_names, list_data, read_catalogue, vectors_of

MAX_ITEMS = 100_000  # with more, the vectors of the whole catalogue would be read for a few lists
NDCG = "ndcg@5"
Json = dict[str, Any]


def of(column: str, ids: Iterable[int]) -> list[tuple[str, str, Any]]:
    """The condition of `RunDir.read` that a column is one of these ids."""
    return [(column, "in", [int(one) for one in ids])]


def titles_of(store: RunDir, items: Iterable[int]) -> dict[int, str]:
    table = store.read("items", where=of("item_id", items), columns=["item_id", "title"])
    return dict(zip(table["item_id"].to_pylist(), table["title"].to_pylist(), strict=True))


def reranked(config: Config, store: RunDir, last_round: int, folds: Mapping[int, int]) -> dict[int, Json]:
    """Validation user -> the user's first list with a positive: titles, which are liked, and an order and NDCG@5 per ranking.

    By the reward's reranker of the user's fold, which never saw the user; without rounds by the evaluation's first one. Empty
    for catalogues of more than MAX_ITEMS. folds: fold of each user.
    """
    if store.require("items").rows > MAX_ITEMS:
        return {}
    lists = store.read("lists", split="valid", where=of("user_id", folds)).sort_by("list_id")
    first: dict[int, int] = {}
    for number, (user, labels) in enumerate(
        zip(lists["user_id"].to_pylist(), lists["labels"].to_pylist(), strict=True)
    ):
        if max(labels, default=0) > 0:
            first.setdefault(user, number)
    if not first:
        return {}
    lists = lists.take(pa.array(sorted(first.values())))
    data, owners = list_data(lists), lists["user_id"].to_pylist()
    titles = titles_of(store, {item for row in lists["candidate_item_ids"].to_pylist() for item in row})
    labels, mask = data.labels.numpy(), data.mask.numpy()
    own_fold = np.array([folds[user] if config.run.num_rounds else 0 for user in owners])
    catalogue = read_catalogue(store)
    columns = []
    for name, turn, folders in _readers(config, store, last_round):
        vectors = None if turn is None else _vectors(store, turn, owners)
        scores = np.full(data.item_ids.shape, -np.inf, np.float32)
        for fold, folder in enumerate(folders):
            mine = np.flatnonzero(own_fold == fold)
            if len(mine):
                scores[mine] = _scores(folder, catalogue, data.select(torch.from_numpy(mine)), vectors, mine)
        columns.append((name, scores, list_metrics(scores, labels, (NDCG,), mask)[NDCG]))
    found: dict[int, Json] = {}
    for row, user in enumerate(owners):
        length = int(mask[row].sum())
        ranked = [np.argsort(-scores[row, :length], kind="stable") for _, scores, _ in columns]
        found[user] = {
            "items": [titles[item] for item in data.item_ids[row, :length].tolist()],
            "liked": [int(label > 0) for label in labels[row, :length]],
            "rankings": [
                {"name": name, "order": order.tolist(), "ndcg": float(values[row])}
                for (name, _, values), order in zip(columns, ranked, strict=True)
            ],
        }
    return found


def _readers(config: Config, store: RunDir, last_round: int) -> Iterator[tuple[str, int | None, list[Place]]]:
    """A name, whose texts are read (None: none), and the rerankers' folders by fold; without those that the run has not."""
    ends = list(config.run.round_ends(last_round))
    called = ["base texts", *(f"texts of round {config.run.round_of(end)}" for end in ends[1:])]
    if config.run.num_rounds:
        folders = [store.path("reward") / name for name in fold_names(config)]
        plain = [folder / PLAIN for folder in folders]
        found = [
            ("no text", None, plain),
            *((name, end, folders) for name, end in zip(called, ends, strict=True)),
        ]
    else:
        backbone, saved = config.evaluated_backbones[0], store.path("per_list") / "rerankers"
        found = [
            ("no text", None, [saved / fit_name(config, backbone, None, 0)]),
            *(
                (name, end, [saved / fit_name(config, backbone, end, 0)])
                for name, end in zip(called, ends, strict=True)
            ),
        ]
    yield from (one for one in found if all((folder / WEIGHTS_FILE).is_file() for folder in one[2]))


def _vectors(store: RunDir, turn: int, owners: Sequence[int]) -> np.ndarray:
    """[len(owners), D] vectors of the first texts of policy `turn`; zeros for a user without one."""
    where = [("subject", "=", "user"), ("sample_id", "=", 0), *of("subject_id", owners)]
    table = store.read("knowledge", turn, where=where, columns=["subject_id", "vector"]).combine_chunks()
    vectors, known = vectors_of(table["vector"]), table["subject_id"].to_pylist()
    found = np.zeros((len(owners), vectors.shape[1]), np.float32)
    place_of = {user: row for row, user in enumerate(owners)}
    found[[place_of[user] for user in known]] = vectors
    return found


def _scores(
    folder: Place, catalogue: Catalogue, data: ListData, vectors: np.ndarray | None, mine: np.ndarray
) -> np.ndarray:
    scorer = ListScorer([load_reranker(folder, catalogue)], catalogue)
    known = None if vectors is None else vectors[mine]
    return scorer.score(data.item_ids, data.mask, known, None, data.histories)
