"""Offline data: D4RL files, transitions, windows, the three spaces."""

from dydiff.data.d4rl import dataset_path, dataset_url, max_episode_steps, normalized_score
from dydiff.data.dataset import COLLECTOR, Dataset, dataset_from_arrays
from dydiff.data.download import download_dataset
from dydiff.data.sources import RawDataset, check_dataset, load_dataset, read_dataset
from dydiff.data.spaces import Limits, Spaces, ZScore
from dydiff.data.transitions import Transitions, make_transitions
from dydiff.data.windows import PADDING, Windows, find_windows
from dydiff.data.writer import check_writable, write_dataset

__all__ = [
    "COLLECTOR",
    "PADDING",
    "Dataset",
    "Limits",
    "RawDataset",
    "Spaces",
    "Transitions",
    "Windows",
    "ZScore",
    "check_dataset",
    "check_writable",
    "dataset_from_arrays",
    "dataset_path",
    "dataset_url",
    "download_dataset",
    "find_windows",
    "load_dataset",
    "make_transitions",
    "max_episode_steps",
    "normalized_score",
    "read_dataset",
    "write_dataset",
]
