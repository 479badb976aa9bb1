"""The small RWKV6 that comes with the project: it opens, knows its small world, and nothing yet of how questions are answered."""

from itertools import islice

import pytest
import torch

from bone_ds import generate
from bone_ds.config import ModelConfig, load_config
from bone_ds.data import build_prompt
from bone_ds.demo import quickstart, rwkv6, small_world
from bone_ds.demo.demonstration import recipe_of
from bone_ds.demo.word_problems import answer_of, last_number

HELD_OUT_LOSS = 0.33  # nats a byte


@pytest.fixture(scope="module")
def small():
    return generate.load(ModelConfig(path=str(quickstart.MODEL), dtype="fp32"))


def logits_of(loaded, texts):
    """Each text as a document of one row: tokens (T,), lengths, logits (T, V)."""
    documents = [[*text.encode(), 0] for text in texts]
    lengths = tuple(map(len, documents))
    tokens = torch.tensor([token for document in documents for token in document])
    with torch.no_grad():
        hidden, _ = loaded.architecture.hidden(loaded.model, tokens[None], lengths)
        return tokens, lengths, hidden @ loaded.architecture.head(loaded.model).T


def test_it_is_small_and_of_bytes(small):
    assert quickstart.MODEL.stat().st_size <= 4_000_000
    assert sum(parameter.numel() for parameter in small.model.parameters()) == 1_700_352
    assert small.architecture.name == "rwkv"
    assert small.tokenizer.vocab_size == 256 and small.tokenizer.eos_token_id == 0


def test_its_held_out_loss(small):
    """On documents of another seed than the corpus was drawn with; see MODEL_CARD.md."""
    tokens, lengths, logits = logits_of(small, islice(small_world.documents(99), 150))
    assert torch.isfinite(logits).all()
    losses = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")
    first = torch.tensor(lengths).cumsum(0)[:-1] - 1
    losses[first] = 0  # nothing predicts the first token of a document
    assert losses.sum() / (len(losses) - len(first)) < HELD_OUT_LOSS


def test_it_states_sums_and_differences(small):
    """Every sum and difference within 20: its result, and the full stop after it, are the likeliest bytes."""
    facts = [small_world.Fact(x, "+", y, x + y) for x in range(21) for y in range(21 - x)]
    facts += [small_world.Fact(x + y, "-", y, x) for x in range(21) for y in range(21 - x)]
    tokens, lengths, logits = logits_of(small, (f"{fact}." for fact in facts))
    likeliest, end, right = logits.argmax(-1), 0, 0
    for fact, length in zip(facts, lengths):
        end += length
        answer = slice(end - len(f"{fact.result}.") - 1, end - 1)
        right += bool((likeliest[answer.start - 1:answer.stop - 1] == tokens[answer]).all())
    assert right / len(facts) > 0.99


def test_it_doesnt_know_the_form_of_an_answer(small):
    prompt = build_prompt(load_config(recipe_of(rwkv6.PART)).data)
    questions = small_world.questions(small_world.families()[1], small_world.HELD_OUT_NAMES, 24, seed=1)
    prompts = [prompt.prompt_text({"query": question.query, "response": question.response}) for question in questions]
    texts = generate.continuations(small, prompts, 40, generate.most_likely)
    assert [answer_of(text) for text in texts] == [None] * len(texts)


def test_it_goes_on_with_a_story(small):
    """Told what is asked about without the question, it comes to the right number: the adapter has to teach the form alone."""
    questions = small_world.questions(small_world.families()[1], small_world.HELD_OUT_NAMES, 24, seed=1)
    stories = [question.query[:question.query.rindex(".") + 1] for question in questions]
    texts = generate.continuations(small, stories, 60, generate.most_likely)
    right = [last_number(text) == question.fact.result for text, question in zip(texts, questions)]
    assert sum(right) >= 23
