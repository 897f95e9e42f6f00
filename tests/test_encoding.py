"""helpers/encoding.py: text -> token ids, labels and batches."""

import dataclasses
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.data import ticket_json
from helpers.encoding import IGNORED, CompletionCollator, encode, split_text
from helpers.models import PLAIN_CHAT_TEMPLATE, load_tokenizer
from helpers.profiles import PROFILES
from helpers.rows import DataError, check_splits, load_examples

GOOD = b'{"prompt": "Hi", "completion": "Hello"}\n'


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_row_longer_than_the_context(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD + GOOD.replace(b"Hello", b"Hello " * 100))
    rows = load_examples(path)
    length = encode(rows, tiny_tokenizer, max_length=10_000)[1]["length"]
    with pytest.raises(DataError) as caught:
        encode(rows, tiny_tokenizer, max_length=length - 1)
    assert str(caught.value).startswith(
        f"{path}:2: the row is {length} tokens long, and {length - 1} is the limit"
    )
    assert len(encode(rows, tiny_tokenizer, max_length=length)) == 2  # the limit itself is allowed


# -- text to token ids -------------------------------------------------------------------------


def test_triage_rows_have_prompt_answer_and_source(triage: DatasetDict) -> None:
    check_splits(**triage)
    for name, rows in triage.items():
        assert rows["source"][:] == [f"{name}.jsonl:{line}" for line in range(1, len(rows) + 1)]
        for row in rows:
            assert [message["role"] for message in row["prompt"]] == ["system", "user"]
            assert row["prompt"][1]["content"] == row["message"]
            assert row["completion"] == [{"role": "assistant", "content": ticket_json(row)}]


@pytest.mark.parametrize("tokenizer_name", ["tiny_tokenizer", "laptop_tokenizer"])
def test_labels_are_the_answer_with_its_end_and_nothing_of_the_prompt(
    tokenizer_name: str, triage: DatasetDict, request: pytest.FixtureRequest
) -> None:
    tokenizer: PreTrainedTokenizerBase = request.getfixturevalue(tokenizer_name)
    rows = triage["test"]
    for row, features in zip(rows, encode(rows, tokenizer, 512), strict=True):
        answer = [label for label in features["labels"] if label != IGNORED]
        prompt_length = len(features["input_ids"]) - len(answer)
        assert features["length"] == len(features["input_ids"]) == len(features["labels"])
        assert features["labels"][:prompt_length] == [IGNORED] * prompt_length
        assert features["input_ids"][prompt_length:] == answer
        assert answer[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(answer[:-1]) == ticket_json(row)
        assert row["message"] in tokenizer.decode(features["input_ids"][:prompt_length])


@pytest.mark.parametrize("tokenizer_name", ["tiny_tokenizer", "laptop_tokenizer"])
def test_prompt_and_answer_give_the_same_tokens_apart_and_together(
    tokenizer_name: str, triage: DatasetDict, request: pytest.FixtureRequest
) -> None:
    # Generation sees the prompt alone. Were a token to span the seam, the model would be trained
    # on a prompt that it never meets.
    tokenizer: PreTrainedTokenizerBase = request.getfixturevalue(tokenizer_name)
    for rows in triage.values():
        for row, features in zip(rows, encode(rows, tokenizer, 512), strict=True):
            together = tokenizer("".join(split_text(row, tokenizer)), add_special_tokens=False)
            assert together["input_ids"] == features["input_ids"], row["source"]


def test_a_tokenizer_without_a_chat_template_gets_the_plain_one(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    profile = dataclasses.replace(PROFILES["tiny"], model_id=str(tmp_path))
    tiny_tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(profile).chat_template == tiny_tokenizer.chat_template

    (tmp_path / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(profile)
    assert tokenizer.chat_template == PLAIN_CHAT_TEMPLATE
    row = load_examples(write(tmp_path / "rows.jsonl", GOOD))[0]
    assert split_text(row, tokenizer) == ("User: Hi\nAssistant: ", "Hello<|im_end|>")


def test_a_template_that_rewrites_the_prompt_is_refused(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(dataclasses.replace(PROFILES["tiny"], model_id=str(tmp_path)))
    tokenizer.chat_template = "{{ messages | length }}{{ messages[-1]['content'] }}"
    path = write(tmp_path / "rows.jsonl", GOOD)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the chat template"):
        encode(load_examples(path), tokenizer, 512)


# -- batches -----------------------------------------------------------------------------------


def pad_fully(rows: Dataset, pad_token_id: int) -> dict[str, torch.Tensor]:
    """The batch as most tutorials build it: padded on the right, one label per token."""
    longest = max(rows["length"])
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        padding = longest - row["length"]
        batch["input_ids"].append(row["input_ids"] + [pad_token_id] * padding)
        batch["attention_mask"].append([1] * row["length"] + [0] * padding)
        batch["labels"].append(row["labels"] + [IGNORED] * padding)
    return {name: torch.tensor(values) for name, values in batch.items()}


def test_a_batch_by_hand() -> None:
    features = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORED] * 3 + [8, 9], "length": 5},
        {"input_ids": [5, 7], "labels": [IGNORED, 7], "length": 2},
    ]
    batch = CompletionCollator(pad_token_id=0)(features)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [0, 0, 0, 5, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    # The longest answer has two tokens, and the first of them is predicted one position earlier.
    assert batch["logits_to_keep"] == 3
    assert batch["labels"].tolist() == [[IGNORED, 8, 9], [IGNORED, IGNORED, 7]]


def test_an_answer_without_a_prompt_keeps_every_position() -> None:
    features = [{"input_ids": [5, 6], "labels": [5, 6], "length": 2}]
    batch = CompletionCollator(pad_token_id=0)(features)
    assert batch["logits_to_keep"] == 2
    assert batch["labels"].tolist() == [[5, 6]]


def test_the_loss_is_that_of_the_full_logits(
    triage: DatasetDict, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = encode(triage["validation"].select(range(16)), tiny_tokenizer, 512)
    assert len(set(rows["length"])) > 8  # else nothing is padded
    batch = CompletionCollator(tiny_tokenizer.pad_token_id)(list(rows))
    assert batch["labels"].shape == (16, batch["logits_to_keep"])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (16, max(rows["length"]))
    with torch.no_grad():
        short = tiny_model(**batch)
        full = tiny_model(**pad_fully(rows, tiny_tokenizer.pad_token_id))
    assert short.logits.shape[1] == batch["logits_to_keep"] < full.logits.shape[1]
    torch.testing.assert_close(short.loss, full.loss, rtol=0, atol=1e-6)
