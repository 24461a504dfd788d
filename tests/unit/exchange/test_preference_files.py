"""Rows of other trainers' preference sets, and texts to token ids and back, over the tokenizers of all families."""

from __future__ import annotations

import copy
import functools
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from dpo4rec_ray.errors import UserError
from dpo4rec_ray.exchange.chat_codec import ChatCodec
from dpo4rec_ray.exchange.preference_files import FORMATS, read_row, read_rows, write_rows
from dpo4rec_ray.exchange.preference_rows import (
    CONTROL,
    EMPTY,
    EQUAL,
    NO_PROMPT,
    NOT_ONE_TURN,
    NOT_TEXT,
    NOT_UNICODE,
    OWN,
    RANKS,
    REFUSED,
    ROLE,
    SEVERAL,
    UNKNOWN_LAYOUT,
    BadRow,
    Preference,
)
from dpo4rec_ray.knowledge.prompts import TEMPLATE_SWITCHES, control_tokens, encode_chat
from dpo4rec_ray.policy.model import load_tokenizer
from tests.unit.knowledge.conftest import BUNDLED, FAMILIES

QUESTION, GOOD, WORSE = "What color is the sky?", "It is blue.", "It is green."
USER = {"role": "user", "content": QUESTION}
WITH_SYSTEM = [{"role": "system", "content": "Be brief."}, USER]
HISTORY = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, USER]
NAMES = [*FAMILIES, "bundled", "no template"]


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def said(name: str, text: str) -> dict[str, str]:
    return {"from": name, "value": text}


@functools.cache
def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    if name == "bundled":
        return load_tokenizer(str(BUNDLED))
    tokenizer = FAMILIES["llama" if name == "no template" else name].tokenizer()
    if name == "no template":
        tokenizer.chat_template = None
    return tokenizer


@functools.cache
def codec_of(name: str) -> ChatCodec:
    return ChatCodec(tokenizer_of(name))


LAYOUTS: dict[str, tuple[str, dict[str, Any], list[dict[str, str]]]] = {
    "plain": ("trl", {"prompt": QUESTION, "chosen": GOOD, "rejected": WORSE}, [USER]),
    "messages": (
        "trl",
        {"prompt": [USER], "chosen": [answer(GOOD)], "rejected": [answer(WORSE)]},
        [USER],
    ),
    "prompt inside": ("trl", {"chosen": [USER, answer(GOOD)], "rejected": [USER, answer(WORSE)]}, [USER]),
    "prompt inside, several turns": (
        "trl",
        {"chosen": [*HISTORY, answer(GOOD)], "rejected": [*HISTORY, answer(WORSE)]},
        HISTORY,
    ),
    "prompt twice, once as text": (
        "trl",
        {"prompt": QUESTION, "chosen": [USER, answer(GOOD)], "rejected": [USER, answer(WORSE)]},
        [USER],
    ),
    "prompt as text, system inside": (
        "trl",
        {
            "prompt": QUESTION,
            "chosen": [*WITH_SYSTEM, answer(GOOD)],
            "rejected": [*WITH_SYSTEM, answer(WORSE)],
        },
        WITH_SYSTEM,
    ),
    "prompt twice as messages": (
        "trl",
        {"prompt": HISTORY, "chosen": [*HISTORY, answer(GOOD)], "rejected": [*HISTORY, answer(WORSE)]},
        HISTORY,
    ),
    "prompt as text, answers as messages": (
        "trl",
        {"prompt": QUESTION, "chosen": [answer(GOOD)], "rejected": [answer(WORSE)]},
        [USER],
    ),
    "other keys of messages": (
        "trl",
        {"prompt": [{**USER, "name": None}], "chosen": answer(GOOD), "rejected": answer(WORSE), "score": 3},
        [USER],
    ),
    "ranks": (
        "nemo",
        {
            "context": HISTORY,
            "completions": [
                {"rank": 1, "completion": [answer(WORSE)]},
                {"rank": 0, "completion": [answer(GOOD)]},
            ],
        },
        HISTORY,
    ),
    "binary": ("nemo", {"prompt": [USER], "chosen": GOOD, "rejected": WORSE}, [USER]),
    "aligner": ("nemo", {"prompt": QUESTION, "chosen_response": GOOD, "rejected_response": WORSE}, [USER]),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": [said("human", "Hi"), said("gpt", "Hello"), said("human", QUESTION)],
            "chosen": said("gpt", GOOD),
            "rejected": said("gpt", WORSE),
        },
        HISTORY,
    ),
    "sharegpt with a system text": (
        "sharegpt",
        {
            "conversations": [said("human", QUESTION)],
            "chosen": said("gpt", GOOD),
            "rejected": said("gpt", WORSE),
            "system": "Be brief.",
        },
        WITH_SYSTEM,
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str) -> None:
    form, row, prompt = LAYOUTS[name]
    for asked in {form, "trl" if name == "binary" else "auto"}:
        found = read_row(row, asked)
        assert (found.prompt, found.chosen, found.rejected) == (prompt, GOOD, [WORSE])


def test_a_prompt_inside_plain_texts() -> None:
    """The space before the first word that differs belongs to the answers (compared with TRL in the integration test)."""
    for chosen, rejected, prompt in [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is bl"),
        ("a  b", "a  c", "a "),
    ]:
        found = read_row({"chosen": chosen, "rejected": rejected}, "trl")
        assert found.prompt == [{"role": "user", "content": prompt}]
        assert [prompt + found.chosen, prompt + found.rejected[0]] == [chosen, rejected]


def test_more_than_two_ranks_are_one_pair() -> None:
    completions = [{"rank": rank, "completion": [answer(f"text {rank}")]} for rank in (3, 0, 7)]
    found = read_row({"context": [USER], "completions": completions}, "auto")
    assert (found.chosen, found.rejected) == ("text 0", ["text 3", "text 7"])
    assert math.isnan(found.chosen_reward)


PLAIN = LAYOUTS["plain"][1]
RANKED = LAYOUTS["ranks"][1]
SHAREGPT = LAYOUTS["sharegpt"][1]
BAD: list[tuple[dict[str, Any], str]] = [
    ({}, UNKNOWN_LAYOUT),
    ({"text": "a"}, UNKNOWN_LAYOUT),
    ({**PLAIN, "chosen": None}, "no field 'chosen'"),
    ({"chosen": GOOD}, "no field 'rejected'"),
    ({"chosen_response": GOOD, "prompt": QUESTION}, "no field 'rejected'"),
    ({"chosen": [answer(GOOD)], "rejected": [answer(WORSE)]}, "no field 'prompt'"),
    ({"completions": RANKED["completions"]}, "no field 'context'"),
    ({**SHAREGPT, "chosen": None}, "no field 'chosen'"),
    ({**PLAIN, "prompt": " \n"}, EMPTY),
    ({**PLAIN, "rejected": "\t"}, EMPTY),
    ({**PLAIN, "chosen": []}, EMPTY),
    ({"chosen": "The sky is", "rejected": "The sky is blue."}, EMPTY),
    ({"chosen": [USER], "rejected": [USER, answer(GOOD)]}, EMPTY),
    ({**PLAIN, "chosen": 3}, NOT_TEXT),
    ({**PLAIN, "prompt": 3}, NOT_TEXT),
    ({**PLAIN, "prompt": [QUESTION]}, NOT_TEXT),
    ({**PLAIN, "prompt": [{"role": "user", "content": [{"type": "image"}]}]}, NOT_TEXT),
    ({"context": [USER], "completions": "x"}, NOT_TEXT),
    ({**PLAIN, "chosen": "half \ud83d"}, NOT_UNICODE),
    ({**PLAIN, "rejected": GOOD}, EQUAL),
    ({"chosen": GOOD, "rejected": GOOD}, EQUAL),
    ({"chosen": [USER, answer(GOOD)], "rejected": [USER, answer(GOOD)]}, EQUAL),
    ({"prompt": [USER], "chosen": [answer(GOOD)], "rejected": [answer(GOOD)]}, EQUAL),
    ({"prompt": [USER], "chosen": [answer(GOOD)], "rejected": GOOD}, EQUAL),
    ({**SHAREGPT, "rejected": said("gpt", GOOD)}, EQUAL),
    ({"prompt": HISTORY[:2], "chosen": [answer(GOOD)], "rejected": [answer(WORSE)]}, NO_PROMPT),
    ({"chosen": "blue", "rejected": "green"}, EMPTY),
    ({**SHAREGPT, "conversations": []}, NO_PROMPT),
    ({**PLAIN, "prompt": [{"role": "tool", "content": "x"}]}, ROLE),
    ({**PLAIN, "prompt": [{"role": 3, "content": "x"}]}, ROLE),
    ({**PLAIN, "prompt": [USER], "chosen": [USER]}, ROLE),
    ({"prompt": [USER], "chosen": [answer("a"), USER], "rejected": [answer("b")]}, SEVERAL),
    ({**RANKED, "completions": RANKED["completions"][:1]}, RANKS),
    ({**RANKED, "completions": [{**one, "rank": 0} for one in RANKED["completions"]]}, RANKS),
    ({**RANKED, "completions": [{**one, "rank": "first"} for one in RANKED["completions"]]}, RANKS),
    ({**RANKED, "completions": [{**one, "rank": 10**400} for one in RANKED["completions"]]}, RANKS),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_rows_without_a_pair(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        codec_of("bundled").encode(read_row(row, "auto"))
    assert str(caught.value) == reason


STRINGS = [
    "",
    " ",
    "a",
    "a b",
    "user",
    "human",
    "gpt",
    "assistant",
    "\ud83d",
    "\x00",
    "<|end|>",
    "é\u0301",
    "valid",
]
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(STRINGS),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(("role", "content", "rank")), inner)
    ),
    max_leaves=6,
)
KEYS = sorted({key for _, row, _ in LAYOUTS.values() for key in row} | set(OWN))


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), anything), st.sampled_from(["auto", *FORMATS]))
def test_no_row_is_a_surprise(row: dict[str, Any], form: str) -> None:
    """Whatever JSON holds is a pair or a bad row."""
    try:
        found = read_row(row, form)
        codec_of("bundled").encode(found)
    except BadRow:
        pass


TEXTS = ["Toy Story (1995), 4 stars", "two\nlines\n\nand more", "café über 東京 🎬", "x"]


@pytest.mark.parametrize("name", NAMES)
def test_texts_come_back(name: str) -> None:
    codec, tokenizer = codec_of(name), tokenizer_of(name)
    for text in TEXTS:
        prompt = codec.encode_prompt([{"role": "user", "content": text}])
        assert prompt == encode_chat(tokenizer, text)
        assert codec.user_text(prompt) == text
        if tokenizer.bos_token_id is not None:
            assert prompt.count(tokenizer.bos_token_id) == 1
        (token_ids,) = codec.encode_answers([text])
        assert codec.answer_text(token_ids) == text
        assert codec.answer_text(token_ids[:-1]) == text  # cut at max_new_tokens


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_the_chat_template(name: str) -> None:
    """Prompt and answer are the whole conversation as the template writes it, up to the token that ends the turn."""
    codec, tokenizer = codec_of(name), tokenizer_of(name)
    if not codec.has_template:
        assert codec.encode_answers([GOOD])[0][-1] == tokenizer.eos_token_id
        return
    for turns in ([USER], HISTORY):
        found = codec.encode(Preference(turns, GOOD, [WORSE]))
        assert found.tokenized
        for text, token_ids in ((GOOD, found.chosen), (WORSE, found.rejected[0])):
            whole = tokenizer.apply_chat_template([*turns, answer(text)], tokenize=False, **TEMPLATE_SWITCHES)
            if (
                name == "qwen3"
            ):  # its empty thoughts stand before an answer to be generated, not in the conversation
                start = whole.rindex(text)
                whole = whole[:start] + "<think>\n\n</think>\n\n" + whole[start:]
            expected = tokenizer(whole, add_special_tokens=False)["input_ids"]
            if tokenizer.bos_token_id is not None and expected[0] != tokenizer.bos_token_id:
                expected = [tokenizer.bos_token_id, *expected]
            ours = [*found.prompt, *token_ids]
            assert ours == expected[: len(ours)]
            assert tokenizer.decode(expected[len(ours) :]).strip() == ""
    end = tokenizer.convert_ids_to_tokens(found.chosen[-1])
    assert end == (tokenizer.eos_token if name == "bundled" else FAMILIES[name].end_of_turn)


@pytest.mark.parametrize("name", [*FAMILIES, "bundled"])
def test_control_tokens_in_texts_stay_text(name: str) -> None:
    codec, tokenizer = codec_of(name), tokenizer_of(name)
    marks = control_tokens(tokenizer)
    control = set(tokenizer.convert_tokens_to_ids(marks))
    plain = codec.encode(Preference(HISTORY, GOOD, [WORSE]))
    for mark in [*marks, "".join(marks), marks[0][:2] + marks[0] + marks[0][2:]]:
        history = [{**turn, "content": f"a{mark}b"} for turn in HISTORY]
        found = codec.encode(Preference(history, f"c {mark}", [f"{mark} d"]))
        assert [i for i in found.prompt if i in control] == [i for i in plain.prompt if i in control]
        for token_ids in (found.chosen, *found.rejected):
            assert control & set(token_ids[:-1]) == set()
            assert token_ids[-1] == plain.chosen[-1]
        assert "b" in tokenizer.decode(found.prompt)


def test_a_control_token_that_cannot_be_broken_up() -> None:
    tokenizer = copy.deepcopy(tokenizer_of("llama"))
    tokenizer.add_tokens(["|"], special_tokens=True)
    codec = ChatCodec(tokenizer)
    codec.encode(Preference([USER], GOOD, [WORSE]))
    for prompt, chosen in ((f"{QUESTION}|", GOOD), (QUESTION, f"{GOOD}|")):
        with pytest.raises(BadRow, match=CONTROL):
            codec.encode(Preference([{"role": "user", "content": prompt}], chosen, [WORSE]))


def test_conversations_that_a_template_refuses() -> None:
    for name in ("mistral", "gemma", "no template"):  # none takes a system text
        with pytest.raises(BadRow, match=REFUSED):
            codec_of(name).encode(Preference(WITH_SYSTEM, GOOD, [WORSE]))


def test_texts_that_become_the_same_tokens() -> None:
    with pytest.raises(BadRow, match=EQUAL):  # Llama's template trims
        codec_of("llama").encode(Preference([USER], GOOD, [f" {GOOD} "]))


def test_a_tokenizer_without_an_end() -> None:
    tokenizer = copy.deepcopy(tokenizer_of("no template"))
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="how an answer ends"):
        ChatCodec(tokenizer)


def pair_of(name: str, *rejected: list[int], chosen: list[int] | None = None) -> dict[str, Any]:
    """A row of the artifact `pairs`."""
    codec = codec_of(name)
    return {
        "round": 2,
        "user_id": 7,
        "pair_id": 3,
        "split": "valid",
        "kind": "other",
        "rejected_user_id": 9,
        "prompt_token_ids": codec.encode_prompt([USER]),
        "chosen_token_ids": chosen or codec.encode_answers([GOOD])[0],
        "rejected_token_ids": list(rejected) or codec.encode_answers([WORSE]),
        "chosen_reward": 0.5,
        "rejected_reward": [-0.25 * (place + 1) for place in range(len(rejected) or 1)],
    }


def spelled(name: str, text: str) -> list[int]:
    """Token ids of a text letter by letter, as a tokenizer would not spell it, without an end."""
    tokenizer = tokenizer_of(name)
    pieces = [tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in text]
    return [token for piece in pieces for token in piece]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_an_export_comes_back_exactly(name: str, form: str) -> None:
    """Two rejected texts, one as its tokenizer spells it, one not and without an end: two lines."""
    codec = codec_of(name)
    odd, even = spelled(name, WORSE), codec.encode_answers([WORSE + " No."])[0]
    pair = pair_of(name, odd, even)
    lines = list(write_rows(pair, codec, form))
    assert [same for _, same in lines] == [False, True]
    for place, (line, _) in enumerate(lines):
        row = json.loads(json.dumps(line, allow_nan=False))
        for asked in (form, "auto"):
            found = read_row(row, asked)
            ids = codec.encode(found)
            assert found.prompt == [USER]
            assert found.chosen == GOOD
            assert not ids.tokenized
            assert ids.prompt == pair["prompt_token_ids"]
            assert ids.chosen == pair["chosen_token_ids"]
            assert ids.rejected == [pair["rejected_token_ids"][place]]
            assert (found.chosen_reward, found.rejected_reward) == (0.5, [pair["rejected_reward"][place]])
            assert found.stored is not None
            assert (found.stored.user_id, found.stored.split) == (7, "valid")


@pytest.mark.parametrize("name", [*FAMILIES, "bundled"])
@settings(deadline=None)
@given(st.data())
def test_any_sampled_tokens_come_back(name: str, data: st.DataObject) -> None:
    codec, tokenizer = codec_of(name), tokenizer_of(name)
    tokens = st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=8)
    chosen, rejected = data.draw(tokens), data.draw(tokens)
    (line, _), *_ = write_rows(pair_of(name, rejected, chosen=chosen), codec, "trl")
    found = read_row(json.loads(json.dumps(line)), "trl")
    if chosen == rejected:
        with pytest.raises(BadRow, match=EQUAL):
            codec.encode(found)
        return
    ids = codec.encode(found)
    assert (ids.chosen, ids.rejected, ids.tokenized) == (chosen, [rejected], False)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_answers_that_differ_by_their_tokens_alone_come_back(name: str, form: str) -> None:
    """One that was cut before its end, one that ends at once: pairs of a run, though their texts are none."""
    codec = codec_of(name)
    (whole,) = codec.encode_answers([GOOD])
    for rejected in (whole[:-1], whole[-1:]):
        ((line, _),) = write_rows(pair_of(name, rejected, chosen=whole), codec, form)
        ids = codec.encode(read_row(json.loads(json.dumps(line)), "auto"))
        assert (ids.chosen, ids.rejected, ids.tokenized) == (whole, [rejected], False)


def test_layouts_as_their_trainers_want_them() -> None:
    pair = pair_of("bundled")
    (trl, _), (nemo, _), (sharegpt, _) = (
        next(write_rows(pair, codec_of("bundled"), form)) for form in ("trl", "nemo", "sharegpt")
    )
    own = {name: pair[name] for name in OWN}
    own |= {"rejected_token_ids": pair["rejected_token_ids"][0], "rejected_reward": -0.25}
    assert trl == {
        "prompt": [USER],
        "chosen": [answer(GOOD)],
        "rejected": [answer(WORSE)],
        "chat_template_kwargs": TEMPLATE_SWITCHES,
        **own,
    }
    assert nemo == {
        "context": [USER],
        "completions": [
            {"rank": 0, "completion": [answer(GOOD)]},
            {"rank": 1, "completion": [answer(WORSE)]},
        ],
        **own,
    }
    assert sharegpt == {
        "conversations": [said("human", QUESTION)],
        "chosen": said("gpt", GOOD),
        "rejected": said("gpt", WORSE),
        **own,
    }


def test_without_a_chat_template_texts_are_plain() -> None:
    ((line, same),) = write_rows(pair_of("no template"), codec_of("no template"), "trl")
    assert same
    assert [line["prompt"], line["chosen"], line["rejected"]] == [
        QUESTION,
        GOOD,
        WORSE,
    ]
    assert "chat_template_kwargs" not in line


def test_a_reward_that_is_no_number() -> None:
    pair = {**pair_of("bundled"), "chosen_reward": math.nan, "rejected_reward": [None]}
    for form in FORMATS:
        ((line, _),) = write_rows(pair, codec_of("bundled"), form)
        found = read_row(json.loads(json.dumps(line, allow_nan=False)), form)
        assert math.isnan(found.chosen_reward)
        assert math.isnan(found.rejected_reward[0])
        assert math.isnan(read_row({**line, "chosen_reward": 10**400}, form).chosen_reward)


def test_a_prompt_that_is_spelled_otherwise_is_counted() -> None:
    """Its texts are those of a prompt that its tokenizer spells itself, its ids are kept."""
    codec = codec_of("bundled")
    pair = pair_of("bundled")
    head, tail = pair["prompt_token_ids"][:2], pair["prompt_token_ids"][-1:]
    (usual,) = write_rows(pair, codec, "nemo")
    text = "Likes mystery"
    pair["prompt_token_ids"] = [*head, *spelled("bundled", text), *tail]
    ((line, same),) = write_rows(pair, codec, "nemo")
    assert (usual[1], same) == (True, False)
    assert line["context"][0]["content"] == text
    found = codec.encode(read_row(line, "nemo"))
    assert (found.prompt, found.tokenized) == (pair["prompt_token_ids"], False)


def test_prompts_of_several_turns_are_not_written() -> None:
    pair = {**pair_of("qwen2.5"), "prompt_token_ids": codec_of("qwen2.5").encode_prompt(HISTORY)}
    with pytest.raises(BadRow, match=NOT_ONE_TURN):
        list(write_rows(pair, codec_of("qwen2.5"), "trl"))


def line_of(name: str) -> dict[str, Any]:
    """An exported line whose ids are not those its texts would be tokenised to."""
    ((line, same),) = write_rows(pair_of(name, spelled(name, WORSE)), codec_of(name), "trl")
    assert not same
    return line


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_edited_texts_win_over_the_stored_ids(field: str) -> None:
    line = line_of("bundled")
    codec = codec_of("bundled")
    assert not codec.encode(read_row(line, "trl")).tokenized
    line[field] = [{**line[field][0], "content": "Something else"}]
    found = codec.encode(read_row(line, "trl"))
    assert found.tokenized
    assert codec.answer_text(found.rejected[0]) == (WORSE if field != "rejected" else "Something else")


def test_ids_of_another_llm_are_not_used() -> None:
    found = codec_of("gemma").encode(read_row(line_of("bundled"), "trl"))
    assert found.tokenized
    assert found.prompt == encode_chat(tokenizer_of("gemma"), QUESTION)


@pytest.mark.parametrize(
    "odd", [None, [], [True], ["1"], [1.0], [-1], [2**31], [10**6], [[1]], "12", 3, {"a": 1}]
)
@pytest.mark.parametrize("field", ["prompt_token_ids", "chosen_token_ids", "rejected_token_ids"])
def test_ids_that_are_none(field: str, odd: Any) -> None:
    assert codec_of("bundled").encode(read_row({**line_of("bundled"), field: odd}, "trl")).tokenized


def test_ids_beyond_the_vocabulary_are_not_used() -> None:
    """They decode to nothing, so that the texts alone would not tell."""
    codec, line = codec_of("bundled"), line_of("bundled")
    line["chosen_token_ids"].insert(1, 10**6)
    assert codec.answer_text(line["chosen_token_ids"]) == GOOD
    assert codec.encode(read_row(line, "trl")).tokenized


def test_control_tokens_inside_a_stored_prompt_are_not_used() -> None:
    """Ids and text agree, but the ids open a turn that the text must not open."""
    codec = codec_of("bundled")
    end = tokenizer_of("bundled").eos_token_id
    line = line_of("bundled")
    head, tail = line["prompt_token_ids"][:3], line["prompt_token_ids"][3:]
    line["prompt_token_ids"] = [*head, end, *tail]
    inside = (
        tokenizer_of("bundled").decode([*head, end, *tail]).split("<|user|>")[1].split("<|assistant|>")[0]
    )
    line["prompt"] = [{"role": "user", "content": inside}]
    found = codec.encode(read_row(line, "trl"))
    assert found.tokenized
    assert end not in found.prompt


def test_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    deep = b"[" * 100_000
    good = b'{"a": 1}'
    file.write_bytes(
        b"\xef\xbb\xbf"
        + good
        + b"\r\n\n  \n[1]\n"
        + good[:-1]
        + b"\n\xff\n"
        + deep
        + b"\n"
        + b"1" * 5000
        + b"\n"
        + good
    )
    found = list(read_rows(file))
    assert [(where, row) for where, row, _ in found] == [
        (f"{file}:1", {"a": 1}),
        *((f"{file}:{number}", None) for number in range(4, 9)),
        (f"{file}:9", {"a": 1}),
    ]
    assert found[2][2].strip() == good[:-1]


def test_parquet(tmp_path: Path) -> None:
    """Row groups of any size, messages as structs, a string that is not UTF-8."""
    rows = [
        {"prompt": [USER], "chosen": [answer(f"text {i}")], "rejected": [answer(WORSE)]} for i in range(600)
    ]
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=77)
    found = list(read_rows(file))
    assert [where for where, _, _ in found] == [f"{file}:{i}" for i in range(1, 601)]
    assert [row for _, row, _ in found] == rows
    bad = pa.array([b"fine", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"chosen": bad, "rejected": ["x", "y"]}), file)
    assert [row for _, row, _ in read_rows(file)] == [{"chosen": "fine", "rejected": "x"}, None]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b'[\n {"a": 1}\n]', "one JSON array"), (b"PAR1 and nothing else PAR1", "damaged")],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "rows"
    file.write_bytes(content)
    with pytest.raises(UserError, match=words):
        list(read_rows(file))


def test_a_cut_parquet_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"a": list(range(1000))}), file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        list(read_rows(file))
