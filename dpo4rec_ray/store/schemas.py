"""Every Parquet artifact's columns. A stage reads and writes these and nothing else."""

from __future__ import annotations

import pyarrow as pa

from dpo4rec_ray.core.metrics import METRICS
from dpo4rec_ray.errors import UserError

SCHEMA_VERSION = 3  # raise it when a column changes meaning: manifests carry it, so old artifacts are redone

EVALUATED_METRICS = tuple(METRICS)  # at each of
EVALUATED_AT = (1, 3, 5, 10)

# Figures of a validation user's texts, each before and after a round (evaluation/heldout_texts.py); means over the user's texts.
HELDOUT_FIGURES = (
    # of the user's own texts; ndcg: NDCG@5 of the lists as drawn
    "reward",
    "ndcg",
    # of other users' texts on this user's lists; NaN where there is no other user
    "others_reward",
    "others_ndcg",
    # named values beside this user's and all others' later likes; NaN where nothing is named
    "fit",
    "fit_others",
    # attribute values named
    "values",
    # titles named
    "titles_history",
    "titles_catalogue",
    "titles_invented",
    # shares of the user's texts
    "distinct_texts",
    "common_opening",
    "words",
)

_IDS = pa.list_(pa.int64())
_TOKENS = pa.list_(pa.int32())
_FLOATS = pa.list_(pa.float32())
_LABEL = [("round", pa.int32()), ("user_id", pa.int64()), ("sample_id", pa.int32())]

SCHEMAS: dict[str, pa.Schema] = {
    "users": pa.schema(
        [
            ("user_id", pa.int64()),
            ("raw_id", pa.string()),
            ("profile", pa.string()),
            ("split", pa.string()),
            ("fold", pa.int32()),
            ("history_item_ids", _IDS),
            ("history_ratings", _FLOATS),
        ]
    ),
    "items": pa.schema(
        [
            ("item_id", pa.int64()),
            ("raw_id", pa.string()),
            ("title", pa.string()),
            ("attributes", pa.list_(pa.string())),
        ]
    ),
    "lists": pa.schema(
        [
            ("list_id", pa.int64()),
            ("user_id", pa.int64()),
            ("split", pa.string()),
            ("timestamp_s", pa.int64()),
            ("history_item_ids", _IDS),
            ("history_ratings", _FLOATS),
            ("candidate_item_ids", _IDS),
            ("labels", _FLOATS),
        ]
    ),
    # Only the sample world knows the truth; nothing but the text-accuracy figure reads it.
    "truth": pa.schema([("user_id", pa.int64()), ("tastes", pa.list_(pa.string()))]),
    # subject: "item" or "user"
    "knowledge": pa.schema(
        [
            ("round", pa.int32()),
            ("subject", pa.string()),
            ("subject_id", pa.int64()),
            ("sample_id", pa.int32()),
            ("text", pa.string()),
            ("vector", _FLOATS),
        ]
    ),
    "generations": pa.schema(
        [
            *_LABEL,
            ("prompt_token_ids", _TOKENS),
            ("token_ids", _TOKENS),
            ("text", pa.string()),
            ("finish_reason", pa.string()),
            # the engine's, of each of token_ids; null where they are not kept
            ("token_logps", _FLOATS),
        ]
    ),
    # Subjects without texts, beside the artifact that lacks them, in its folder failed/.
    "failed": pa.schema(
        [
            ("round", pa.int32()),
            ("subject", pa.string()),
            ("subject_id", pa.int64()),
            ("reason", pa.string()),
            ("detail", pa.string()),
        ]
    ),
    # reward: what pairs are made of, the plain reward or, where reward.personal is set, plain_reward - others_reward.
    # std_error: how far chance alone moves the reward beside those of the user's other samples.
    "scores": pa.schema(
        [
            *_LABEL,
            ("reward", pa.float32()),
            ("plain_reward", pa.float32()),
            # what the text is worth to other users; NaN where that is not asked for (reward.personal, or validation users with
            # several turns per round), or there is nobody else
            ("others_reward", pa.float32()),
            ("std_error", pa.float32()),
            ("num_lists", pa.int32()),
        ]
    ),
    # The same by every metric that is compared; half_a, half_b: over a random half of the user's lists each.
    "metric_scores": pa.schema(
        [
            *_LABEL,
            ("metric", pa.string()),
            ("reward", pa.float32()),
            ("std_error", pa.float32()),
            ("num_lists", pa.int32()),
            ("half_a", pa.float32()),
            ("half_b", pa.float32()),
        ]
    ),
    "pairs": pa.schema(
        [
            ("round", pa.int32()),
            ("user_id", pa.int64()),
            ("pair_id", pa.int32()),  # counts the user's pairs
            ("split", pa.string()),
            ("kind", pa.string()),  # core.pairing.Kind
            ("rejected_user_id", pa.int64()),  # whose the rejected texts are
            ("prompt_token_ids", _TOKENS),
            ("chosen_token_ids", _TOKENS),
            # one or more rejected texts, worst first
            ("rejected_token_ids", pa.list_(_TOKENS)),
            ("chosen_reward", pa.float32()),
            # NaN for a text of another user: nobody measured what it is worth to this one
            ("rejected_reward", pa.list_(pa.float32())),
        ]
    ),
    # Beside the pairs, one file per reference and part, in the pairs' order: sums over completion tokens.
    "reference_logps": pa.schema(
        [
            ("user_id", pa.int64()),
            ("chosen_logp", pa.float64()),
            ("rejected_logp", pa.list_(pa.float64())),
        ]
    ),
    # Beside the scores, one file per policy and part: of every user with scores, one number per token of each text.
    "token_logps": pa.schema([("user_id", pa.int64()), ("logps", pa.list_(_FLOATS))]),
    # Fresh samples of the validation users under the policies before and after a round.
    "heldout": pa.schema(
        [
            ("round", pa.int32()),
            ("user_id", pa.int64()),
            *(
                (f"{figure}_{side}", pa.float32())
                for figure in HELDOUT_FIGURES
                for side in ("before", "after")
            ),
        ]
    ),
    "per_list": pa.schema(
        [
            ("list_id", pa.int64()),
            ("user_id", pa.int64()),
            ("system", pa.string()),
            ("backbone", pa.string()),
            ("seed", pa.int32()),
            *((f"{metric}@{k}", pa.float32()) for metric in EVALUATED_METRICS for k in EVALUATED_AT),
        ]
    ),
}


def validate_table(name: str, table: pa.Table) -> pa.Table:
    """Put a table's columns in the schema's order and types.

    Raises:
        UserError: a column is missing or cannot take the declared type.
    """
    schema = SCHEMAS[name]
    missing = [column for column in schema.names if column not in table.column_names]
    if missing:
        raise UserError(f"{name} has no column {', '.join(missing)} (found: {', '.join(table.column_names)})")
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{name}: a column has another type than declared: {error}") from None
