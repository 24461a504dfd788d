"""GRPO's loss and gradients against TRL's GRPOTrainer (1.16): one batch, the same token ids, float32.

TRL runs every completion with its prompt apart; ours takes the way it trains, a group's shared prompt once in a packed row.
Its loss types are our token weights: "grpo" is "sequence" and "dr_grpo" is "constant"; "bnpo" takes the mean over the tokens of
the whole micro-batch, our "token" over those of each group, so they are the same for one group. TRL's advantages divide by the
standard deviation plus 1e-4, as ours do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from dpo4rec_ray.config.training import GRPOSection
from dpo4rec_ray.core.policy_gradient import advantages
from dpo4rec_ray.policy.batch import collate
from dpo4rec_ray.policy.logps import CompletionLogps
from dpo4rec_ray.policy.objectives import BatchLayout, GRPOObjective
from tests.trl_parity import BOS, EOS, Outcome, encode, gradients_of, tiny_llama, word_tokenizer

LONGEST = 7
GROUPS = [  # prompt, texts, their rewards
    ("the user likes", [" drama films with hope", " short comedy", " old films"], [0.3, -0.2, 0.1]),
    ("a user likes old films and", [" new films", " long films of drama and hope", " hope"], [1.0, 2.5, 0.0]),
]


def rows(temperature: float, scale: str) -> list[dict[str, Any]]:
    """As the trainer reads them; the old policy is not the one that is trained, so that ratios are not 1."""
    old, reference = (
        CompletionLogps(tiny_llama(seed=seed), per_token=True, temperature=temperature) for seed in (1, 2)
    )
    found = []
    for prompt, texts, rewards in GROUPS:
        prompt_ids = [BOS, *encode(prompt)]
        completions = [[*encode(text), EOS] for text in texts]
        with torch.no_grad():
            logps = {
                name: [model(collate([prompt_ids], [one], 0)).tolist() for one in completions]
                for name, model in (("sampler_logps", old), ("reference_logps", reference))
            }
        # As if the engine's kernels were a little off, some of it beyond the cap.
        engine = [
            [logp + 0.4 * (-1) ** place * place for place, logp in enumerate(one)]
            for one in logps["sampler_logps"]
        ]
        own = advantages(np.array(rewards), scale)
        assert own is not None
        row = {"prompt_token_ids": prompt_ids, "completions": completions, **logps, "engine_logps": engine}
        found.append({**row, "advantages": own.tolist()})
    return found


def ours(
    own: list[dict[str, Any]], temperature: float, *, same_reference: bool = True, **settings: Any
) -> tuple[Outcome, dict[str, float]]:
    objective = GRPOObjective(
        BatchLayout(0, prefix_sharing=True, packing=True),
        GRPOSection(**settings),
        LONGEST,
        same_reference=same_reference,
    )
    model = tiny_llama(seed=0)
    logps = CompletionLogps(model, grouped=True, chunk_tokens=5, per_token=True, temperature=temperature)
    total, sums = objective(logps, objective.collate(own))
    (total / len(own)).backward()
    metrics = {name: value / len(own) for name, value in sums.items()}
    return Outcome(total.item() / len(own), gradients_of(model), metrics), metrics


def padded(sequences: list[list[Any]], *, left: bool, fill: float = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] values and mask."""
    width = max(map(len, sequences))
    rows, masks = [], []
    for one in sequences:
        gap = [fill] * (width - len(one))
        rows.append([*gap, *one] if left else [*one, *gap])
        mask = [1] * len(one)
        masks.append([*[0] * len(gap), *mask] if left else [*mask, *[0] * len(gap)])
    return torch.tensor(rows), torch.tensor(masks)


def theirs(
    folder: Path,
    own: list[dict[str, Any]],
    temperature: float,
    kl: float,
    *,
    same_reference: bool = True,
    cap: float = 0.0,
    **settings: Any,
) -> Outcome:
    trainer = GRPOTrainer(
        model=tiny_llama(seed=0),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=6,
            num_generations=3,
            max_completion_length=LONGEST,
            temperature=temperature,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            **settings,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt, *_ in GROUPS]),
        processing_class=word_tokenizer(),
    )
    trainer.beta = kl  # set here: the constructor would load a reference from a hub
    trainer.current_gradient_accumulation_steps = 1
    texts = [(row["prompt_token_ids"], one) for row in own for one in row["completions"]]
    prompt_ids, prompt_mask = padded([prompt for prompt, _ in texts], left=True)
    completion_ids, completion_mask = padded([one for _, one in texts], left=False)
    logps, reference, engine = (
        padded([one for row in own for one in row[name]], left=False, fill=0.0)[0]
        for name in ("sampler_logps", "reference_logps", "engine_logps")
    )
    if cap:  # as the trainer does with texts of its own vLLM
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    loss = trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": completion_ids,
            "completion_mask": completion_mask,
            "advantages": torch.tensor([one for row in own for one in row["advantages"]]),
            "old_per_token_logps": logps,
            "ref_per_token_logps": logps if same_reference else reference,
            "importance_sampling_ratio": (logps - engine).exp().clamp(max=cap or 1.0),
            "num_items_in_batch": completion_mask.sum(),
        },
    )
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items() if values}
    return Outcome(loss.item(), gradients_of(trainer.model), metrics)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize(
    ("weights", "loss_type"), [("sequence", "grpo"), ("constant", "dr_grpo"), ("token", "bnpo")]
)
def test_loss_and_gradients_are_trls(
    tmp_path: Path, weights: str, loss_type: str, kl: float, temperature: float
) -> None:
    own = rows(temperature, "std")
    if weights == "token":
        own = own[:1]
    found, _ = ours(own, temperature, token_weights=weights, kl_weight=kl, clip_low=0.2, clip_high=0.3)
    expected = theirs(tmp_path, own, temperature, kl, loss_type=loss_type, epsilon=0.2, epsilon_high=0.3)
    found.assert_equals(expected)


def test_a_reference_that_did_not_draw_the_texts_is_trls(tmp_path: Path) -> None:
    own = rows(0.7, "std")
    found, _ = ours(own, 0.7, same_reference=False, kl_weight=0.1)
    found.assert_equals(theirs(tmp_path, own, 0.7, 0.1, same_reference=False, loss_type="grpo"))


def test_truncated_importance_sampling_is_trls(tmp_path: Path) -> None:
    own = rows(1.0, "std")
    found, metrics = ours(own, 1.0, kl_weight=0.1, sampler="corrected", importance_cap=1.3)
    found.assert_equals(theirs(tmp_path, own, 1.0, 0.1, cap=1.3, loss_type="grpo"))
    plain, _ = ours(own, 1.0, kl_weight=0.1)
    assert abs(found.loss - plain.loss) > 1e-3 and metrics["engine_gap"] > 0.1


def test_clipping_and_divergence_are_trls(tmp_path: Path) -> None:
    """What is logged too: shares of clipped tokens and the KL estimate, which TRL takes over the tokens of all groups."""
    own = rows(1.0, "none")[:1]
    _, found = ours(own, 1.0, token_weights="token", kl_weight=0.1)
    expected = theirs(tmp_path, own, 1.0, 0.1, loss_type="bnpo", epsilon=0.2).metrics
    assert 0 < found["clip_share"] < 1
    assert found["clip_share"] == pytest.approx(expected["clip_ratio/region_mean"], rel=1e-5)
    assert found["kl_per_token"] == pytest.approx(expected["kl"], rel=1e-5)


def test_a_new_policy_has_ratios_of_one_and_no_divergence() -> None:
    """The identities of a first step: the loss is minus the sum of the advantages, 0."""
    own = rows(1.0, "std")
    for row in own:
        with torch.no_grad():
            logps = CompletionLogps(tiny_llama(seed=0), per_token=True)
            row["sampler_logps"] = [
                logps(collate([row["prompt_token_ids"]], [one], 0)).tolist() for one in row["completions"]
            ]
    found, metrics = ours(own, 1.0, kl_weight=0.1)
    assert found.loss == pytest.approx(0, abs=1e-6)
    assert metrics["ratio"] == pytest.approx(1, abs=1e-6)
    assert metrics["kl_per_token"] == pytest.approx(0, abs=1e-6)
    assert metrics["gain"] == pytest.approx(0, abs=1e-5)
