"""Tests of data/: the shape of the files, their honesty (no leaks, no templates), the baselines.

The baselines say which fields need no language model. They and every count in data/README.md are
measured here, so the datasheet cannot drift away from the data.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import combinations
from statistics import median
from typing import Any

import pytest
from datasets import DatasetDict
from transformers import PreTrainedTokenizerBase

from helpers import data, encoding
from helpers.profiles import Profile
from helpers.rows import check_splits

Row = dict[str, Any]

CATEGORIES = {"delivery", "billing", "return", "defect", "account", "question"}
URGENCIES = {"low", "normal", "high"}
COLUMNS = ["message", "category", "urgency", "product", "order"]
SIZES = {"train": 456, "validation": 114, "test": 114}
README = (data.DATA / "README.md").read_text(encoding="utf-8")


def read_jsonl(name: str) -> list[Row]:
    # Decoded strictly, and split at "\n" alone: a stray U+2028 in a message is not a new line.
    lines = (data.DATA / name).read_bytes().decode("utf-8").split("\n")
    assert lines.pop() == "", f"{name} must end with a newline"
    return [json.loads(line) for line in lines]


# Read with plain json: these tests must not depend on the loader that they also test.
SPLITS = {name: read_jsonl(f"triage/{name}.jsonl") for name in SIZES}
ROWS = [(f"{name}:{n}", row) for name, rows in SPLITS.items() for n, row in enumerate(rows, 1)]
WORD = re.compile(r"\w+(?:['’]\w+)*")


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return WORD.findall(text.lower())


def assert_in_readme(*cells: object) -> None:
    """A row of a table in the datasheet is what was measured just now."""
    line = f"| {' | '.join(map(str, cells))} |"
    assert line in README.splitlines(), f"data/README.md should have the row\n{line}"


def spread(values: list[int]) -> str:
    return f"{min(values)} / {median(values):g} / {max(values)}"


# -- shape -------------------------------------------------------------------------------------


def test_rows_have_the_columns_and_the_labels_of_the_guide() -> None:
    for where, row in ROWS:
        assert list(row) == COLUMNS, where
        assert isinstance(row["message"], str), where
        assert row["category"] in CATEGORIES, where
        assert row["urgency"] in URGENCIES, where
        # By the guide a question is low, or high when it has a deadline.
        assert (row["category"], row["urgency"]) != ("question", "normal"), where


def test_messages_are_one_line_of_5_to_80_words() -> None:
    for where, row in ROWS:
        message = row["message"]
        assert message.splitlines() == [message.strip()], where
        assert 5 <= len(message.split()) <= 80, where


def test_product_and_order_are_copied_from_the_message() -> None:
    for where, row in ROWS:
        for field in ("product", "order"):
            value = row[field]
            if value is not None:
                assert isinstance(value, str) and value == value.strip() != "", where
                assert value in row["message"], where


@pytest.mark.parametrize("name", SIZES)
def test_each_split_has_its_size_and_a_fair_share_of_every_value(name: str) -> None:
    rows = SPLITS[name]
    assert len(rows) == SIZES[name]
    categories = Counter(row["category"] for row in rows)
    urgencies = Counter(row["urgency"] for row in rows)
    assert all(0.10 <= categories[c] / len(rows) <= 0.25 for c in CATEGORIES), categories
    assert all(urgencies[u] / len(rows) >= 0.15 for u in URGENCIES), urgencies
    for field in ("product", "order"):
        assert 0.10 <= sum(row[field] is None for row in rows) / len(rows) <= 0.60, field


def test_the_other_two_files() -> None:
    prose = read_jsonl("prose.jsonl")
    assert len(prose) == 30
    assert all(list(row) == ["topic", "text"] for row in prose)
    assert all(80 <= len(row["text"].split()) <= 150 for row in prose)
    questions = read_jsonl("questions.jsonl")
    assert len(questions) == 20
    assert all(list(row) == ["question", "kind"] for row in questions)
    for rows in (prose, questions):
        assert len({tuple(row.values()) for row in rows}) == len(rows)


# -- no leaks, no templates --------------------------------------------------------------------


def test_no_message_stands_twice() -> None:
    counts = Counter(" ".join(words(row["message"])) for _, row in ROWS)
    assert [text for text, count in counts.items() if count > 1] == []


def test_no_two_messages_share_many_trigrams() -> None:
    # Near-duplicates across splits would turn the test score into a measure of memory.
    trigrams = []
    for where, row in ROWS:
        text = words(row["message"])
        grams = set(zip(text, text[1:], text[2:], strict=False))
        trigrams.append((where.split(":")[0], where, grams))
    for (split_a, a, grams_a), (split_b, b, grams_b) in combinations(trigrams, 2):
        limit = 0.7 if split_a == split_b else 0.5
        assert len(grams_a & grams_b) <= limit * min(len(grams_a), len(grams_b)), (a, b)


def test_no_opening_is_a_template() -> None:
    openings = Counter(tuple(words(row["message"])[:3]) for _, row in ROWS)
    opening, count = openings.most_common(1)[0]
    assert count <= 0.02 * len(ROWS), opening


# -- the loader --------------------------------------------------------------------------------


def test_load_triage_gives_the_splits_with_the_columns_of_its_docstring() -> None:
    splits = data.load_triage()
    assert isinstance(splits, DatasetDict)
    assert {name: len(split) for name, split in splits.items()} == SIZES
    for name, split in splits.items():
        assert split.column_names == [*COLUMNS, "prompt", "completion", "source"]
        assert split.select_columns(COLUMNS).to_list() == SPLITS[name]
    first = splits["test"][0]
    assert first["prompt"] == data.triage_prompt(first["message"])
    assert first["completion"] == [{"role": "assistant", "content": data.ticket_json(first)}]
    assert first["source"] == "test.jsonl:1"
    check_splits(**splits)


def test_ticket_json_is_compact_stable_and_keeps_letters() -> None:
    row = {
        "order": "№ 7/Ä",
        "product": 'Étoile 5" Wiśnia',
        "urgency": "low",
        "category": "return",
        "message": "not part of the ticket",
    }
    text = data.ticket_json(row)
    assert text == (
        '{"category":"return","urgency":"low","product":"Étoile 5\\" Wiśnia","order":"№ 7/Ä"}'
    )
    assert data.ticket_json(dict(reversed(row.items()))) == text
    for _, row in ROWS:
        ticket = json.loads(data.ticket_json(row))
        assert list(ticket) == list(data.FIELDS)
        assert ticket == {field: row[field] for field in data.FIELDS}
        assert data.ticket_json(ticket) == data.ticket_json(row)


# -- baselines without a language model --------------------------------------------------------

# The rules for `order` were written in two rounds while looking at the errors on train and
# validation (96 %, then 98 % exact); the test split was scored once, when they were done.

ORDER_WORD = r"\b(?:orders?|ordr|purchase|booking|commande|command|bestellung|pedido|zamówienie)\b"
FILLER = r"(?:[\s:#.,(]|'s\b|\b(?:no|nr|number|ref|reference|is|was|has|the|on|slip|for|it)\b)*"
NUMBER = (
    r"(?P<number>"
    r"(?:\b(?!NO|NR|IS|OF|TO)[A-Z]{1,2} )?"  # a prefix set apart: "PL 77310"
    r"\b(?=[A-Za-z./-]{0,4}\d)[A-Za-z0-9]+(?:[-./][A-Za-z0-9]+)*"  # "4471", "HK.2291.7", "k-31-77"
    r"(?: (?:\d[\d./-]*|[A-HJ-Z]\b(?!'))"  # groups: "20 931 47", "6618 Q"; not "47 I think",
    r"(?![\w:,.]*\d| ?(?:euro|EUR|[ap]m|cm|kg)\b))*"  # and not a time or a price that follows
    r")(?<![./-])(?![\w:%€£]|,\d)"
)
NAMED_BEFORE = re.compile(rf"(?i:{ORDER_WORD}{FILLER}){NUMBER}")  # "order no. 4471"
NAMED_AFTER = re.compile(  # "4471 was my order", "4471 it says on the order slip"
    rf"{NUMBER},? (?i:(?:(?:is|was|that's|on|it says on) )?(?:what )?(?:the|my|our|your|you)\b"
    rf"[^.!?]{{0,20}}{ORDER_WORD}|ordered\b)"
)
UNNAMED = re.compile(NUMBER)
NAMED_OTHERWISE = re.compile(  # "tracking 4471", "my customer number is 4471"
    r"(?i)(?:track|parcel|invoice|case|ticket|return n|member|customer|phone|number,|ring|code"
    r"|voucher|card|serial|batch|lot|article|receipt n|delivery note|near)\w*\W+(?:\w+\W+){0,3}$"
)
SHAPED_OTHERWISE = re.compile(  # a price, two kinds of date, a size, a phone number
    r"\d+[.,]\d\d|\d{1,2}/\d{2,4}|\d{1,2}\.\d{1,2}\.\d{2,4}|\d+x\d+|0\d{3,4} [\d ]+"
)


def order_after_the_word(message: str) -> str | None:
    """The plain rule: what stands right behind the word "order" and has a digit."""
    match = re.search(r"(?i)\border:? #?(\S*\d\S*\w)", message)
    return match and match[1]


def order_by_rules(message: str) -> str | None:
    """The best rule: a number named an order, or else one that nothing speaks against."""
    for pattern in (NAMED_BEFORE, NAMED_AFTER):
        for match in pattern.finditer(message):
            if len(match["number"]) >= 4:
                return match["number"]
    for match in UNNAMED.finditer(message):
        number = match["number"]
        long = len(number) >= 5 and sum(c.isdigit() for c in number) >= 3
        otherwise = NAMED_OTHERWISE.search(message[: match.start()])
        if long and not otherwise and not SHAPED_OTHERWISE.fullmatch(number):
            return number
    return None


def product_by_words(rows: Iterable[Row]) -> Callable[[str], str | None]:
    """Learn which words stand in products; answer the run with the most such words.

    A word never seen before may belong to a product too: a new word is often a name.
    """
    inside, seen = Counter(), Counter()
    for row in rows:
        inside.update(words(row["product"] or ""))
        seen.update(words(row["message"]))

    def belongs(word: str) -> bool:
        # 0.3 was the best of 0.3, 0.5 and 0.7 on the validation split.
        return inside[word] >= 0.3 * seen[word] if word in seen else not word[0].isdigit()

    def predict(message: str) -> str | None:
        runs: list[list[re.Match[str]]] = []
        for match in WORD.finditer(message):
            if belongs(match[0].lower()):
                if runs and message[runs[-1][-1].end() : match.start()] in (" ", "-", " & "):
                    runs[-1].append(match)
                else:
                    runs.append([match])
        if not runs:
            return None
        best = max(runs, key=lambda run: (sum(inside[m[0].lower()] > 0 for m in run), len(run)))
        return message[best[0].start() : best[-1].end()]

    return predict


def majority(rows: Iterable[Row], field: str) -> Callable[[str], str | None]:
    """Always answer the value most frequent in the rows."""
    value = Counter(row[field] for row in rows).most_common(1)[0][0]
    return lambda message: value


def naive_bayes(rows: Iterable[Row], field: str) -> Callable[[str], str]:
    """Multinomial Naive Bayes over word counts, with add-one smoothing."""
    counts: dict[str, Counter[str]] = {}
    rows_of: Counter[str] = Counter()
    for row in rows:
        rows_of[row[field]] += 1
        counts.setdefault(row[field], Counter()).update(words(row["message"]))
    vocabulary = set().union(*counts.values())
    total = {label: count.total() + len(vocabulary) for label, count in counts.items()}

    def log_probability(label: str, known: list[str]) -> float:
        return math.log(rows_of[label]) + sum(
            math.log((counts[label][word] + 1) / total[label]) for word in known
        )

    def predict(message: str) -> str:
        known = [word for word in words(message) if word in vocabulary]
        return max(sorted(counts), key=lambda label: log_probability(label, known))

    return predict


def accuracy(predict: Callable[[str], str | None], field: str, rows: list[Row]) -> float:
    return sum(predict(row["message"]) == row[field] for row in rows) / len(rows)


def percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def test_baselines_are_above_chance_and_the_datasheet_reports_them() -> None:
    train, test = SPLITS["train"], SPLITS["test"]
    best = {
        "category": naive_bayes(train, "category"),
        "urgency": naive_bayes(train, "urgency"),
        "product": product_by_words(train),
        "order": order_by_rules,
    }
    always = {field: majority(train, field) for field in best}
    for field, predict in best.items():
        chance, score = accuracy(always[field], field, test), accuracy(predict, field, test)
        assert_in_readme(f"`{field}`", percent(chance), percent(score))
        # `order` has no upper bound: it is the field that rules do solve.
        assert chance < score and (score < 0.9 or field == "order"), field
    assert f"scores {percent(accuracy(order_after_the_word, 'order', test))}" in README

    def share_exact(predictors: dict[str, Callable[[str], str | None]]) -> float:
        exact = [all(p(row["message"]) == row[f] for f, p in predictors.items()) for row in test]
        return sum(exact) / len(exact)

    assert_in_readme("all four", percent(share_exact(always)), percent(share_exact(best)))


# -- the counts of the datasheet ---------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_the_datasheet_states_the_counts(name: str) -> None:
    rows = SPLITS[name]
    urgencies = Counter(row["urgency"] for row in rows)
    (per_category,) = set(Counter(row["category"] for row in rows).values())
    assert_in_readme(
        f"`{name}`",
        len(rows),
        per_category,
        " / ".join(str(urgencies[u]) for u in ("low", "normal", "high")),
        *(sum(row[field] is None for row in rows) for field in ("product", "order")),
        spread([len(row["message"].split()) for row in rows]),
    )


def test_the_datasheet_states_the_lengths_in_tokens(
    triage: DatasetDict, laptop: Profile, laptop_tokenizer: PreTrainedTokenizerBase
) -> None:
    for name, rows in triage.items():
        messages = laptop_tokenizer(list(rows["message"]), add_special_tokens=False)["input_ids"]
        features = encoding.encode(rows, laptop_tokenizer, laptop.max_length)
        answers = [sum(i != encoding.IGNORED for i in labels) for labels in features["labels"]]
        assert_in_readme(
            f"`{name}`",
            spread([len(ids) for ids in messages]),
            spread(answers),
            spread(list(features["length"])),
        )


def test_the_datasheet_describes_the_other_two_files() -> None:
    lengths = [len(row["text"].split()) for row in read_jsonl("prose.jsonl")]
    assert f"{len(lengths)} passages of {min(lengths)} to {max(lengths)} words" in README
    kinds = Counter(row["kind"] for row in read_jsonl("questions.jsonl"))
    assert f"{kinds.total()} questions" in README
    assert all(f"{count} `{kind}`" in README for kind, count in kinds.items()), kinds
