"""Right forms and typical mistakes of notebook 02's exercises; test_exercises.py tries them."""

import torch

# -- 02.3: the labels of a padded row ----------------------------------------------------------


def by_counting(input_ids: list[int], attention_mask: list[int], prompt_length: int) -> list[int]:
    labels, read = [], 0
    for token, real in zip(input_ids, attention_mask, strict=True):
        read += real
        labels.append(token if real and read > prompt_length else -100)
    return labels


def with_tensors(input_ids: list, attention_mask: list, prompt_length: int) -> torch.Tensor:
    labels, mask = torch.tensor(input_ids), torch.tensor(attention_mask)
    return labels.masked_fill((mask == 0) | (mask.cumsum(0) <= prompt_length), -100)


def by_position(input_ids: list[int], attention_mask: list[int], prompt_length: int) -> list[int]:
    first = attention_mask.index(1)
    for index in range(len(input_ids)):  # changes its argument, which is allowed
        if index < first + prompt_length or not attention_mask[index]:
            input_ids[index] = -100
    return input_ids


def by_id(input_ids: list[int], attention_mask: list[int], prompt_length: int) -> list[int]:
    labels = by_counting(input_ids, attention_mask, prompt_length)
    return [-100 if label == 2 else label for label in labels]


def from_the_edge(input_ids: list[int], attention_mask: list[int], prompt_length: int) -> list[int]:
    return [-100] * prompt_length + input_ids[prompt_length:]


def from_the_edge_of_the_mask(input_ids: list[int], attention_mask: list[int], n: int) -> list:
    return [
        t if m and i >= n else -100
        for i, (t, m) in enumerate(zip(input_ids, attention_mask, strict=True))
    ]


def zeros(input_ids: list[int], attention_mask: list[int], prompt_length: int) -> list[int]:
    return [max(0, label) for label in by_counting(input_ids, attention_mask, prompt_length)]


def shifted(input_ids: list[int], attention_mask: list[int], prompt_length: int) -> list[int]:
    return [*by_counting(input_ids, attention_mask, prompt_length)[1:], -100]


def only_learned(input_ids: list[int], attention_mask: list[int], prompt_length: int) -> list[int]:
    return [x for x in by_counting(input_ids, attention_mask, prompt_length) if x != -100]


def learns_padding(input_ids: list[int], attention_mask: list[int], prompt_length: int) -> list:
    first = attention_mask.index(1) + prompt_length
    return [-100] * first + input_ids[first:]


def only_left(input_ids: list[int], attention_mask: list[int], prompt_length: int) -> list[int]:
    first = attention_mask.count(0) + prompt_length
    return [-100] * first + input_ids[first:]


def everything(input_ids: list[int], attention_mask: list[int], prompt_length: int) -> list[int]:
    return [t if real else -100 for t, real in zip(input_ids, attention_mask, strict=True)]


# -- 02.4: a shorter message -------------------------------------------------------------------

Row = list[int]


def shorten(before: Row, message: Row, after: Row, answer: Row, max_length: int) -> Row:
    room = max_length - len(before) - len(after) - len(answer)
    return before + message[: max(0, room)] + after + answer


def token_by_token(before: Row, message: Row, after: Row, answer: Row, max_length: int) -> Row:
    while len(before + message + after + answer) > max_length:
        message.pop()
    return [*before, *message, *after, *answer]


def as_tensor(before: Row, message: Row, after: Row, answer: Row, limit: int) -> torch.Tensor:
    return torch.tensor(shorten(before, message, after, answer, limit))


def right_cut(before: Row, message: Row, after: Row, answer: Row, max_length: int) -> Row:
    return (before + message + after + answer)[:max_length]


def left_cut(before: Row, message: Row, after: Row, answer: Row, max_length: int) -> Row:
    return (before + message + after + answer)[-max_length:]


def keeps_the_end(before: Row, message: Row, after: Row, answer: Row, max_length: int) -> Row:
    room = max_length - len(before + after + answer)
    return before + message[-room:] + after + answer


def keeps_the_end_safely(b: Row, message: Row, after: Row, answer: Row, max_length: int) -> Row:
    room = max_length - len(b + after + answer)
    return b + (message[-room:] if room else []) + after + answer


def cuts_off_the_surplus(before: Row, message: Row, after: Row, answer: Row, limit: int) -> Row:
    surplus = max(0, len(before + message + after + answer) - limit)
    keep = message[:-surplus] if surplus and surplus < len(message) else message
    return before + keep + after + answer


def negative_surplus(before: Row, message: Row, after: Row, answer: Row, max_length: int) -> Row:
    surplus = len(before + message + after + answer) - max_length
    return before + message[: len(message) - abs(surplus)] + after + answer


def message_alone(before: Row, message: Row, after: Row, answer: Row, max_length: int) -> Row:
    return before + message[:max_length] + after + answer


def forgets_the_answer(before: Row, message: Row, after: Row, answer: Row, limit: int) -> Row:
    return before + message[: limit - len(before + after)] + after + answer


def drops_the_message(before: Row, message: Row, after: Row, answer: Row, limit: int) -> Row:
    fits = len(before + message + after + answer) <= limit
    return before + (message if fits else []) + after + answer


RIGHT: list[tuple[str, object]] = [
    ("02.1", 12),
    ("02.1", "12"),
    ("02.1", "12 tokens"),
    ("02.1", len("Größe 💡".encode())),
    ("02.1", "Größe 💡".encode()),
    ("02.1", list("Größe 💡".encode())),
    ("02.1", torch.tensor(12)),
    ("02.2", 130),
    ("02.2", "130"),
    ("02.2", "130 tokens"),
    ("02.2", 145 - 15),
    ("02.2", torch.tensor(130.0)),
    ("02.3", by_counting),
    ("02.3", with_tensors),
    ("02.3", by_position),
    ("02.4", shorten),
    ("02.4", token_by_token),
    ("02.4", as_tensor),
]
WRONG: list[tuple[str, object, str]] = [
    ("02.1", 7, "counted characters"),
    ("02.1", "9", "light bulb?"),
    ("02.1", 10, "not English"),
    ("02.1", 11, "between the word"),
    ("02.1", 2, "counted words"),
    ("02.1", 42, "how many bytes each"),
    ("02.2", 145, "left after grouping?"),
    ("02.2", 15, "were there before"),
    ("02.2", 150, "padded to 110"),
    ("02.2", 165, "padded to 110"),
    ("02.2", -130, "saving or a loss"),
    ("02.2", 160, "difference"),
    ("02.2", 3, "sorted by length"),
    ("02.3", by_id, "by its id"),
    ("02.3", from_the_edge, "position 0"),
    ("02.3", zeros, "Which number does the loss skip"),
    ("02.3", shifted, "shifts by itself"),
    ("02.3", only_learned, "equally long"),
    ("02.3", learns_padding, "eos after eos"),
    ("02.3", only_left, "padded on the right: where"),
    ("02.3", from_the_edge_of_the_mask, "position 0"),
    ("02.3", everything, "message too"),
    ("02.3", lambda ids, mask, n: [5] * len(ids), "it should give"),
    ("02.4", right_cut, "cut the end of the row"),
    ("02.4", left_cut, "cut the beginning"),
    ("02.4", keeps_the_end, "message[-0:]"),
    ("02.4", keeps_the_end_safely, "beginning was asked for"),
    ("02.4", cuts_off_the_surplus, "no room for the message"),
    ("02.4", negative_surplus, "come out unchanged"),
    ("02.4", message_alone, "still longer"),
    ("02.4", forgets_the_answer, "still longer"),
    ("02.4", drops_the_message, "More is gone"),
    ("02.4", lambda b, m, a, w, limit: w + m[:3] + a + b, "How much room"),
]
TASKS = [
    ("02.1", "single merge"),
    ("02.2", "batches of two"),
    ("02.3", "row_labels"),
    ("02.4", "shorten"),
]
