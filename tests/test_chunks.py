"""Rows cut into chunks: every token, label and document boundary is where it was, and ranks agree on the count."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_order import samples_of

from bone_ds.data import collate, collate_chunks


def joined(chunks):
    """Tokens, document lengths, label positions and labels of chunks that continue each other."""
    tokens, lengths, positions, labels = [], [], [], []
    for chunk in chunks:
        own = list(chunk.document_lengths)
        if chunk.continues:
            lengths[-1] += own.pop(0)
        positions += (chunk.label_positions + len(tokens)).tolist()
        tokens += chunk.tokens[0].tolist()
        labels += chunk.labels.tolist()
        lengths += own
    return tokens, lengths, positions, labels


@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=6), chunk_length=st.integers(1, 50))
@settings(deadline=None)
def test_chunks_hold_the_row(lengths, chunk_length):
    samples = samples_of(lengths)
    units = [list(range(len(lengths)))]
    row = collate(samples, units, "cpu")
    chunks = collate_chunks(samples, units, "cpu", chunk_length, [units])
    assert all(chunk.tokens.shape[1] == sum(chunk.document_lengths) <= chunk_length for chunk in chunks)
    assert joined(chunks) == (row.tokens[0].tolist(), lengths, row.label_positions.tolist(), row.labels.tolist())
    assert not chunks[0].continues
    for before, after in pairwise(chunks):
        assert before.tokens.numel() + after.document_lengths[0] > chunk_length, "they would have fitted in one"


@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=6), chunk_length=st.integers(1, 50))
@settings(deadline=None)
def test_where_a_document_is_cut_depends_on_itself_alone(lengths, chunk_length):
    samples = samples_of(lengths)
    cuts = []
    for units in ([list(range(len(lengths)))], *([[index]] for index in range(len(lengths)))):
        position, ends = 0, []
        for chunk in collate_chunks(samples, units, "cpu", chunk_length, [units]):
            position = position if chunk.continues else 0
            for length in chunk.document_lengths:
                position += length
                ends.append(position)
                position = 0 if length != chunk.document_lengths[-1] else position
        cuts.append(len(ends))
    assert cuts[0] == sum(cuts[1:]) == sum(-(-length // chunk_length) for length in lengths)


@pytest.mark.parametrize("units", [[], [[0]]])
def test_ranks_with_fewer_chunks_get_some_without_labels(units):
    samples = samples_of([10, 17])
    chunks = collate_chunks(samples, units, "cpu", 4, [[[0]], [[1]], []])
    assert len(chunks) == 5
    idle = chunks[3:] if units else chunks
    assert all(len(chunk.labels) == 0 and chunk.tokens.shape == (1, 1) and not chunk.continues for chunk in idle)
    assert sum(len(chunk.labels) for chunk in chunks) == (collate(samples, units, "cpu").labels.numel())


def test_without_a_chunk_length_the_row_is_whole():
    samples = samples_of([10, 3])
    (row,) = collate_chunks(samples, [[0], [1]], "cpu", None, [])
    assert row.document_lengths == (10, 3) and not row.continues
