"""The benchmark of the stage `prepare`: raw Amazon reviews to candidate lists, against pandas (prepare_pandas.py)."""

from __future__ import annotations

import argparse
from pathlib import Path

import harness
from harness import Row

# Amazon-Books as the paper uses it; and the whole of it, whose size is given as a multiple of that.
PAPER_REVIEWS = 1_410_000
FULL_REVIEWS, FULL_SIZE = 51_311_621, 36
COUNTS = ("users", "items", "events", "lists")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sizes", default="1,4,16,36", help=f"multiples of {PAPER_REVIEWS:,} reviews; 36: all 51 M"
    )
    parser.add_argument("--peer-sizes", default="1,4", help="those that pandas does too")
    parser.add_argument(
        "--reviews", type=int, default=PAPER_REVIEWS, help="of size 1; 100000 shows that everything runs"
    )
    parser.add_argument("--layout", choices=("json.gz", "csv"), default="json.gz")
    parser.add_argument("--repeats", type=int, default=1, help="of every run; the median is shown")
    parser.add_argument("--seed", type=int, default=0)


def run(options: argparse.Namespace, folder: Path) -> int:
    cases = [("paper size", "amazon-books-core", options.reviews, True)]
    for size in (int(size) for size in options.sizes.split(",") if size):
        full = size == FULL_SIZE and options.reviews == PAPER_REVIEWS
        reviews = FULL_REVIEWS if full else size * options.reviews
        cases.append((f"{size}x", "amazon-books", reviews, str(size) in options.peer_sizes.split(",")))
    found: list[Row] = []
    for data, like, reviews, with_peer in cases:
        raw = make_raw(folder, like, reviews, options)
        for program in ("dpo4rec_ray", "pandas") if with_peer else ("dpo4rec_ray",):
            case = {"data": data, "program": program, "reviews": reviews}
            runs = [
                harness.note(case | PROGRAMS[program](raw, folder, options)) for _ in range(options.repeats)
            ]
            found.append(harness.median_run(runs, "seconds"))
    for row in found:
        row["reviews_per_s"] = row["reviews"] / row["seconds"]
        if row["data"].endswith("x"):  # linear growth is 1.00
            sizes = [one for one in found if one["program"] == row["program"] and one["data"].endswith("x")]
            row["growth"] = sizes[0]["reviews_per_s"] / row["reviews_per_s"]
    harness.print_table(
        found,
        "data {data} | program {program} | reviews {reviews:,} | seconds {seconds} | wall {wall_s} | peak MiB {peak_mib:,} | "
        "reviews/s {reviews_per_s:,.0f} | per review, 1x = 1 {growth:.2f} | "
        "users, items, events, lists {users:,}, {items:,}, {events:,}, {lists:,}",
    )
    harness.write_results(folder / "prepare.json", found)
    return check_agreement(found)


def make_raw(folder: Path, like: str, reviews: int, options: argparse.Namespace) -> Path:
    """Synthetic raw files of the published shape, made once."""
    raw = folder / f"{like}-{reviews}-{options.layout}-{options.seed}"
    if not (raw / "done").exists():
        shape = f"--like {like} --reviews {reviews} --layout {options.layout} --seed {options.seed}"
        module = ["-m", "benchmarks.amazon_files", str(raw), "--force", "--processes", "2"]
        harness.run(*module, *shape.split())
        (raw / "done").touch()
    return raw


def run_ours(raw: Path, folder: Path, options: argparse.Namespace) -> Row:
    """The stage alone. "seconds" is without starting Python and Ray, by the stage's own clock."""
    overrides = [f"data.raw_dir={raw}", f"run.root={folder}", "run.name=run", f"run.seed={options.seed}"]
    overrides += ["data.repeated_events=first"]  # as the peer does
    recipe = ["jobs/recipes/amazon_books.toml", *overrides]
    wall_s, peaks, _ = harness.watched(["jobs/run.py", *recipe, "--only", "prepare"])
    manifest = harness.manifest_of(recipe, "lists")
    measured = {"wall_s": round(wall_s, 1), "seconds": manifest.seconds, "peak_mib": round(peaks.tree_mib)}
    return measured | {name: manifest.stats[name] for name in COUNTS}


def run_pandas(raw: Path, folder: Path, options: argparse.Namespace) -> Row:
    cores = ["--user-core", "60", "--item-core", "40"]
    wall_s, peaks, answer = harness.watched(
        ["benchmarks/prepare_pandas.py", str(raw), str(folder / "pandas"), *cores]
    )
    counts = {name: answer[name] for name in ("seconds", *COUNTS)}
    return {"wall_s": round(wall_s, 1), "peak_mib": round(peaks.tree_mib), **counts}


PROGRAMS = {"dpo4rec_ray": run_ours, "pandas": run_pandas}


def check_agreement(found: list[Row]) -> int:
    """Exit code 1 unless both programs made the same numbers of users, items, events and lists."""
    by_data: dict[str, dict[str, list[int]]] = {}
    for row in found:
        by_data.setdefault(row["data"], {})[row["program"]] = [row[name] for name in COUNTS]
    wrong = {data: counts for data, counts in by_data.items() if len({*map(tuple, counts.values())}) > 1}
    for data, counts in wrong.items():
        harness.note({"the programs disagree": data, **counts})
    return 1 if wrong else 0
