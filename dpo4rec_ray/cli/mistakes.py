"""The user's mistake inside an exception: what errors of Ray, vLLM and the model hub look like, and what each becomes.

Most of them come from other processes, as text in which their class and cause are lost.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from dpo4rec_ray.errors import UserError, first_line

DISK_IS_FULL = "no space left on the disk of the run folder; free some or change run.root, then run again"
_OUT_OF_MEMORY = "lower generate.kv_cache_gib, the number of engines and workers or policy.batch_size, or take a larger machine"
_GPU_MEMORY = "lower generate.gpu_memory_utilization, or end what else is on the GPU (nvidia-smi)"
_OTHER_LLM = "set llm.path to another one, or update the environment"

# What an error's text holds -> what it becomes; {0} is its first group. The first that fits counts.
MISTAKES = {
    r"\[Errno 28\]|os error 28|No space left on device": DISK_IS_FULL,
    r"Error performing \w+ (\S+) in \S+, after \d+ retries": (
        "the store does not answer: {0} was asked for three minutes; run the same command when it does"
    ),
    # Ray itself
    r"current node timed out during startup|Timed out waiting for file": (
        "Ray did not start in time on this machine; it is too busy or short of memory: end other work, then run again"
    ),
    r"Version mismatch: .*\n\s*Ray: (\S+)\n\s*Python: (\S+)\n.*\n\s*Ray: (\S+)\n\s*Python: (\S+)": (
        "the cluster runs Ray {0} on Python {1}, this job Ray {2} on Python {3}; start both from the same environment"
    ),
    r"Could not find any running Ray instance": (
        "RAY_ADDRESS names no Ray that runs; start one (ray start --head), or unset it to run on this machine alone"
    ),
    r"RAY_AUTH_TOKEN|InvalidAuthToken": (
        "the cluster wants a token, and not what this job has; set RAY_AUTH_MODE=token and the cluster's RAY_AUTH_TOKEN (or "
        "RAY_AUTH_TOKEN_PATH)"
    ),
    r"exceeds /dev/shm size": "Ray's object store does not fit into /dev/shm; enlarge it (docker run --shm-size=2g)",
    r"No module named '?(dpo4rec_ray\b[\w.]*)": (
        "a node of the cluster has no {0}; install this version of the package on every node, or submit with "
        "ray job submit --working-dir"
    ),
    r"No module named '?(vllm|deepspeed|peft|transformers|torch|pyarrow|safetensors)\b": (
        "a worker lacks the package {0}; install the requirements with the extra cpu or gpu, on a cluster on every node"
    ),
    # memory
    r"Available memory on node .*?\((\S+?)/.*is less than requested memory for kv \((\S+ GiB|\S+/\S+ GiB)\)": (
        "an engine asks for {1} of memory for its KV cache, and {0} GiB are free; lower generate.kv_cache_gib or num_engines"
    ),
    r"To serve at least one request .*?\((\d+)\), \((\S+) GiB KV.*?\((\S+) GiB\)": (
        "a prompt of llm.max_model_len = {0} needs {1} GiB of KV cache, and the engine has {2}; lower llm.max_model_len or "
        "give it more (generate.kv_cache_gib, on a GPU generate.gpu_memory_utilization)"
    ),
    r"Free memory on device .*? \((\S+?)/(\S+) GiB\) on startup": (
        f"an engine found {{0}} of {{1}} GiB free on its GPU, less than it may take; {_GPU_MEMORY}"
    ),
    r"No available memory for the cache blocks": (
        "the LLM leaves no room for a KV cache; raise generate.gpu_memory_utilization or kv_cache_gib, or take a larger GPU"
    ),
    r"CUDA out of memory|CUDA error: out of memory|torch\.OutOfMemoryError": (
        f"a GPU is out of memory; {_GPU_MEMORY}; in training lower policy.batch_size or set policy.activation_checkpointing"
    ),
    r"running low on memory|OutOfMemoryError|MemoryError|can't allocate memory|Cannot allocate memory": (
        f"this machine is out of memory; {_OUT_OF_MEMORY}"
    ),
    # devices
    r"Failed to infer device type|Torch not compiled with CUDA|Found no NVIDIA driver|No CUDA GPUs|NVMLError|CUDA driver": (
        "a worker found no GPU that it can use; look at nvidia-smi there (driver, container), or set gpus_per_* = 0"
    ),
    # the LLM
    r"model type `(\S+)` but Transformers does not recognize": (
        f"the LLM is of a kind that the installed transformers does not know ({{0}}); {_OTHER_LLM}"
    ),
    r"Model architectures \['(\S+?)'.* not supported": (
        f"the LLM has an architecture that the installed vLLM does not know ({{0}}); {_OTHER_LLM}"
    ),
    r"Unknown quantization method: (\S+)\. Must": (
        f"the LLM's config.json asks for quantization {{0}}, which the installed vLLM does not have; {_OTHER_LLM}"
    ),
    r"(\S+) is not supported for quantization method (\S+)\. Supported dtypes: \[(.*?)\]": (
        "the LLM is quantized with {1}, which cannot run in llm.dtype ({0}), only in {2}; change llm.dtype, or set llm.path to "
        "weights that are not quantized"
    ),
    r"Engine core initialization failed": (  # vLLM on GPUs: the engine is a process of its own, whose errors stay in its log
        "an engine could not start, and why is in its log alone: run again with --verbose (no GPU or driver, too little GPU "
        "memory, an LLM that it does not know)"
    ),
    r"SafetensorError: (.*)": "a *.safetensors file of the LLM or encoder is damaged ({0}); download it again",
    r"vllm/[\s\S]*, in load_model\n[\s\S]*\n((?:\w+\.)*\w+Error\b.*)|ignore_(mismatched_sizes)": (
        "the LLM's weights do not fit its config.json ({0}); download the folder again, or set llm.path to another model"
    ),
}


def user_mistake(error: BaseException) -> str | None:
    """What to tell the user of an exception from the driver or a worker; None: it is not the user's to mend."""
    errors = list(chain(error))
    for inner in errors:
        if type(inner) is UserError:  # Ray's wrappers of one are instances too; their text is the traceback
            return first_line(inner)  # Ray Data adds advice of its own below
        if isinstance(inner, OSError) and inner.errno in (errno.ENOSPC, errno.EDQUOT):
            return DISK_IS_FULL
        if isinstance(inner, PermissionError):
            return f"{inner.filename}: not allowed to write here; set run.root to a folder of yours"
    for inner in errors:
        text = f"{type(inner).__name__}: {inner}"
        # of a worker's constructor only the traceback's text arrives
        if found := re.search(rf"{UserError.__module__}\.UserError: (.*)", text):
            return found[1]
        for looks, sentence in MISTAKES.items():
            if found := re.search(looks, text):
                return sentence.format(*filter(None, found.groups()))
    return None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what caused it, through Ray's own wrappers."""
    seen: set[int] = set()
    todo = [error]
    while todo:
        inner = todo.pop(0)
        if inner is None or id(inner) in seen:
            continue
        seen.add(id(inner))
        yield inner
        failures = getattr(inner, "worker_failures", None)
        todo += list(failures.values()) if isinstance(failures, dict) else []
        todo += [getattr(inner, name, None) for name in ("cause", "_base_exc", "__cause__", "__context__")]
        todo = [item for item in todo if item is None or isinstance(item, BaseException)]
