"""Transitions against a literal loop over the rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydiff.data import Dataset, dataset_from_arrays, make_transitions
from dydiff.errors import DydiffError


def make_dataset(
    terminals: list[bool],
    timeouts: list[bool] | None,
    name: str = "test",
    next_observations: np.ndarray | None = None,
) -> Dataset:
    rows = len(terminals)
    arrays = {
        "observations": np.arange(rows, dtype=np.float32)[:, None],
        "actions": np.arange(rows, dtype=np.float32)[:, None] / 10,
        "rewards": np.arange(rows, dtype=np.float32) * 2,
        "terminals": np.array(terminals, bool),
    }
    if timeouts is not None:
        arrays["timeouts"] = np.array(timeouts, bool)
    if next_observations is not None:
        arrays["next_observations"] = next_observations
    return dataset_from_arrays(arrays, name)


def kept_rows(dataset: Dataset, terminate_on_end: bool, limit: int | None) -> list[int]:
    """Return the rows that D4RL's loop keeps: its counter starts at 1 behind a kept end, at 0 behind a dropped one."""
    kept, counter = [], 0
    for row in range(len(dataset) - 1):
        last = dataset.timeouts[row] if dataset.timeouts is not None else counter == limit - 1
        if last and not terminate_on_end:
            counter = 0
            continue
        if dataset.terminals[row] or last:
            counter = 0
        kept.append(row)
        counter += 1
    return kept


flags = st.integers(2, 60).flatmap(
    lambda rows: st.tuples(*[st.lists(st.booleans(), min_size=rows, max_size=rows) for _ in range(2)])
)


@settings(max_examples=150, deadline=None)
@given(flags, st.booleans(), st.one_of(st.none(), st.integers(1, 12)))
def test_same_rows_as_the_loop(marks, terminate_on_end, limit):
    terminals, timeouts = marks
    dataset = make_dataset(terminals, timeouts if limit is None else None)
    rows = kept_rows(dataset, terminate_on_end, limit)
    if not rows:
        with pytest.raises(DydiffError, match="no transition left"):
            make_transitions(dataset, terminate_on_end, limit)
        return
    transitions = make_transitions(dataset, terminate_on_end, limit)
    np.testing.assert_array_equal(transitions.observation[:, 0], rows)
    np.testing.assert_array_equal(transitions.next_observation, transitions.observation + 1)
    np.testing.assert_array_equal(transitions.action, dataset.actions[rows])
    np.testing.assert_array_equal(transitions.reward, dataset.rewards[rows])
    np.testing.assert_array_equal(transitions.terminal, dataset.terminals[rows])
    assert transitions.reward.dtype == np.float32 and transitions.terminal.dtype == bool


def test_stored_next_observations():
    stored = np.arange(5, dtype=np.float32)[:, None] + 100
    dataset = make_dataset([False] * 5, [False, True, False, False, True], next_observations=stored)
    np.testing.assert_array_equal(make_transitions(dataset).next_observation[:, 0], [1, 3, 4])
    transitions = make_transitions(dataset, next_observation="stored")
    np.testing.assert_array_equal(transitions.observation[:, 0], [0, 2, 3])
    np.testing.assert_array_equal(transitions.next_observation[:, 0], [100, 102, 103])
    everything = make_transitions(dataset, terminate_on_end=True, next_observation="stored")
    np.testing.assert_array_equal(everything.next_observation[:, 0], [100, 101, 102, 103])


@pytest.mark.parametrize("name", ["antmaze-umaze-v2", "antmaze-large-diverse-v0"])
def test_antmaze_rewards_are_shifted(name):
    dataset = make_dataset([False] * 4, [False] * 4, name)
    np.testing.assert_array_equal(make_transitions(dataset).reward, [-1, 1, 3])
    np.testing.assert_array_equal(dataset.rewards, [0, 2, 4, 6])


def test_time_limit_of_the_environment_stands_in():
    dataset = make_dataset([False] * 2100, None, "hopper-medium-v0")
    rows = make_transitions(dataset).observation[:, 0]
    assert set(range(2099)) - set(rows.astype(int)) == {999, 1999}


def test_errors_name_the_remedy():
    dataset = make_dataset([False] * 4, None)
    with pytest.raises(DydiffError, match="time limit .* .unknown. is not known. Store a timeouts array"):
        make_transitions(dataset)
    with pytest.raises(DydiffError, match="has no transition left: .* Correct its timeouts array: it must mark only the last row"):
        make_transitions(make_dataset([False] * 4, [True] * 4))
    with pytest.raises(DydiffError, match="max_episode_steps must be at least 1, not 0"):
        make_transitions(dataset, max_episode_steps=0)
    with pytest.raises(DydiffError, match="stores no next_observations"):
        make_transitions(dataset, next_observation="stored")
    with pytest.raises(DydiffError, match="must be 'shift' or 'stored', not 'next'"):
        make_transitions(dataset, next_observation="next")
