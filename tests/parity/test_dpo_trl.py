"""Our DPO loss and gradient against one batch of TRL's DPOTrainer (1.16), sigmoid loss, same token ids.

TRL tokenises the prompt alone and prompt + completion + EOS, takes the common prefix as the prompt, pads
right, sums the log-probabilities of the completion tokens, EOS included, and means -log sigmoid over the
pairs.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from dpo4rec_ray.core.losses import dpo_loss, sequence_logps

BETA = 0.3
TEXT = "the a user likes drama comedy films of old new long short and with hope"
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *TEXT.split()]
PAIRS = [  # prompt, chosen, rejected: lengths differ on both sides of a pair and between pairs
    ("the user likes", " drama films with hope", " short comedy"),
    ("a user likes old films and", " new films", " long films of drama and hope"),
    ("the", " user", " a new user with the old hope"),
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, one BOS in front."""
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", WORDS.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).float()


def encode(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def logps(model: LlamaForCausalLM, prompts: list[list[int]], completions: list[list[int]]) -> torch.Tensor:
    """Sums over completion tokens [B] of one right-padded batch, wider than TRL's."""
    rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    width = max(map(len, rows)) + 3
    token_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    places = torch.arange(width)
    real = places < torch.tensor([[len(row)] for row in rows])
    completion = real & (places >= torch.tensor([[len(prompt)] for prompt in prompts]))
    return sequence_logps(
        model(input_ids=token_ids, attention_mask=real.long()).logits, token_ids, completion
    )


def test_loss_rewards_and_gradient_equal_trl(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    policy, reference = tiny_llama(seed=0), tiny_llama(seed=1)
    ours = copy.deepcopy(policy)
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(
            output_dir=str(tmp_path),
            beta=BETA,
            loss_type=["sigmoid"],
            per_device_train_batch_size=len(PAIRS),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(
            [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in PAIRS]
        ),
        processing_class=tokenizer,
    )
    prompts = [[1, *encode(prompt)] for prompt, _, _ in PAIRS]
    chosen = [[*encode(text), 2] for _, text, _ in PAIRS]
    rejected = [[*encode(text), 2] for _, _, text in PAIRS]
    assert trainer.train_dataset is not None
    assert trainer.train_dataset["prompt_ids"][:] == prompts
    assert trainer.train_dataset["chosen_ids"][:] == chosen
    assert trainer.train_dataset["rejected_ids"][:] == rejected

    trl_loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    trl_loss.backward()

    with torch.no_grad():
        ref_chosen, ref_rejected = logps(reference, prompts, chosen), logps(reference, prompts, rejected)
    policy_chosen, policy_rejected = logps(ours, prompts, chosen), logps(ours, prompts, rejected)
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        policy_chosen, policy_rejected, ref_chosen, ref_rejected, BETA
    )
    losses.mean().backward()

    assert abs(losses.mean().item() - math.log(2)) > 0.05  # the policy is not the reference
    assert losses.mean().item() == pytest.approx(trl_loss.item(), abs=1e-5)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert metrics["logps/chosen"] == pytest.approx(policy_chosen.mean().item(), abs=1e-4)
    assert metrics["logps/rejected"] == pytest.approx(policy_rejected.mean().item(), abs=1e-4)
    assert metrics["rewards/chosen"] == pytest.approx(chosen_rewards.mean().item(), abs=1e-5)
    assert metrics["rewards/rejected"] == pytest.approx(rejected_rewards.mean().item(), abs=1e-5)
    assert metrics["rewards/accuracies"] == pytest.approx(
        (chosen_rewards > rejected_rewards).float().mean().item()
    )
    for (name, mine), theirs in zip(ours.named_parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )
