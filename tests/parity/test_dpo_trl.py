"""Our losses and gradients against TRL's DPOTrainer (1.16): one batch, the same token ids, float32.

TRL tokenises the prompt alone and prompt + completion + EOS, takes the common prefix as the prompt, pads right, runs
chosen and rejected apart and sums the log-probabilities of the completion tokens, EOS included. Ours takes the way it
trains: shared prompts in one packed row, a head in chunks, reference log-probabilities given.

Where the two differ by definition: TRL's "ipo" is our ipo_norm; its "sft" term weighs tokens, ours pairs; its "sigmoid"
ignores label_smoothing, so that conservative DPO has no counterpart but "aot" on a batch of one pair; and it has one
rejected per prompt.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from dpo4rec_ray.config.training import DPOSection
from dpo4rec_ray.policy.groups import Group, collate_groups
from dpo4rec_ray.policy.logps import CompletionLogps
from dpo4rec_ray.policy.objectives import BatchLayout, DPOObjective
from tests.trl_parity import BOS, EOS, Outcome, encode, gradients_of, tiny_llama, word_tokenizer

Pair = tuple[str, str, str]
BETA = 0.3
PAIRS: list[Pair] = [  # prompt, chosen, rejected: lengths differ on both sides of a pair and between pairs
    ("the user likes", " drama films with hope", " short comedy"),
    ("a user likes old films and", " new films", " long films of drama and hope"),
    ("the", " user", " a new user with the old hope"),
]
SAME_LENGTH: list[Pair] = [
    ("the user likes", " drama films", " short comedy"),
    ("a user likes old films and", " new films", " old hope"),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


def trl_trainer(
    folder: Path, tokenizer: PreTrainedTokenizerFast, pairs: list[Pair], **settings: Any
) -> DPOTrainer:
    return DPOTrainer(
        model=tiny_llama(seed=0),
        ref_model=tiny_llama(seed=1),
        args=DPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=len(pairs),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            dataloader_pin_memory=False,
            **{"beta": BETA, **settings},
        ),
        train_dataset=Dataset.from_list(
            [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs]
        ),
        processing_class=tokenizer,
    )


def step_of(trainer: DPOTrainer) -> Outcome:
    """One batch of all pairs."""
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return Outcome(loss.item(), gradients_of(trainer.model), metrics)


@pytest.fixture
def trl(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Any:
    """(pairs, **DPOConfig) -> `Outcome`"""
    return lambda pairs, **settings: step_of(trl_trainer(tmp_path, tokenizer, pairs, **settings))


def row_of(prompt: str, chosen: str, *rejected: str) -> dict[str, Any]:
    """A row as the trainer reads it, with the reference's log-probabilities."""
    group = Group([BOS, *encode(prompt)], [[*encode(text), EOS] for text in (chosen, *rejected)])
    with torch.no_grad():
        logps = CompletionLogps(tiny_llama(seed=1), grouped=True)(collate_groups([group], 0, packing=True))
    first, *others = group.completions
    return {
        "prompt_token_ids": group.prompt,
        "chosen_token_ids": first,
        "rejected_token_ids": others,
        "chosen_logp": logps[0].item(),
        "rejected_logp": logps[1:].tolist(),
    }


def ours(rows: list[tuple[str, ...]] | list[Pair], **settings: Any) -> Outcome:
    """The same step by our objective: the mean over the rows."""
    section = DPOSection(**{"beta": BETA, **settings})
    objective = DPOObjective(BatchLayout(0, prefix_sharing=True, packing=True), section)
    model = tiny_llama(seed=0)
    total, sums = objective(
        CompletionLogps(model, grouped=True, chunk_tokens=7),
        objective.collate([row_of(*row) for row in rows]),
    )
    (total / len(rows)).backward()
    metrics = {name: value / len(rows) for name, value in sums.items()}
    return Outcome(total.item() / len(rows), gradients_of(model), metrics)


def test_the_same_tokens_count(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """TRL's ids are ours, and its completion mask holds the completion and its EOS: what lengths are counted from."""
    trainer = trl_trainer(tmp_path, tokenizer, PAIRS)
    rows = [row_of(*pair) for pair in PAIRS]
    assert trainer.train_dataset is not None
    assert trainer.train_dataset["prompt_ids"][:] == [row["prompt_token_ids"] for row in rows]
    assert trainer.train_dataset["chosen_ids"][:] == [row["chosen_token_ids"] for row in rows]
    assert [[ids] for ids in trainer.train_dataset["rejected_ids"][:]] == [
        row["rejected_token_ids"] for row in rows
    ]
    batch = next(iter(trainer.get_train_dataloader()))
    counted = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    completions = [row["chosen_token_ids"] for row in rows] + [row["rejected_token_ids"][0] for row in rows]
    assert sorted(counted) == sorted(completions)  # the loader shuffles
    assert all(ids[-1] == EOS for ids in counted)


def test_the_metrics_are_trls(trl: Any) -> None:
    """Log-probabilities, rewards, margin and accuracy; the policy is not the reference."""
    theirs, found = trl(PAIRS, loss_type=["sigmoid"]).metrics, ours(PAIRS)
    assert abs(found.loss - math.log(2)) > 0.05
    for name, theirs_name in {
        "chosen_logp": "logps/chosen",
        "rejected_logp": "logps/rejected",
        "chosen_reward": "rewards/chosen",
        "rejected_reward": "rewards/rejected",
        "margin": "rewards/margins",
        "accuracy": "rewards/accuracies",
    }.items():
        assert found.metrics[name] == pytest.approx(theirs[theirs_name], rel=1e-5), name


@pytest.mark.parametrize(
    ("loss", "loss_type", "smoothing"),
    [
        ("sigmoid", "sigmoid", 0.0),
        ("hinge", "hinge", 0.0),
        ("ipo_norm", "ipo", 0.0),
        ("robust", "robust", 0.1),
        ("sigmoid_norm", "sigmoid_norm", 0.0),
        ("softmax", "sigmoid", 0.0),  # S-DPO with one rejected is DPO
    ],
)
def test_loss_and_gradient_equal_trl(trl: Any, loss: str, loss_type: str, smoothing: float) -> None:
    theirs = trl(PAIRS, loss_type=[loss_type], label_smoothing=smoothing)
    ours(PAIRS, loss=loss, label_smoothing=smoothing).assert_equals(theirs)


def test_ipo_on_sums_is_trls_with_another_beta(trl: Any) -> None:
    """TRL divides each log-ratio by its length: (m / L - 1 / (2 beta))^2 where all lengths are L.

    That is (m - L / (2 beta))^2 / L^2, ours on sums with beta / L, divided by L^2. With other lengths the two put
    different weights on the two texts of a pair, and no beta makes them equal.
    """
    length = len(encode(SAME_LENGTH[0][1])) + 1  # EOS
    theirs = trl(SAME_LENGTH, loss_type=["ipo"])
    found = ours(SAME_LENGTH, loss="ipo", beta=BETA / length)
    scaled = Outcome(
        found.loss / length**2,
        {name: gradient / length**2 for name, gradient in found.gradients.items()},
        found.metrics,
    )
    scaled.assert_equals(theirs)


def test_conservative_dpo_is_trls_aot_on_one_pair(trl: Any) -> None:
    """ "aot" sorts the log-ratios of a batch before it takes margins; of one pair there is nothing to sort."""
    for pair in PAIRS:
        theirs = trl([pair], loss_type=["aot"], label_smoothing=0.1)
        ours([pair], label_smoothing=0.1).assert_equals(theirs)


def test_trls_sigmoid_ignores_the_smoothing(trl: Any) -> None:
    theirs = trl(PAIRS, loss_type=["sigmoid"], label_smoothing=0.1)
    ours(PAIRS, label_smoothing=0.0).assert_equals(theirs)
    assert abs(ours(PAIRS, label_smoothing=0.1).loss - theirs.loss) > 1e-2


def test_the_nll_term_of_one_pair_is_trls(trl: Any) -> None:
    for pair in PAIRS:
        theirs = trl([pair], loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5])
        ours([pair], nll_weight=0.5).assert_equals(theirs)


def test_the_nll_term_of_a_batch_weighs_tokens_in_trl(trl: Any) -> None:
    """Ours is the mean over pairs (RPO, eq. 2); times its number of tokens over the mean one, a pair's term is TRL's."""
    lengths = [len(encode(chosen)) + 1 for _, chosen, _ in PAIRS]
    terms = [ours([pair], nll_weight=0.5).loss - ours([pair]).loss for pair in PAIRS]
    theirs = trl(PAIRS, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]).loss - ours(PAIRS).loss
    by_tokens = sum(term * length for term, length in zip(terms, lengths, strict=True)) / sum(lengths)
    assert theirs == pytest.approx(by_tokens, rel=1e-5)
    found = ours(PAIRS, nll_weight=0.5).loss - ours(PAIRS).loss
    assert found == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert abs(found - theirs) > 1e-2


@pytest.mark.parametrize(
    ("loss", "loss_type"),
    [("sigmoid", "sigmoid"), ("hinge", "hinge"), ("ipo_norm", "ipo"), ("sigmoid_norm", "sigmoid_norm")],
)
def test_k_rejected_are_k_pairs_of_trl(trl: Any, loss: str, loss_type: str) -> None:
    """One row with three rejected against a batch of its three pairs."""
    prompt, chosen, rejected = PAIRS[0]
    texts = [rejected, " films of old hope", " a"]
    theirs = trl([(prompt, chosen, text) for text in texts], loss_type=[loss_type])
    ours([(prompt, chosen, *texts)], loss=loss).assert_equals(theirs)
