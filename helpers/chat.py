"""A chat -> token ids, in which only the chat template writes control tokens.

A template puts control tokens such as <|im_end|> around the messages, and tokenizers read them
in a message as well: whoever types one ends a turn and begins another in the system's name.
Here the content of a message is plain text. Without such text in it, the token ids are those of
`apply_chat_template(tokenize=True)`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerBase

from helpers import CourseError
from helpers.rows import DataError

Messages = list[dict[str, str]]
Ids = list[int]
Span = tuple[int, int]

# Templates of reasoning models then let the answer begin at once; others ignore it.
NO_THOUGHTS = {"enable_thinking": False}
PLACEHOLDERS = 0xF0000  # private characters, which no template trims or changes
STAND_INS = 0x100000


@dataclasses.dataclass(frozen=True)
class Answer:
    """Where an answer is: its characters, and its tokens, up to the end of its turn."""

    characters: Span
    tokens: Span


@dataclasses.dataclass(frozen=True)
class EncodedChat:
    """A conversation as text and as tokens.

    Attributes:
        offsets: the characters of `text` that each token stands for.
        answers: the answers to train, in order.
        prompt_length: how many characters come before the last answer.
        last_content: the characters of the last answer without its end-of-turn token.
    """

    text: str
    input_ids: Ids
    offsets: list[Span]
    answers: list[Answer]
    prompt_length: int
    last_content: Span


@dataclasses.dataclass(frozen=True)
class _Frame:
    """What a template writes around messages of certain roles: the contents are placeholders."""

    text: str
    controls: Ids


@dataclasses.dataclass(frozen=True)
class _Found:
    """Characters of an answer, and the text that asks for it (None if the whole has it not)."""

    prompt: str | None
    start: int
    end: int
    index: int


class ChatEncoder:
    """Encodes chats with the chat template of a tokenizer. Make one for many chats."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise CourseError(
                f"{type(tokenizer).__name__} cannot say where in a text its tokens are. Use a "
                f"model with a tokenizer.json."
            )
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        special = set(tokenizer.all_special_ids)
        self.control = {i: t for i, t in added.items() if t.special or i in special}
        self._frames: dict[Any, _Frame] = {}
        self._plain: dict[int, tuple[tokenizers.Tokenizer, dict[int, int | None]]] = {}
        question = {"role": "user", "content": "-"}
        turns = ""  # some models' turns begin and end with tokens that are not marked as special
        for messages in ([question], [{"role": "system", "content": "-"}, question]):
            with contextlib.suppress(DataError):
                turns += self._render(messages, "", True)
        self.control |= {
            i: t for i, t in added.items() if t.content in turns and "think" not in t.content
        }

    # -- what others call ----------------------------------------------------------------------

    def encode_prompt(
        self, messages: Messages, where: str = "prompt", thoughts: bool = False
    ) -> Ids:
        """Token ids of messages and the generation prompt: what the model reads to answer.

        Args:
            where: named in errors.
            thoughts: let a reasoning model write thoughts before its answer.
        """
        options = {} if thoughts else NO_THOUGHTS
        text = self._render(messages, where, True, **options)
        return self._encode(text, messages, where, True, options)[0]

    def encode_chat(
        self, messages: Messages, where: str = "chat", every_answer: bool = False
    ) -> EncodedChat:
        """Encode a conversation that ends with an answer.

        Args:
            where: "file:line", named in errors.
            every_answer: find all messages of the assistant, not the last alone.

        Raises:
            DataError: the template refuses the messages, or the answers cannot be located.
        """
        text, prompt, options = self._write(messages, where)
        ids, offsets = self._encode(text, messages, where, False, options)
        found = [_Found(prompt, len(prompt), len(text), len(messages) - 1)]
        if every_answer:
            roles = [message["role"] for message in messages[:-1]]
            earlier = [index for index, role in enumerate(roles) if role == "assistant"]
            found[:0] = [self._find_answer(text, messages, i, where, options) for i in earlier]
        firsts = self._first_tokens(ids, found, messages, where, options)
        if firsts is None:  # a token across the seam: an answer cannot begin inside a token
            spans = self._contents(text, messages, where, False, options)
            cuts = [one.start for one in found if one.prompt is not None]
            cut_ids, cut_offsets, firsts = self._encode_apart(text, spans, cuts)
            if self.tokenizer.decode(cut_ids) == self.tokenizer.decode(ids):
                ids, offsets = cut_ids, cut_offsets
            else:  # some tokenizers put a space before every piece
                firsts = {}
        answers = [
            Answer((one.start, one.end), _tokens(offsets, one, firsts.get(one.start)))
            for one in found
        ]
        content = self._last_content(text, messages, where, options)
        return EncodedChat(text, ids, offsets, answers, len(prompt), content)

    def split(self, messages: Messages, where: str = "chat") -> tuple[str, str]:
        """The text of the prompt, and that of the last answer with its end-of-turn token."""
        text, prompt, _ = self._write(messages, where)
        return prompt, text[len(prompt) :]

    def stop_ids(self) -> Ids:
        """The tokens that end an answer: eos, and the template's end-of-turn token."""
        stops = {self.tokenizer.eos_token_id}
        question, answer = ({"role": r, "content": "-"} for r in ("user", "assistant"))
        with contextlib.suppress(DataError):  # a template that refuses this chat: eos must do
            stops.add(self._end_token(self._frame([question, answer], "", False, NO_THOUGHTS)))
        return sorted(stops - {None})

    # -- the text ------------------------------------------------------------------------------

    def _render(self, messages: Messages, where: str, ask: bool, **options: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=ask, **options
            )
        except Exception as error:  # a template is a foreign program, and may raise anything
            reason = " ".join(str(error).split())[:120]
            raise DataError(
                f"{where}: the chat template of this model refuses the messages "
                f"({reason}). Change the row, or choose another model."
            ) from error

    def _write(self, messages: Messages, where: str) -> tuple[str, str, dict[str, Any]]:
        """The whole text up to the end of the answer, its prompt, and the template's options."""
        for options in (NO_THOUGHTS, {}):  # the second for answers that hold thoughts
            text = self._render(messages, where, False, **options).rstrip()
            prompt = self._render(messages[:-1], where, True, **options)
            if text.startswith(prompt):
                break
        else:
            raise DataError(
                f"{where}: the chat template writes the prompt differently once the answer "
                f"follows, so the two cannot be told apart. Choose another model."
            )
        if self._end_token(self._frame(messages, where, False, options)) is None:
            text += self.tokenizer.eos_token or ""
        return text, prompt, options

    def _frame(self, messages: Messages, where: str, ask: bool, options: Any) -> _Frame:
        key = (tuple(message["role"] for message in messages), ask, tuple(options))
        if key not in self._frames:
            contents = [chr(PLACEHOLDERS + index) for index in range(len(messages))]
            text = self._render(
                [m | {"content": c} for m, c in zip(messages, contents, strict=True)],
                where,
                ask,
                **options,
            )
            for message, content in zip(messages, contents, strict=True):
                if content not in text:
                    raise DataError(
                        f"{where}: the chat template of this model leaves out a message of the "
                        f"role {message['role']!r}. Remove it, or choose another model."
                    )
            self._frames[key] = _Frame(text, self._controls(text, *self._joint(text)))
        return self._frames[key]

    def _end_text(self, frame: _Frame) -> str:
        """What the template writes after the last answer, up to its first control token."""
        _, _, after = frame.text.rpartition(
            max(char for char in frame.text if PLACEHOLDERS <= ord(char) < STAND_INS)
        )
        found = self._pattern.search(after)
        return after[: found.end()] if found else ""

    def _end_token(self, frame: _Frame) -> int | None:
        """The control token that the template writes after the last answer, if it writes one."""
        found = self._pattern.search(self._end_text(frame))
        return self.tokenizer.convert_tokens_to_ids(found[0]) if found else None

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        """Any control token; the longest first, as tokenizers match them."""
        texts = sorted((token.content for token in self.control.values()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    # -- where things are ----------------------------------------------------------------------

    def _find_content(
        self, text: str, messages: Messages, index: int, where: str, ask: bool, options: Any
    ) -> Span:
        """Where the template has written a message: what changes if only its content does."""
        full = self._render(messages, where, ask, **options)
        mark = next(c for c in map(chr, range(PLACEHOLDERS, STAND_INS)) if c not in full)
        changed = [*messages]
        changed[index] = messages[index] | {"content": mark}
        other = self._render(changed, where, ask, **options)
        before, _, after = other.partition(mark)
        if mark in after or mark not in other or not full.endswith(after):
            raise DataError(
                f"{where}: message {index + 1} cannot be found in what the chat template writes. "
                f"Remove control tokens from its content, or choose another model."
            )
        start = next(
            (i for i, (a, b) in enumerate(zip(full, before, strict=False)) if a != b), len(before)
        )
        return min(start, len(text)), min(len(full) - len(after), len(text))

    def _contents(
        self, text: str, messages: Messages, where: str, ask: bool, options: Any
    ) -> list[Span]:
        return [
            self._find_content(text, messages, index, where, ask, options)
            for index in range(len(messages))
        ]

    def _find_answer(
        self, text: str, messages: Messages, index: int, where: str, options: Any
    ) -> _Found:
        """An answer before the last, with its end-of-turn token."""
        start, stop = self._find_content(text, messages, index, where, False, options)
        prompts = (self._render(messages[:index], where, True, **o) for o in (options, {}))
        prompt = next((p for p in prompts if text.startswith(p) and len(p) <= stop), None)
        frame = self._frame(messages, where, False, options)
        ends = [self._end_text(frame), self.tokenizer.eos_token]
        end = next((end for end in ends if end and text.startswith(end, stop)), "")
        stop += len(end)
        return _Found(prompt, start if prompt is None else len(prompt), stop, index)

    def _last_content(self, text: str, messages: Messages, where: str, options: Any) -> Span:
        content = messages[-1]["content"]
        frame = self._frame(messages, where, False, options).text.rstrip()
        after = frame.rpartition(chr(PLACEHOLDERS + len(messages) - 1))[2]
        stop = len(text) - len(after or self.tokenizer.eos_token or "")
        for form in (content, content.strip()):
            if text[:stop].endswith(form):
                return stop - len(form), stop
        return self._find_content(text, messages, len(messages) - 1, where, False, options)

    # -- the tokens ----------------------------------------------------------------------------

    def _joint(self, text: str) -> tuple[Ids, list[Span]]:
        """Tokens of the whole text, control tokens wherever they are written."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def _first_tokens(
        self, ids: Ids, found: list[_Found], messages: Messages, where: str, options: Any
    ) -> dict[int, int] | None:
        """{start of an answer: tokens before it}; None if the prompt alone has other tokens."""
        firsts = {}
        for one in found:
            if one.prompt is None:
                continue
            before, _ = self._encode(one.prompt, messages[: one.index], where, True, options)
            if ids[: len(before)] != before:
                return None
            firsts[one.start] = len(before)
        return firsts

    def _controls(self, text: str, ids: Ids, offsets: list[Span]) -> Ids:
        """The control tokens among the ids, in order."""
        unknown = self.tokenizer.unk_token_id  # may also stand for a character without a token
        return [
            token
            for token, (start, end) in zip(ids, offsets, strict=True)
            if token in self.control
            and (token != unknown or text[start:end].strip() == self.control[token].content)
        ]

    def _encode(
        self, text: str, messages: Messages, where: str, ask: bool, options: Any
    ) -> tuple[Ids, list[Span]]:
        ids, offsets = self._joint(text)
        expected = self._frame(messages, where, ask, options)
        controls = expected.controls
        if not ask and self._end_token(expected) is None and self.tokenizer.eos_token:
            controls = [*controls, self.tokenizer.eos_token_id]
        if self._controls(text, ids, offsets) != controls:  # a content holds some of its own
            spans = self._contents(text, messages, where, ask, options)
            ids, offsets, _ = self._encode_apart(text, spans)
            if self._controls(text, ids, offsets) != controls:
                raise DataError(
                    f"{where}: a message holds a control token of this model, which cannot be "
                    f"read as plain text here. Remove it from the message."
                )
        return ids, offsets

    def _encode_apart(
        self, text: str, contents: Sequence[Span], cuts: Sequence[int] = ()
    ) -> tuple[Ids, list[Span], dict[int, int]]:
        """Encode with a tokenizer to which control tokens mean nothing, and stand-ins all.

        Returns:
            The ids, the offsets, and for each cut the number of tokens before it.
        """
        first = STAND_INS
        while any(first <= ord(char) <= first + len(self.control) for char in text):
            first += len(self.control) + 1  # text that holds a stand-in: take others
        backend, ids_of = self._plain_tokenizer(first)
        cut = chr(first)
        names = {
            token.content: chr(first + 1 + number) * len(token.content)
            for number, token in enumerate(self.control.values())
        }
        pieces, position = [], 0
        for start, end in [*sorted(contents), (len(text), len(text))]:
            start, end = max(start, position), max(end, position)
            between = self._pattern.sub(lambda found: names[found[0]], text[position:start])
            pieces += [between, text[start:end]]
            position = end
        written = "".join(pieces)  # as long as the text, so positions are the same
        for place in sorted(cuts, reverse=True):
            written = written[:place] + cut + written[place:]
        encoded = backend.encode(written, add_special_tokens=False)
        ids: Ids = []
        offsets: list[Span] = []
        places: dict[int, int] = {}
        for token, (start, end) in zip(encoded.ids, encoded.offsets, strict=True):
            if token in ids_of and ids_of[token] is None:
                places[start - len(places)] = len(ids)
                continue
            ids.append(ids_of.get(token, token))
            offsets.append((start - len(places), end - len(places)))
        return ids, offsets, places

    def _plain_tokenizer(self, first: int) -> tuple[tokenizers.Tokenizer, dict[int, int | None]]:
        """A copy that reads control tokens as text, and private characters as control tokens."""
        if first in self._plain:
            return self._plain[first]
        backend = copy.deepcopy(self.tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        backend.add_special_tokens(list(self.control.values()))
        ids_of: dict[int, int | None] = {}
        cut = tokenizers.AddedToken(chr(first), normalized=False)
        stand_ins = [
            tokenizers.AddedToken(
                chr(first + 1 + number) * len(token.content),
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
            )
            for number, token in enumerate(self.control.values())
        ]
        backend.add_tokens([cut, *stand_ins])
        for token, control in zip([cut, *stand_ins], [None, *self.control], strict=True):
            ids_of[backend.token_to_id(token.content)] = control
        backend.encode_special_tokens = True
        self._plain = {first: (backend, ids_of)}
        return backend, ids_of


def _tokens(offsets: list[Span], found: _Found, first: int | None) -> Span:
    """The tokens of an answer; `first` if it is known where they begin."""
    if first is None:
        first = next((i for i, (_, end) in enumerate(offsets) if end > found.start), len(offsets))
    after = (i for i, (start, _) in enumerate(offsets) if i >= first and start >= found.end)
    return first, next(after, len(offsets))
