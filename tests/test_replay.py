"""The ring buffer against a plain Python model of it, and the batches mixed from two."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dydiff.data import Transitions
from dydiff.errors import DydiffError
from dydiff.replay import ReplayBuffer, count_real, sample_mixed


def numbered(first: int, count: int) -> Transitions:
    """Transitions that carry their number in every field."""
    number = torch.arange(first, first + count, dtype=torch.float32)
    return Transitions(number[:, None].repeat(1, 3), number[:, None].repeat(1, 2), number, number[:, None].repeat(1, 3), number)


def filled(count: int, first: int = 0, capacity: int | None = None) -> ReplayBuffer:
    buffer = ReplayBuffer(capacity or count, 3, 2, "cpu")
    buffer.extend(numbered(first, count))
    return buffer


def content(buffer: ReplayBuffer) -> list[float]:
    """What is stored, oldest first."""
    numbers = buffer.storage.reward[: buffer.size].tolist()
    cut = buffer.position if buffer.size == buffer.capacity else 0
    return numbers[cut:] + numbers[:cut]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 12), st.lists(st.integers(0, 30), max_size=12))
def test_ring_buffer_is_a_bounded_queue(capacity, counts):
    buffer, model = ReplayBuffer(capacity, 3, 2, "cpu"), deque(maxlen=capacity)
    first = 0
    for count in counts:
        buffer.extend(numbered(first, count))
        model.extend(range(first, first + count))
        first += count
        assert buffer.size == len(model) and content(buffer) == list(model)
    for field in buffer.storage:  # every field of a row moved together
        assert (field[: buffer.size].movedim(0, -1) == buffer.storage.reward[: buffer.size]).all()


@given(st.integers(1, 12), st.integers(0, 30), st.integers(0, 30))
def test_state_continues_the_buffer(capacity, before, after):
    buffer, copy = ReplayBuffer(capacity, 3, 2, "cpu"), ReplayBuffer(capacity, 3, 2, "cpu")
    buffer.extend(numbered(0, before))
    copy.load_state_dict(
        {name: value.clone() if hasattr(value, "clone") else value for name, value in buffer.state_dict().items()}
    )
    for each in (buffer, copy):
        each.extend(numbered(before, after))
    assert content(copy) == content(buffer)
    if buffer.size:
        for one, other in zip(buffer.sample(8, generator(3)), copy.sample(8, generator(3)), strict=True):
            assert torch.equal(one, other)


def test_state_leaves_unused_slots_out():
    assert len(filled(3, capacity=100).state_dict()["reward"]) == 3


def test_a_buffer_of_given_transitions_keeps_the_newest():
    transitions = numbered(0, 10)
    buffer = ReplayBuffer.from_transitions(transitions, 4)
    assert content(buffer) == [6, 7, 8, 9] and buffer.capacity == 4
    assert content(ReplayBuffer.from_transitions(transitions, 100)) == list(range(10))


def test_samples_are_whole_rows_drawn_uniformly_with_replacement():
    buffer = filled(5, capacity=50)
    batch = buffer.sample(10_000, generator())
    for field in batch:
        assert (field.reshape(10_000, -1) == batch.reward[:, None]).all()
    counts = torch.bincount(batch.reward.long(), minlength=5)
    assert len(counts) == 5 and ((counts - 2000).abs() < 200).all()  # five standard deviations


@pytest.mark.parametrize(
    "num_synthetic, real_ratio, num_real",
    [
        (50, 0.6, 6),
        (50, 0.59, 5),
        (50, 1.0, 10),
        (50, 0.0, 0),
        (4, 0.6, 6),
        (3, 0.6, 10),
        (0, 0.6, 10),
        (9, 0.0, 10),
        (0, 1.0, 10),
    ],
)
def test_composition_of_mixed_batches(num_synthetic, real_ratio, num_real):
    real, synthetic = filled(20), ReplayBuffer(60, 3, 2, "cpu")
    synthetic.extend(numbered(1000, num_synthetic))
    batch = sample_mixed(real, synthetic, 10, count_real(synthetic, 10, real_ratio), generator())
    assert len(batch.reward) == 10 and int((batch.reward < 1000).sum()) == num_real
    for field in batch:
        assert field.dtype == torch.float32 and (field.reshape(10, -1) == batch.reward[:, None]).all()


def test_a_buffer_for_nothing_is_refused():
    with pytest.raises(DydiffError, match="at least 1 transition, not 0"):
        ReplayBuffer(0, 3, 2, "cpu")
