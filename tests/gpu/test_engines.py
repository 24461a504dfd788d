"""The two engines on a real GPU, on the model that ships with the package. Skipped where there is no CUDA GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import DEMO, ROOT, TINY, run_job

pytestmark = [pytest.mark.gpu]


def test_vllm_gives_n_seeded_samples() -> None:
    from dpo4rec_ray.config.texts import GenerateSection, LLMSection
    from dpo4rec_ray.knowledge.engine_spec import EngineSpec, ServedWeights
    from dpo4rec_ray.knowledge.generator import VLLMGenerator
    from dpo4rec_ray.knowledge.prompts import encode_chat
    from dpo4rec_ray.policy.model import load_tokenizer

    model = str(ROOT / "dpo4rec_ray/policy/bundled")
    generate = GenerateSection(max_new_tokens=24, gpus_per_engine=1, gpu_memory_utilization=0.3)
    generator = VLLMGenerator(EngineSpec(ServedWeights(model), LLMSection(max_model_len=320), generate))
    prompt = encode_chat(load_tokenizer(model), 'History: "Silent Harbor" (drama; 1980s; Okafor), 5 stars;')
    (first,), (second,) = (generator.generate([prompt], [7], [4]) for _ in range(2))
    assert len(first.samples) == 4
    assert [sample.token_ids for sample in first.samples] == [sample.token_ids for sample in second.samples]


def test_the_whole_run_with_nccl_and_gpu_engines(tmp_path: Path) -> None:
    """One worker each: two NCCL ranks need two GPUs."""
    shares = ["generate.gpus_per_engine=0.4", "generate.num_engines=1", "generate.gpu_memory_utilization=0.3"]
    training = ["policy.num_workers=1", "policy.gpus_per_worker=0.4", "reward.num_workers=1"]
    done = run_job(tmp_path, DEMO, *TINY, *shares, *training)
    assert done.code == 0, done.stderr[-4000:]
    assert done.summary["rounds"][0]["training"]["first_loss"] == pytest.approx(0.6931, abs=1e-3)
