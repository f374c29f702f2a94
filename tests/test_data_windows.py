"""Windows against a literal loop over episodes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dydiff.data import PADDING, Dataset, Limits, Windows, dataset_from_arrays
from dydiff.data.windows import find_episodes
from dydiff.errors import DydiffError


def make_dataset(terminals: list[bool], timeouts: list[bool] | None, name: str = "test") -> Dataset:
    rows = len(terminals)
    generator = np.random.default_rng(rows)
    arrays = {
        "observations": generator.standard_normal((rows, 2)),
        "actions": generator.standard_normal((rows, 1)),
        "rewards": np.zeros(rows),
        "terminals": np.array(terminals, bool),
    }
    if timeouts is not None:
        arrays["timeouts"] = np.array(timeouts, bool)
    return dataset_from_arrays(arrays, name)


def cut_by_loop(dataset: Dataset, horizon: int, limit: int | None) -> list[np.ndarray]:
    raw = np.concatenate([dataset.observations, dataset.actions], axis=1).astype(np.float64)
    minimum, maximum = raw.min(axis=0), raw.max(axis=0)
    scaled = 2 * (raw - minimum) / (maximum - minimum) - 1
    windows, episode = [], []
    for row in range(len(dataset)):
        episode.append(scaled[row])
        late = dataset.timeouts[row] if dataset.timeouts is not None else len(episode) == limit
        if not (dataset.terminals[row] or late):
            continue
        if len(episode) <= horizon:
            windows.append(np.array(episode + [np.full(3, PADDING)] * (horizon - len(episode))))
        else:
            windows += [np.array(episode[first : first + horizon]) for first in range(len(episode) - horizon + 1)]
        episode = []
    return windows


def test_episodes():
    begins, lengths = find_episodes(np.array([0, 0, 1, 0, 1, 0], bool))
    assert begins.tolist() == [0, 3] and lengths.tolist() == [3, 2]
    begins, lengths = find_episodes(np.zeros(3, bool))
    assert len(begins) == len(lengths) == 0


flags = st.integers(2, 50).flatmap(
    lambda rows: st.tuples(
        *[st.lists(st.sampled_from([False] * 4 + [True]), min_size=rows, max_size=rows) for _ in range(2)]
    )
)


@settings(max_examples=150, deadline=None)
@given(flags, st.integers(1, 12), st.one_of(st.none(), st.integers(1, 20)))
def test_same_windows_as_the_loop(marks, horizon, limit):
    terminals, timeouts = marks
    dataset = make_dataset(terminals, timeouts if limit is None else None)
    expected = cut_by_loop(dataset, horizon, limit)
    limits = Limits.from_dataset(dataset)
    if not expected:
        with pytest.raises(DydiffError, match="marks no end of an episode"):
            Windows(dataset, horizon, limits, max_episode_steps=limit)
        return
    windows = Windows(dataset, horizon, limits, max_episode_steps=limit)
    assert len(windows) == len(expected)
    ours = windows.gather(torch.arange(len(windows)))
    assert ours.dtype == torch.float32 and ours.shape == (len(expected), horizon, 3)
    np.testing.assert_allclose(ours.numpy(), np.array(expected), atol=1e-5)
    assert windows.padding == pytest.approx((ours < -1.00005).double().mean().item(), abs=1e-9)
    index = torch.tensor([len(expected) - 1, 0, 0])
    assert torch.equal(windows.gather(index), ours[index])
    observations_only = Windows(dataset, horizon, limits, include_action=False, max_episode_steps=limit)
    assert torch.equal(observations_only.gather(index), ours[index][:, :, :2])


def test_padding_is_exact_and_only_behind_the_data():
    dataset = make_dataset([False] * 6, [False, False, True, False, False, False])
    windows = Windows(dataset, 5, Limits.from_dataset(dataset))
    (window,) = windows.gather(torch.tensor([0]))
    assert torch.equal(window[3:], torch.full((2, 3), -1.0001))
    assert window[:3].abs().max() <= 1.0
    assert (windows.dim, windows.observation_dim, windows.action_dim) == (3, 2, 1)


def test_one_endless_trajectory_is_cut_at_its_goals():
    timeouts = np.zeros(500, bool)
    timeouts[79::80] = True
    dataset = make_dataset([False] * 500, list(timeouts), "maze2d-umaze-v1")
    windows = Windows(dataset, 32, Limits.from_dataset(dataset))
    assert len(windows) == 6 * (80 - 32 + 1)


def test_no_window_crosses_the_time_limit_of_a_known_environment():
    dataset = make_dataset([False] * 2500, None, "halfcheetah-medium-v0")
    windows = Windows(dataset, 100, Limits.from_dataset(dataset))
    assert len(windows) == 2 * 901
    assert not ((windows.start < 1000) & (windows.start + windows.length > 1000)).any()


def test_memory_is_one_copy_of_the_rows():
    dataset = make_dataset([False] * 1000, [row % 100 == 99 for row in range(1000)])
    windows = Windows(dataset, 50, Limits.from_dataset(dataset))
    assert windows.rows.shape == (1001, 3) and windows.start.shape == (10 * 51,)


def test_errors_name_the_remedy():
    dataset = make_dataset([False] * 6, [False] * 6)
    limits = Limits.from_dataset(dataset)
    with pytest.raises(DydiffError, match="Store a timeouts array that marks the last row of every episode that time ended.$"):
        Windows(dataset, 3, limits)
    ended = make_dataset([False] * 5 + [True], None)
    with pytest.raises(DydiffError, match="max_length_of_trajectory. must be at least 1, not 0"):
        Windows(ended, 0, limits)
    with pytest.raises(DydiffError, match="limits have 2 columns, but dataset 'test' has 2 observation and 1 action"):
        Windows(ended, 3, limits.part(slice(0, 2)))
    with pytest.raises(DydiffError, match="max_episode_steps must be at least 1, not -1"):
        Windows(ended, 3, limits, max_episode_steps=-1)
