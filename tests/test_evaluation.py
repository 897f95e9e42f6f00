"""Tests of helpers/evaluation.py: answers, scores, losses."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers import evaluation
from helpers.data import FIELDS, ticket_json, triage_prompt
from helpers.encoding import split_text
from helpers.evaluation import (
    answer_losses,
    evaluating,
    generate_answers,
    parse,
    references,
    same_answer,
    score,
    scores_after_references,
    value_spans,
)


def ticket(**fields: str | None) -> str:
    """A ticket as text; the fields that are not given have ordinary values."""
    ordinary = {"category": "return", "urgency": "low", "product": "desk", "order": "77"}
    return ticket_json(ordinary | fields)


# -- answers -----------------------------------------------------------------------------------


@pytest.fixture
def talkative(tiny_model: PreTrainedModel) -> PreTrainedModel:
    """The tiny model with larger weights: as it is, it answers everything with line breaks."""
    with torch.no_grad():
        for weight in tiny_model.model.layers.parameters():
            if weight.ndim == 2:
                weight.mul_(10)
    return tiny_model


def test_answers_do_not_depend_on_batches_or_order(
    triage: DatasetDict, talkative: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = triage["test"]["prompt"][:12]

    def answers(prompts: list[Any], batch_size: int) -> list[str]:
        return generate_answers(talkative, tiny_tokenizer, prompts, 12, batch_size)

    one_by_one = answers(prompts, 1)
    assert len(set(one_by_one)) > 6  # else a mix-up could pass unseen
    assert answers(prompts, 5) == one_by_one
    assert answers(prompts, 100) == one_by_one
    assert answers(prompts[::-1], 5) == one_by_one[::-1]
    assert answers([], 5) == []


def test_answers_are_those_of_a_plain_greedy_loop(
    triage: DatasetDict, talkative: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = triage["test"]["prompt"][:3]
    expected = []
    for prompt in prompts:
        text = tiny_tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=True
        )
        ids = tiny_tokenizer(text, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(8):
            with torch.no_grad():
                likeliest = talkative(ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, likeliest], dim=1)
            if likeliest.item() == tiny_tokenizer.eos_token_id:
                break
        expected.append(tiny_tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip())
    assert generate_answers(talkative, tiny_tokenizer, prompts, max_new_tokens=8) == expected


@pytest.mark.parametrize("training", [True, False])
def test_the_model_comes_back_as_it_was(
    training: bool,
    triage: DatasetDict,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    tiny_model.train(training)
    generate_answers(tiny_model, tiny_tokenizer, [triage_prompt("Hi")], max_new_tokens=2)
    assert tiny_model.training is training
    answer_losses(tiny_model, tiny_tokenizer, triage["test"].select(range(2)))
    assert tiny_model.training is training
    with pytest.raises(KeyError), evaluating(tiny_model):
        assert not tiny_model.training
        raise KeyError
    assert tiny_model.training is training
    assert not torch.is_inference_mode_enabled()


# -- scores ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I cannot help with that.",
        'Here it is: {"a": 1}',
        '{"a": 1} Anything else?',
        '```json\n{"a": 1}\n```',
        '{"a": 1}{"a": 1}',
        '{"a": 1',
        "{'a': 1}",
        '[{"a": 1}]',
        '"a"',
        "7",
        "null",
        pytest.param("7" * 5000, id="a longer number than Python reads"),
        pytest.param("[" * 100_000, id="deeper than the parser goes"),
    ],
)
def test_only_a_json_object_alone_is_a_ticket(answer: str) -> None:
    assert parse(answer) is None


def test_white_space_around_and_inside_a_ticket_is_no_fault() -> None:
    assert parse(' {"a": 1,\n "b": null}\n') == {"a": 1, "b": None}


def test_same_answer() -> None:
    assert same_answer('{"b": null, "a": 1}', '{"a":1,"b":null}')
    assert not same_answer('{"a": 1}', '{"a":1,"b":null}')
    assert not same_answer('Sure: {"a": 1}', '{"a":1}')
    assert same_answer(" Paris\n", "Paris")  # where no JSON is expected, text is compared
    assert not same_answer("paris", "Paris")


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ('{"a": 1}', '{"a": true}', False),
        ('{"a": [0]}', '{"a": [false]}', False),
        ('{"a": {"b": 1}}', '{"a": {"b": true}}', False),
        ('{"a": 1}', '{"a": 1.0}', True),  # one number in JSON
        ('{"a": [1, {"b": null}]}', '{"a":[1,{"b":null}]}', True),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', False),
    ],
)
def test_values_are_compared_as_json_means_them(answer: str, expected: str, same: bool) -> None:
    assert same_answer(answer, expected) is same
    assert score([answer], [expected])["fields"]["a"] == same


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_python_reads_numbers_that_json_does_not_have(value: str) -> None:
    assert parse(f'{{"a": {value}}}') is None


def test_valid_json_counts_only_rows_whose_reference_is_json() -> None:
    result = score(["a", "b", "{}"], ["a", "b", ticket()])
    assert result["valid_json"] == 1


def test_score_counts_each_field_over_all_tickets() -> None:
    expected = [ticket(), ticket(product=None), ticket(order=None), ticket(urgency="high")]
    answers = [
        ticket(),
        ticket(product="desk"),  # one field wrong
        "no ticket at all",  # every field wrong
        ticket(urgency="high").replace(",", ", "),  # written differently, the same ticket
    ]
    assert score(answers, expected) == {
        "exact_match": 0.5,
        "valid_json": 0.75,
        "fields": {"category": 0.75, "urgency": 0.75, "product": 0.5, "order": 0.75},
    }


def test_a_missing_field_is_not_the_same_as_null() -> None:
    expected = ticket(order=None)
    missing = json.dumps({k: v for k, v in json.loads(expected).items() if k != "order"})
    result = score([missing], [expected])
    assert result["fields"] == {"category": 1, "urgency": 1, "product": 1, "order": 0}
    assert (result["exact_match"], result["valid_json"]) == (0, 1)


def test_a_field_too_many_spoils_the_match_alone() -> None:
    result = score([ticket()[:-1] + ',"colour":"red"}'], [ticket()])
    assert result["exact_match"] == 0
    assert result["fields"] == dict.fromkeys(FIELDS, 1)


def test_without_json_references_only_the_text_counts() -> None:
    result = score(["Paris", "Rome"], ["Paris", "Bern"])
    assert result == {"exact_match": 0.5, "valid_json": None, "fields": {}}


@pytest.mark.parametrize(("answers", "expected"), [([ticket()], []), ([], []), (["a"], ["a", "b"])])
def test_unequal_lengths_and_nothing_cannot_be_scored(
    answers: list[str], expected: list[str]
) -> None:
    with pytest.raises(ValueError, match=f"{len(answers)} answers for {len(expected)} reference"):
        score(answers, expected)


def test_the_references_of_triage_score_full_marks(triage: DatasetDict) -> None:
    expected = references(triage["test"])
    assert score(expected, expected) == {
        "exact_match": 1,
        "valid_json": 1,
        "fields": dict.fromkeys(FIELDS, 1),
    }


# -- losses ------------------------------------------------------------------------------------


def require_value_spans(answer: str) -> None:
    """The spans hold exactly the values, each right after its own key."""
    expected = json.loads(answer)
    spans = value_spans(answer)
    assert [json.loads(answer[start:end]) for start, end in spans] == list(expected.values())
    for key, (start, end) in zip(expected, spans, strict=True):
        assert answer[:start].endswith(f'"{key}":')
        assert answer[end] in ",}"


@pytest.mark.parametrize(
    "answer",
    [
        ticket(product="desk 1", order="1"),  # the number stands in the product already
        ticket(product="1", order="1"),
        ticket(product="return", order="low"),
        ticket(category="category", urgency="urgency", product="product", order="order"),
        ticket(product=None, order=None),
        ticket(product="null", order=None),
        ticket(product='","order":null', order=None),  # looks like the next field
        ticket(product='27" screen \\ "Käfer" 🦆\n', order="#\t1"),
        ticket(product="", order=":"),
        ticket(product=":", order=","),
    ],
)
def test_value_spans(answer: str) -> None:
    require_value_spans(answer)


def test_value_spans_of_all_tickets(triage: DatasetDict) -> None:
    for rows in triage.values():
        for answer in references(rows):
            require_value_spans(answer)


def test_text_that_is_no_ticket_has_no_value_spans() -> None:
    assert value_spans("Paris") == []
    assert value_spans("[1, 2]") == []


def learn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> None:
    """Train on a few rows until the model knows most of them by heart."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        for row in rows:
            prompt, answer = (tokenizer(text)["input_ids"] for text in split_text(row, tokenizer))
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).backward()
            optimizer.step()
            optimizer.zero_grad()


def test_losses_and_scores_are_those_of_a_plain_loop(
    triage: DatasetDict, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    # One row at a time, no padding, every logit. A letter in the name of a byte-level token stands
    # for one byte, so the values are found by counting bytes.
    examples = list(triage["validation"].select(range(12)))
    examples[3]["completion"][0]["content"] = ticket(product="Käfer-Éclair 🦆")
    rows = Dataset.from_list(examples)
    learn(tiny_model, tiny_tokenizer, rows.select(range(6)))
    per_row, values, fields, exact = [], [], [], []
    for row in rows:
        prompt, answer = split_text(row, tiny_tokenizer)
        prompt_ids = tiny_tokenizer(prompt)["input_ids"]
        answer_ids = tiny_tokenizer(answer)["input_ids"]
        with torch.no_grad():
            logits = tiny_model(torch.tensor([prompt_ids + answer_ids])).logits[0]
        position, tokens = 0, []
        for index, token in enumerate(answer_ids):
            after = logits[len(prompt_ids) + index - 1].softmax(-1)
            end = position + len(tiny_tokenizer.convert_ids_to_tokens(token))
            best = after.argmax().item()
            stands = set(range(position, end))
            tokens.append((stands, -after[token].log().item(), best == token, after[best].item()))
            position = end
        spans = [
            set(range(len(answer[:start].encode()), len(answer[:end].encode())))
            for start, end in value_spans(row["completion"][0]["content"])
        ]
        per_row.append([loss for _, loss, _, _ in tokens])
        values += [token[1:] for token in tokens if any(token[0] & span for span in spans)]
        fields += [all(t[2] for t in tokens if t[0] & span) for span in spans]
        exact.append(all(right for _, _, right, _ in tokens))
    every = [loss for losses in per_row for loss in losses]
    assert 0 < len(values) < len(every) and len(fields) == 48
    assert 0 < sum(exact) < 12 and sum(exact) * 4 < sum(fields) < 48
    losses = {
        "loss": pytest.approx(np.mean(every), abs=1e-5),
        "value_loss": pytest.approx(np.mean([loss for loss, _, _ in values]), abs=1e-5),
    }
    scores = losses | {
        "exact_match": pytest.approx(np.mean(exact)),
        "fields_right": pytest.approx(np.mean(fields)),
        "value_accuracy": pytest.approx(np.mean([right for _, right, _ in values])),
        "confidence": pytest.approx(np.mean([sure for _, _, sure in values]), abs=1e-5),
        "row_loss": pytest.approx([np.mean(row) for row in per_row], abs=1e-5),
        "row_right": exact,
    }
    for size in (1, 5, 100):
        assert answer_losses(tiny_model, tiny_tokenizer, rows, size) == losses
        assert scores_after_references(tiny_model, tiny_tokenizer, rows, size) == scores


def test_scores_after_references_need_values(
    triage: DatasetDict, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    answer = [{"role": "assistant", "content": "We will call you back."}]
    rows = triage["test"].select(range(2)).map(lambda _: {"completion": answer})
    with pytest.raises(ValueError, match="flat JSON"):
        scores_after_references(tiny_model, tiny_tokenizer, rows)


def test_prose_has_a_loss_but_no_value_loss(
    triage: DatasetDict, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    answer = [{"role": "assistant", "content": "We will call you back."}]
    rows = triage["test"].select(range(2)).map(lambda _: {"completion": answer})
    result = answer_losses(tiny_model, tiny_tokenizer, rows)
    assert isinstance(result["loss"], float)
    assert result["value_loss"] is None


# -- perplexity --------------------------------------------------------------------------------


def test_perplexity_is_that_of_a_plain_loop(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = ["The tide comes in twice a day.", "Bread.", "My parcel is late and nobody answers me."]
    losses = []
    for text in texts:
        ids = tiny_tokenizer(text)["input_ids"]
        with torch.no_grad():
            logits = tiny_model(torch.tensor([ids])).logits[0]
        for position, token in enumerate(ids[1:]):
            losses.append(-logits[position].log_softmax(-1)[token].item())
    expected = pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert evaluation.perplexity(tiny_model, tiny_tokenizer, texts, batch_size=1) == expected
    assert evaluation.perplexity(tiny_model, tiny_tokenizer, texts, batch_size=3) == expected


def test_a_model_that_guesses_has_the_perplexity_of_its_vocabulary(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    with torch.no_grad():
        tiny_model.get_output_embeddings().weight.zero_()
    measured = evaluation.perplexity(tiny_model, tiny_tokenizer, ["Where is my parcel?"])
    assert measured == pytest.approx(tiny_model.config.vocab_size, rel=1e-4)


@pytest.mark.parametrize("texts", [[], [""], ["", "a"]])
def test_no_text_has_no_perplexity(
    texts: list[str], tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match="at least two tokens"):
        evaluation.perplexity(tiny_model, tiny_tokenizer, texts)
