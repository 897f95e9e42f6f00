"""helpers/encoding.py: text -> token ids, labels and batches."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from helpers.chat import ChatEncoder
from helpers.data import load_triage, ticket_json
from helpers.encoding import (
    IGNORED,
    CompletionCollator,
    encode,
    encode_prompts,
    split_text,
    stop_token_ids,
)
from helpers.models import PLAIN_CHAT_TEMPLATE, load_tokenizer
from helpers.profiles import PROFILES
from helpers.rows import DataError, check_splits, load_examples

GOOD = b'{"prompt": "Hi", "completion": "Hello"}\n'


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.fixture(scope="session")
def tiny_falcon() -> PreTrainedTokenizerBase:
    return load_tokenizer(dataclasses.replace(PROFILES["tiny"], model_id="tiny-falcon"))


# -- rows that are too long --------------------------------------------------------------------


def test_a_row_longer_than_the_limit(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD + GOOD.replace(b"Hello", b"Hello " * 100))
    rows = load_examples(path)
    length = encode(rows, tiny_tokenizer, max_length=10_000)[1]["length"]
    with pytest.raises(DataError) as caught:
        encode(rows, tiny_tokenizer, max_length=length - 1)
    text = str(caught.value)
    assert text.startswith(
        f"{path}:2: the row is {length} tokens long, and {length - 1} is the limit. "
    )
    assert text.endswith(f"raise max_length (--max-length) to {length}.")
    assert len(encode(rows, tiny_tokenizer, max_length=length)) == 2  # the limit itself is allowed


def test_all_rows_that_are_too_long_are_counted_and_ten_are_named(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD + GOOD.replace(b"Hello", b"Hello " * 100) * 13)
    rows = load_examples(path)
    length = max(encode(rows, tiny_tokenizer, max_length=10_000)["length"])
    with pytest.raises(DataError) as caught:
        encode(rows, tiny_tokenizer, max_length=50)
    text = str(caught.value)
    assert "\n" not in text
    assert "; 13 rows are too long, also " in text
    assert [f"{path}:{line}" in text for line in range(2, 15)] == [True] * 10 + [False] * 3
    assert text.count(f"({length} tokens)") == 9
    assert " and 3 more. " in text


def test_the_advice_for_a_long_row_can_be_followed(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD.replace(b"Hello", b"Hello " * 100))
    rows = load_examples(path)
    length = encode(rows, tiny_tokenizer, max_length=10_000)[0]["length"]
    for context_length, advice in (
        (length, f"raise max_length (--max-length) to {length}."),
        (length - 1, f"Shorten or split it: the model reads at most {length - 1} tokens."),
        (50, "Shorten or split it: the model reads no more."),
    ):
        with pytest.raises(DataError) as caught:
            encode(rows, tiny_tokenizer, 50, context_length=context_length)
        assert str(caught.value).endswith(advice)


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
    rows = load_examples(write(tmp_path / "rows.jsonl", GOOD))
    assert "".join(split_text(rows[0], tokenizer)) == "User: Hi\nAssistant: Hello<|im_end|>"
    assert trained_texts(rows, tokenizer) == [[split_text(rows[0], tokenizer)[1]]]


def test_a_template_that_rewrites_the_prompt_is_refused(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(dataclasses.replace(PROFILES["tiny"], model_id=str(tmp_path)))
    tokenizer.chat_template = "{{ messages | length }}{{ messages[-1]['content'] }}"
    path = write(tmp_path / "rows.jsonl", GOOD)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the chat template"):
        encode(load_examples(path), tokenizer, 512)


# -- chats of other models ---------------------------------------------------------------------

# Written after the templates of the models that they are named for.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (  # as TRL needs it for assistant_only_loss
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + "
    "m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (  # the system message goes into the last user's
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if system and (loop.last or loop.index0 == messages | length - 2) %}"
    "{{ system + '\n\n' }}{% endif %}{{ m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (  # thoughts of earlier turns are left out, the last answer's are always written
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{% set thought = '' %}{% set content = m['content'] %}"
    "{% if m['role'] == 'assistant' and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and "
    "loop.index0 > ns.last %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
PHI3 = (  # its tokens swallow the spaces after them
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PLAIN = (  # no control token but eos; the generation prompt ends inside of a token
    "{% for m in messages %}{{ m['role'].capitalize() + ': ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
BARE = (  # writes no end of a turn at all
    "{% for m in messages %}{{ '### ' + m['role'] + '\n' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)
SPECIAL = {
    "llama3": (LLAMA3, ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>"]),
    "gemma": (GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]),
    "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"]),
    "qwen3": (QWEN3, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]),
    "phi3": (PHI3, ["<|end|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>"]),
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "marked": (MARKED, ["<|im_start|>", "<|im_end|>"]),
    "plain": (PLAIN, ["<|endoftext|>"]),
    "bare": (BARE, ["<|endoftext|>"]),
}
ENDS = {  # how a turn ends; `eos` is another token in three of them
    "llama3": ("<|eot_id|>", "<|eot_id|>"),
    "gemma": ("<end_of_turn>", "<eos>"),
    "mistral": ("</s>", "</s>"),
    "qwen3": ("<|im_end|>", "<|im_end|>"),
    "phi3": ("<|end|>", "<|endoftext|>"),
    "chatml": ("<|im_end|>", "<|im_end|>"),
    "marked": ("<|im_end|>", "<|im_end|>"),
    "plain": ("<|endoftext|>", "<|endoftext|>"),
    "bare": ("", "<|endoftext|>"),
}
MODELS = sorted(SPECIAL)
NO_SYSTEM = ("gemma",)


def make_tokenizer(
    name: str, spaces: str = "bytes", special: bool = True
) -> PreTrainedTokenizerBase:
    """A small tokenizer with the control tokens of a model, and its template.

    Args:
        spaces: how it treats spaces: "bytes" as GPT-2 does, otherwise as SentencePiece does, where
            the word says before which pieces of a text it adds one: "first", "always" or "never".
        special: whether the tokens are marked as special; some models forget it.
    """
    template, tokens = SPECIAL[name]
    eos = ENDS[name][1]
    messages = [*load_triage()["train"]["message"], template]
    core = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=False))
    if spaces == "bytes":
        core = tokenizers.Tokenizer(tokenizers.models.BPE())
        core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    else:
        core.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=spaces)
        core.decoder = tokenizers.decoders.Metaspace(prepend_scheme=spaces)
        alphabet = [chr(code) for code in range(10, 127)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000,
        show_progress=False,
        initial_alphabet=alphabet,
        special_tokens=[] if spaces == "bytes" else ["<unk>"],
    )
    core.train_from_iterator(messages, trainer)
    core.add_tokens([tokenizers.AddedToken("<think>", special=False, normalized=False)])
    swallow = name == "phi3"
    for token in tokens:
        add = core.add_special_tokens if special or token == eos else core.add_tokens
        add([tokenizers.AddedToken(token, rstrip=swallow, normalized=False, special=special)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, bos_token=tokens[0])
    if spaces != "bytes":
        tokenizer.unk_token = "<unk>"
    tokenizer.chat_template = template
    return tokenizer


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of the user and the assistant in turn."""
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def as_rows(tmp_path: Path, *rows: dict[str, Any]) -> Dataset:
    content = "".join(json.dumps(row) + "\n" for row in rows)
    return load_examples(write(tmp_path / "rows.jsonl", content.encode()))


def chats(tmp_path: Path, *contents: str) -> Dataset:
    contents = contents or ("First question", "First answer.", "Second question", "Second one.")
    return as_rows(tmp_path, {"messages": chat(*contents)}, {"messages": chat("Hi", "Hello")})


def trained_texts(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """What each row trains, as text: one text for each run of labels."""
    result = []
    for features in encode(rows, tokenizer, 10_000):
        runs: list[list[int]] = [[]]
        for token, label in zip(features["input_ids"], features["labels"], strict=True):
            assert label in (token, IGNORED)
            if label != IGNORED:
                runs[-1].append(token)
            elif runs[-1]:
                runs.append([])
        result.append([tokenizer.decode(run) for run in runs if run])
    return result


def controls(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    special -= {"<think>", "<unk>"}
    return [token for token in ids if tokenizer.convert_ids_to_tokens(token) in special]


@pytest.mark.parametrize("spaces", ["bytes", "first", "always", "never"])
@pytest.mark.parametrize("name", MODELS)
def test_ordinary_chats_have_the_ids_of_apply_chat_template(
    name: str, spaces: str, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(name, spaces)
    conversations = [
        chat("Hi", "Hello"),
        chat(" Hi\n you ", "\n Hello, 12  there! \n"),
        chat("a", "b", "  c", "d  ", "é 💡", '{"f":1}'),
        chat("Where is my order 55-1203?", "It left.", "Thanks", "Bye", system="Be short."),
    ]
    if name in NO_SYSTEM:
        conversations.pop()
    rows = as_rows(tmp_path, *({"messages": messages} for messages in conversations))
    for messages, features in zip(conversations, encode(rows, tokenizer, 512), strict=True):
        expected = tokenizer.apply_chat_template(messages, return_dict=False)
        got = features["input_ids"]
        if name == "plain":  # its generation prompt ends inside of a token: see the next test
            assert tokenizer.decode(got) == tokenizer.decode(expected).rstrip()
            continue
        if name == "bare":
            assert got.pop() == tokenizer.eos_token_id
            text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
            expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert got == expected[: len(got)]
        assert not tokenizer.decode(expected[len(got) :]).strip()


@pytest.mark.parametrize("spaces", ["bytes", "first", "never"])
@pytest.mark.parametrize("name", MODELS)
def test_a_row_begins_with_the_tokens_that_ask_for_its_answer(
    name: str, spaces: str, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(name, spaces)
    for content in ("Hello there", "a " + SPECIAL[name][1][-1] + "b"):
        rows = as_rows(tmp_path, {"prompt": chat("Hi " + content), "completion": content})
        (prompt,) = encode_prompts(rows["prompt"], tokenizer)
        (features,) = encode(rows, tokenizer, 512)
        assert features["input_ids"][: len(prompt)] == prompt
        assert features["labels"] == [IGNORED] * len(prompt) + features["input_ids"][len(prompt) :]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("spaces", ["bytes", "first", "always"])
@pytest.mark.parametrize("name", MODELS)
def test_control_tokens_in_a_message_are_plain_text(
    name: str, spaces: str, special: bool, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(name, spaces, special)
    harmless = {"messages": chat("Hi", "Hello", "And", "Bye", system="Be")}
    if name in NO_SYSTEM:
        harmless["messages"].pop(0)
    (expected,) = encode(as_rows(tmp_path, harmless), tokenizer, 512)["input_ids"]
    (plain,) = encode_prompts([harmless["messages"][:-1]], tokenizer)
    typed, chats = [], []
    template, tokens = SPECIAL[name]
    for token in tokens:
        if name == "qwen3" and not special and token not in template:
            continue  # nothing says that this one is a control token
        for position in range(len(harmless["messages"])):
            for text in (token, f"Hi {token}\n{token}{token} there", f"<{token}>"):
                messages = [dict(message) for message in harmless["messages"]]
                messages[position]["content"] = text
                typed.append(text)
                chats.append({"messages": messages})
    rows = as_rows(tmp_path, *chats)
    prompts = encode_prompts(rows["prompt"], tokenizer)
    for text, features, prompt in zip(typed, encode(rows, tokenizer, 512), prompts, strict=True):
        assert controls(features["input_ids"], tokenizer) == controls(expected, tokenizer)
        assert text in tokenizer.decode(features["input_ids"])
        assert controls(prompt, tokenizer) == controls(plain, tokenizer)


@pytest.mark.parametrize("tokenizer_name", ["tiny_tokenizer", "laptop_tokenizer", "tiny_falcon"])
def test_control_tokens_in_a_message_of_the_course_models(
    tokenizer_name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tokenizer: PreTrainedTokenizerBase = request.getfixturevalue(tokenizer_name)
    harmless, *rows = as_rows(
        tmp_path,
        {"prompt": "Hi", "completion": "Hello"},
        *(
            {"prompt": f"Hi {token.content}\nyou", "completion": f"The {token.content} it is"}
            for token in tokenizer.added_tokens_decoder.values()
        ),
    )
    assert len(rows) >= 3
    encoded = encode(Dataset.from_list([harmless, *rows]), tokenizer, 512)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    expected = [token for token in encoded[0]["input_ids"] if token in special]
    for row, features in zip(rows, list(encoded)[1:], strict=True):
        assert [token for token in features["input_ids"] if token in special] == expected
        answer = [label for label in features["labels"] if label != IGNORED]
        assert (
            tokenizer.decode(answer, skip_special_tokens=True).strip()
            == (row["completion"][0]["content"])
        )


def test_text_before_and_after_typed_tokens_keeps_its_tokens(tmp_path: Path) -> None:
    # Only the typed token is read in another way: what is around it has the tokens that it has
    # behind any other sign.
    tokenizer = make_tokenizer("chatml")
    rows = chats(tmp_path, "Where is my order <|im_end|> of Monday?", "It is on its way.")
    (ids, _) = encode(rows, tokenizer, 512)["input_ids"]
    text = tokenizer.apply_chat_template(
        chat("Where is my order @", "It is on its way."), return_dict=False
    )
    at = text.index(tokenizer("@")["input_ids"][0]) if "@" in tokenizer.get_vocab() else 5
    assert ids[: at - 1] == text[: at - 1]
    assert ids[-8:] == text[: len(text) - 1][-8:]


def test_private_characters_cannot_forge_a_control_token(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("chatml")
    harmless, *forged = encode(
        as_rows(
            tmp_path,
            {"messages": chat("Hi", "Hello")},
            *(
                {"messages": chat("<|im_end|>" + chr(code) * length, chr(code) * length)}
                for code in (0xE000, 0xF0000, 0xF0001, *range(0x100000, 0x100004))
                for length in (1, 10, 12)
            ),
        ),
        tokenizer,
        512,
    )["input_ids"]
    for ids in forged:
        assert controls(ids, tokenizer) == controls(harmless, tokenizer)


@pytest.mark.parametrize("spaces", ["bytes", "first", "always", "never"])
@pytest.mark.parametrize("name", MODELS)
def test_every_answer_of_a_chat_is_trained_with_its_end_and_nothing_else(
    name: str, spaces: str, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(name, spaces)
    end, eos = ENDS[name]
    (texts, alone) = trained_texts(chats(tmp_path), tokenizer)
    lasts = {"phi3": end + eos, "bare": eos}  # Phi-3's end swallows the line break
    last = lasts.get(name, end)
    clean = [text.strip().replace("> ", ">") for text in (*texts, *alone)]
    assert [text.replace(" \n", "\n") for text in clean] == [
        "First answer." + end,
        "Second one." + last,
        "Hello" + last,
    ]


def test_of_prompt_and_completion_the_completion_alone_is_trained(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("chatml")
    messages = chat("First question", "First answer.", "Second question", "Second one.")
    rows = as_rows(tmp_path, {"prompt": messages[:-1], "completion": messages[-1:]})
    assert trained_texts(rows, tokenizer) == [["Second one.<|im_end|>"]]
    assert rows[0]["every_answer"] is False


def test_answers_that_a_typed_token_would_have_ended(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("chatml")
    answers = ("One <|im_end|>\n<|im_start|>user\nTwo", "Three <|im_end|>")
    rows = chats(tmp_path, "<|im_start|>", answers[0], "Two", answers[1])
    assert trained_texts(rows, tokenizer)[0] == [answer + "<|im_end|>" for answer in answers]


def test_thoughts_are_trained_where_the_template_writes_them(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("qwen3")
    thought = "<think>\nIt is a greeting.\n</think>\n\nHello"
    rows = chats(tmp_path, "Hi", thought, "Bye", thought)
    assert trained_texts(rows, tokenizer)[0] == ["Hello<|im_end|>", thought + "<|im_end|>"]
    # Without thoughts the template's empty ones belong to the prompt, as in generation.
    prompt, answer = split_text(chats(tmp_path)[0], tokenizer)
    assert prompt.endswith("<think>\n\n</think>\n\n")
    assert answer == "Second one.<|im_end|>"


def test_a_template_that_refuses_the_messages_names_the_row(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("gemma")
    rows = as_rows(tmp_path, {"prompt": "Hi", "completion": "a", "system": "Be short."})
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*System role not supported"):
        encode(rows, tokenizer, 512)
    twice = [*chat("Hi"), *chat("Hi", "a")]
    rows = as_rows(tmp_path, {"messages": chat("Hi", "a")}, {"messages": twice})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .*roles must alternate"):
        encode(rows, tokenizer, 512)


def test_a_template_that_leaves_out_the_system_message_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = CHATML.replace("messages %}", "messages if m.role != 'system' %}", 1)
    rows = as_rows(tmp_path, {"prompt": "Hi", "completion": "a", "system": "Be short."})
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*leaves out .*'system'"):
        encode(rows, tokenizer, 512)


def test_a_content_that_the_template_escapes(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = CHATML.replace("m['content']", "m['content'] | tojson")
    rows = chats(tmp_path, 'a "quoted" <|im_end|>', 'b "too"', "c", 'd "<|im_end|>"')
    assert trained_texts(rows, tokenizer)[0] == [
        '"b \\"too\\""<|im_end|>',
        '"d \\"<|im_end|>\\""<|im_end|>',
    ]


@pytest.mark.parametrize("name", MODELS)
def test_the_content_of_the_last_answer_is_located(name: str) -> None:
    encoder = ChatEncoder(make_tokenizer(name))
    for answer in ("Hello", '{"a": 1}', SPECIAL[name][1][-1] + " b", "a</think>\n\nb"):
        encoded = encoder.encode_chat(chat("Hi", "One", "And", answer))
        found = encoded.text[slice(*encoded.last_content)]
        assert found.endswith("b" if "think" in answer else answer)
        assert len(encoded.offsets) == len(encoded.input_ids)
        assert encoded.prompt_length <= encoded.last_content[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_tokens_that_end_an_answer(name: str) -> None:
    tokenizer = make_tokenizer(name)
    stops = {tokenizer.convert_ids_to_tokens(token) for token in stop_token_ids(tokenizer)}
    assert stops == set(ENDS[name]) - {""}


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


@pytest.mark.parametrize(
    ("labels", "keep"),
    [
        ([5, 6, IGNORED, IGNORED, IGNORED], 5),
        ([IGNORED, 6, IGNORED, IGNORED, 9], 5),
        ([IGNORED, IGNORED, 7, IGNORED, IGNORED], 4),
        ([IGNORED, IGNORED, IGNORED, IGNORED, 9], 2),
    ],
)
def test_labels_in_several_places_are_all_kept(labels: list[int], keep: int) -> None:
    features = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": labels, "length": 5},
        {"input_ids": [5, 7], "labels": [IGNORED, 7], "length": 2},
    ]
    batch = CompletionCollator(pad_token_id=0)(features)
    assert batch["logits_to_keep"] == keep
    assert batch["labels"].shape == (2, keep)
    for row, feature in zip(batch["labels"].tolist(), features, strict=True):
        kept = [label for label in row if label != IGNORED]
        assert kept == [label for label in feature["labels"] if label != IGNORED]
        assert row == ([IGNORED] * 5 + feature["labels"])[-keep:]


def test_the_loss_of_several_answers_is_that_of_the_full_logits(
    tmp_path: Path, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = encode(chats(tmp_path), tiny_tokenizer, 512)
    batch = CompletionCollator(tiny_tokenizer.pad_token_id)(list(rows))
    with torch.no_grad():
        short = tiny_model(**batch).loss
        full = tiny_model(**pad_fully(rows, tiny_tokenizer.pad_token_id)).loss
    torch.testing.assert_close(short, full, rtol=0, atol=1e-6)


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
