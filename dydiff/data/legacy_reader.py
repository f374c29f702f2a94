"""Datasets that only the legacy `d4rl` package (arXiv 2004.07219) knows by name: adroit, kitchen, and others."""

from __future__ import annotations

import importlib

import numpy as np

from dydiff.data.files import METADATA, Contents, Scalar, keep_scalar
from dydiff.errors import DydiffError


def find_obstacle() -> str:
    """Say why the package cannot be imported here; empty where it can."""
    try:
        importlib.import_module("d4rl")
        importlib.import_module("gym")
    except Exception as error:  # mujoco-py raises bare exceptions where its MuJoCo or a compiler is missing
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return ""


def read_environment(name: str) -> Contents:
    """Return the arrays and metadata of the dataset that belongs to the environment `name` of `d4rl`.

    The package looks into its own cache folder and downloads what is not there. Raises DydiffError for a name that it does
    not know and for what goes wrong inside it.
    """
    gym = importlib.import_module("gym")
    try:
        environment = gym.make(name)
        values = environment.get_dataset()
        environment.close()
    except Exception as error:
        raise DydiffError(
            f"Unknown dataset {name!r}: dydiff does not know this name, and the d4rl package failed with it "
            f"({type(error).__name__}: {error}). `dydiff data list` shows the names that need no d4rl package."
        ) from error
    arrays: dict[str, np.ndarray] = {}
    metadata: dict[str, Scalar] = {"source": "d4rl package"}
    for key, value in values.items():
        if key.startswith(METADATA) and np.ndim(value) == 0:
            keep_scalar(metadata, key.removeprefix(METADATA), value)
        else:
            arrays[key] = np.asarray(value)
    return arrays, metadata
