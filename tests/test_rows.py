"""helpers/rows.py: every error that a file can have.

Each error names its file and line. For JSONL that is the line, for Parquet the row, counted from 1;
for CSV it is the line on which the row ends, because a quoted cell may hold line breaks.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

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
        (b'{"messages": "Hi"}', "messages must be text or a list"),
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
    require_fault(write(tmp_path / "rows.jsonl", GOOD.decode().encode("utf-16")), 1, "not UTF-8")
    csv = "prompt,completion\nHi,Hello\n".encode("utf-16")
    require_fault(write(tmp_path / "rows.csv", csv), 1, "not UTF-8")


@pytest.mark.parametrize(
    ("content", "line", "fragment"),
    [
        (b"prompt,answer\nHi,Hello\n", 2, "the field 'completion' is missing"),
        (b"prompt;completion\nHi;Hello\n", 2, "the field 'prompt' is missing"),
        (b"prompt,completion\nHi,Hello\nHi,\n", 3, "completion is empty"),
        (b"prompt,completion\nHi,Hello\nHi\n", 3, "completion must be text"),
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
        ({"messages": [{"role": "user"}]}, "needs role and content"),
    ],
)
def test_bad_parquet_column(tmp_path: Path, row: dict[str, Any], fragment: str) -> None:
    require_fault(write_parquet(tmp_path / "rows.parquet", [row]), 1, fragment)


def test_not_a_parquet_file(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", GOOD)
    with pytest.raises(DataError, match=r"rows\.parquet: not a Parquet file"):
        load_examples(path)


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
