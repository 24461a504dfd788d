"""dpo4rec prompts RECIPE --user U: the prompt about a user as the LLM sees it, its tokens, and what was cut."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dpo4rec_ray.cli import session
from dpo4rec_ray.cli.arguments import CHANGES, RECIPE, Formatter, examples
from dpo4rec_ray.errors import UserError
from dpo4rec_ray.storage.places import place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dpo4rec_ray.config import Config
    from dpo4rec_ray.knowledge.catalogue_prompts import ExampleUser
    from dpo4rec_ray.store.artifacts import RunDir


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="dpo4rec prompts",
        description="Show the prompt about a user as the LLM sees it, its tokens, and what was cut. Runs nothing: the "
        "recipe's data must be prepared.",
        epilog=examples(
            ("dpo4rec run demo --only prepare", "first: users and items"),
            ("dpo4rec prompts demo", "the prompt about the first training user"),
            (
                "dpo4rec prompts demo --user 17 prompt.lead_in='This user likes'",
                "about a user, with another key",
            ),
        ),
        formatter_class=Formatter,
    )
    found.add_argument("recipe", **RECIPE)
    found.add_argument("changes", **CHANGES)
    found.add_argument(
        "--user",
        default="",
        metavar="U",
        help="id of the user in the raw data; default: the first training user",
    )
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print one prompt."""
    options = parser().parse_intermixed_args(arguments)
    return session.guarded(lambda: show(options.recipe, options.changes, options.user), verbose=False)


def show(recipe: str, changes: list[str], raw_id: str) -> int:
    """Raises UserError if the data is not prepared, there is no such user, or llm.source asks nobody."""
    from dpo4rec_ray.config import load_config

    config = load_config(recipe, changes)
    session.set_defaults(session.QUIET_ENV)
    from dpo4rec_ray.knowledge.wording import check_prompt
    from dpo4rec_ray.store.artifacts import RunDir
    from dpo4rec_ray.texts.examples import draw_examples

    if config.llm.source not in ("vllm", "openai"):
        raise UserError(
            f'llm.source = {config.llm.source!r} asks nobody; prompts are what "vllm" and "openai" are asked with'
        )
    check_prompt(config.prompt, config.generate)
    store = RunDir(place(config.run.root) / config.run.name)
    if store.manifest("users") is None or store.manifest("items") is None:
        raise UserError(
            f"{store.root}: its users are not there yet; run first: {' '.join(['dpo4rec run', recipe, *changes])} --only prepare"
        )
    user, shown = _user(store, raw_id), draw_examples(config, store)
    print(f"user {user['raw_id']} ({user['split']}), {len(user['history_item_ids'])} events in the history")
    if config.llm.source == "openai":
        _show_messages(config, store, user, shown)
    else:
        _show_tokens(config, store, user, shown)
    return 0


def _user(store: RunDir, raw_id: str) -> dict[str, Any]:
    where = [("raw_id", "==", raw_id)] if raw_id else []
    found = store.read("users", where=where, split=None if raw_id else "train").slice(0, 1).to_pylist()
    if not found:
        wanted = f"user {raw_id!r}" if raw_id else "training user"
        raise UserError(f"{store.path('users')} has no {wanted}; ids are those of the raw data")
    return found[0]


def _show_messages(config: Config, store: RunDir, user: dict[str, Any], shown: list[ExampleUser]) -> None:
    """What an endpoint is sent; its tokenizer is unknown here."""
    from dpo4rec_ray.knowledge.catalogue_prompts import CataloguePrompts
    from dpo4rec_ray.knowledge.prompts import messages
    from dpo4rec_ray.texts.text_source import catalogue

    prompts = CataloguePrompts.of_recipe(config, catalogue(store), shown)
    question = prompts.user(user["profile"], user["history_item_ids"], user["history_ratings"])
    for turn in messages(prompts.asked(question, user["user_id"])):
        print(f"----- {turn['role']}\n{turn['content']}")
    print(
        "-----\nThe endpoint has the tokenizer; a prompt that it finds too long is sent again with half of the events."
    )


def _show_tokens(config: Config, store: RunDir, user: dict[str, Any], shown: list[ExampleUser]) -> None:
    from dpo4rec_ray.knowledge.catalogue_prompts import TokenizedPrompts, max_prompt_tokens
    from dpo4rec_ray.knowledge.prompts import MAX_CHARS, style_remarks
    from dpo4rec_ray.policy.model import load_tokenizer
    from dpo4rec_ray.store.policies import base_llm_path
    from dpo4rec_ray.texts.text_source import catalogue

    if config.llm.path == "bootstrap" and store.manifest("base_llm") is None:
        raise UserError(
            f'{store.path("base_llm")}: llm.path = "bootstrap" trains the LLM first; run the recipe with --only bootstrap'
        )
    items, tokenizer = catalogue(store), load_tokenizer(base_llm_path(config, store))
    prompts = TokenizedPrompts.of_recipe(config, tokenizer, items, shown)
    item_ids, ratings = user["history_item_ids"], user["history_ratings"]
    token_ids, left_out = prompts.user(user["profile"], item_ids, ratings, user["user_id"])
    question = prompts.catalogue.user(user["profile"], item_ids, ratings, left_out)
    prompt, style = prompts.catalogue.asked(question, user["user_id"]), prompts.catalogue.wording.style
    text = tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    print(f"----- prompt, style {style!r}\n{text}\n-----")
    long = sum(len(items["title"][item].as_py()) > MAX_CHARS for item in item_ids[left_out:])
    room = max_prompt_tokens(config.llm, config.generate)
    print(f"{len(token_ids)} tokens, room for {room} (llm.max_model_len - generate.max_new_tokens)")
    if len(token_ids) > room:
        print("too long even without events: this user gets no text; raise llm.max_model_len")
    print(
        f"cut: {left_out} of {len(item_ids)} events left out, {long} titles shortened to {MAX_CHARS} characters"
    )
    print(f"BOS: {_token(tokenizer, tokenizer.bos_token_id)} {_places(token_ids, tokenizer.bos_token_id)}")
    print(f"EOS: {_token(tokenizer, tokenizer.eos_token_id)} {_places(token_ids, tokenizer.eos_token_id)}")
    if prompt.lead_in:
        length = len(tokenizer(f" {prompt.lead_in}", add_special_tokens=False)["input_ids"])
        last = " ".join(_token(tokenizer, one) for one in token_ids[-length:])
        print(
            f"lead-in {prompt.lead_in!r}: about the last {length} tokens: {last}; the text goes on behind it"
        )
    for remark in style_remarks(config.prompt, tokenizer):
        print(f"this LLM: {remark}")


def _token(tokenizer: PreTrainedTokenizerBase, token_id: int | None) -> str:
    return "none" if token_id is None else f"{tokenizer.decode([token_id])!r} ({token_id})"


def _places(token_ids: list[int], token_id: int | None) -> str:
    places = [str(place) for place, one in enumerate(token_ids) if one == token_id]
    return f"at {', '.join(places)}" if places else "not in the prompt"
