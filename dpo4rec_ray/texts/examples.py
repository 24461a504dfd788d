"""The training users whom prompts show as examples (prompt.examples)."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc

from dpo4rec_ray.config import Config
from dpo4rec_ray.core.keys import seed_of
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.knowledge.catalogue_prompts import ExampleUser
from dpo4rec_ray.store.artifacts import RunDir


def draw_examples(config: Config, store: RunDir) -> list[ExampleUser]:
    """prompt.examples training users, and one more in place of whoever is asked about; the same at every call.

    Only users of the split "train": what is known of the others must not reach another user's prompt.

    Raises:
        UserError: there are not so many training users with a history.
    """
    wanted = config.prompt.examples + 1
    if wanted == 1:
        return []
    columns = ["user_id", "profile", "history_item_ids", "history_ratings"]
    users = store.read("users", split="train", columns=columns)
    users = users.filter(pc.greater(pc.list_value_length(users["history_item_ids"]), 0)).sort_by("user_id")
    if len(users) < wanted:
        raise UserError(
            f"prompt.examples = {config.prompt.examples}, and one more in place of the user who is asked about, but "
            f"{store.path('users')} has {len(users)} training users with a history; lower it"
        )
    rng = np.random.default_rng(seed_of(config.run.seed, "examples"))
    rows = users.take(rng.choice(len(users), wanted, replace=False)).to_pylist()
    return [
        ExampleUser(row["user_id"], row["profile"], row["history_item_ids"], row["history_ratings"])
        for row in rows
    ]
