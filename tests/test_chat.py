"""Conversations: what of them is learnt, token by token, under the templates of real models; what can't be told is refused."""

import json
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bone_ds.config import DataConfig
from bone_ds.data import load_samples, prompt_ids
from bone_ds.data.chat import build_chat_prompt
from bone_ds.data.preview import segments
from bone_ds.data.tokenization import tokenize
from bone_ds.errors import ConfigError, DataError
from rwkv_adapters.tokenizer import ByteTokenizer

# as the models' tokenizer_config.json have them: SmolLM2-Instruct whole, the others without tools and dates
SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + \
'<|end_header_id|>

'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>

' }}{% endif %}"""
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}\
{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate \
user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}\
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}\
{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}\
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
# leaves the thinking out of every turn but the last, as reasoning models' templates do
FORGETS = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if loop.last %}{{ message['content'] }}{% else %}{{ message['content'].split('</think>')[-1] }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
PLAIN = "{% for message in messages %}{{ message['role'] }}:{{ message['content'] }}\n{% endfor %}"
GLUED = PLAIN + "{% if add_generation_prompt %}assistant:{% endif %}"
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
EOS = {SMOLLM2: "<|im_end|>", LLAMA3: "<|eot_id|>", FORGETS: "<|im_end|>"}
CHAT = [("system", "be kind"), ("user", "ab?"), ("assistant", "cab"), ("user", "d"), ("assistant", "ef\n gh")]


@cache
def tokenizer_of(template, merges=()):
    """A token for every byte, the special tokens of all the templates, and some pairs of bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*letters, *map("".join, merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=EOS.get(template, "</s>"), chat_template=template)


def messages_of(chat):
    return [{"role": role, "content": content} for role, content in chat]


def samples_of(tokenizer, *chats, max_length=2048, **options):
    data = DataConfig(train=("x",), prompt="chat", max_length=max_length, **options)
    return tokenize([{"messages": messages_of(chat)} for chat in chats], build_chat_prompt(data), tokenizer, data, "chats.jsonl")


def learnt_texts(samples, index, tokenizer):
    """The tokens that bear loss, as runs of text; every token is decoded alone."""
    runs, was_learnt = [], False
    for token, is_learnt in zip(samples[index].tolist(), samples.learnt_of(index).tolist(), strict=True):
        if is_learnt:
            runs += [] if was_learnt else [""]
            runs[-1] += tokenizer.decode([token])
        was_learnt = is_learnt
    return runs


@pytest.mark.parametrize(("template", "learnt"), [
    (SMOLLM2, ["cab<|im_end|>", "ef\n gh<|im_end|>"]),
    (LLAMA3, ["cab<|eot_id|>", "ef\n gh<|eot_id|>"]),
    (LLAMA2, [" cab </s>", " ef\n gh </s>"]),
], ids=["SmolLM2", "Llama 3", "Llama 2"])
def test_labels_token_by_token(template, learnt):
    tokenizer = tokenizer_of(template)
    samples = samples_of(tokenizer, CHAT)
    rendered = tokenizer.apply_chat_template(messages_of(CHAT), tokenize=False)
    assert samples[0].tolist() == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert learnt_texts(samples, 0, tokenizer) == learnt
    # every one of them stands where the model that is asked for the turn would write it
    for index in (2, 4):
        asked = tokenizer.apply_chat_template(messages_of(CHAT[:index]), tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        assert samples.learnt_of(0)[start] and not samples.learnt_of(0)[start - 1]
        assert prompt_ids(asked, tokenizer) == samples[0][:start].tolist()


def test_smollm2_says_that_a_turn_ends_but_not_the_line_end_after_it():
    tokenizer = tokenizer_of(SMOLLM2)
    samples = samples_of(tokenizer, [("user", "a"), ("assistant", "b")])
    assert [tokenizer.decode([token]) for token in samples[0][-3:]] == ["b", "<|im_end|>", "\n"]
    assert samples.learnt_of(0)[-3:].tolist() == [True, True, False]


def test_what_follows_the_last_turn_of_the_assistant_is_left_out():
    tokenizer = tokenizer_of(LLAMA3)
    chats = [CHAT, [*CHAT, ("user", "and?")]]
    samples = samples_of(tokenizer, *chats)
    assert samples[0].tolist() == samples[1].tolist()
    with pytest.raises(DataError, match="no sample is left of 1 rows"):
        samples_of(tokenizer, CHAT[:2])


def test_a_template_without_an_end_gets_eos():
    tokenizer = tokenizer_of(PLAIN)
    samples = samples_of(tokenizer, CHAT)
    assert learnt_texts(samples, 0, tokenizer) == ["assistant:cab\n", "assistant:ef\n gh\n</s>"]


def test_an_added_token_of_the_answer_is_no_end():
    """SmolLM2's end, in a template that does not end turns with it: the answer brings it, and EOS follows."""
    tokenizer = tokenizer_of(PLAIN)
    samples = samples_of(tokenizer, [("user", "a"), ("assistant", "b<|im_end|>")])
    assert learnt_texts(samples, 0, tokenizer) == ["assistant:b<|im_end|>\n</s>"]


def test_an_answer_that_stands_in_the_name_of_its_end():
    tokenizer = tokenizer_of(PLAIN)
    samples = samples_of(tokenizer, [("user", "a"), ("assistant", "o")], chat_template=LLAMA3)
    assert learnt_texts(samples, 0, tokenizer) == ["o<|eot_id|>"]


@pytest.mark.parametrize("template", [SMOLLM2, LLAMA3, None], ids=["SmolLM2", "Llama 3", "RWKV"])
def test_an_empty_answer_is_not_learnt(template):
    tokenizer = tokenizer_of(template) if template else ByteTokenizer()
    chat = [("user", "a"), ("assistant", " \n"), ("user", "b"), ("assistant", "c"), ("user", "d"), ("assistant", "")]
    samples = samples_of(tokenizer, chat)
    (learnt,) = learnt_texts(samples, 0, tokenizer)
    assert learnt.strip(" \0").startswith("c") and len(samples) == 1
    with pytest.raises(DataError, match="no sample is left of 1 rows"):
        samples_of(tokenizer, [("user", "a"), ("assistant", "")])


DATED = "\n  {% if true %}{{ strftime_now('%d %B %Y, %H') }}{% endif %}\n" + SMOLLM2


def test_a_template_that_asks_for_the_date_gets_one_and_the_same():
    tokenizer = tokenizer_of(SMOLLM2)
    samples = samples_of(tokenizer, CHAT, chat_template=DATED)
    fixed = samples_of(tokenizer, CHAT, chat_template=DATED.replace("strftime_now('%d %B %Y, %H')", "'26 July 2024, 00'"))
    assert samples.fingerprint() == fixed.fingerprint() and "26 July 2024, 00" in tokenizer.decode(samples[0])
    with pytest.raises(ConfigError, match="data.chat_template: line 2: "):
        samples_of(tokenizer, CHAT, chat_template="{{ strftime_now('%d') }}\n{{ m[ }}")


def test_truncation_may_leave_some_turns():
    tokenizer = tokenizer_of(LLAMA3)
    whole = samples_of(tokenizer, CHAT)
    end = int(whole.learnt_of(0).argmax()) + 2
    cut = samples_of(tokenizer, CHAT, max_length=end)
    assert learnt_texts(cut, 0, tokenizer) == ["ca"] and cut.report.truncated == 1 and cut.label_count(0) == 2
    with pytest.raises(DataError, match="1 without a token to learn"):
        samples_of(tokenizer, CHAT, max_length=end - 2)


@pytest.mark.parametrize(("template", "chat", "named"), [
    (FORGETS, [("user", "a"), ("assistant", "<think>b</think>c"), ("user", "d"), ("assistant", "e")],
     "chats.jsonl: row 2: turn 4: the chat template renders what comes before otherwise once it is there: '<think>b"),
    (LLAMA2, [("user", "a"), ("user", "b"), ("assistant", "c")], "row 2: the chat template refuses it: Conversation roles must alternate"),
    (LLAMA3, [("assistant", "hi"), ("user", "a"), ("assistant", "b")], "row 2: turn 1 is the assistant's"),
    (SMOLLM2, [("user", "a"), ("assistant", "b")], None),
], ids=["forgets", "raises", "assistant first", "safe"])
def test_an_unsafe_conversation_is_refused_by_its_number(template, chat, named):
    safe = [("user", "a"), ("assistant", "b")]
    if named is None:
        assert len(samples_of(tokenizer_of(template), safe, chat)) == 2
        return
    with pytest.raises(DataError) as caught:
        samples_of(tokenizer_of(template), safe, chat)
    assert named in str(caught.value) and len(str(caught.value)) < 400


def test_a_template_without_a_border_of_tokens_is_refused():
    """The text before the answer is the beginning of the text with it, its tokens are not: ':' and the answer are one token."""
    tokenizer = tokenizer_of(GLUED, ((":", "b"),))
    with pytest.raises(DataError, match=r"row 1: turn 2: the chat template leaves no border of tokens after 'user:a\\nassistant:'"):
        samples_of(tokenizer, [("user", "a"), ("assistant", "b")])
    assert len(samples_of(tokenizer, [("user", "a"), ("assistant", "c")])) == 1


def test_a_template_of_the_config(tmp_path):
    tokenizer, given = tokenizer_of(SMOLLM2), "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    path = tmp_path / "mine.jinja"
    path.write_text(given)
    by_text, by_file = (samples_of(tokenizer, CHAT, chat_template=template) for template in (given, str(path)))
    assert by_text[0].tolist() == by_file[0].tolist()
    assert learnt_texts(by_text, 0, tokenizer) == ["[assistant]cab</s>", "[assistant]ef\n gh</s>"]


@pytest.mark.parametrize(("given", "named"), [
    ("{% for m in messages %}\n{{ m[ }}", "data.chat_template: line 2: "),
    ("gone.jinja", "data.chat_template: gone.jinja: can't be read: No such")])
def test_a_wrong_template_of_the_config(given, named):
    with pytest.raises(ConfigError) as caught:
        samples_of(tokenizer_of(SMOLLM2), CHAT, chat_template=given)
    assert named in str(caught.value)


def test_a_tokenizer_without_a_template():
    tokenizer = tokenizer_of(None)
    with pytest.raises(DataError, match="the tokenizer has no chat template; give one with data.chat_template"):
        samples_of(tokenizer, CHAT)


# RWKV's tokenizers have no templates


def test_rwkv_turns():
    chat = [("system", "be\n\nkind"), ("user", " ab\n\n?"), ("assistant", "c\n\nd"), ("user", "e"), ("assistant", "f")]
    samples = samples_of(ByteTokenizer(), chat)
    assert bytes(samples[0].tolist()) == b"System: be\nkind\n\nUser: ab\n?\n\nAssistant: c\n\nd\n\nUser: e\n\nAssistant: f\0"
    assert learnt_texts(samples, 0, ByteTokenizer()) == [" c\n\nd\n\n", " f\0"]


def test_one_rwkv_turn_is_what_user_assistant_is(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"query": "1\n\n+ 1?", "response": "2"}) + "\n")
    one = load_samples(DataConfig(train=(str(path),), prompt="user_assistant"), ByteTokenizer())
    other = samples_of(ByteTokenizer(), [("user", "1\n\n+ 1?"), ("assistant", "2")])
    assert one.tokens.tolist() == other.tokens.tolist() and one.learnt.tolist() == other.learnt.tolist()


def test_what_rwkv_turns_have_no_place_for():
    with pytest.raises(DataError, match="chats.jsonl: row 1: turn 2: the role 'tool' has no place"):
        samples_of(ByteTokenizer(), [("user", "a"), ("tool", "b"), ("assistant", "c")])
    with pytest.raises(ConfigError, match="data.chat_template: this tokenizer knows no templates"):
        samples_of(ByteTokenizer(), CHAT, chat_template=PLAIN)


# rows


@pytest.mark.parametrize("row", [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "id": 3},
    {"messages": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}], "conversations": None},
])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_messages_and_conversations(tmp_path, row, suffix):
    path = tmp_path / f"chats{suffix}"
    if suffix == ".jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    tokenizer = tokenizer_of(LLAMA3)
    samples = load_samples(DataConfig(train=(str(path),), prompt="chat"), tokenizer)
    assert samples[0].tolist() == samples_of(tokenizer, [("user", "a"), ("assistant", "b")])[0].tolist()


@pytest.mark.parametrize(("row", "named"), [
    ({"chat": []}, ["chats.jsonl:1", "no field 'messages'", '"chat"', "data.fields: {messages:"]),
    ({"messages": []}, ["the field 'messages' is []", "make it a list"]),
    ({"messages": "hi"}, ['the field \'messages\' is "hi"', "make it a list"]),
    ({"messages": [{"role": "user"}]}, ["turn 1 of 'messages'", "role and content"]),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}, ["turn 2 of", 'the role is "bot"', "assistant"]),
    ({"messages": [{"role": ["user"], "content": "a"}]}, ["turn 1 of", 'the role is ["user"]']),
    ({"messages": [{"role": "user", "content": None}]}, ["turn 1 of", "the content is null"]),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, ["the content is", "a list"]),
    ({"conversations": [{"from": "human", "value": 3}]}, ["turn 1 of 'conversations'", "the value is 3, a number"]),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, ["turn 1 of", "calls tools"]),
])
def test_a_row_that_is_no_conversation(tmp_path, row, named):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError) as caught:
        load_samples(DataConfig(train=(str(path),), prompt="chat"), tokenizer_of(LLAMA3))
    assert str(path) in str(caught.value) and [part for part in named if part not in str(caught.value)] == []


def test_the_column_may_have_another_name(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"talk": messages_of(CHAT), "messages": 3}) + "\n")
    assert len(load_samples(DataConfig(train=(str(path),), prompt="chat", fields={"messages": "talk"}), tokenizer_of(LLAMA3))) == 1
    with pytest.raises(ConfigError, match="the prompt has no field 'message', it has messages, did you mean 'messages'"):
        load_samples(DataConfig(train=(str(path),), prompt="chat", fields={"message": "talk"}), tokenizer_of(LLAMA3))


# what is learnt and what is not, joined, is what the template rendered

words = st.text("abc de?\né漢", min_size=1, max_size=12).filter(str.strip)
chats = st.lists(st.tuples(words, words), min_size=1, max_size=3).map(
    lambda pairs: [turn for asked, answered in pairs for turn in (("user", asked), ("assistant", answered))])


@pytest.mark.parametrize("template", [SMOLLM2, LLAMA3], ids=["SmolLM2", "Llama 3"])
@settings(deadline=None, max_examples=30)
@given(chat=chats)
def test_the_parts_joined_are_the_rendered_text(template, chat):
    tokenizer = tokenizer_of(template)
    parts = segments(samples_of(tokenizer, chat), 0, tokenizer)
    rendered = tokenizer.apply_chat_template(messages_of(chat), tokenize=False)
    assert "".join(part.text for part in parts) == rendered
    endings = {SMOLLM2: "{}<|im_end|>", LLAMA3: "{}<|eot_id|>"}
    spoken = [content if template == SMOLLM2 else content.strip() for role, content in chat if role == "assistant"]
    assert [part.text for part in parts if part.learnt] == [endings[template].format(text) for text in spoken]
