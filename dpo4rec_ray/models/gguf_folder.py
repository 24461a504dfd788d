"""A .gguf file as a model folder (safetensors, config, tokenizer): converted once per machine, into the user's cache.

Everything that loads a model calls `model_folder` first, so that a .gguf file is an LLM like any other: for vLLM, for the
trainer and for the tokenizer. A run keeps the path of the file; each machine that loads it has a cache of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from dpo4rec_ray.errors import UserError, first_line
from dpo4rec_ray.storage.local_copies import alone, cache_root, local_copy
from dpo4rec_ray.storage.places import new_folder, write_text

# Raise it with any change of what a converted folder holds.
CONVERTER = 1
# general.file_type -> format of the weights, for files that are not quantized
_UNQUANTIZED = {0: "float32", 1: "float16"}
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


def is_gguf(path: str) -> bool:
    return path.lower().endswith(".gguf")


def model_folder(path: str) -> str:
    """The folder of a .gguf file's conversion, which is made if it is missing; any other path or hub name as it is.

    Processes that ask at the same time convert once; the others wait.

    Raises:
        UserError: the file is missing, damaged, a part of a model, or of a kind that transformers does not read; the package
            gguf is not installed; the cache cannot be written.
    """
    if not is_gguf(path):
        return str(local_copy(path)) if "://" in path else path
    file = _checked(path)
    version = f"{CONVERTER}-{importlib.metadata.version('transformers')}"
    folder = cache_root() / "gguf" / f"{file.stem}-{content_hash(path)}-{version}"
    if folder.is_dir():
        return str(folder)
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"llm.path {path}: a .gguf file needs the package gguf; install it, or dpo4rec-ray with the extra gguf"
        )
    try:
        with alone(folder):
            if not folder.is_dir():  # another process was first
                _convert(file, folder)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: {error.strerror or error}; the conversion of {path} goes there, XDG_CACHE_HOME names "
            "another place"
        ) from None
    return str(folder)


def content_hash(path: str) -> str:
    """First 16 hexadecimal digits of the file's sha256. Kept by path, size and time: a large file is read once.

    Raises:
        UserError: the file is missing.
    """
    file = _checked(path)
    stat = file.stat()
    seen = hashlib.sha256(f"{file} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:32]
    known = cache_root() / "gguf" / "sha256" / seen
    with contextlib.suppress(OSError):
        return known.read_text(encoding="ascii")
    with file.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()[:16]
    with contextlib.suppress(OSError):  # then it is read again next time
        known.parent.mkdir(parents=True, exist_ok=True)
        write_text(known, found)
    return found


def _checked(path: str) -> Path:
    file = local_copy(path) if "://" in path else Path(path).expanduser().resolve()
    if not file.is_file():
        raise UserError(f"llm.path {path}: no such file")
    if _PART.search(file.name):
        raise UserError(
            f"llm.path {path}: one part of a split model; join the parts first (llama-gguf-split --merge)"
        )
    with file.open("rb") as handle:
        first = handle.read(4)
    if first != b"GGUF":
        raise UserError(f"llm.path {path}: begins with {first!r} and not with b'GGUF'; download it again")
    return file


def _convert(file: Path, folder: Path) -> None:
    """Write `folder`. Quantized weights become bfloat16, others keep their format.

    Raises:
        UserError: transformers cannot read the file.
        OSError: the folder cannot be written.
    """
    print(
        f"{file.name} is converted once, into {folder} (it takes a minute or more)",
        file=sys.stderr,
        flush=True,
    )
    with new_folder(folder) as temporary:
        model, tokenizer = _read(file)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _read(file: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a file, as they can be saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.integrations.gguf.reader import read_gguf_metadata

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        metadata, _ = read_gguf_metadata(str(file))
        dtype = _UNQUANTIZED.get(metadata.get("general.file_type", -1), "bfloat16")
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            **where,
            trust_remote_code=False,
            dtype=getattr(torch, dtype),
            quantization_config=GgufConfig(dequantize=True),
        )
    except (
        Exception
    ) as error:  # the parser's and every architecture's own errors, about a file that somebody downloaded
        raise UserError(
            f"llm.path {file}: cannot be read as a GGUF model ({type(error).__name__}: {first_line(error)[:200]}); is it "
            f"whole, and of an architecture that transformers {importlib.metadata.version('transformers')} reads from GGUF?"
        ) from None
    stops = model.generation_config or model.config
    model.generation_config = GenerationConfig(
        bos_token_id=stops.bos_token_id, eos_token_id=stops.eos_token_id, pad_token_id=stops.pad_token_id
    )
    return model, tokenizer
