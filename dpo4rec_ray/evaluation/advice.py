"""What to do about the weak rung of a run, and the page of the documentation that says more."""

from __future__ import annotations

HARMS = "harms"  # texts lower the test users' figures
# Weak rungs that have a name of their own, as what follows from them is more than that one rung.
UNREAD, NOISE, COLLAPSE = "texts are not read", "the reward is noise", "the texts collapsed"
TEST = "test users"  # the last rungs
COUNTED = "counted texts"  # what those against them come to
CONFIRM = "confirm"  # nothing is weak

# Weak rung, or the start of its name -> what to do about it, and the page that says more.
ADVICE = {
    UNREAD: (
        "let the rerankers learn to read from texts that say what they know in one form (reward.reader), from more texts of a "
        "user (reward.reader_texts) and more users (data.max_users); reward.oracle measures the most that any text can reach",
        "docs/rewards-and-pairs.md",
    ),
    NOISE: (
        "measure rewards on more lists (reward.num_redraws, or users with more lists), by a finer metric (reward.metric), and "
        "leave out pairs that chance explains (pair.min_std_errors)",
        "docs/rewards-and-pairs.md",
    ),
    COLLAPSE: (
        "train more gently: lower policy.lr or policy.epochs, pull harder to the reference (dpo.beta, dpo.nll_weight, "
        "grpo.kl_weight)",
        "docs/dpo.md",
    ),
    "text accuracy": (
        "read the prompts (dpo4rec prompts) and the texts below: show examples (prompt.examples), or take a stronger LLM "
        "(llm.path)",
        "docs/texts-and-llms.md",
    ),
    "fit to later likes": (
        "read the prompts (dpo4rec prompts) and the texts below: show examples (prompt.examples), or take a stronger LLM "
        "(llm.path)",
        "docs/texts-and-llms.md",
    ),
    "channel": (
        "even texts that need no LLM add nothing here: try another text encoder (encoder.path) and other backbones "
        "(evaluate.backbones) before another LLM",
        "docs/evaluation.md",
    ),
    "DPO accuracy": (
        "give it more to learn from: more users (data.max_users), more pairs of each (pair.pairs_per_user), or more steps "
        "(policy.epochs, policy.lr)",
        "docs/dpo.md",
    ),
    "held-out reward": (
        "what was learned does not reach other users: more users (data.max_users), fewer epochs (policy.epochs), clearer pairs "
        "(pair.min_std_errors)",
        "docs/dpo.md",
    ),
    # The reward shows reading, or the rung before this one would be the weak one.
    "reading gain in NDCG@5": (
        "by the reward, texts say more about their user; the ranking does not show it yet: more users (data.max_users), who "
        "teach more and show smaller differences, or a stronger LLM (llm.path)",
        "docs/rewards-and-pairs.md",
    ),
    "reading gain": (
        "training taught a manner, not the user: reward what a text is worth to its own user (reward.personal), and, with DPO, "
        "pair against other users' texts (pair.others_share)",
        "docs/rewards-and-pairs.md",
    ),
    "style gain": (
        "training taught a manner more than the user: reward what a text is worth to its own user (reward.personal), and, with "
        "DPO, pair against other users' texts (pair.others_share)",
        "docs/rewards-and-pairs.md",
    ),
    COUNTED: (
        "the LLM is not shown to beat texts that are counted from the history and cost nothing: try a stronger one (llm.path) or "
        "other prompts (prompt.template), or serve the counted texts (llm.source)",
        "docs/texts-and-llms.md",
    ),
    TEST: ("measure on more test users (data.test_frac, data.max_users)", "docs/evaluation.md"),
    HARMS: (
        "do not serve these texts: test users lose what validation users seemed to gain, so look at another seed (run.seed) and "
        "at how the splits differ (data.protocol)",
        "docs/evaluation.md",
    ),
    CONFIRM: (
        "confirm it with another seed (run.seed) and other backbones (evaluate.backbones), then publish the run (dpo4rec serve)",
        "docs/serving.md",
    ),
}
