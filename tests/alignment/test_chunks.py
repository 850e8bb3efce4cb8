"""Chunks of two tokenizations, against the definition by prefixes."""

from itertools import accumulate, groupby, pairwise
from operator import itemgetter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_kd.alignment import align


def cut_at_random(total):
    """Sizes of at least one byte that add up to a total."""
    ends = st.sets(st.integers(1, max(1, total - 1))).map(lambda cuts: sorted({*cuts, total}))
    return ends.map(lambda places: [b - a for a, b in pairwise([0, *places])])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40).flatmap(lambda n: st.tuples(cut_at_random(n), cut_at_random(n))))
def test_chunks_are_cut_wherever_both_sides_have_a_prefix_of_one_length(sides):
    first, second = sides
    chunks = align(first, second)
    shared = sorted(set(accumulate(first)) & set(accumulate(second)))
    for sizes, numbers in zip(sides, (chunks.first, chunks.second), strict=True):
        assert numbers == sorted(numbers)
        both = zip(numbers, sizes, strict=True)
        lengths = [sum(size for _, size in run) for _, run in groupby(both, itemgetter(0))]
        assert list(accumulate(lengths)) == shared
    assert chunks.count == len(shared)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=12))
def test_one_tokenization_on_both_sides_has_a_chunk_for_each_token(sizes):
    chunks = align(sizes, sizes)
    assert chunks.first == chunks.second == list(range(len(sizes)))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_tokens_without_bytes_change_no_cut(data):
    first, second = data.draw(
        st.integers(1, 20).flatmap(lambda n: st.tuples(cut_at_random(n), cut_at_random(n)))
    )
    place = data.draw(st.integers(0, len(first)))
    with_one = [*first[:place], 0, *first[place:]]
    chunks, plain = align(with_one, second), align(first, second)
    assert chunks.count == plain.count
    assert chunks.second == plain.second
    others = chunks.first[:place] + chunks.first[place + 1 :]
    assert others == plain.first
    # To what follows it, or, at the end of the text, to what is before it.
    assert chunks.first[place] == [*plain.first, plain.count - 1][place]


def test_without_bytes_on_one_side_there_is_no_chunk():
    assert align([0, 0], []).first == [-1, -1]
    assert align([], []).count == 0


def test_texts_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="one side has 3 bytes and the other 4"):
        align([1, 2], [4])
