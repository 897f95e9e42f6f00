"""helpers/rows.py: every error that a file can have.

Each error names its file and line. For JSONL that is the line, for Parquet the row, counted from 1;
for CSV it is the line on which the row ends, because a quoted cell may hold line breaks.
"""

import csv
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from helpers.rows import DataError, check_splits, load_examples

BOM = b"\xef\xbb\xbf"
GOOD = b'{"prompt": "Hi", "completion": "Hello"}\n'


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def require_fault(path: Path, line: int, *fragments: str) -> None:
    """Loading must fail, and name the file, the line and the fault."""
    with pytest.raises(DataError) as caught:
        load_examples(path)
    text = str(caught.value)
    assert text.startswith(f"{path}:{line}: "), text
    for fragment in fragments:
        assert fragment in text


# -- good files --------------------------------------------------------------------------------


def test_all_accepted_shapes_become_the_same_columns(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    rows: list[dict[str, Any]] = [
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [user], "completion": [answer]},
        {"messages": [user, answer]},
    ]
    text = "".join(json.dumps(row) + "\n\n" for row in rows)  # blank lines are passed over
    loaded = load_examples(write(tmp_path / "rows.jsonl", text.encode()))
    assert loaded["prompt"][:] == [[user]] * 3
    assert loaded["completion"][:] == [[answer]] * 3
    assert loaded["source"][:] == [f"{tmp_path / 'rows.jsonl'}:{line}" for line in (1, 3, 5)]


@pytest.mark.parametrize("bom", [b"", BOM])
def test_the_three_formats_say_the_same(tmp_path: Path, bom: bytes) -> None:
    row = {"prompt": "Wie spät?\nBitte.", "completion": 'a "quoted", answer'}
    files = [
        write(tmp_path / "rows.jsonl", bom + json.dumps(row, ensure_ascii=False).encode()),
        write(
            tmp_path / "rows.csv",
            bom + 'prompt,completion\r\n"Wie spät?\nBitte.","a ""quoted"", answer"\r\n'.encode(),
        ),
        write_parquet(tmp_path / "rows.parquet", [row]),
    ]
    for path in files:
        loaded = load_examples(path)
        assert loaded[0]["prompt"] == [{"role": "user", "content": row["prompt"]}]
        assert loaded[0]["completion"] == [{"role": "assistant", "content": row["completion"]}]


def test_line_separators_of_unicode_stay_inside_a_jsonl_row(tmp_path: Path) -> None:
    # str.splitlines would break the line at these; JSON allows them inside a string.
    content = '{"prompt": "a\u2028b\u0085c", "completion": "Hello"}\n'.encode()
    assert len(load_examples(write(tmp_path / "rows.jsonl", content))) == 1


# -- bad files ---------------------------------------------------------------------------------


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: there is no such file"):
        load_examples(tmp_path / "nowhere.jsonl")


def test_unknown_suffix(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.xlsx", GOOD)
    with pytest.raises(DataError, match=r"rows\.xlsx: .*\.jsonl, \.csv, \.parquet"):
        load_examples(path)


def test_empty_files(tmp_path: Path) -> None:
    files = [
        write(tmp_path / "empty.jsonl", b""),
        write(tmp_path / "blank.jsonl", b"\n \n"),
        write(tmp_path / "empty.csv", b""),
        write(tmp_path / "header.csv", b"prompt,completion\n"),
        write_parquet(tmp_path / "empty.parquet", []),
    ]
    for path in files:
        with pytest.raises(DataError, match=f"{path.name}: the file has no rows"):
            load_examples(path)


@pytest.mark.parametrize(
    ("second_line", "fragment"),
    [
        (b'{"prompt": "Hi", "completion": "Hel', "not JSON"),
        (b"prompt,completion", "not JSON"),
        (b'["Hi", "Hello"]', "must be an object"),
        (b'"Hi"', "must be an object"),
        (b'{"prompt": "Hi"}', "the field 'completion' is missing"),
        (b'{"completion": "Hello"}', "the field 'prompt' is missing"),
        (b'{"Prompt": "Hi", "completion": "Hello"}', "the field 'prompt' is missing"),
        (b'{"prompt": "", "completion": "Hello"}', "prompt is empty"),
        (b'{"prompt": "Hi", "completion": " \\n"}', "completion is empty"),
        (b'{"prompt": [], "completion": "Hello"}', "prompt is empty"),
        (b'{"prompt": 7, "completion": "Hello"}', "prompt must be text or a list"),
        (b'{"prompt": "Hi", "completion": null}', "completion must be text or a list"),
        (b'{"prompt": "Hi", "completion": {"a": 1}}', "completion must be text or a list"),
        (b'{"prompt": ["Hi"], "completion": "Hello"}', "needs role and content"),
        (b'{"prompt": [{"role": "user"}], "completion": "Hello"}', "needs role and content"),
        (b'{"prompt": [{"role": "human", "content": "Hi"}], "completion": "a"}', "role 'human'"),
        (b'{"prompt": [{"role": ["user"], "content": "Hi"}], "completion": "a"}', "the role"),
        (b'{"prompt": [{"role": "user", "content": 7}], "completion": "a"}', "must be text"),
        (b'{"prompt": [{"role": "user", "content": ""}], "completion": "a"}', "is empty"),
        (b'{"prompt": "Hi", "completion": [{"role": "user", "content": "a"}]}', '"assistant"'),
        (b'{"messages": "Hi"}', "messages must be a list of chat messages, not 'Hi'"),
        (b'{"messages": []}', "messages is empty"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "must end with an answer"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "must end with an answer"),
        (b'{"prompt": "\\ud83d", "completion": "Hello"}', "prompt holds half"),
    ],
)
def test_bad_jsonl_row(tmp_path: Path, second_line: bytes, fragment: str) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD + second_line + b"\n" + GOOD)
    require_fault(path, 2, fragment)


def test_messages_that_end_with_a_question(tmp_path: Path) -> None:
    messages = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    content = GOOD + json.dumps({"messages": messages}).encode()
    require_fault(write(tmp_path / "rows.jsonl", content), 2, "must end with an answer")


@pytest.mark.parametrize("bom", [b"", BOM])
@pytest.mark.parametrize("good_rows", [0, 2, 3000])  # 3000: beyond any read buffer
def test_not_utf8(tmp_path: Path, bom: bytes, good_rows: int) -> None:
    latin1 = "Übung".encode("latin-1")
    jsonl = bom + GOOD * good_rows + GOOD.replace(b"Hello", latin1) + GOOD
    require_fault(write(tmp_path / "rows.jsonl", jsonl), good_rows + 1, "not UTF-8", "as UTF-8")
    # The bad byte is the first of its line: were the BOM forgotten, the line before would be named.
    csv = bom + b"prompt,completion\n" + b"Hi,Hello\n" * good_rows + latin1 + b",Hello\nHi,a\n"
    require_fault(write(tmp_path / "rows.csv", csv), good_rows + 2, "not UTF-8", "as UTF-8")


def test_utf16_is_not_utf8(tmp_path: Path) -> None:
    # What Excel writes as "Unicode text".
    # Also without the mark at its beginning.
    for encoding in ("utf-16", "utf-16-le"):
        content = GOOD.decode().encode(encoding)
        require_fault(write(tmp_path / "rows.jsonl", content), 1, "not UTF-8")
    csv = "prompt,completion\nHi,Hello\n".encode("utf-16")
    require_fault(write(tmp_path / "rows.csv", csv), 1, "not UTF-8")


@pytest.mark.parametrize(
    ("content", "line", "fragment"),
    [
        (b"prompt,answer\nHi,Hello\n", 2, "the field 'completion' is missing"),
        (b"prompt,completion\nHi,Hello\nHi,\n", 3, "completion is empty"),
        (b"prompt,completion\nHi,Hello\nHi\n", 3, "fewer cells than the header"),
        (b"prompt;completion\nHi there, you;Hello, friend\n", 1, "semicolons separate"),
        (b"prompt\tcompletion\nHi\tHello\n", 1, "tabs separate"),
        (b"sep=;\nprompt;completion\nHi;Hello\n", 1, "semicolons separate"),
        (b"prompt,completion,\nHi,Hello,\n", 1, "column 3 has no name"),
        (b"prompt,prompt,completion\nHi,you,Hello\n", 1, "two columns have the name 'prompt'"),
        (b"prompt,completion\nHi,Hel\0lo\n", 2, "a byte of value 0"),
        (b"prompt,completion,topic\nHi,Hello,a\n", 2, "the key 'topic' would be lost"),
        (b"messages\nHi\n", 2, "messages must be a list of chat messages"),
        # A comma in a cell without quotes: the answer would be cut off at it.
        (b"prompt,completion\nHi,Hello, you\n", 2, "more cells than the header"),
        # A quote that is never closed: the answer would swallow all rows after it.
        (b'prompt,completion\nHi,Hello\nHi,"Hello\nHi,Hello\n', 4, "unexpected end of data"),
        # The row with the fault spans the lines 2 and 3: the line of its end is named.
        (b'prompt,completion\n"Hi\nyou",\nHi,Hello\n', 3, "completion is empty"),
        # The same after a row of two lines and a blank line.
        (b'prompt,completion\n"Hi\nyou",Hello\n\nHi,\n', 5, "completion is empty"),
    ],
)
def test_bad_csv_row(tmp_path: Path, content: bytes, line: int, fragment: str) -> None:
    require_fault(write(tmp_path / "rows.csv", content), line, fragment)


def test_csv_names_the_line_on_which_a_row_ends(tmp_path: Path) -> None:
    content = b'prompt,completion\n"a\nb",c\nd,e\n\n"f","g\n\nh"\n'
    path = write(tmp_path / "rows.csv", content)
    assert load_examples(path)["source"][:] == [f"{path}:{line}" for line in (3, 4, 8)]


@pytest.mark.parametrize(
    ("row", "fragment"),
    [
        ({"prompt": "Hi", "completion": None}, "completion must be text"),
        ({"prompt": "Hi", "completion": ""}, "completion is empty"),
    ],
)
def test_bad_parquet_row(tmp_path: Path, row: dict[str, Any], fragment: str) -> None:
    good = {"prompt": "Hi", "completion": "Hello"}
    require_fault(write_parquet(tmp_path / "rows.parquet", [good, row]), 2, fragment)


@pytest.mark.parametrize(
    ("row", "fragment"),
    [
        ({"prompt": "Hi"}, "the field 'completion' is missing"),
        ({"prompt": 7, "completion": "Hello"}, "prompt must be text"),
        ({"prompt": b"Hi", "completion": "Hello"}, "prompt must be text"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "must end with an answer"),
        ({"messages": [{"role": "human", "content": "Hi"}]}, "the role 'human'"),
        ({"messages": [{"role": "user", "content": "Hi", "name": "Al"}]}, "the key 'name'"),
        ({"prompt": "Hi", "completion": "a", "extra": {"a": 1}}, "the key 'extra'"),
        ({"messages": [{"role": "user"}]}, "needs role and content"),
    ],
)
def test_bad_parquet_column(tmp_path: Path, row: dict[str, Any], fragment: str) -> None:
    require_fault(write_parquet(tmp_path / "rows.parquet", [row]), 1, fragment)


def test_not_a_parquet_file(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", GOOD)
    with pytest.raises(DataError, match=r"rows\.parquet: not a Parquet file"):
        load_examples(path)


# -- what is not a file of rows ----------------------------------------------------------------


def fault(path: Path | str) -> str:
    with pytest.raises(DataError) as caught:
        load_examples(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "\n" not in text and len(text) < 400 + len(str(path))
    assert text.endswith((".", ")"))
    return text


def test_what_is_not_a_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")  # to open it would wait for a writer
    assert "is a folder" in fault(tmp_path / "folder.jsonl")
    assert "is a pipe or device" in fault(tmp_path / "pipe.jsonl")
    assert "is a pipe or device" in fault("/dev/null")
    assert "there is no such file" in fault(write(tmp_path / "a.jsonl", GOOD) / "b.jsonl")
    assert "cannot be read" in fault(tmp_path / ("long" * 100 + ".jsonl"))


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything
    text = fault(write(tmp_path / "rows.jsonl", GOOD))
    assert "cannot be read (Permission denied)" in text


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_other_formats_under_a_text_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    assert "compressed with gzip" in fault(write(path, gzip.compress(GOOD)))
    assert "is a ZIP archive or an Excel file" in fault(write(path, b"PK\3\4..."))
    assert "is a Parquet file" in fault(write(path, b"PAR1..."))
    assert "Unpack it first" in fault(write(tmp_path / "rows.jsonl.gz", gzip.compress(GOOD)))


@pytest.mark.parametrize(
    "content",
    [
        b'[{"prompt": "Hi", "completion": "Hello"}]',
        b'[\n  {"prompt": "Hi", "completion": "Hello"}\n]',
        b' [ {"prompt": "Hi",\n"completion": "Hello"}]',
    ],
)
def test_a_json_array(tmp_path: Path, content: bytes) -> None:
    require_fault(write(tmp_path / "rows.jsonl", content), 1, "JSON array", "one per line")


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("row", "fragment"),
    [
        ('{"prompt": "Hi", "completion": "a", "id": %s}' % ("9" * 5000), "5000 digits"),
        ('{"prompt": %s, "completion": "a"}' % ("9" * 2000), "2000 digits"),
        ('{"completion": "a", "prompt": ' + nested(200_000) + "}", "too deeply"),
        ('{"completion": "a", "prompt": ' + nested(500) + "}", "needs role and content"),
        ('{"prompt": "Hi", "completion": NaN}', "NaN is not a JSON value"),
        ('{"prompt": "Hi", "completion": "a", "x": -Infinity}', "-Infinity is not"),
        ('{"prompt": "Hi", "prompt": "you", "completion": "a"}', "the key 'prompt' is in one"),
        ('{"messages": [{"role": "user", "role": "user", "content": "a"}]}', "the key 'role' is"),
        ('{"prompt": "Hi\\u0000", "completion": "a"}', "a character of value 0"),
        ('{"prompt": "Hi", "completion": "%s"}x' % ("a" * 9999), "not JSON (Extra data"),
        ('{"prompt": "Hi", "%s": 1, "completion": "a"}' % ("k" * 9999), "would be lost"),
        ('{"prompt": "Hi", "\\ud83d\\n": 1, "completion": "a"}', "would be lost"),
    ],
)
def test_values_that_no_row_should_hold(tmp_path: Path, row: str, fragment: str) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD + row.encode() + b"\n")
    require_fault(path, 2, fragment)
    assert fault(path).isprintable()


@pytest.mark.parametrize(
    "text", ["\u200b", "\ufeff \u2060", "\u00a0", "\u3164", "\u2800", "\u200d\ufe0f", "\u00ad\t"]
)
def test_text_that_shows_nothing_is_empty(tmp_path: Path, text: str) -> None:
    for row in ({"prompt": "Hi", "completion": text}, {"prompt": text, "completion": "Hi"}):
        path = write(tmp_path / "rows.jsonl", json.dumps(row).encode())
        require_fault(path, 1, "is empty")


def test_emoji_and_joined_letters_are_text(tmp_path: Path) -> None:
    row = {"prompt": "❤️", "completion": "می‌خواهم"}
    loaded = load_examples(write(tmp_path / "rows.jsonl", json.dumps(row).encode()))
    assert loaded[0]["completion"][0]["content"] == row["completion"]


def test_a_cell_longer_than_the_csv_module_allows(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = write(tmp_path / "rows.csv", b"prompt,completion\nHi," + b"a" * 300_000 + b"\n")
    assert len(load_examples(path)[0]["completion"][0]["content"]) == 300_000
    assert csv.field_size_limit() == before


def test_parquet_with_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pyarrow.table([["Hi"], ["you"], ["a"]], names=["prompt", "prompt", "completion"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert "two columns have the name 'prompt'" in fault(tmp_path / "rows.parquet")


# -- keys --------------------------------------------------------------------------------------


def load(tmp_path: Path, *rows: dict[str, Any]) -> Dataset:
    content = "".join(json.dumps(row) + "\n" for row in rows)
    return load_examples(write(tmp_path / "rows.jsonl", content.encode()))


def test_a_system_column_becomes_the_system_message(tmp_path: Path) -> None:
    german, french = (
        {"role": "system", "content": f"Answer in {x}."} for x in ("German", "French")
    )
    question = {"role": "user", "content": "Say word 1"}
    answer = {"role": "assistant", "content": "Wort eins"}
    rows = [
        {"system": "Answer in German.", "prompt": "Say word 1", "completion": "Wort eins"},
        {"system": "Answer in French.", "prompt": [question], "completion": [answer]},
        {"system": "Answer in German.", "messages": [question, answer]},
        {"system": None, "prompt": "Say word 1", "completion": "Wort eins"},
        {"system": " ", "prompt": "Say word 1", "completion": "Wort eins"},
        {"prompt": "Say word 1", "completion": "Wort eins"},
    ]
    loaded = load(tmp_path, *rows)
    first = [[german, question], [french, question], [german, question]]
    assert loaded["prompt"][:] == [*first, *[[question]] * 3]
    assert loaded["every_answer"][:] == [False, False, True, False, False, False]
    csv_file = write(tmp_path / "rows.csv", b"system,prompt,completion\nBe,Hi,a\n,Hi,a\n")
    assert [len(prompt) for prompt in load_examples(csv_file)["prompt"]] == [2, 1]
    parquet = load_examples(write_parquet(tmp_path / "rows.parquet", rows[3:4] + rows[:1]))
    assert parquet["prompt"][:] == [[question], [german, question]]
    # Other system messages make other prompts.
    check_splits(train=load(tmp_path, rows[0]), test=load(tmp_path, rows[1]))


@pytest.mark.parametrize(
    ("row", "fragments"),
    [
        (
            {"system": "Be", "prompt": [{"role": "system", "content": "a"}], "completion": "b"},
            ["a system message among the others"],
        ),
        ({"system": 7, "prompt": "Hi", "completion": "a"}, ["system must be text"]),
        ({"system": ["Be"], "prompt": "Hi", "completion": "a"}, ["system must be text"]),
        (
            {"prompt": "Translate.", "input": "Good day", "completion": "Guten Tag"},
            ["the key 'input' would be lost", "Put the text of 'input' into the prompt"],
        ),
        (
            {"instruction": "Translate.", "input": "Good day", "output": "Guten Tag"},
            ["'prompt' is missing", "Rename 'instruction' to 'prompt'", "Rename 'output'"],
        ),
        (
            {"Prompt": "Hi", "completion": "Hello"},
            ["the field 'prompt' is missing", "Rename 'Prompt' to 'prompt'"],
        ),
        ({"prompt": "Hi", "answer": "Hello"}, ["Rename 'answer' to 'completion'"]),
        ({"prompt": "Hi", "completion": "a", " id": 1, "b": 2}, ["the keys ' id', 'b' would be"]),
        (
            {"conversations": [{"from": "human", "value": "Hi"}]},
            ["Rename 'conversations' to 'messages'"],
        ),
        ({"prompt": "Hi", "completion": "a", "messages": [1]}, ["messages and prompt too"]),
        ({"tools": [1], "messages": [{"role": "user", "content": "a"}]}, ["not supported"]),
        ({"tools": [1], "prompt": "Hi"}, ["tool calls are not supported"]),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}]},
            ["tool calls are not supported"],
        ),
        ({"messages": [{"role": "tool", "content": "a"}]}, ["tool calls are not supported"]),
        ({"prompt": [{"role": "tool"}], "completion": "a"}, ["tool calls are not supported"]),
        (
            {"messages": [{"role": "user", "content": "a", "weight": 0}]},
            ["messages: the key 'weight' of a chat message would be lost"],
        ),
        ({"messages": [{"from": "human", "value": "Hi"}]}, ["Rename from to role"]),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, ["must be text"]),
    ],
)
def test_keys_are_used_or_refused(
    tmp_path: Path, row: dict[str, Any], fragments: list[str]
) -> None:
    content = GOOD + json.dumps(row).encode()
    require_fault(write(tmp_path / "rows.jsonl", content), 2, *fragments)


def test_all_unknown_keys_of_a_file_are_named_at_once(tmp_path: Path) -> None:
    row = {"prompt": "Hi", "completion": "Hello"}
    rows = [row, row | {"id": 1}, row | {"id": 2, "date": "x"}, row | {"topic": None}]
    with pytest.raises(DataError) as caught:
        load(tmp_path, *rows)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'rows.jsonl'}:2: the keys 'id', 'date' would be lost")
    assert "(2 rows)" in text and "topic" not in text


def test_keys_that_say_nothing_are_no_fault(tmp_path: Path) -> None:
    # Parquet gives every row every key.
    message = {"role": "user", "content": "Hi", "tool_calls": None, "name": None}
    answer = {"role": "assistant", "content": "Hello", "tool_calls": None, "name": None}
    rows = [
        {"messages": [message, answer], "prompt": None, "completion": None},
        {"messages": None, "prompt": "Hi", "completion": "Hello"},
    ]
    assert load(tmp_path, *rows)["prompt"][:] == [[{"role": "user", "content": "Hi"}]] * 2


# -- splits ------------------------------------------------------------------------------------


def test_a_chat_in_two_splits(tmp_path: Path) -> None:
    def messages(*contents: str) -> dict[str, Any]:
        roles = ("user", "assistant") * len(contents)
        chat = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
        return {"messages": chat}

    long, short = messages("Hi", "Hello", "And?", "Bye"), messages("Hi", "Good day")
    other = messages("Hi", "Hello", "Or?", "Bye")
    for one, two in ((long, long), (long, short), (short, long)):  # the short one is scored
        with pytest.raises(DataError, match="split too"):
            check_splits(train=load(tmp_path, one), test=load(tmp_path, two))
    check_splits(train=load(tmp_path, long), test=load(tmp_path, other))  # they only begin alike
    prompt = {"prompt": long["messages"][:3], "completion": "So?"}
    with pytest.raises(DataError, match="split too"):
        check_splits(train=load(tmp_path, long), test=load(tmp_path, prompt))


def test_a_prompt_in_two_splits(tmp_path: Path) -> None:
    other = b'{"prompt": "Who?", "completion": "Me"}\n'
    train = load_examples(write(tmp_path / "train.jsonl", other + GOOD))
    # Another answer does not make it another prompt.
    test = load_examples(write(tmp_path / "test.jsonl", b"\n" + GOOD.replace(b"Hello", b"Bye")))
    with pytest.raises(DataError) as caught:
        check_splits(train=train, test=test)
    assert str(caught.value).startswith(f"{tmp_path / 'test.jsonl'}:2: ")
    assert f"({tmp_path / 'train.jsonl'}:2)" in str(caught.value)
    # Within one split it is allowed.
    check_splits(train=load_examples(write(tmp_path / "twice.jsonl", GOOD + GOOD)))
