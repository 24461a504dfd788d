"""One file per stage: `run(config, store, round_id) -> Outcome` places plain objects on Ray and writes an artifact."""

NAMES = (
    "prepare",
    "bootstrap",
    "encode",
    "references",
    "train_reward",
    "generate",
    "score",
    "pair",
    "dpo",
    "best_of_n",
    "grpo",
    "validate",
    "evaluate",
    "report",
)  # here and not in pipeline.py, which imports them all: the help of a command lists them
