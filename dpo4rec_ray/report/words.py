"""What the words of the report mean, for a reader who has not read the documentation."""

from __future__ import annotations

# (word, what it means); those of SYSTEMS and USERS are on every page.
USERS = (
    ("text", "what the LLM wrote about a user from the user's history; rerankers read it as a vector."),
    ("list", "candidates that are ranked for a user at once, some of which the user liked."),
    ("validation users", "held out from training; texts, rounds and settings are chosen on them."),
    ("test users", "looked at once, at the end; the verdict is about them."),
)
SYSTEMS = (
    ("backbone", "a reranker that reads no texts."),
    ("base-llm", "the same reranker with the texts of the LLM before any training."),
    ("statistics", "with texts that are counted from the history, without an LLM."),
    ("random-texts", "with counted texts of another user: it must add nothing."),
    ("upper-bound", "the best order of every list: no system can be above it."),
)
ROUNDS = (
    ("dpo4rec-roundN", "the same reranker with the texts of the LLM that round N trained."),
    ("rung", "a link of the chain from the texts to the test users."),
    (
        "reward",
        "how well a reranker that reads the text ranks the user's lists (reward.metric); higher is better.",
    ),
    ("reading", "reward of a user's own texts minus that of other users' texts on the same lists."),
    ("reading gain", "how much training raised it: this part is about the user."),
    ("style gain", "how much training raised the reward of other users' texts: this part is manner."),
    ("chosen, rejected", "the better and the worse text of a pair that DPO learns from."),
    ("DPO accuracy", "share of pairs of held-out users of which the trained LLM prefers the chosen text."),
    (
        "reward margin",
        "how much more training raised the LLM's own preference for the chosen than for the rejected text.",
    ),
    ("KL", "how far the trained LLM's next words are from those before training; 0 is unchanged."),
)


def words(*, with_rounds: bool) -> tuple[tuple[str, str], ...]:
    """Word and meaning, in the order of the page."""
    return (*USERS, *SYSTEMS, *(ROUNDS if with_rounds else ()))
