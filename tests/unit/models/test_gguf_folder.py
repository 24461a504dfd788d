"""A .gguf file as a model folder: what it becomes, that it is converted once, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.knowledge.prompts import encode_chat
from dpo4rec_ray.models import gguf_folder
from dpo4rec_ray.models.gguf_folder import content_hash, model_folder
from dpo4rec_ray.policy.model import load_model, load_tokenizer
from dpo4rec_ray.store.policies import model_identity

WIDTH, HEADS, VOCAB = 32, 2, 262


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/dpo4rec_ray/gguf"


def tiny_gguf(path: Path, *, half: bool = False) -> dict[str, np.ndarray]:
    """Write one layer of Qwen 2 with bytes as its tokens; returns the tensors by their names in the file."""
    gguf = pytest.importorskip("gguf")
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    writer = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_file_type(1 if half else 0)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    tokens = [*bytes_to_unicode().values(), "th", "<bos>", "<eos>", "<pad>", "he", "in"]
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<bos>", "<eos>", "<pad>") else 1 for token in tokens])
    writer.add_token_merges(["t h", "h e", "i n"])
    for name, place in (("bos", 257), ("eos", 258), ("pad", 259)):
        getattr(writer, f"add_{name}_token_id")(place)
    random = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (VOCAB, WIDTH),
        "output_norm.weight": (WIDTH,),
        "output.weight": (VOCAB, WIDTH),
        "blk.0.attn_norm.weight": (WIDTH,),
        "blk.0.ffn_norm.weight": (WIDTH,),
        "blk.0.ffn_gate.weight": (48, WIDTH),
        "blk.0.ffn_up.weight": (48, WIDTH),
        "blk.0.ffn_down.weight": (WIDTH, 48),
        **{f"blk.0.attn_{part}.weight": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")},
        **{f"blk.0.attn_{part}.bias": (WIDTH,) for part in ("q", "k", "v")},
    }
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, values in tensors.items():
        writer.add_tensor(name, values.astype(np.float16) if half and values.ndim > 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_file_becomes_a_folder_with_its_weights_and_its_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    tensors = tiny_gguf(file)
    folder = Path(model_folder(str(file)))
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"] and "quantization_config" not in config
    assert sorted(one.suffix for one in folder.iterdir() if one.suffix == ".safetensors") == [".safetensors"]
    model = load_model(str(file), "float32")
    weights = model.state_dict()
    for mine, theirs in {
        "model.embed_tokens.weight": "token_embd.weight",
        "lm_head.weight": "output.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
        "model.layers.0.self_attn.k_proj.bias": "blk.0.attn_k.bias",
    }.items():
        assert np.array_equal(weights[mine].numpy(), tensors[theirs]), mine
    tokenizer = load_tokenizer(str(file))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (257, 258)
    prompt = encode_chat(tokenizer, "the thin hen")
    assert prompt.count(257) == 1 and prompt[0] == 257
    assert tokenizer.decode(prompt[1:]) == "the thin hen"


def test_half_precision_stays_half_precision(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "half.gguf", half=True)
    assert (
        json.loads((Path(model_folder(str(tmp_path / "half.gguf"))) / "config.json").read_text())["dtype"]
        == "float16"
    )


def test_it_is_converted_once_for_all_paths_with_the_same_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, copy = tmp_path / "tiny.gguf", tmp_path / "elsewhere/tiny.gguf"
    tiny_gguf(file)
    copy.parent.mkdir()
    copy.write_bytes(file.read_bytes())
    os.utime(copy, ns=(0, 0))
    folder = model_folder(str(file))
    monkeypatch.setattr(gguf_folder, "_read", None)  # would fail
    assert model_folder(str(copy)) == model_folder(str(file)) == folder
    assert model_identity(str(copy)) == model_identity(str(file))


def test_processes_that_ask_together_convert_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF")
    begun: list[str] = []

    class Saved:
        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text("{}")

    def read(file: Path) -> tuple[Saved, Saved]:
        begun.append(file.name)
        threading.Event().wait(0.2)
        return Saved(), Saved()

    monkeypatch.setattr(gguf_folder, "_read", read)
    threads = [threading.Thread(target=model_folder, args=(str(file),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert begun == ["tiny.gguf"]
    assert [one.name for one in cache.iterdir() if one.is_dir() and one.name != "sha256"] == [
        Path(model_folder(str(file))).name
    ]


def test_a_conversion_that_fails_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF")

    class Full:
        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir()
            raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(gguf_folder, "_read", lambda file: (Full(), Full()))
    with pytest.raises(UserError, match=r"No space left on device; the conversion of .* XDG_CACHE_HOME"):
        model_folder(str(file))
    assert not [one for one in cache.iterdir() if one.is_dir() and one.name != "sha256"]


def test_identity_follows_the_content(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF one")
    first = model_identity(str(file))
    os.utime(file, ns=(0, 0))
    assert model_identity(str(file)) == first
    file.write_bytes(b"GGUF two")
    assert model_identity(str(file)) != first


def test_the_content_is_read_once(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    assert content_hash(str(file)) == hashlib.sha256(b"GGUF").hexdigest()[:16]
    (known,) = (cache / "sha256").iterdir()
    known.write_text("0" * 16)
    assert content_hash(str(file)) == "0" * 16


def test_other_paths_and_hub_names_stay(tmp_path: Path) -> None:
    assert model_folder("someone/llm") == "someone/llm"
    assert model_folder(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("absent.gguf", None, "no such file"),
        ("page.gguf", b"<html>", "begins with b'<htm' and not with b'GGUF'"),
        ("x-00001-of-00003.gguf", b"GGUF", "join the parts first"),
        ("cut.gguf", b"GGUF\x03\x00\x00\x00", "cannot be read as a GGUF model"),
    ],
)
def test_what_is_refused(tmp_path: Path, cache: Path, name: str, content: bytes | None, says: str) -> None:
    pytest.importorskip("gguf")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        model_folder(str(tmp_path / name))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_without_the_package_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(gguf_folder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package gguf; install it"):
        model_folder(str(tmp_path / "x.gguf"))
