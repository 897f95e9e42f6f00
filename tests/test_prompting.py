"""Tests of helpers/prompting.py: examples in the prompt, decoding that follows a schema."""

import json
import sys
from collections import Counter
from typing import Any

import jsonschema
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers import CourseError
from helpers.data import FIELDS, ticket_json
from helpers.encoding import CompletionCollator, encode, encode_prompts
from helpers.evaluation import generate_answers, parse, references
from helpers.prompting import (
    TICKET_SCHEMA,
    constrained_answers,
    few_shot,
    few_shot_examples,
    spelled_out,
)

ROOM = 160  # tokens: the tiny model's tokenizer cuts a ticket into many more than SmolLM2's


@pytest.fixture
def examples(triage: DatasetDict) -> list[dict[str, Any]]:
    return few_shot_examples(triage["train"])


# -- examples in the prompt --------------------------------------------------------------------


def test_the_examples_are_one_of_each_category_and_varied(
    examples: list[dict[str, Any]], triage: DatasetDict
) -> None:
    assert {row["category"] for row in examples} == set(triage["train"]["category"])
    assert len(examples) == 6
    assert Counter(row["urgency"] for row in examples) == {"low": 2, "normal": 2, "high": 2}
    given = {(row["product"] is not None, row["order"] is not None) for row in examples}
    assert len(given) == 4
    seen = {*triage["validation"]["message"], *triage["test"]["message"]}
    assert not seen & {row["message"] for row in examples}


def test_few_shot_puts_the_examples_between_the_system_message_and_the_question(
    examples: list[dict[str, Any]], triage: DatasetDict
) -> None:
    system, user = prompt = triage["validation"][0]["prompt"]
    messages = few_shot(prompt, examples)
    assert messages[0] == system and messages[-1] == user
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * 6, "user"]
    assert [m["content"] for m in messages[1:-1:2]] == [row["message"] for row in examples]
    assert [m["content"] for m in messages[2:-1:2]] == [ticket_json(row) for row in examples]
    assert few_shot(prompt, []) == prompt
    assert few_shot([user], examples) == messages[1:]


def test_the_spelled_out_instruction_names_all_fields_and_values(triage: Any) -> None:
    prompt = triage["validation"][0]["prompt"]
    system, *rest = spelled_out(prompt)
    assert system["role"] == "system" and rest == prompt[1:]
    for field, values in TICKET_SCHEMA["properties"].items():
        assert f"{field}:" in system["content"]
        assert all(value in system["content"] for value in values.get("enum", []))


def test_a_few_shot_prompt_fits_the_chat_template(
    examples: list[dict[str, Any]], triage: DatasetDict, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = few_shot(triage["validation"][0]["prompt"], examples)
    (ids,) = encode_prompts([prompt], tiny_tokenizer)
    text = tiny_tokenizer.decode(ids)
    assert [text.count(f"<|im_start|>{role}") for role in ("system", "user", "assistant")] == [
        1,
        7,
        7,
    ]
    assert text.endswith("<|im_start|>assistant\n")


# -- the schema --------------------------------------------------------------------------------


def test_every_reference_answer_satisfies_the_schema(triage: DatasetDict) -> None:
    assert list(TICKET_SCHEMA["properties"]) == TICKET_SCHEMA["required"] == list(FIELDS)
    for rows in triage.values():
        for reference in references(rows):
            jsonschema.validate(json.loads(reference), TICKET_SCHEMA)


@pytest.mark.parametrize(
    "wrong",
    [
        {"category": "complaint"},
        {"urgency": None},
        {"product": ""},
        {"product": "a\tb"},
        {"product": "x" * 41},
        {"order": 4471},
        {"reason": "none"},
    ],
)
def test_the_schema_refuses_what_is_no_ticket(wrong: dict[str, Any]) -> None:
    ticket = {"category": "return", "urgency": "low", "product": "desk", "order": None}
    jsonschema.validate(ticket, TICKET_SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(ticket | wrong, TICKET_SCHEMA)


# -- constrained decoding ----------------------------------------------------------------------


def test_constrained_answers_are_tickets_where_the_model_alone_writes_none(
    triage: DatasetDict, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    pytest.importorskip("xgrammar")
    prompts = triage["validation"]["prompt"][:20]
    alone = generate_answers(tiny_model, tiny_tokenizer, prompts, 20)
    assert [parse(answer) for answer in alone] == [None] * 20
    # Several batches, the last smaller: each needs a grammar of its own.
    answers = constrained_answers(tiny_model, tiny_tokenizer, prompts, TICKET_SCHEMA, ROOM, 8)
    for answer in answers:
        ticket = json.loads(answer)
        jsonschema.validate(ticket, TICKET_SCHEMA)
        assert answer == ticket_json(ticket)  # compact, with the keys in order
    assert len(set(answers)) > 1  # the model's own choice within the schema


def test_another_schema_is_followed_too(
    triage: DatasetDict, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    pytest.importorskip("xgrammar")
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    prompts = triage["validation"]["prompt"][:3]
    answers = constrained_answers(tiny_model, tiny_tokenizer, prompts, schema)
    assert set(answers) <= {'{"ok":true}', '{"ok":false}'}


def test_the_schema_changes_no_answer_that_satisfies_it_anyway(
    triage: DatasetDict, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    pytest.importorskip("xgrammar")
    rows = triage["train"].select(range(4))
    learn_by_heart(tiny_model, tiny_tokenizer, rows)
    free = generate_answers(tiny_model, tiny_tokenizer, rows["prompt"], ROOM)
    assert free == references(rows)
    held = constrained_answers(tiny_model, tiny_tokenizer, rows["prompt"], TICKET_SCHEMA, ROOM)
    assert held == free


def learn_by_heart(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset
) -> None:
    """Train a tiny model until it answers a few rows as their references do."""
    features = encode(rows, tokenizer, max_length=512).remove_columns("length").to_list()
    batch = CompletionCollator(tokenizer.pad_token_id)(features)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(150):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_without_xgrammar_an_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
    triage: DatasetDict,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(CourseError, match="pip install xgrammar"):
        constrained_answers(
            tiny_model, tiny_tokenizer, triage["validation"]["prompt"][:1], TICKET_SCHEMA
        )
