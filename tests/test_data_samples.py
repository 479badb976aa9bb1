"""Rows to tokens to batches: where loss falls, what is cut, what is left out."""

import json
import time

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bone_ds.config import DataConfig
from bone_ds.data import build_prompt, collate, load_samples, prompt_ids, tokenize
from bone_ds.errors import ConfigError, DataError

WORDS = ["<unk>", "<s>", "</s>", "Q", "A", ":", *[f"w{number}" for number in range(50)]]
ID = {word: index for index, word in enumerate(WORDS)}
BOS, EOS = ID["<s>"], ID["</s>"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def word_tokenizer(adds_bos: bool, adds_eos: bool = False, eos: str | None = "</s>", bos: str | None = "<s>"):
    """One token a word; it puts BOS before and EOS after a text as asked."""
    backend = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos or adds_eos:
        pattern = [bos] * adds_bos + ["$A"] + [eos] * adds_eos
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(pattern), special_tokens=[(word, ID[word]) for word in {bos, eos} if word in pattern])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token=bos, eos_token=eos)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make(tmp_path, rows, tokenizer, template="Q : {q} A :", completion="{a}", **options):
    path = write(tmp_path / "rows.jsonl", rows)
    config = DataConfig(train=(path,), prompt="template", template=template, completion=completion, **options)
    return load_samples(config, tokenizer)


def words(ids):
    return [WORDS[index] for index in ids]


def test_label_positions_by_hand(tmp_path):
    samples = make(tmp_path, [{"q": "w1 w2", "a": "w3"}, {"q": "w4", "a": "w5 w6"}], word_tokenizer(adds_bos=True))
    assert words(samples[0]) == ["<s>", "Q", ":", "w1", "w2", "A", ":", "w3", "</s>"]
    assert words(samples[1]) == ["<s>", "Q", ":", "w4", "A", ":", "w5", "w6", "</s>"]
    batch = collate(samples, [[0], [1]], "cpu")
    assert batch.document_lengths == (9, 9)
    assert batch.tokens.shape == (1, 18)
    # the hidden state of the last prompt token (6; 9 + 5) predicts the first completion token
    assert batch.label_positions.tolist() == [6, 7, 14, 15, 16]
    assert words(batch.labels) == ["w3", "</s>", "w5", "w6", "</s>"]
    assert {batch.tokens.dtype, batch.label_positions.dtype, batch.labels.dtype} == {torch.int64}
    assert [samples.label_count(index) for index in (0, 1)] == samples.label_counts.tolist() == [2, 3]


def test_labels_are_the_next_tokens_of_the_same_document(tmp_path):
    rows = [{"q": f"w{number}", "a": " ".join(["w7"] * (1 + number % 4))} for number in range(12)]
    samples = make(tmp_path, rows, word_tokenizer(adds_bos=True))
    batch = collate(samples, [[3, 0, 7], [11], [5, 1]], "cpu")
    assert torch.equal(batch.labels, batch.tokens[0, batch.label_positions + 1])
    starts = set(np.cumsum((0, *batch.document_lengths)).tolist())
    assert not starts & set((batch.label_positions + 1).tolist())
    assert len(batch.labels) == sum(samples.label_count(index) for index in (3, 0, 7, 11, 5, 1))


def test_without_a_prompt_the_first_token_is_unlabelled(tmp_path):
    samples = make(tmp_path, [{"a": "w3 w4"}], word_tokenizer(adds_bos=False), template="")
    batch = collate(samples, [[0]], "cpu")
    assert words(batch.tokens[0]) == ["w3", "w4", "</s>"]
    assert batch.label_positions.tolist() == [0, 1]
    assert words(batch.labels) == ["w4", "</s>"]
    assert samples.report.label_tokens == samples.label_count(0) == 2


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("adds_eos", [True, False])
def test_bos_as_the_tokenizer_does_and_eos_once(tmp_path, adds_bos, adds_eos):
    tokenizer = word_tokenizer(adds_bos, adds_eos)
    samples = make(tmp_path, [{"q": "w1", "a": "w2"}], tokenizer)
    assert list(samples[0]).count(BOS) == int(adds_bos)
    assert list(samples[0]).count(EOS) == 1 and samples[0][-1] == EOS
    assert EOS in collate(samples, [[0]], "cpu").labels
    assert prompt_ids("Q : w1 A :", tokenizer) == samples[0][~samples.learnt_of(0)].tolist()


@pytest.mark.parametrize("adds_bos", [True, False])
def test_tokens_in_the_users_template_are_not_doubled(tmp_path, adds_bos):
    samples = make(tmp_path, [{"q": "w1", "a": "w2"}], word_tokenizer(adds_bos), template="<s> Q {q}", completion="{a} </s>")
    assert words(samples[0]) == ["<s>", "Q", "w1", "w2", "</s>"]
    assert samples.learnt.tolist() == [False, False, False, True, True]


def test_bos_in_the_completion_of_an_empty_prompt_is_not_doubled(tmp_path):
    samples = make(tmp_path, [{"a": "w2"}], word_tokenizer(adds_bos=True), template="", completion="<s> {a}")
    assert words(samples[0]) == ["<s>", "w2", "</s>"]
    assert samples.label_count(0) == 2


def test_one_token_as_bos_and_eos(tmp_path):
    appends = word_tokenizer(adds_bos=False, adds_eos=True, bos="</s>")
    assert words(make(tmp_path, [{"q": "w1", "a": "w2"}], appends, template="{q}")[0]) == ["w1", "w2", "</s>"]
    prepends = word_tokenizer(adds_bos=True, bos="</s>")
    assert words(make(tmp_path, [{"q": "w1", "a": "w2"}], prepends, template="{q}")[0]) == ["</s>", "w1", "w2", "</s>"]


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    with pytest.raises(DataError, match="no EOS token"):
        make(tmp_path, [{"q": "w1", "a": "w2"}], word_tokenizer(adds_bos=True, eos=None))


# in tokens, BOS and EOS counted, against a max_length of 8: 8; 10; 11 of which 9 are the prompt; a completion of spaces
OVERLONG = [
    {"q": "w1 w1", "a": "w2 w2 w2"}, {"q": "w1 w1", "a": "w2 w2 w2 w2 w2"}, {"q": "w1 " * 7, "a": "w2"}, {"q": "w1", "a": "  "}]


def test_truncation_keeps_the_start_and_counts(tmp_path):
    samples = make(tmp_path, OVERLONG, word_tokenizer(adds_bos=True), template="Q {q}", max_length=8)
    report = samples.report
    assert (report.rows, report.kept, report.truncated, report.dropped, report.label_less) == (4, 2, 1, 0, 2)
    assert words(samples[0]) == ["<s>", "Q", "w1", "w1", "w2", "w2", "w2", "</s>"]
    assert words(samples[1]) == ["<s>", "Q", "w1", "w1", "w2", "w2", "w2", "w2"]
    assert (report.tokens, report.label_tokens, report.longest) == (16, 8, 11)
    assert "1 truncated" in str(report) and "2 left out" in str(report)


def test_dropping_counts(tmp_path):
    samples = make(tmp_path, OVERLONG, word_tokenizer(adds_bos=True), template="Q {q}", max_length=8, overlong="drop")
    report = samples.report
    assert (report.rows, report.kept, report.truncated, report.dropped, report.label_less) == (4, 1, 0, 2, 1)
    assert samples.lengths.tolist() == [8]


def test_an_empty_completion_never_bears_loss(tmp_path):
    rows = [{"q": "w1", "a": ""}, {"q": "w2", "a": " \n"}, {"q": "w3", "a": "w4"}]
    samples = make(tmp_path, rows, word_tokenizer(adds_bos=True))
    assert len(samples) == 1 and ID["w3"] in samples[0]
    assert samples.report.label_less == 2


@pytest.mark.parametrize("options", [dict(overlong="drop"), dict(overlong="truncate")])
def test_no_sample_left_names_the_file_and_the_counts(tmp_path, options):
    with pytest.raises(DataError, match=r"rows\.jsonl: no sample is left of 1 rows") as caught:
        make(tmp_path, [{"q": "w1 " * 20, "a": "w2"}], word_tokenizer(adds_bos=True), max_length=8, **options)
    assert len(str(caught.value).splitlines()) <= 2


def test_an_idle_rank_gets_one_token_and_no_label(tmp_path):
    samples = make(tmp_path, [{"q": "w1", "a": "w2"}], word_tokenizer(adds_bos=True))
    for units in ([], [[]]):
        batch = collate(samples, units, "cpu")
        assert batch.tokens.tolist() == [[EOS]]
        assert batch.document_lengths == (1,)
        assert batch.label_positions.shape == batch.labels.shape == (0,)
        assert batch.label_positions.dtype == batch.labels.dtype == torch.int64


def test_the_fingerprint_follows_the_samples(tmp_path):
    tokenizer = word_tokenizer(adds_bos=True)
    first = make(tmp_path, [{"q": "w1", "a": "w2"}], tokenizer)
    again = make(tmp_path, [{"q": "w1", "a": "w2"}], tokenizer)
    other = make(tmp_path, [{"q": "w1", "a": "w3"}], tokenizer)
    moved = make(tmp_path, [{"q": "w1", "a": "w2"}], tokenizer, template="Q : {q}", completion="A : {a}")
    assert first.fingerprint() == again.fingerprint()
    assert len({samples.fingerprint() for samples in (first, other, moved)}) == 3
    assert first.tokens.tolist() == moved.tokens.tolist()


def test_many_rows_keep_their_order(tmp_path):
    rows = [{"q": f"w{number % 50}", "a": f"w{number % 7}"} for number in range(2500)]
    samples = make(tmp_path, rows, word_tokenizer(adds_bos=True))
    assert [words(samples[index])[3] for index in range(2500)] == [row["q"] for row in rows]


def test_splits_and_limits(tmp_path):
    paths = [write(tmp_path / f"{name}.jsonl", [{"query": f"w{number}", "response": "w1"} for number in range(count)])
             for name, count in (("one", 3), ("two", 4), ("held", 5))]
    config = DataConfig(train=tuple(paths[:2]), eval=(paths[2],), train_samples=5, eval_samples=2)
    tokenizer = word_tokenizer(adds_bos=True)
    assert load_samples(config, tokenizer).report.rows == 5
    assert load_samples(config, tokenizer, split="eval").report.rows == 2


# whole documents


def make_text(tmp_path, texts, tokenizer, **options):
    path = write(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    return load_samples(DataConfig(train=(path,), prompt="text", **options), tokenizer)


def test_all_of_a_text_but_its_first_token_is_learnt(tmp_path):
    samples = make_text(tmp_path, ["w1 w2 w3", "w4", "", " \n", "w5 </s>"], word_tokenizer(adds_bos=False, bos=None))
    assert [words(samples[index]) for index in range(len(samples))] == [["w1", "w2", "w3", "</s>"], ["w4", "</s>"], ["w5", "</s>"]]
    batch = collate(samples, [[0, 1]], "cpu")
    assert batch.label_positions.tolist() == [0, 1, 2, 4]
    assert words(batch.labels) == ["w2", "w3", "</s>", "</s>"]
    assert (samples.report.rows, samples.report.label_less, samples.report.label_tokens) == (5, 2, 5)


def test_after_bos_all_of_a_text_is_learnt(tmp_path):
    samples = make_text(tmp_path, ["w1 w2", "<s> w3"], word_tokenizer(adds_bos=True))
    assert [words(samples[index]) for index in (0, 1)] == [["<s>", "w1", "w2", "</s>"], ["<s>", "w3", "</s>"]]
    assert samples.label_counts.tolist() == [3, 2]


def test_the_texts_column_may_have_another_name(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"body": "w1 w2", "text": 3}])
    samples = load_samples(DataConfig(train=(path,), prompt="text", fields={"text": "body"}), word_tokenizer(adds_bos=False))
    assert words(samples[0]) == ["w1", "w2", "</s>"]


def test_a_txt_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("w1 w2\n\nw3\n")
    config = DataConfig(train=(str(path),), prompt="text", fields={"text": "body"})
    samples = load_samples(config, word_tokenizer(adds_bos=False))
    assert len(samples) == 1 and words(samples[0]) == ["w1", "w2", "w3", "</s>"]


# in words; EOS is one token more. Pieces of 8 start at the tokens 0, 7, 14
@pytest.mark.parametrize(("count", "lengths"), [(7, [8]), (8, [8, 2]), (13, [8, 7]), (14, [8, 8]), (15, [8, 8, 2])])
def test_split_pieces_overlap_by_a_token_that_is_not_learnt_again(tmp_path, count, lengths):
    text = " ".join(f"w{number}" for number in range(count))
    samples = make_text(tmp_path, [text], word_tokenizer(adds_bos=False), max_length=8, overlong="split")
    assert samples.lengths.tolist() == lengths
    learnt = [word for index in range(len(samples)) for word in words(collate(samples, [[index]], "cpu").labels)]
    assert learnt == [*text.split()[1:], "</s>"]
    assert all(samples[index][-1] == samples[index + 1][0] for index in range(len(samples) - 1))


def test_split_pieces_after_bos(tmp_path):
    samples = make_text(tmp_path, ["w1 w2 w3 w4 w5 w6 w7 w8 w9"], word_tokenizer(adds_bos=True), max_length=8, overlong="split")
    assert [words(samples[index]) for index in range(len(samples))] == [
        ["<s>", *[f"w{number}" for number in range(1, 8)]], ["w7", "w8", "w9", "</s>"]]
    assert samples.label_counts.tolist() == [7, 3]


def test_splitting_counts_rows_and_samples(tmp_path):
    texts = ["w1 w2", "w3 " * 20, "", "w4 " * 9]
    report = make_text(tmp_path, texts, word_tokenizer(adds_bos=False), max_length=8, overlong="split").report
    assert (report.rows, report.split, report.pieces, report.kept, report.label_less, report.longest) == (4, 2, 5, 6, 1, 21)
    assert report.rows == report.kept - report.pieces + report.split + report.dropped + report.label_less
    assert report.label_tokens == 2 + 20 + 9 and report.truncated == 0
    assert "6 samples of 4 rows" in str(report) and "2 split into 5" in str(report)


@pytest.mark.parametrize(("overlong", "kept", "truncated", "dropped"), [("truncate", 2, 1, 0), ("drop", 1, 0, 1)])
def test_a_long_text_may_be_cut_or_dropped_too(tmp_path, overlong, kept, truncated, dropped):
    samples = make_text(tmp_path, ["w1 w2", "w3 " * 20], word_tokenizer(adds_bos=False), max_length=8, overlong=overlong)
    assert (samples.report.kept, samples.report.truncated, samples.report.dropped) == (kept, truncated, dropped)
    assert "split" not in str(samples.report)


# prompts


def test_user_assistant_wording():
    prompt = build_prompt(DataConfig(train=("x",), prompt="user_assistant", fields={"query": "question"}))
    row = {"question": "What is {1} + 1?", "response": "Two.\n\nIt is {2}."}
    assert prompt.prompt_text(row) == "User: What is {1} + 1?\n\nAssistant:"
    assert prompt.completion_text(row) == " Two.\n\nIt is {2}."
    assert prompt.columns == {"query": "question", "response": "response"}
    assert prompt.prompt_columns == {"query": "question"}
    assert prompt.prompt_text({"question": "Hi"}) == "User: Hi\n\nAssistant:"


@pytest.mark.parametrize(("query", "worded"), [
    ("one\n\ntwo", "one\ntwo"),
    ("one\r\n\r\ntwo\r\nthree", "one\ntwo\nthree"),
    ("\n one\n\n\n\n  two \n\n", "one\n  two"),
    ("one\ntwo", "one\ntwo"),
])
def test_a_blank_line_in_the_query_would_end_the_turn(query, worded):
    prompt = build_prompt(DataConfig(train=("x",), prompt="user_assistant"))
    assert prompt.prompt_text({"query": query, "response": "x"}) == f"User: {worded}\n\nAssistant:"


def test_user_assistant_samples(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"query": "w1\n\nw2", "response": "w3"}, {"query": "w1", "response": " "}])
    samples = load_samples(DataConfig(train=(path,), prompt="user_assistant"), word_tokenizer(adds_bos=False))
    assert samples.report.label_less == 1
    assert words(samples[0])[-2:] == ["w3", "</s>"] and samples.label_count(0) == 2


def test_metamath_wording():
    prompt = build_prompt(DataConfig(train=("x",), fields={"query": "question"}))
    row = {"question": "1 + {1}?", "response": "2"}
    assert prompt.prompt_text(row) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n1 + {1}?\n\n### Response:")
    assert prompt.completion_text(row) == "2"
    assert prompt.columns == {"query": "question", "response": "response"}
    assert prompt.prompt_columns == {"query": "question"}


def test_instruction_wording_with_and_without_input():
    prompt = build_prompt(DataConfig(train=("x",), prompt="instruction"))
    row = {"instruction": "Translate.", "input": "Hund", "output": "dog"}
    assert prompt.prompt_text(row).endswith("### Instruction:\nTranslate.\n\n### Input:\nHund\n\n### Response:")
    for nothing in ("", None, "  "):
        text = prompt.prompt_text({**row, "input": nothing})
        assert "Input" not in text and text.endswith("### Instruction:\nTranslate.\n\n### Response:")
    assert prompt.completion_text(row) == "dog"


def test_a_column_given_to_another_field_is_not_read_twice():
    prompt = build_prompt(DataConfig(train=("x",), prompt="instruction", fields={"instruction": "input"}))
    row = prompt.values("x:1", {"input": "Say hi.", "output": "hi"})
    assert "Input" not in prompt.prompt_text(row) and "Say hi." in prompt.prompt_text(row)


def test_wizardlm_wording():
    prompt = build_prompt(DataConfig(train=("x",), prompt="wizardlm"))
    row = prompt.values("x:1", {"instruction": "Say hi.", "output": "hi", "input": 3})
    assert prompt.prompt_text(row) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hi.\n\n### Response:")
    assert prompt.completion_text(row) == "hi"


CODE = "```python\nprint('```')\n```"


@pytest.mark.parametrize(("answer", "learnt"), [
    (f"Use this:\n\n{CODE}\n\nIt prints.\n\n{CODE}\n", f"Use this:\n\n{CODE}"),
    (f"{CODE}   \nIt prints.", f"{CODE}   "),
    ("1. So:\n   ```\n   x\n   ```\n2. Done", "1. So:\n   ```\n   x\n   ```"),
    ("````md\n```\nx\n```\n````\nDone", "````md\n```\nx\n```\n````"),
    ("~~~\nx\n```\n~~~\nDone", "~~~\nx\n```\n~~~"),
    ("```\r\nx\r\n```\r\nDone", "```\r\nx\r\n```\r"),
    ("```\n```\nDone", "```\n```"),
    ("no code, but `this` and ```that``` too", "no code, but `this` and ```that``` too"),
    ("```python\nnever closed", "```python\nnever closed"),
    ("1. ```py\n   x\n   ```\n2. Done\n```\ny\n```", "1. ```py\n   x\n   ```"),
    ("> - ```\n>   x\n>   ```\nDone", "> - ```\n>   x\n>   ```"),
    ("```\nx\n```py\ny\n```\nDone", "```\nx\n```py\ny\n```"),
])
def test_what_follows_the_first_code_block_is_left_out(answer, learnt):
    prompt = build_prompt(DataConfig(train=("x",), prompt="code"))
    assert prompt.completion_text({"query": "q", "answer": answer}) == learnt
    other = build_prompt(DataConfig(train=("x",), prompt="user_assistant", fields={"response": "answer"}, drop_after_code=True))
    assert other.completion_text({"query": "q", "answer": answer}) == f" {learnt}"
    assert build_prompt(DataConfig(train=("x",))).completion_text({"query": "q", "response": answer}) == answer


def test_template_with_literal_braces_and_mapped_fields():
    prompt = build_prompt(DataConfig(
        train=("x",), prompt="template", template="{{json}} {topic}?", completion="{reply}", fields={"topic": "a.b"}))
    assert prompt.prompt_text({"a.b": "{x}", "reply": "y"}) == "{json} {x}?"


@pytest.mark.parametrize(("options", "named"), [
    (dict(fields={"qury": "question"}), "did you mean 'query'"),
    (dict(prompt="user_assistant", fields={"question": "q"}), "it has query, response"),
    (dict(prompt="text", fields={"txt": "body"}), "did you mean 'text'"),
    (dict(prompt="template", template="{q", completion="{a}"), "data.template"),
    (dict(prompt="template", template="{q}", completion="{a"), "data.completion"),
    (dict(prompt="template", template="{}", completion="{a}"), "no plain"),
    (dict(prompt="template", template="{0}", completion="{a}"), "no plain"),
    (dict(prompt="template", template="{q!r}", completion="{a}"), "no plain"),
    (dict(prompt="template", template="{q:>9}", completion="{a}"), "no plain"),
    (dict(prompt="template", template="{q.x}", completion="{a}"), "no plain"),
    (dict(prompt="template", template="{q}", completion="always this"), "no {field}"),
    (dict(prompt="template", template="{q}", completion="{a}", fields={"b": "c"}), "no field 'b'"),
])
def test_a_wrong_template_or_mapping_is_a_config_error(options, named):
    with pytest.raises(ConfigError) as caught:
        build_prompt(DataConfig(train=("x",), **options))
    assert named in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def test_tokenize_takes_rows_from_anywhere():
    import datasets

    rows = datasets.Dataset.from_dict({"query": ["w1"], "response": ["w2"]})
    config = DataConfig(train=("x",))
    samples = tokenize(rows, build_prompt(config), word_tokenizer(adds_bos=False), config)
    assert samples.report.kept == 1 and samples[0][-1] == EOS


def test_many_open_fences_take_no_time():
    prompt = build_prompt(DataConfig(train=("x",), prompt="code"))
    answer = "\n".join(f"{'`' * 200}x" for _ in range(2000))
    started = time.monotonic()
    assert prompt.completion_text({"query": "q", "answer": answer}) == answer
    assert time.monotonic() - started < 1


def test_labels_are_counted_in_slices(monkeypatch, tmp_path):
    samples = make_text(tmp_path, ["w1 w2 w3", "w4", "w5 w6", "w7 w8 w9 w1"], word_tokenizer(adds_bos=True))
    monkeypatch.setattr("bone_ds.data.samples._SAMPLES_AT_ONCE", 3)
    assert samples.label_counts.tolist() == [samples.label_count(index) for index in range(4)] == [4, 2, 3, 5]
