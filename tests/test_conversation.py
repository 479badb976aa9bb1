"""A conversation that goes on from what was read is the one that is read anew; in a terminal it can be interrupted and ended."""

import contextlib
import os
import pty
import select
import signal
import string
import sys
import time
from pathlib import Path

import pytest
import tiny_llama
import tiny_rwkv
from test_chat import DATED, LLAMA2, LLAMA3, PLAIN, SMOLLM2, tokenizer_of
from tokenizers import decoders

import llama_adapters
from bone_ds import generate
from bone_ds.config import ModelConfig
from bone_ds.conversation import Conversation
from bone_ds.errors import BoneError, DataError
from llama_adapters import generation as llama_generation
from rwkv_adapters import generation as rwkv_generation
from rwkv_adapters.tokenizer import WorldTokenizer

ROOT = Path(__file__).parents[1]
TEMPLATE = ("{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}{% if turn.role == 'assistant' %}</s>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}")
TIMEOUT_S = 120


@pytest.fixture
def reads(monkeypatch):
    """What the models were given to read, in order."""
    given = []
    for kind in (llama_generation, rwkv_generation):
        read = kind.Reading.read
        monkeypatch.setattr(kind.Reading, "read", lambda self, tokens, read=read: given.append(tokens[0]) or read(self, tokens))
    return given


@pytest.fixture
def rwkv(tmp_path):
    tiny_rwkv.save_tiny(tmp_path / "model.pth", vocabulary=256)
    return generate.load(ModelConfig(path=str(tmp_path / "model.pth"), dtype="fp32"))


@pytest.fixture
def llama(tmp_path):
    tiny_llama.save_tiny(tmp_path)
    loaded = generate.load(ModelConfig(path=str(tmp_path), dtype="fp32"))
    loaded.tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    return loaded


def anew(loaded, ids, stops, count=8):
    (tokens,) = generate.generate(loaded.architecture, loaded.model, [ids], count, stops, generate.most_likely)
    return tokens


def test_rwkv_reads_every_token_once(rwkv, reads):
    conversation, shown = Conversation(rwkv, generate.most_likely, 8), []
    answers = [conversation.answer(text, shown.append) for text in ("How are\n\nyou?", "é", "again")]
    assert "".join(shown) == "".join(answers)
    once = [token for tokens in reads for token in tokens]
    history = []
    for text, answer in zip(("How are\nyou?", "é", "again"), answers, strict=True):
        history += rwkv.tokenizer.encode(f"User: {text}\n\nAssistant:")
        tokens = anew(rwkv, history, (0,))
        assert rwkv.tokenizer.decode(tokens).startswith(answer) and len(answer) > 0
        history += tokens
        if text != "again":
            history += rwkv.tokenizer.encode("\n\n")
    assert once == history[:len(once)] and len(history) - len(once) in (0, 1), "the last token of an answer is read with the next turn"


def test_llama_through_its_template(llama, reads):
    conversation, shown = Conversation(llama, generate.most_likely, 8, template=TEMPLATE), []
    answers = [conversation.answer(text, shown.append) for text in ("ab", "cd")]
    assert "".join(shown) == "".join(answers) and all(answers)
    first, second = (tokens for tokens in reads if len(tokens) > 1)
    text = "[user]ab[assistant]"
    for answer, following in zip(answers, ("</s>[user]cd[assistant]", ""), strict=True):
        tokens = anew(llama, llama.tokenizer(text, add_special_tokens=False)["input_ids"], (2,))
        assert llama.tokenizer.decode(tokens, skip_special_tokens=True) == answer
        text += answer + following
        if following:
            whole = llama.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert whole[:len(first)] == first and whole[-len(second):] == second and len(second) < len(whole) - len(first)


def test_a_turn_that_is_rendered_otherwise_is_read_anew(llama, reads):
    """The template drops all turns but the last: nothing that was read is the beginning of what comes."""
    forgetful = "{{ messages[-1].content }}{% if add_generation_prompt %}={% endif %}"
    conversation = Conversation(llama, generate.most_likely, 4, template=forgetful)
    first, other, again = (conversation.answer(text, lambda piece: None) for text in ("abc", "zz", "abc"))
    assert first == again != other
    assert [len(tokens) for tokens in reads if len(tokens) > 1] == [4, 3, 4]


def test_an_answer_that_is_interrupted_is_part_of_the_conversation(rwkv, reads):
    conversation, shown = Conversation(rwkv, generate.most_likely, 1000), []
    conversation.answer("one", shown.append, lambda: sum(map(len, reads)) > 30)
    assert sum(map(len, reads)) < 60
    conversation.answer("two", shown.append, lambda: True)
    once = [token for tokens in reads for token in tokens]
    assert rwkv.tokenizer.decode(once).startswith("User: one\n\nAssistant:") and "User: two\n\nAssistant:" in rwkv.tokenizer.decode(once)


def test_a_token_that_holds_more_than_the_blank_line_ends_the_turn(tmp_path):
    tokens = [repr(bytes([byte])) for byte in range(256)] + [repr("\n\n#")]
    lines = [f"{number} {token} {1 if number <= 256 else 3}\n" for number, token in enumerate(tokens, 1)]
    (tmp_path / "vocabulary.txt").write_text("".join(lines), encoding="utf-8")
    tokenizer = WorldTokenizer(tmp_path / "vocabulary.txt")
    wording = conversation_of(tokenizer, None)._wording
    wording.ask("a")
    wording.answered("yes", [*tokenizer.encode("yes"), 257])
    assert tokenizer.decode(wording.ask("b")) == "User: a\n\nAssistant:yes\n\n#User: b\n\nAssistant:"


def conversation_of(tokenizer, template):
    """Without a model: how turns are worded."""
    return Conversation(generate.Loaded(llama_adapters.ARCHITECTURE, None, tokenizer), generate.most_likely, 8, template=template)


@pytest.mark.parametrize(("template", "ends"), [
    (SMOLLM2, ["</s>", "<|im_end|>"]), (LLAMA3, ["</s>", "<|eot_id|>"]), (LLAMA2, ["</s>"]), (PLAIN, ["</s>"])],
    ids=["SmolLM2", "Llama 3", "Llama 2", "none of its own"])
def test_an_answer_ends_as_training_ends_it(template, ends):
    tokenizer = tokenizer_of(None)  # its EOS is </s>
    assert sorted(tokenizer.convert_ids_to_tokens(conversation_of(tokenizer, template)._wording.stop_tokens)) == ends


def test_a_template_that_asks_for_the_date_gets_the_one_of_training():
    tokenizer = tokenizer_of(SMOLLM2)
    assert "26 July 2024, 00" in tokenizer.decode(conversation_of(tokenizer, DATED)._wording.ask("hi"))


@pytest.mark.parametrize(("template", "says"), [
    ("{{ strftime_now('%d') }}\n{{ m[ }}", "--chat-template: line 2: "), ("gone.jinja", "--chat-template: gone.jinja: can't be read"),
    ("{{ raise_exception('no,\nnever') }}", "--chat: the chat template refuses it: no,")])
def test_a_template_that_can_not_be_used(template, says):
    with pytest.raises(BoneError) as caught:
        conversation_of(tokenizer_of(None), template)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_without_a_template(llama):
    with pytest.raises(DataError, match="no chat template; give one with --chat-template"):
        Conversation(llama, generate.most_likely, 8)


class Terminal:
    """A program that believes it talks to a person."""

    def __init__(self, *arguments: str, directory: Path):
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever runs the tests may ignore it
            os.chdir(directory)
            os.execve(sys.executable, [sys.executable, "-m", "bone_ds", *arguments], os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb"})
        self.text = b""

    def type(self, keys: bytes) -> None:
        os.write(self.terminal, keys)

    def wait_for(self, condition, within_s: float = TIMEOUT_S) -> None:
        """Reads until the condition on what was shown so far holds."""
        end = time.monotonic() + within_s
        while not condition(self.text):
            if time.monotonic() > end:
                raise TimeoutError(self.text)
            if select.select([self.terminal], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    self.text += os.read(self.terminal, 65536)

    def interrupt(self) -> None:
        """Ctrl-C, until a new prompt is shown. Once is not enough where it comes between a prompt and the read that it is to end."""
        prompts = self.text.count(b"\n> ")
        for _ in range(TIMEOUT_S // 3):
            self.type(b"\x03")
            with contextlib.suppress(TimeoutError):
                return self.wait_for(lambda text: text.count(b"\n> ") > prompts, within_s=3)
        raise TimeoutError(self.text)

    def code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_in_a_terminal(tmp_path):
    tensors = tiny_rwkv.save_tiny(tmp_path / "model.pth", vocabulary=256)
    tensors["head.weight"][[byte for byte in range(256) if chr(byte) not in string.ascii_letters]] = 0  # letters without end
    tiny_rwkv.write(tmp_path / "model.pth", tensors)
    terminal = Terminal("generate", "model.pth", "--chat", "--dtype", "fp32", "--max-new-tokens", "1000000", directory=tmp_path)
    terminal.wait_for(lambda text: text.endswith(b"> "))
    assert b"model.pth: a line is a turn, Ctrl-C ends an answer, Ctrl-D the chat\r\n> " in terminal.text
    terminal.type(b"half a line")
    terminal.interrupt()  # at the prompt it drops the line
    for said in (b"hello", b"and more"):
        terminal.type(said + b"\n")
        before = len(terminal.text) + len(said) + 200
        terminal.wait_for(lambda text, before=before: len(text) > before)
        terminal.interrupt()
    terminal.type(b"\x04")
    assert terminal.code() == 0
    assert b"Traceback" not in terminal.text
