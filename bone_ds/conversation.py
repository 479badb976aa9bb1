"""A conversation with a model: what it has read stays read, in its state or cache."""

from __future__ import annotations

from collections.abc import Callable

from bone_ds.arch import Reading
from bone_ds.data.chat_template import ChatTemplate, template_text
from bone_ds.data.fields import Turn
from bone_ds.data.prompts import without_blank_lines
from bone_ds.data.tokenization import eos_of
from bone_ds.errors import DataError
from bone_ds.generate import Choice, Loaded, TextStream, check_is_text, generate


class Conversation:
    """Turns through the tokenizer's chat template; where it knows none, as RWKV's, User: and Assistant: turns, as in training."""

    def __init__(self, loaded: Loaded, choose: Choice, max_new_tokens: int, repetition_penalty: float = 1.0, template: str | None = None):
        """template: in place of the tokenizer's own, as data.chat_template. Raises DataError where a Llama's tokenizer has none."""
        self._loaded = loaded
        self._choose = choose
        self._max_new_tokens = max_new_tokens
        self._penalty = repetition_penalty
        self._wording = _Templated(loaded.tokenizer, template) if hasattr(loaded.tokenizer, "apply_chat_template") else _Plain(
            loaded.tokenizer, template)
        self._memory = _Memory(loaded)

    def answer(self, text: str, show: Callable[[str], None], interrupted: Callable[[], bool] = lambda: False) -> str:
        """The model's answer, shown as it comes. `interrupted` is asked after every token; what was said until then stays said.

        Raises DataError for what is no text.
        """
        check_is_text("--chat", text)
        ids = self._wording.ask(text)
        stream = TextStream(self._loaded.tokenizer, self._wording.stop_texts, show)
        unread = self._memory.unread(ids)
        (tokens,) = generate(
            self._loaded.architecture, self._loaded.model, [unread], self._max_new_tokens, self._wording.stop_tokens, self._choose,
            self._penalty, lambda _, tokens: stream.follow(tokens) or interrupted(), self._memory)
        answer = stream.finish(tokens)
        self._wording.answered(answer, tokens)
        return answer


class _Memory:
    """`bone_ds.arch.Reading` of one document that knows what it has read."""

    def __init__(self, loaded: Loaded):
        self._loaded = loaded
        self._reading: Reading | None = None
        self._read: list[int] = []

    def unread(self, ids: list[int]) -> list[int]:
        """What of the document is still to be read: all of it, from the start, where it is not what was read and more."""
        if self._reading is None or len(ids) <= len(self._read) or ids[:len(self._read)] != self._read:
            self._reading, self._read = self._loaded.architecture.reading(self._loaded.model, 1), []
        return ids[len(self._read):]

    def read(self, tokens: list[list[int]]):
        self._read += tokens[0]
        return self._reading.read(tokens)

    def keep(self, documents: list[int]) -> None:
        assert documents == [0], "a conversation is one document"


class _Templated:
    """The conversation is rendered anew for every turn."""

    stop_texts = ()

    def __init__(self, tokenizer, template: str | None):
        given = None if template is None else template_text(template, "--chat-template")
        self._template = ChatTemplate(tokenizer, given, "--chat", "--chat-template")
        self._turns: list[Turn] = []
        self.stop_tokens = {eos_of(tokenizer), *self._end_of_turn()}

    def ask(self, text: str) -> list[int]:
        self._turns.append(Turn("user", text))
        return self._ids(self._turns, asks=True)

    def answered(self, answer: str, tokens: list[int]) -> None:
        self._turns.append(Turn("assistant", answer))

    def _end_of_turn(self) -> list[int]:
        """The token with which the template ends an answer, as training has it: it may be another than EOS."""
        question, answer = Turn("user", "a"), Turn("assistant", "a")
        before, after = (self._template.render("--chat", turns, asks) for turns, asks in (([question], True), ([question, answer], False)))
        (ids,) = self._template.tokens([after])
        end, has_its_own = self._template.end(ids, after.removeprefix(before), answer.content)
        return ids[end - 1:end] if has_its_own else []

    def _ids(self, turns: list[Turn], asks: bool) -> list[int]:
        return self._template.tokens([self._template.render(f"--chat: turn {len(turns)}", turns, asks)])[0]


class _Plain:
    """Each turn is tokenised by itself, as in training; a blank line ends it."""

    stop_texts = ("\n\n",)

    def __init__(self, tokenizer, template: str | None):
        if template is not None:
            raise DataError("--chat-template: this tokenizer knows no templates, turns are worded User: and Assistant:; remove it")
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self.stop_tokens = {eos_of(tokenizer)}

    def ask(self, text: str) -> list[int]:
        self._ids += self._encoded(f"User: {without_blank_lines(text)}\n\nAssistant:")
        return self._ids

    def answered(self, answer: str, tokens: list[int]) -> None:
        self._ids = self._ids + tokens
        if "\n\n" not in self._tokenizer.decode(tokens):  # a token may hold it and more
            self._ids += self._encoded("\n\n")

    def _encoded(self, text: str) -> list[int]:
        return self._tokenizer([text])["input_ids"][0]
