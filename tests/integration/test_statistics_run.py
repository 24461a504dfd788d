"""Rounds without an LLM: counted texts go through encode, generate, score and pair, and nothing else runs or is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from dpo4rec_ray import checks
from dpo4rec_ray.config import Config, load_config
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.running import Selection, run_pipeline
from dpo4rec_ray.store.artifacts import RunDir
from dpo4rec_ray.texts.sampling import UserSampler, text_pool
from tests.conftest import DEMO, TINY

pytestmark = pytest.mark.ray
# llm.path is not looked at
STATISTICS = [
    'llm.source="statistics"',
    "llm.path=/nowhere",
    "reranker.epochs=1",
    "reward.num_folds=1",
    "reward.num_workers=2",  # Ray Train; the demo trains its folds as tasks
    "generate.num_engines=1",
]
STEPS = ["prepare", "encode", "references", "train_reward", "generate", "score", "pair"]
NUM_SAMPLES = 3


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(DEMO, [*TINY, *STATISTICS])


@pytest.fixture(scope="module")
def store(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunDir]:
    """The run up to its pairs, with workers in which an engine cannot be imported."""
    import ray
    import ray.data

    blocked = tmp_path_factory.mktemp("blocked")
    for name in ("vllm", "deepspeed"):
        (blocked / f"{name}.py").write_text("raise RuntimeError('an engine was imported')\n")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=2**28,
        runtime_env={"env_vars": {"PYTHONPATH": str(blocked)}},
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    checks.check_all(config)
    store = RunDir(tmp_path_factory.mktemp("statistics"))
    for step in STEPS:
        run_pipeline(config, store, Selection(only=step))
    yield store
    ray.shutdown()


def texts(store: RunDir, name: str, round_id: int) -> dict[tuple[int, int], str]:
    """(user, sample) -> text."""
    rows = store.read(name, round_id).to_pylist()
    users = [row for row in rows if row.get("subject", "user") == "user"]
    found = {(row.get("subject_id", row.get("user_id")), row["sample_id"]): row["text"] for row in users}
    assert len(found) == len(users)
    return found


def test_every_user_has_a_vector_of_the_full_text(store: RunDir) -> None:
    """The text names the user's liked titles, and as many values as there are liked events to count."""
    knowledge = texts(store, "knowledge", 0)
    users, items = store.read("users").to_pylist(), store.read("items").to_pylist()
    assert set(knowledge) == {(user["user_id"], 0) for user in users}
    for user in users:
        text = knowledge[user["user_id"], 0]
        events = list(zip(user["history_item_ids"], user["history_ratings"], strict=True))
        liked = [items[item] for item, rating in events if rating >= 4]
        if not liked:
            assert text.startswith("This user liked none of these: ")
            continue
        assert sorted(text.split("Liked: ")[1].removesuffix(".").split("; ")) == sorted(
            i["title"] for i in liked
        )
        counts = Counter(value.partition(": ")[2] for item in liked for value in item["attributes"])
        named = dict(part.rsplit(" (", 1) for part in text.split(" likes ")[1].split("). ")[0].split("), "))
        assert {value: int(count) for value, count in named.items()}.items() <= counts.items()
        assert sorted(map(int, named.values())) == sorted(counts.values())[-5:]


def test_exactly_n_texts_per_sampled_user(store: RunDir) -> None:
    splits = {user["user_id"]: user["split"] for user in store.read("users").to_pylist()}
    sampled = texts(store, "generations", 1)
    asked = [user for user, split in splits.items() if split in ("train", "valid")]
    assert set(sampled) == {(user, sample) for user in asked for sample in range(NUM_SAMPLES)}
    distinct = [len({sampled[user, sample] for sample in range(NUM_SAMPLES)}) for user in asked]
    assert sum(distinct) / len(distinct) > NUM_SAMPLES - 0.2  # a history of one or two events has few halves
    rows = store.read("generations", 1).to_pylist()
    assert {row["finish_reason"] for row in rows} == {"stop"}
    assert not any(row["prompt_token_ids"] or row["token_ids"] for row in rows)


def test_samples_get_rewards_and_pairs(store: RunDir) -> None:
    scores = store.read("scores", 1).to_pylist()
    assert Counter(row["user_id"] for row in scores) == Counter(
        user for user, _ in texts(store, "generations", 1)
    )
    pairs = store.read("pairs", 1).to_pylist()
    best = {row["user_id"]: -1e9 for row in scores}
    for row in scores:
        best[row["user_id"]] = max(best[row["user_id"]], row["reward"])
    assert pairs and all(
        row["chosen_reward"] == best[row["user_id"]] > row["rejected_reward"][0]
        for row in pairs
        if row["kind"] == "own"
    )


def test_a_round_ends_with_its_pairs(config: Config, store: RunDir) -> None:
    for step in ("bootstrap", "dpo", "validate"):
        with pytest.raises(UserError, match=f"no such step in this recipe: --only {step}"):
            run_pipeline(config, store, Selection(only=step))
    assert not store.path("policy", 1).exists()
    assert store.manifest("knowledge", 1) is None


def test_a_text_depends_on_the_seed_and_the_user_alone(config: Config, store: RunDir) -> None:
    """Sampled again in other shards; another run seed gives other halves."""
    before = texts(store, "generations", 1)

    def again(config: Config) -> dict[tuple[int, int], str]:
        counts = {"train": NUM_SAMPLES, "valid": NUM_SAMPLES}
        folder = str(store.root / "again")
        pool = text_pool(
            config,
            store,
            UserSampler,
            stage="generate",
            round_id=1,
            policy_round=0,
            folder=folder,
            samples_per_shard=1,
            num_samples=counts,
        )
        sampler = UserSampler(**pool.arguments)
        found = {}
        for shard, (low, high) in enumerate([(0, 17), (17, 60)]):
            sampled = sampler.sample(shard, low, high)
            for user, one in zip(sampled.ids, sampled.answers, strict=True):
                found |= {(user, number): sample.text for number, sample in enumerate(one.samples)}
        return found

    assert again(config) == before
    other = again(load_config(DEMO, [*TINY, *STATISTICS, "run.seed=1"]))
    assert sum(other[key] != before[key] for key in before) > len(before) / 2
