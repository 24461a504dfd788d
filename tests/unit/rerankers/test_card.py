from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from dpo4rec_ray.config.ranking import FitSection
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.rerankers.card import read_card
from dpo4rec_ray.rerankers.catalogue import Histories
from dpo4rec_ray.rerankers.fit import fit, load_reranker, save_reranker
from dpo4rec_ray.rerankers.scorer import ListScorer
from tests.unit.rerankers.builders import build

INFO = {
    "system": "base-llm",
    "seed": 2,
    "data": {"dataset": "movielens", "protocol": "paper", "users": 2999},
    "fit": {"lr": 0.001},
    "metrics": {"best epoch": 7, "test ndcg@5": 0.71234},
    "versions": {"torch": "2.13.0"},
    "commit": "abc123",
}


def test_a_saved_reranker_has_a_card(small, tmp_path: Path) -> None:
    model = build("setrank", small.catalogue.shape, True)
    save_reranker(tmp_path, model, INFO)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert ModelCard(text).data.to_dict() == {"library_name": "dpo4rec_ray", "tags": ["reranker", "setrank"]}
    for fact in (
        "setrank",
        "hea",
        "`base-llm`",
        "movielens",
        "paper",
        "| test ndcg@5 | 0.7123 |",
        "| lr | 0.0010 |",
        "abc123",
    ):
        assert fact in text, fact
    assert json.loads((tmp_path / "reranker.json").read_text())["info"] == INFO
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "README.md",
        "model.safetensors",
        "reranker.json",
    ]


def test_an_old_file_is_read_and_a_missing_or_damaged_one_is_named(small, tmp_path: Path) -> None:
    """Releases before 0.2 wrote the metrics under "figures"."""
    save_reranker(tmp_path, build("prm", small.catalogue.shape, True), INFO)
    file = tmp_path / "reranker.json"
    assert '"metrics"' in file.read_text(encoding="utf-8")
    new = read_card(tmp_path)
    file.write_text(file.read_text(encoding="utf-8").replace('"metrics"', '"figures"'), encoding="utf-8")
    assert read_card(tmp_path) == new and new["info"] == INFO
    for damage in (lambda: file.write_text("{"), file.unlink):
        damage()
        with pytest.raises(UserError, match=r"reranker\.json") as refused:
            read_card(tmp_path)
        assert "\n" not in str(refused.value)


def test_mir_reads_histories_in_training_and_scoring(small, tmp_path: Path) -> None:
    """Other histories of the same lists give other weights and other scores; empty histories count as none."""
    torch.manual_seed(0)
    count = len(small.train)

    def histories(size: int) -> Histories:
        ids = torch.randint(small.catalogue.shape.num_items, (size, 5))
        return Histories(ids, torch.ones(size, 5, dtype=torch.bool), torch.full((size, 5), 4.0))

    train, valid = (
        replace(small.train, histories=histories(count)),
        replace(small.valid, histories=histories(len(small.valid))),
    )
    results = {}
    for name, lists in (("with", train), ("without", small.train)):
        model = build("mir", small.catalogue.shape, False)
        results[name] = fit(
            model,
            small.catalogue,
            lists,
            valid,
            None,
            FitSection(epochs=1, batch_size=32, resample_negatives=False),
        )
    assert results["with"].history[0]["train_loss"] != results["without"].history[0]["train_loss"]
    scorer = ListScorer([model], small.catalogue)
    seen = scorer.score(valid.item_ids, valid.mask, histories=valid.histories)
    bare = scorer.score(valid.item_ids, valid.mask)
    assert abs(seen - bare).max() > 1e-4
    empty = Histories(
        *(
            column[:, :0]
            for column in (valid.histories.item_ids, valid.histories.mask, valid.histories.ratings)
        )
    )
    assert abs(scorer.score(valid.item_ids, valid.mask, histories=empty) - bare).max() < 1e-6
    # histories are no part of the weights: a loaded reranker reads them alike
    save_reranker(tmp_path, model, {})
    again = ListScorer([load_reranker(tmp_path, small.catalogue)], small.catalogue)
    assert (again.score(valid.item_ids, valid.mask, histories=valid.histories) == seen).all()
