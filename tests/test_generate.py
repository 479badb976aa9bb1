"""Text that is generated with a cache or a state is what the parallel forward says, one prompt at a time or many together."""

import io
import json
import os
import re
import shlex
import string
from pathlib import Path

import pytest
import tiny_llama
import tiny_rwkv
import torch
from tiny_rwkv_adapter import random_adapter as random_rwkv_adapter
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import llama_adapters
import rwkv_adapters
from bone_ds import generate, launch
from bone_ds.cli import main
from bone_ds.config import ModelConfig
from bone_ds.errors import CheckpointError
from bone_ds.merge import merge
from rwkv_adapters import generation
from rwkv_adapters.tokenizer import ByteTokenizer

ROOT = Path(__file__).parents[1]
PROMPTS = [[5], [17, 3, 88, 41, 2, 2, 60, 33, 9, 11, 80], [60, 33, 9], [7, 7, 7, 7, 7, 7], [5]]
NEVER = ()


class Llama:
    architecture, directory = llama_adapters.ARCHITECTURE, tiny_llama
    model, random_adapter = "model", staticmethod(tiny_llama.random_adapter)

    @staticmethod
    def logits(model, row):
        return tiny_llama.logits(model, torch.tensor([row]))


class Rwkv:
    architecture, directory = rwkv_adapters.ARCHITECTURE, tiny_rwkv
    model, random_adapter = "model.pth", staticmethod(random_rwkv_adapter)

    @staticmethod
    def logits(model, row):
        return tiny_rwkv.logits(model, torch.tensor([row]))


@pytest.fixture(params=[Llama, Rwkv], ids=["llama", "rwkv"])
def kind(request):
    return request.param


@pytest.fixture
def model(kind, tmp_path):
    kind.directory.save_tiny(tmp_path / kind.model)
    return kind.directory.built_and_loaded(kind.directory.opened(tmp_path / kind.model))


class Recorder:
    """Chooses the likeliest token and keeps the logits it was shown."""

    def __init__(self):
        self.shown = []

    def __call__(self, logits):
        self.shown.append(logits.clone())
        return logits.argmax(-1)


@torch.no_grad()
def test_every_choice_is_made_on_the_parallel_forward_s_logits(kind, model):
    for prompt in PROMPTS:
        choose = Recorder()
        (row,) = generate.generate(kind.architecture, model, [prompt], 12, NEVER, choose)
        parallel = kind.logits(model, prompt + row)[len(prompt) - 1:-1]
        torch.testing.assert_close(torch.cat(choose.shown), parallel, rtol=1e-5, atol=2e-5)
        assert row == parallel.argmax(-1).tolist() and len(row) == 12


def test_together_as_one_by_one(kind, model):
    alone = [generate.generate(kind.architecture, model, [prompt], 12, NEVER, generate.most_likely)[0] for prompt in PROMPTS]
    assert len({tuple(row) for row in alone}) == 4  # the two equal prompts alone go on equally
    choose = Recorder()
    assert generate.generate(kind.architecture, model, PROMPTS, 12, NEVER, choose) == alone
    assert [len(logits) for logits in choose.shown] == [5] * 12


def test_finished_prompts_leave_the_batch(kind, model):
    alone = [generate.generate(kind.architecture, model, [prompt], 12, NEVER, generate.most_likely)[0] for prompt in PROMPTS]
    stop = alone[1][4]
    cut = [row[:row.index(stop)] if stop in row else row for row in alone]
    assert len({len(row) for row in cut}) > 1
    choose = Recorder()
    assert generate.generate(kind.architecture, model, PROMPTS, 12, (stop,), choose) == cut
    assert [len(logits) for logits in choose.shown] == [sum(len(row) >= step for row in cut) for step in range(max(map(len, cut)) + 1)][:12]


def test_stopped_at_once_and_a_single_token(kind, model):
    (first,) = generate.generate(kind.architecture, model, [PROMPTS[1]], 1, NEVER, generate.most_likely)
    assert len(first) == 1
    assert generate.generate(kind.architecture, model, [PROMPTS[1]], 12, first, generate.most_likely) == [[]]


@pytest.mark.parametrize("slice_tokens", [1, 2, 7, 15])
def test_rwkv_reads_long_prompts_in_slices(tmp_path, monkeypatch, slice_tokens):
    tiny_rwkv.save_tiny(tmp_path / "model.pth", initial_state=True)
    model = tiny_rwkv.built_and_loaded(tiny_rwkv.opened(tmp_path / "model.pth"))
    whole, sliced = Recorder(), Recorder()
    rows = generate.generate(rwkv_adapters.ARCHITECTURE, model, PROMPTS, 4, NEVER, whole)
    monkeypatch.setattr(generation, "_SLICE_TOKENS", slice_tokens)
    longest, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, *rest: longest.append(tokens.shape[1]) or hidden(tokens, *rest))
    assert generate.generate(rwkv_adapters.ARCHITECTURE, model, PROMPTS, 4, NEVER, sliced) == rows
    torch.testing.assert_close(torch.stack(sliced.shown), torch.stack(whole.shown), rtol=1e-5, atol=1e-5)
    assert max(longest) <= max(slice_tokens, len(PROMPTS))


def test_llama_trains_on_as_before(tmp_path):
    tiny_llama.save_tiny(tmp_path)
    model = tiny_llama.built_and_loaded(tiny_llama.opened(tmp_path)).train()
    before = tiny_llama.logits(model, torch.tensor([PROMPTS[1]]))
    generate.generate(llama_adapters.ARCHITECTURE, model, PROMPTS, 3, NEVER, generate.most_likely)
    assert torch.equal(tiny_llama.logits(model, torch.tensor([PROMPTS[1]])), before) and model.training


def test_a_token_costs_no_walk_through_llama_s_modules(tmp_path, monkeypatch):
    tiny_llama.save_tiny(tmp_path)
    model = tiny_llama.built_and_loaded(tiny_llama.opened(tmp_path)).eval()
    for name in ("train", "eval", "set_attn_implementation"):
        monkeypatch.setattr(model, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
    generate.generate(llama_adapters.ARCHITECTURE, model, PROMPTS, 3, NEVER, generate.most_likely)


def test_rwkv_s_states_are_not_copied_from_token_to_token(tmp_path, monkeypatch):
    tiny_rwkv.save_tiny(tmp_path / "model.pth")
    model = tiny_rwkv.built_and_loaded(tiny_rwkv.opened(tmp_path / "model.pth"))
    states, hidden = [], model.hidden

    def seen(tokens, lengths, state, *rest):
        output, kept = hidden(tokens, lengths, state, *rest)
        states.append((state, kept))
        return output, kept

    monkeypatch.setattr(model, "hidden", seen)
    generate.generate(rwkv_adapters.ARCHITECTURE, model, PROMPTS, 4, NEVER, generate.most_likely)
    assert len(states) == 4
    for (_, kept), (given, _) in zip(states[1:], states[2:], strict=False):  # the first gave prompts of several lengths
        assert all(before.data_ptr() == now.data_ptr() for before, now in zip(kept, given, strict=True))


def test_stopped_by_a_special_token(tmp_path):
    tiny_llama.save_tiny(tmp_path)
    loaded = generate.load(ModelConfig(path=str(tmp_path), dtype="fp32"))
    special = loaded.tokenizer.convert_tokens_to_ids("<s>")

    def continued(stops, ignore_eos):
        chosen = iter([40, 41, special, 42, loaded.tokenizer.eos_token_id, 43])
        return generate.continuations(loaded, ["z"], 6, lambda _: torch.tensor([next(chosen)]), ignore_eos=ignore_eos, stops=stops)

    def text(*tokens):
        return [loaded.tokenizer.decode(tokens)]

    assert continued([], False) == text(40, 41, 42) and continued([], True) == text(40, 41, 42, 43)
    assert continued(["<s>"], False) == continued(["<s>"], True) == text(40, 41)
    assert continued(["</s>", "nowhere"], True) == text(40, 41, 42)


def test_llama_as_plain_transformers(tmp_path):
    tiny_llama.save_tiny(tmp_path)
    loaded = generate.load(ModelConfig(path=str(tmp_path), dtype="fp32"))
    prompts = ["ab", "abcdefgh", "z"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert generate.continuations(loaded, prompts, 12, generate.most_likely) == generate.complete(plain, loaded.tokenizer, prompts, 12)


ADAPTERS = {"row": {"rank": 8}, "col": {"rank": 8, "grouping": "col"}, "lora": {"method": "lora", "rank": 4}, "full": {"method": "full"},
            "some": {"rank": 8, "layers": [1, 2]}}


@pytest.mark.parametrize("adapter", ADAPTERS)
@torch.no_grad()
def test_an_adapter_in_memory_is_the_merged_model(kind, tmp_path, adapter):
    kind.directory.save_tiny(tmp_path / kind.model, **({} if kind is Llama else {"vocabulary": 256}))
    adapted = kind.random_adapter(tmp_path / kind.model, tmp_path / "a.safetensors", **ADAPTERS[adapter])
    loaded = generate.load(ModelConfig(path=str(tmp_path / kind.model), dtype="fp32"), tmp_path / "a.safetensors")
    merge(tmp_path / "a.safetensors", tmp_path / f"merged-{kind.model}")
    merged = generate.load(ModelConfig(path=str(tmp_path / f"merged-{kind.model}"), dtype="fp32"))
    torch.testing.assert_close(kind.logits(loaded.model, PROMPTS[1]), kind.logits(adapted, PROMPTS[1]), rtol=1e-5, atol=1e-5)
    weights = dict(merged.model.named_parameters())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in loaded.model.named_parameters())


@pytest.mark.parametrize("layers", [None, [1, 2]])
@torch.no_grad()
def test_an_initial_state_in_memory(tmp_path, layers):
    tiny_rwkv.save_tiny(tmp_path / "model.pth", vocabulary=256)
    adapted = random_rwkv_adapter(tmp_path / "model.pth", tmp_path / "a.safetensors", method="state", layers=layers)
    config = ModelConfig(path=str(tmp_path / "model.pth"), dtype="fp32")
    loaded, base = generate.load(config, tmp_path / "a.safetensors"), generate.load(config)
    wanted = Rwkv.logits(adapted, PROMPTS[1])
    torch.testing.assert_close(Rwkv.logits(loaded.model, PROMPTS[1]), wanted, rtol=1e-5, atol=1e-5)
    assert (Rwkv.logits(base.model, PROMPTS[1]) - wanted).abs().max() > 0.01
    together = Recorder()
    generate.generate(rwkv_adapters.ARCHITECTURE, loaded.model, PROMPTS, 1, NEVER, together)
    for logits, prompt in zip(together.shown[0], PROMPTS, strict=True):
        torch.testing.assert_close(logits, Rwkv.logits(adapted, prompt)[-1], rtol=1e-5, atol=1e-5)


def test_an_adapter_of_another_model(kind, tmp_path):
    kind.directory.save_tiny(tmp_path / kind.model)
    kind.random_adapter(tmp_path / kind.model, tmp_path / "a.safetensors", rank=8)
    other, config = (Rwkv, {"path": str(tmp_path / "other.pth")}) if kind is Llama else (Llama, {"path": str(tmp_path / "other")})
    other.directory.save_tiny(tmp_path / other.model.replace("model", "other"))
    with pytest.raises(CheckpointError, match=f"a.safetensors: is an adapter for {kind.architecture.name}, .*other"):
        generate.load(ModelConfig(**config), tmp_path / "a.safetensors")
    kind.directory.save_tiny(tmp_path / kind.model.replace("model", "wide"), **(
        {"hidden_size": 64} if kind is Llama else {"width": 64, "vocabulary": 256}))
    with pytest.raises(CheckpointError, match="a.safetensors: was trained on another base"):
        generate.load(ModelConfig(path=str(tmp_path / kind.model.replace("model", "wide"))), tmp_path / "a.safetensors")


def drawer(temperature=1.0, top_p=1.0, seed=0):
    return generate.Sampling(True, temperature, top_p=top_p, seed=seed).choice()


def test_drawing_follows_the_shares():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20_000, 4)
    for temperature, top_p, kept in [(1.0, 1.0, [0, 1, 2, 3]), (0.5, 1.0, [0, 1, 2, 3]), (1.0, 0.7, [1, 2]), (1.0, 1e-6, [2])]:
        shares = torch.zeros(4)
        shares[kept] = (logits[0] / temperature).exp()[kept]
        drawn = torch.bincount(drawer(temperature, top_p)(logits), minlength=4) / len(logits)
        torch.testing.assert_close(drawn, shares / shares.sum(), rtol=0, atol=0.015)
    assert torch.equal(drawer(1e-300)(logits), logits.argmax(dim=-1)), "no quotient overflows"
    first = drawer(seed=3)(logits)
    assert torch.equal(first, drawer(seed=3)(logits)) and not torch.equal(first, drawer(seed=4)(logits))


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (0.5, 12, 0.6), (1.0, 1, 1.0)])
@pytest.mark.parametrize("penalty", [1.0, 1.7, 0.6])
def test_shares_are_those_of_transformers(temperature, top_k, top_p, penalty):
    logits = 3 * torch.randn(6, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = torch.randint(0, 40, (6, 15), generator=torch.Generator().manual_seed(1))
    warpers = [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    wanted = LogitsProcessorList(warpers)(seen, logits).softmax(dim=-1)
    sampling = generate.Sampling(True, temperature, top_k, top_p, penalty)
    shares, tokens = sampling.shares(generate.penalised(logits, seen.tolist(), penalty))
    shares = torch.zeros_like(logits).scatter(1, tokens, shares)
    torch.testing.assert_close(shares / shares.sum(dim=-1, keepdim=True), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_as_transformers_generate(tmp_path, penalty):
    plain = tiny_llama.save_tiny(tmp_path).eval()
    model = tiny_llama.built_and_loaded(tiny_llama.opened(tmp_path))
    stop = (2, 40, 41)
    rows = generate.generate(llama_adapters.ARCHITECTURE, model, PROMPTS, 20, stop, generate.most_likely, penalty)
    lengths = set()
    for prompt, row in zip(PROMPTS, rows, strict=True):
        output = plain.generate(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                                max_new_tokens=20, do_sample=False, repetition_penalty=penalty, eos_token_id=list(stop), pad_token_id=0)
        wanted = output[0, len(prompt):].tolist()
        assert row == (wanted[:-1] if wanted[-1] in stop else wanted)
        lengths.add(len(row))
    assert penalty == 1 or len({tuple(row) for row in rows}) == 4
    assert any(len(set(row)) < len(row) for row in rows), "tokens repeat, or the penalty could not tell"


@torch.no_grad()
def test_read_on_after_an_answer_is_the_parallel_forward(kind, model):
    """Documents of other lengths, some forgotten, several tokens at a time."""
    pieces = [[[5, 6], [17], [9, 9, 3, 4]], [[60, 3, 88, 41], [2, 8, 8], [1]], [[7], [33, 9], [11, 80, 5]]]
    reading = kind.architecture.reading(model, 3)
    reading.read([piece[0] for piece in pieces])
    reading.read([piece[1] for piece in pieces])
    reading.keep([2, 0])
    logits = reading.read([pieces[2][2], pieces[0][2]])
    for found, document in zip(logits, (pieces[2], pieces[0]), strict=True):
        torch.testing.assert_close(found, kind.logits(model, sum(document, []))[-1], rtol=1e-5, atol=2e-5)


def streamed(tokenizer, tokens, stops=()):
    pieces = []
    stream = generate.TextStream(tokenizer, stops, pieces.append)
    for end in range(1, len(tokens) + 1):
        if stream.follow(tokens[:end]):
            break
    text = stream.finish(tokens[:end])
    assert "".join(pieces) == text
    return pieces, text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le"])
@pytest.mark.parametrize("text", ["plain", "aé€😀z", "漢字かな", "😀", "a\ufffdb"])
def test_pieces_are_the_text_whatever_its_bytes(encoding, text):
    tokenizer = ByteTokenizer(encoding)
    pieces, whole = streamed(tokenizer, tokenizer.encode(text))
    assert whole == text and (len(pieces) > 1 or len(text) == 1)
    damaged = tokenizer.encode(text)[:-1]
    assert streamed(tokenizer, damaged)[1] == tokenizer.decode(damaged, skip_special_tokens=True)


def test_broken_bytes_are_streamed_as_they_are_decoded():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        tokens = torch.randint(1, 256, (12,), generator=generator).tolist()
        assert streamed(ByteTokenizer(), tokens)[1] == ByteTokenizer().decode(tokens, skip_special_tokens=True)


def test_stop_texts_are_never_shown():
    tokenizer = ByteTokenizer()
    assert streamed(tokenizer, tokenizer.encode("one\n\nUser: two"), ["\n\nUser:"]) == (list("one"), "one")
    pieces, text = streamed(tokenizer, tokenizer.encode("one\n\nUse it"), ["\n\nUser:", "it"])
    assert text == "one\n\nUse " and pieces[:3] == list("one")
    assert streamed(tokenizer, tokenizer.encode("ab\n"), ["\n\n"])[1] == "ab\n", "what might have been a stop text and wasn't is shown"


@pytest.fixture
def here(tmp_path, monkeypatch):
    tiny_rwkv.save_tiny(tmp_path / "model.pth", vocabulary=256)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys, *arguments) -> str:
    assert main(["generate", "model.pth", "--dtype", "fp32", "--max-new-tokens", "5", "--ignore-eos", *arguments]) == 0
    return capsys.readouterr().out


def test_command_line(here, capsys, monkeypatch):
    one, two = printed(capsys, "--prompt", "ab"), printed(capsys, "--prompt", "cd\ne")
    assert one.endswith("\n") and one != two
    assert printed(capsys, "--prompt", "ab", "--prompt", "cd\ne") == f"=== 1 of 2: ab\n{one}=== 2 of 2: cd e\n{two}"
    (here / "p.jsonl").write_text('{"prompt": "ab", "id": 3}\n\n{"prompt": "cd\\ne"}\n')
    assert printed(capsys, "--prompts", "p.jsonl", "--out", "o.jsonl", "--batch-size", "1") == "o.jsonl: 2 completions\n"
    rows = [json.loads(line) for line in (here / "o.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [{"prompt": "ab", "completion": one[:-1]}, {"prompt": "cd\ne", "completion": two[:-1]}]
    monkeypatch.setattr("sys.stdin", Typed("ab\n", terminal=False))
    assert printed(capsys) == one
    drawn = printed(capsys, "--prompt", "ab", "--temperature", "2", "--seed", "1")
    assert drawn == printed(capsys, "--prompt", "ab", "--temperature", "2", "--seed", "1") != one
    assert printed(capsys, "--prompt", "ab", "--temperature", "2", "--top-p", "1e-9") == one
    assert printed(capsys, "--prompt", "ab", "--do-sample", "--top-k", "1") == one
    favoured = ("--prompt", string.ascii_letters, "--repetition-penalty", "0.001")
    again = printed(capsys, *favoured)
    assert set(again) <= set(string.ascii_letters + "\n") and len(again) == 6, "what has been there is favoured"
    assert printed(capsys, *favoured, "--stop", "nowhere", "--stop", again[-2]) == again[:again.index(again[-2])] + "\n"


def test_a_prompt_may_hold_any_line_separator_but_the_file_s(tmp_path):
    (tmp_path / "p.jsonl").write_bytes('{"prompt": "a\u2028b\x85c"}\r\n{"prompt": "d"}\n'.encode())
    assert generate.read_prompts(tmp_path / "p.jsonl") == ["a\u2028b\x85c", "d"]


def test_an_empty_completion_is_explained(here, capsys):
    (first, *_) = printed(capsys, "--prompt", "ab")
    assert main(["generate", "model.pth", "--dtype", "fp32", "--prompt", "ab", "--stop", first]) == 0
    output = capsys.readouterr()
    assert output.out == "\n" and "nothing came" in output.err
    assert main(["generate", "model.pth", "--dtype", "fp32", "--prompt", "ab", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().err == ""


class Typed:
    def __init__(self, text: str, terminal: bool):
        self.text, self.terminal = text, terminal

    def read(self):
        return self.text

    def isatty(self):
        return self.terminal


MISUSED = {
    "no prompt": ([], ["--prompt TEXT", "--prompts FILE.jsonl", "stdin"]),
    "two sources": (["--prompt", "a", "--prompts", "p.jsonl"], ["--prompt and --prompts"]),
    "no file": (["--prompts", "gone.jsonl"], ["--prompts: gone.jsonl", "No such file"]),
    "no JSON": (["--prompts", "text.jsonl"], ["text.jsonl:1", "is no JSON"]),
    "no field": (["--prompts", "rows.jsonl"], ["rows.jsonl:2", "'{\"text\": \"b\"}'"]),
    "no rows": (["--prompts", "none.jsonl"], ["none.jsonl", "no prompts"]),
    "no text": (["--prompts", "model.pth"], ["model.pth", "UTF-8"]),
    "an empty prompt": (["--prompt", "a", "--prompt", ""], ["prompt 2 of 2", "empty"]),
    "half a pair": (["--prompt", "a", "--prompt", "b\udcff"], ["prompt 2 of 2", "character 2 is '\\udcff'"]),
    "no tokens": (["--prompt", "a", "--max-new-tokens", "0"], ["--max-new-tokens: 0"]),
    "no batch": (["--prompt", "a", "--batch-size", "-1"], ["--batch-size: -1"]),
    "cold": (["--prompt", "a", "--temperature", "0"], ["--temperature: 0.0"]),
    "hot": (["--prompt", "a", "--temperature", "inf"], ["--temperature: inf"]),
    "no share": (["--prompt", "a", "--temperature", "1", "--top-p", "0"], ["--top-p: 0.0"]),
    "more than all": (["--prompt", "a", "--temperature", "1", "--top-p", "1.5"], ["--top-p: 1.5"]),
    "top-p alone": (["--prompt", "a", "--top-p", "0.5"], ["--top-p: 0.5", "--temperature"]),
    "seed alone": (["--prompt", "a", "--seed", "5"], ["--seed: 5", "--temperature"]),
    "top-k alone": (["--prompt", "a", "--top-k", "5"], ["--top-k: 5", "--do-sample"]),
    "negative top-k": (["--prompt", "a", "--do-sample", "--top-k", "-5"], ["--top-k: -5"]),
    "no factor": (["--prompt", "a", "--repetition-penalty", "0"], ["--repetition-penalty: 0.0"]),
    "stop at nothing": (["--prompt", "a", "--stop", ""], ["--stop: ''"]),
    "a prompt in a chat": (["--chat", "--prompt", "a"], ["--chat", "--prompt"]),
    "a template without a chat": (["--prompt", "a", "--chat-template", "x"], ["--chat-template", "--chat"]),
    "a template for bytes": (["--chat", "--chat-template", "x"], ["--chat-template", "knows no templates"]),
    "ranks of a chat": (["--chat", "--ranks", "2"], ["--ranks: 2", "--chat"]),
    "batches of a chat": (["--chat", "--batch-size", "4"], ["--batch-size: 4", "--chat"]),
    "ranks for stdin": (["--ranks", "2"], ["--ranks: 2", "--prompts"]),
    "no ranks": (["--prompt", "a", "--ranks", "0"], ["--ranks: 0"]),
    "negative seed": (["--prompt", "a", "--temperature", "1", "--seed", "-5"], ["--seed: -5"]),
    "out exists": (["--prompt", "a", "--out", "text.jsonl"], ["--out: text.jsonl exists already"]),
    "out nowhere": (["--prompt", "a", "--out", "deep/o.jsonl"], ["--out: deep/o.jsonl", "no directory deep"]),
    "no adapter": (["--prompt", "a", "--adapter", "gone.safetensors"], ["gone.safetensors", "no such adapter"]),
    "no such tokenizer": (["--prompt", "a", "--tokenizer", "gone.txt"], ["gone.txt"]),
}


@pytest.mark.parametrize("case", MISUSED)
def test_misuse(here, capsys, monkeypatch, case):
    arguments, says = MISUSED[case]
    monkeypatch.setattr("sys.stdin", Typed("", terminal=True))
    (here / "text.jsonl").write_text("once upon a time\n")
    (here / "rows.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (here / "none.jsonl").write_text("\n")
    before = sorted(here.iterdir())
    assert main(["generate", "model.pth", *arguments]) == 2
    output = capsys.readouterr()
    message = output.err.removesuffix("\n")
    assert output.out == "" and message.startswith("bone-ds: ") and "\n" not in message, message
    assert all(part in message for part in says), message
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize("errors, says", [("strict", "stdin: is no UTF-8 text (byte 3)"), (
    "surrogateescape", "--chat: is no UTF-8 text (character 1 is '\\udcff')")])  # as Python reads in other locales
def test_a_chat_that_is_no_utf_8(here, capsys, monkeypatch, errors, says):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hi\n\xff\n"), encoding="utf-8", errors=errors))
    assert main(["generate", "model.pth", "--chat", "--dtype", "fp32"]) == 2
    assert capsys.readouterr().err == f"bone-ds: {says}\n"


@pytest.mark.parametrize("command", [["generate", "model.pth", "--dtype", "fp32", "--prompt", "ab"], ["config"]])
def test_output_that_nobody_reads(here, capsys, monkeypatch, command):
    """Text that is shown as it comes, and text that waits in a buffer."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as unread:
        monkeypatch.setattr("sys.stdout", unread)
        assert main(command) == 128 + 13
    assert capsys.readouterr().err == ""


def commands_of(page: str) -> list[list[str]]:
    """Those of `bone-ds generate` in the page's blocks; their texts may reach over lines."""
    blocks = re.findall(r"^```\n(bone-ds generate .*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    found = [shlex.split(command, comments=True) for block in blocks for command in re.split(r"^bone-ds ", block, flags=re.MULTILINE)[1:]]
    assert len(found) >= 2
    return found


@pytest.mark.parametrize("command", [command for page in ("README.md", "docs/generate.md") for command in commands_of(page)], ids=" ".join)
def test_every_command_of_the_pages_runs(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    tiny_rwkv.save_tiny(tmp_path / "merged.pth", vocabulary=256)
    tiny_rwkv.save_tiny(tmp_path / "RWKV-x060-World-1B6.pth", vocabulary=256)
    (tmp_path / "runs/rwkv6-metamath").mkdir(parents=True)
    random_rwkv_adapter("RWKV-x060-World-1B6.pth", tmp_path / "runs/rwkv6-metamath/adapter.safetensors", rank=8)
    (tmp_path / "questions.jsonl").write_text('{"prompt": "a"}\n')
    started = []
    monkeypatch.setattr(launch, "start", lambda given, ranks: started.append(ranks) or 1)  # test_prompt_shares starts some
    monkeypatch.setattr("builtins.input", typed("hello"))
    assert main(command) == (1 if "--ranks" in command else 0) and started == ([2] if "--ranks" in command else [])
    assert (tmp_path / "answers.jsonl").exists() == ("--out" in command and not started)


def typed(*lines: str):
    """In place of `input`: the lines, then the end of the file."""
    waiting = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    return read


@pytest.mark.parametrize("model, says", [
    ("gone.pth", "gone.pth"), ("./gone", "./gone"), ("text.pth", "text.pth"), ("wide.pth", "model.tokenizer")])
def test_models_that_can_not_be_used(here, capsys, model, says):
    (here / "text.pth").write_text("text")
    tiny_rwkv.save_tiny(here / "wide.pth", vocabulary=300)
    assert main(["generate", model, "--prompt", "a"]) == 2
    message = capsys.readouterr().err
    assert says in message and message.count("\n") == 1, message


