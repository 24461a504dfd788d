from __future__ import annotations

from typing import Any

import pytest

from dpo4rec_ray.evaluation.paper_table import TABLE_I, key_of, layout
from tests.unit.evaluation.frames import only


def test_table_one_is_the_papers() -> None:
    """Some cells, and the sums over the 18 rows of each printed column (awk over the paper's text)."""
    assert TABLE_I["ml-1m"]["dlcm"]["backbone"] == (0.72815, 0.77053)
    assert TABLE_I["amazon-books"]["prm"]["DPO4Rec_Llama3.1-8B"] == (0.67397, 0.70174)
    assert TABLE_I["amazon-beauty"]["setrank"]["KAR"] == (0.78903, 0.80977)
    sums = {
        dataset: tuple(
            round(sum(pair[place] for methods in backbones.values() for pair in methods.values()), 5)
            for place in (0, 1)
        )
        for dataset, backbones in TABLE_I.items()
    }
    assert sums == {
        "ml-1m": (13.28816, 14.01483),
        "amazon-books": (11.8918, 12.36528),
        "amazon-beauty": (14.42925, 14.77517),
    }
    assert {len(methods) for backbones in TABLE_I.values() for methods in backbones.values()} == {6}


@pytest.mark.parametrize(
    ("dataset", "files", "key"),
    [
        ("movielens", ["d/ratings.dat", "d/movies.dat", "d/users.dat"], "ml-1m"),
        ("movielens", ["s3://b/ml-1m/users.dat?version=2"], "ml-1m"),
        ("movielens", ["d/ratings.dat", "d/movies.dat"], None),  # 10M
        ("amazon2018", ["d/Books_5.json.gz", "d/meta_Books.json.gz"], "amazon-books"),
        ("amazon2018", ["All_Beauty_5.json"], "amazon-beauty"),
        ("amazon2018", ["d/Luxury_Beauty_5.json.gz", "d/meta_Books.json.gz"], None),
        ("amazon2023", ["d/Books.jsonl.gz"], None),
        ("table", ["users.dat"], None),
    ],
)
def test_which_dataset_of_the_paper(dataset: str, files: list[str], key: str | None) -> None:
    assert key_of(dataset, iter(files)) == key


def test_layout_sets_the_paper_beside_the_run(summary: dict[str, Any]) -> None:
    """KAR minus backbone, DLCM on Amazon-Beauty: .80909 - .79069 = .01840 and .82667 - .80959 = .01708."""
    lines = layout(summary["systems"], summary["comparisons"], "amazon-beauty")
    assert [line["method"] for line in lines[:9]] == [
        "random", "popularity", "backbone", "base-llm", "dpo4rec-round1", "dpo4rec-round12", "backbone", "KAR",
        "KAR_chatgpt-4o",
    ]  # fmt: skip
    kar = only(lines, method="KAR")
    assert (kar["backbone"], kar["source"]) == ("dlcm", "paper")
    assert (kar["map_paper@5"], kar["map_paper@5 delta"], kar["ndcg@5 delta"]) == (0.80909, 0.0184, 0.01708)
    assert kar["ndcg@5 p_value"] is None
    mine = only(lines, backbone="mir", method="dpo4rec-round12")
    wanted = only(
        summary["comparisons"], backbone="mir", system="dpo4rec-round12", against="backbone", metric="ndcg@5"
    )
    assert (mine["ndcg@5 delta"], mine["ndcg@5 p_value"]) == (wanted["delta"], wanted["p_value"])
    system = only(summary["systems"], backbone="mir", system="dpo4rec-round12")
    assert (mine["ndcg@5"], mine["ndcg@5 sd"]) == (system["ndcg@5"], system["ndcg@5 sd"])
    assert (
        only(lines, backbone="mir", method="backbone")["ndcg@5 delta"] is None
    )  # that one is against popularity
    assert {line["backbone"] for line in lines if line["source"] == "paper"} == {"dlcm"}
    alone = layout(summary["systems"], summary["comparisons"])
    assert alone == [line for line in lines if line["source"] == "run"]
    with pytest.raises(KeyError, match="ml-20m"):
        layout(summary["systems"], summary["comparisons"], "ml-20m")
