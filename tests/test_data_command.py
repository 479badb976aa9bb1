"""`bone-ds data`: what it shows is what the model will see, and everything it counts is true."""

import json
import re

import pytest
import tiny
from tiny_llama import save_tiny

from bone_ds.cli import main
from bone_ds.config import validate
from bone_ds.data import GlobalOrder, load_samples
from bone_ds.data.preview import as_text, preview, printable
from llama_adapters import ARCHITECTURE


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A directory with a model without weights, data of which some is cut or left out, and a config."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    rows = [("one", "1"), ("two", "22"), ("three", ""), ("x" * 70, "4"), ("five", "5" * 60), ("a\nb\x1b[31m", "c\nd")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"q": query, "a": answer}) + "\n" for query, answer in rows))
    (tmp_path / "held.jsonl").write_text(json.dumps({"q": "h", "a": "eld"}) + "\n")
    (tmp_path / "run.yaml").write_text("""
model: {path: model}
data: {train: rows.jsonl, eval: held.jsonl, prompt: template, template: "{q}=", completion: "{a}", max_length: 32}
train: {global_batch_size: 2}
output: {directory: run}
""")
    return tmp_path


def shown(capsys, *arguments):
    assert main(["data", "run.yaml", *arguments]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


def test_what_is_shown(run, capsys):
    lines = shown(capsys, "--samples", "3").splitlines()
    assert "train: rows.jsonl" in lines and "eval: held.jsonl" in lines
    assert "  4 samples of 6 rows: 1 truncated, 0 dropped as too long, 2 left out without a token to learn" in lines
    start = lines.index("  sample 1: 6 tokens, 2 bear loss, EOS last")
    assert lines[start:start + 3] == ["  sample 1: 6 tokens, 2 bear loss, EOS last", "  | o n e =", "  >  1 </s>"]
    assert "  sample 3: 32 tokens, 27 bear loss, cut at 32" in lines
    packs = re.compile(r"an epoch: 4 samples in \d packs of 32 tokens, \d+\.\d% filled, \d\.\d samples a pack")
    assert any(map(packs.fullmatch, lines))


def test_colour_is_not_needed_to_tell_what_is_learnt(run, capsys):
    plain, coloured = shown(capsys), shown(capsys, "--colour", "always")
    assert "\x1b" not in plain and "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
    assert re.search(r"^  >  1 </s>$", plain, re.MULTILINE)


def test_data_does_not_steer_the_terminal(run, capsys):
    assert "\x1b" not in shown(capsys, "--samples", "4")
    assert printable("a\x1b[31m\r\tb") == "a\\x1b[31m\\r\tb"


def test_as_json(run, capsys):
    found = json.loads(shown(capsys, "--json", "--samples", "9"))
    train, held_out = found["sources"]
    assert (train["report"]["rows"], train["report"]["kept"], train["report"]["label_less"], held_out["split"]) == (6, 4, 2, "eval")
    assert [sample["label_tokens"] for sample in train["samples"]] == [2, 3, 27, len("c?d") + 1]
    assert sum(count for *_, count in train["histogram"]) == 4 and train["histogram"][-1][1] == 32
    assert found["epoch"]["samples"] == {"rows.jsonl": 4} and found["warning"] is None


def test_the_figures_are_those_of_the_run(run):
    tree = {"model": {"path": "model"}, "data": {
        "train": "rows.jsonl", "prompt": "template", "template": "{q}=", "completion": "{a}", "max_length": 32},
        "train": {"global_batch_size": 2, "seed": 3}, "output": {"directory": "run"}}
    for packing in (True, False):
        tree["data"]["packing"] = packing
        config = validate(tree, "case")
        tokenizer = ARCHITECTURE.tokenizer(ARCHITECTURE.outline(config.model))
        samples, found = load_samples(config.data, tokenizer), preview(config, tokenizer, 9)
        order = GlobalOrder(samples, packing, 32, 2, 3)
        windows = [order.window(step) for step in range(order.steps_in_epochs(1))]
        assert found.epoch.steps == len(windows) and found.epoch.packs == sum(len(window.units) for window in windows)
        assert (found.epoch.tokens, found.epoch.label_tokens) == (samples.report.tokens, samples.report.label_tokens)
        assert found.epoch.filled == (samples.report.tokens / (32 * found.epoch.packs) if packing else None)
        (source,) = found.sources
        for index, sample in enumerate(source.samples):
            assert "".join(segment.text for segment in sample.segments) == tokenizer.decode(samples[index].tolist())
        assert ("filled" in as_text(found, 32)) == packing


def test_a_mixtures_counts(run, capsys):
    mixture = "data.mixture=[{path: rows.jsonl, weight: 3}, {path: held.jsonl}]"
    text = shown(capsys, "data.train=[]", mixture, "data.eval=[]", "--samples", "0")
    assert "train: rows.jsonl, weight 3" in text and "sample 1:" not in text
    assert "4 of rows.jsonl (80.0%)" in text and "1 of held.jsonl (20.0%)" in text


def test_samples_beyond_the_models_context_are_told(run, capsys):
    text = shown(capsys, "data.max_length=128")
    assert text.splitlines()[-1].startswith("warning: the longest sample has 73 tokens, the model's context is 64 (max_position")
    assert "warning" not in shown(capsys, "data.max_length=64")


@pytest.mark.parametrize(("arguments", "says"), [
    (["data.train=gone.jsonl"], "data.train: gone.jsonl: there is no such file"),
    (["data.train=[]", "data.mixture=[gone.jsonl]"], "data.mixture: gone.jsonl: there is no such file"),
    (["data.fields={x: y}"], "data.fields: the prompt has no field 'x'"), (["--samples", "-1"], "--samples: -1"),
    (["data.revision=main"], "data.revision: 'main' is for a hub id, rows.jsonl is here"),
    (["data.subset=main"], "data.subset: 'main' is for a directory or a hub id, rows.jsonl is a file"),
])
def test_what_is_refused(run, capsys, arguments, says):
    assert main(["data", "run.yaml", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == "" and says in output.err and output.err.count("\n") <= 2


def test_an_rwkv_model_and_its_end_of_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "rwkv", "--layers", "1", "--width", "32", "--vocab", "256", "--head-size", "8", "--out", "new.pth"]) == 0
    tiny.write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "run.yaml").write_text("model: {path: new.pth}\noutput: {directory: run}\n"
                                       "data: {train: rows.jsonl, prompt: user_assistant, fields: {query: q, response: a}}\n")
    capsys.readouterr()
    text = shown(capsys)
    assert re.search(r"^  \| User: \w+\n  \|\n  \| Assistant:\n  >  \w+\\x00$", text, re.MULTILINE), text
