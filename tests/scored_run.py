"""A run folder up to the scores of its first round, with made-up rewards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from dpo4rec_ray.store.artifacts import Manifest, RunDir

NUM_USERS, NUM_SAMPLES = 30, 4


def make_store(
    folder: Path, rewards: np.ndarray, errors: np.ndarray, num_lists: np.ndarray, *, longer: bool = False
) -> RunDir:
    """A run up to its scores, in two parts with rows in no order; rewards: [U, N].

    The text n of user u has the tokens u, n; with `longer` and n more.
    """
    store = RunDir(folder)
    users = np.arange(NUM_USERS)
    empty = [[] for _ in users]
    splits = ["train"] * (NUM_USERS - 5) + ["valid"] * 5
    columns = {"user_id": users, "raw_id": users.astype(str), "profile": [""] * NUM_USERS, "split": splits}
    store.start("users")
    store.write(
        "users", pa.table({**columns, "fold": users * 0, "history_item_ids": empty, "history_ratings": empty})
    )
    store.finish(Manifest("users", "", NUM_USERS))
    for name in ("generations", "scores"):
        store.start(name, 1)
    for part, own in enumerate((users[:17], users[17:])):
        ids = {"round": np.ones(len(own) * NUM_SAMPLES, np.int32), "user_id": np.repeat(own, NUM_SAMPLES)}
        ids["sample_id"] = np.tile(np.arange(NUM_SAMPLES), len(own))
        tokens = [
            [int(user), int(sample)] for user, sample in zip(ids["user_id"], ids["sample_id"], strict=True)
        ]
        written = [[*one, *[5] * one[1]] for one in tokens] if longer else tokens
        texts = {"prompt_token_ids": tokens, "token_ids": written, "text": [str(one) for one in tokens]}
        # As an engine would have them: minus a tenth of each token's number.
        logps = [[-0.1 * token for token in one] for one in written]
        texts |= {"finish_reason": ["stop"] * len(tokens), "token_logps": logps}
        scores = {
            "reward": rewards[own].ravel(),
            "plain_reward": np.where(np.isnan(rewards[own]), 0.0, rewards[own]).ravel(),
            "others_reward": np.zeros(len(tokens)),
            "std_error": np.repeat(errors[own], NUM_SAMPLES),
            "num_lists": np.repeat(num_lists[own], NUM_SAMPLES),
        }
        order = np.random.default_rng(part).permutation(len(tokens))
        store.write("generations", pa.table({**ids, **texts}), 1, part)
        store.write("scores", pa.table({**ids, **scores}).take(order), 1, part)
    store.finish(Manifest("generations", "", rewards.size), 1)
    store.finish(Manifest("scores", "", rewards.size), 1)
    return store
