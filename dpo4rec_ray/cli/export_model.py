"""dpo4rec export-model RUN DEST: a run's policy or reranker as a folder for the Hugging Face Hub, with a model card."""

from __future__ import annotations

import argparse

from dpo4rec_ray.cli import session
from dpo4rec_ray.cli.arguments import Formatter, examples
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.storage.places import place

WHAT, FORMS = ("policy", "reranker"), ("merged", "lora")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="dpo4rec export-model",
        description="Write what others need of a run: the policy as safetensors (merged, or its LoRA alone) or the reranker, and "
        "a model card with the recipe, the data's and the base model's terms as far as they are known, figures with intervals, "
        "and how to load it. The folder holds no user's data. Nothing is uploaded; the last line says how.",
        epilog=examples(
            ("dpo4rec export-model runs/demo out/policy", "the policy of the best round, all weights"),
            ("dpo4rec export-model runs/demo out/lora --form lora", "its LoRA alone"),
            (
                "dpo4rec export-model runs/demo out/reranker --what reranker",
                "the reranker that reads its texts",
            ),
        ),
        formatter_class=Formatter,
    )
    found.add_argument("run", metavar="RUN_FOLDER")
    found.add_argument("dest", metavar="DEST", help="a new folder")
    found.add_argument("--what", choices=WHAT, default="policy")
    found.add_argument(
        "--form", choices=FORMS, default="merged", help="of a policy: all weights, or the LoRA alone"
    )
    found.add_argument(
        "--round",
        type=int,
        default=None,
        metavar="R",
        help="the policy of round R (where a round has several turns: of turn R), or the reranker that reads its texts; "
        "default: the best round",
    )
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return session.guarded(lambda: export(options), verbose=False)


def export(options: argparse.Namespace) -> int:
    """Write the folder. Raises UserError as exchange.model_export does."""
    if options.what == "reranker" and options.form == "lora":
        raise UserError("--form lora is of a policy; a reranker has none")
    session.set_defaults(session.QUIET_ENV)
    from dpo4rec_ray.config import read_config
    from dpo4rec_ray.exchange.model_export import chosen_policy, export_policy, export_reranker
    from dpo4rec_ray.serving.publish import best_policy
    from dpo4rec_ray.storage.places import is_remote, size_of
    from dpo4rec_ray.store.artifacts import RunDir

    target = place(options.dest)
    if is_remote(target):
        raise UserError(f"DEST {options.dest}: name a folder on this machine, from which it can be uploaded")
    store = RunDir(options.run)
    if options.what == "reranker" or options.round is None:
        session.check_came_to("per_list", 0, options.run)
    config = read_config(options.run)
    if options.what == "reranker":
        number = best_policy(store) if options.round is None else options.round
        what = f"reranker {export_reranker(config, store, number, target)}"
    else:
        number = chosen_policy(config, store) if options.round is None else options.round
        export_policy(config, store, number, options.form, target)
        what = f"policy of {config.run.called(number)}, {options.form}"
    print(f"{what}: {target} ({size_of(target) / 1e6:.1f} MB)")
    print("read README.md, above all its part on data and licence; then:")
    print(f"hf upload YOUR_NAME/{target.name} {target}")
    return 0
