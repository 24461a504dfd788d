"""What users get wrong: one clear line, exit code 2, and nothing half-written that counts as complete."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo4rec_ray.storage.lease import lease
from tests.conftest import DEMO, ROOT, TINY, Finished, run_job

ML = "jobs/recipes/ml1m_small.toml"
BUNDLED = ROOT / "dpo4rec_ray" / "policy" / "bundled"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A tiny MovieLens-1M folder: 30 users, 40 movies."""
    folder = tmp_path / "ml-1m"
    folder.mkdir()
    movies = [
        f"{i}::Movie number {i} ({1960 + i})::{'Drama' if i % 2 else 'Comedy|Action'}" for i in range(1, 41)
    ]
    users = [f"{u}::{'M' if u % 2 else 'F'}::25::4::12345" for u in range(1, 31)]
    ratings = [
        f"{u}::{(u * 7 + i * 3) % 40 + 1}::{(u + i) % 5 + 1}::{978300000 + 60 * i}"
        for u in range(1, 31)
        for i in range(20)
    ]
    (folder / "movies.dat").write_text("\n".join(movies) + "\n", encoding="latin-1")
    (folder / "users.dat").write_text("\n".join(users) + "\n")
    (folder / "ratings.dat").write_text("\n".join(ratings) + "\n")
    return folder


def one_line(done: Finished, *words: str) -> None:
    """Exit code 2, one line on standard error that names everything in `words`, no complete artifact."""
    assert done.code == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0], lines[0]
    assert not list(done.folder.rglob("manifest.json"))
    assert not (done.folder / "summary.json").exists()


def movielens(tmp_path: Path, raw: Path, *more: str) -> Finished:
    return run_job(tmp_path, ML, f"data.raw_dir={raw}", *more, timeout=200)


@pytest.mark.ray
def test_missing_ratings(tmp_path: Path, raw: Path) -> None:
    (raw / "ratings.dat").unlink()
    one_line(movielens(tmp_path, raw), "ratings.dat")


@pytest.mark.ray
def test_truncated_ratings(tmp_path: Path, raw: Path) -> None:
    text = (raw / "ratings.dat").read_text()
    (raw / "ratings.dat").write_text(text[:-9])
    one_line(movielens(tmp_path, raw), "ratings.dat", "truncated")


@pytest.mark.ray
def test_wrong_field_count(tmp_path: Path, raw: Path) -> None:
    lines = (raw / "ratings.dat").read_text().splitlines()
    lines[16:27] = ["1::5::3"] * 11  # ten bad rows stop no run
    (raw / "ratings.dat").write_text("\n".join(lines) + "\n")
    one_line(movielens(tmp_path, raw), "ratings.dat", "17", "1::5::3")


@pytest.mark.ray
def test_movie_without_title(tmp_path: Path, raw: Path) -> None:
    lines = (raw / "ratings.dat").read_text().splitlines()
    lines[3:14] = [f"1::999::3::{978300000 + second}" for second in range(11)]  # ten stop no run
    (raw / "ratings.dat").write_text("\n".join(lines) + "\n")
    one_line(movielens(tmp_path, raw), "999")


def test_missing_folder(tmp_path: Path) -> None:
    one_line(movielens(tmp_path, tmp_path / "nowhere"), "data.raw_dir", "nowhere")


def test_unknown_key(tmp_path: Path) -> None:
    one_line(run_job(tmp_path, DEMO, "generate.num_sampels=3"), "generate.num_sampels", "'num_samples'")


def test_zero_samples(tmp_path: Path) -> None:
    one_line(run_job(tmp_path, DEMO, "generate.num_samples=0"), "generate.num_samples", "0")


def test_llm_without_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "llm"
    shutil.copytree(BUNDLED, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    one_line(run_job(tmp_path, DEMO, f"llm.path={folder}"), "llm.path", "tokenizer")


def test_llm_folder_with_pickled_weights_only(tmp_path: Path) -> None:
    folder = tmp_path / "llm"
    shutil.copytree(BUNDLED, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    one_line(run_job(tmp_path, DEMO, f"llm.path={folder}"), "safetensors")


def test_bundled_llm_on_another_catalogue(tmp_path: Path, raw: Path) -> None:
    one_line(movielens(tmp_path, raw, "llm.path=bundled"), "bundled", "bootstrap")


@pytest.mark.ray
def test_too_many_engines_for_the_machine(tmp_path: Path) -> None:
    done = run_job(tmp_path, DEMO, *TINY, "generate.num_engines=99", "generate.cpus_per_engine=1")
    assert done.code == 2
    assert "99 engines (" in done.stderr
    assert not (done.folder / "rounds/00/knowledge/manifest.json").exists()


@pytest.mark.ray
@pytest.mark.parametrize(
    "size",
    ["16k", "600k", pytest.param("1200k", marks=pytest.mark.slow)],
    ids=["prepare", "encode", "saving a model"],
)
def test_full_disk(tmp_path: Path, size: str) -> None:
    """A real small tmpfs, in a mount namespace of its own: full in the driver, in an actor, in a Ray Train worker."""
    tiny = " ".join(TINY)
    inner = (
        f"mount -t tmpfs -o size={size} none {tmp_path} && exec {sys.executable} jobs/run.py {DEMO} {tiny}"
    )
    probe = subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True
    )
    if probe.returncode:
        pytest.skip("mount namespaces are not allowed here")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{inner} run.root={tmp_path} run.name=run"],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(lines) == 1 and "no space left" in lines[0], done.stderr
    stage = {"16k": "prepare(0)", "600k": "encode(0)", "1200k": "train_reward(0)"}[size]
    assert f"{stage}: started" in done.stdout and f"{stage}: kept" not in done.stdout


def test_help_names_every_option() -> None:
    done = subprocess.run([sys.executable, "jobs/run.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for word in ("--only", "--from", "--round", "--verbose", "section.key=value"):
        assert word in done.stdout


def test_two_jobs_in_one_folder(tmp_path: Path) -> None:
    with lease(tmp_path / "run", lost=lambda: None):
        one_line(run_job(tmp_path, DEMO), f"another job (process {os.getpid()} on ", "is at work")


def test_a_model_too_short_for_the_prompts(tmp_path: Path) -> None:
    one_line(run_job(tmp_path, DEMO, "llm.max_model_len=4096"), "llm.max_model_len", "1024")


def test_a_bootstrap_that_cannot_be_built(tmp_path: Path, raw: Path) -> None:
    one_line(movielens(tmp_path, raw, "bootstrap.hidden_size=100"), "100")


def test_weights_that_are_cut_off(tmp_path: Path) -> None:
    """As a download leaves them that broke off."""
    folder = tmp_path / "llm"
    shutil.copytree(BUNDLED, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    one_line(run_job(tmp_path, DEMO, f"llm.path={folder}"), "llm.path", str(file), "damaged")


@pytest.mark.ray
def test_an_engine_without_enough_memory(tmp_path: Path) -> None:
    done = run_job(tmp_path, DEMO, *TINY, "generate.kv_cache_gib=900000")
    assert done.code == 2, done.stderr
    assert (
        done.stderr.count("\n") == 1
        and "900000.0 GiB" in done.stderr
        and "generate.kv_cache_gib" in done.stderr
    )
    assert "prepare(0)" in done.stdout and not (done.folder / "rounds/00/knowledge/manifest.json").exists()


def joining(tmp_path: Path, address: str, **env: str) -> Finished:
    """A job that joins a cluster, with a home folder of its own: Ray leaves tokens there."""
    own = {"HOME": str(tmp_path), "RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}
    return run_job(tmp_path, DEMO, *TINY, timeout=200, **{**own, **env})


def test_a_cluster_that_is_gone(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"  # bound, and nobody listens
        one_line(joining(tmp_path, address), "RAY_ADDRESS", address, "unset RAY_ADDRESS")


TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(24)}


@pytest.fixture(scope="module")
def bare_cluster() -> Iterator[str]:
    """The address of a cluster that wants TOKEN and whose only node has no dpo4rec_ray: its folder is empty there."""
    folder = Path(tempfile.mkdtemp(prefix="bare"))  # a short name: sockets lie below it
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    inner = (
        f"mount -t tmpfs none {ROOT / 'dpo4rec_ray'} && cd / && exec {Path(sys.executable).parent / 'ray'} start --head "
        f"--node-ip-address=127.0.0.1 --port={port} --num-cpus=2 --include-dashboard=false --object-store-memory=100000000 "
        "--block"
    )
    own = ["unshare", "-rmpf", "--kill-child", "--mount-proc"]
    if subprocess.run([*own, "mount", "-t", "tmpfs", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("namespaces are not allowed here")
    env = {
        **os.environ,
        **TOKEN,
        "HOME": str(folder),
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with open(folder / "head.log", "wb") as log:
        head = subprocess.Popen([*own, "sh", "-c", inner], env=env, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in (folder / "head.log").read_text():
            assert head.poll() is None and time.monotonic() < deadline, (folder / "head.log").read_text()
            time.sleep(0.5)
        yield f"127.0.0.1:{port}"
    finally:
        head.kill()
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
def test_a_cluster_that_wants_a_token(tmp_path: Path, bare_cluster: str) -> None:
    one_line(joining(tmp_path, bare_cluster), "token", "RAY_AUTH_TOKEN")


@pytest.mark.ray
def test_a_node_without_the_package(tmp_path: Path, bare_cluster: str) -> None:
    one_line(joining(tmp_path, bare_cluster, **TOKEN), "node", "dpo4rec_ray", "on every node")
