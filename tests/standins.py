"""Files of the same make as published checkpoints: the same names, constructors and trees, with small random networks.

The classes below are pickled under the names of modules that are there only while `published_modules` is open: what reads the
files later cannot find them.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import sys
import types
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dydiff.agents.diffusion_actor import PUBLISHED_NAMES, make_betas

SOURCE = "raise SystemExit('the embedded source was run')"


def _reconstruct_persistent_obj(meta: dict) -> object:
    """What the published loader does: it runs the source."""
    exec(meta["module_src"], {})
    return meta["state"]


class Persistent:
    """An object that travels with the source of its module."""

    source = SOURCE

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": type(self).__name__}
        return _reconstruct_persistent_obj, ({**meta, "state": {**self.__dict__}},)


class EasyDict(dict):
    """A dict that is a class of its own."""


class Rearrange(nn.Module):
    """A module without weights."""

    def __init__(self, pattern: str = "b c h -> b c 1 h"):
        super().__init__()
        self.pattern = pattern
        self.axes_lengths = (("a", 1),)


class Conv1dBlock(nn.Module):
    def __init__(self, fan_in: int, fan_out: int):
        super().__init__()
        convolution = nn.Conv1d(fan_in, fan_out, 5, padding=2)
        self.block = nn.Sequential(convolution, Rearrange(), nn.GroupNorm(8, fan_out), Rearrange(), nn.Mish())


class ResidualBlock(nn.Module):
    def __init__(self, fan_in: int, fan_out: int, dim: int):
        super().__init__()
        self.blocks = nn.ModuleList([Conv1dBlock(fan_in, fan_out), Conv1dBlock(fan_out, fan_out)])
        self.time_mlp = nn.Sequential(nn.Mish(), nn.Linear(dim, fan_out), Rearrange())
        self.residual_conv = nn.Conv1d(fan_in, fan_out, 1) if fan_in != fan_out else nn.Identity()


class Resample(nn.Module):
    def __init__(self, convolution: nn.Module):
        super().__init__()
        self.conv = convolution


class TemporalUnet(nn.Module):
    def __init__(self, data_dim: int, dim: int, dim_mults: Sequence[int]):
        super().__init__()
        widths = [data_dim, *(dim * mult for mult in dim_mults)]
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.time_mlp = nn.Sequential(Rearrange(), nn.Linear(dim, 4 * dim), nn.Mish(), nn.Linear(4 * dim, dim))
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for a, b in pairs:
            last = nn.Identity() if b == widths[-1] else Resample(nn.Conv1d(b, b, 3, 2, 1))
            self.downs.append(nn.ModuleList([ResidualBlock(a, b, dim), ResidualBlock(b, b, dim), last]))
        self.mid_block1, self.mid_block2 = (ResidualBlock(widths[-1], widths[-1], dim) for _ in range(2))
        for a, b in reversed(pairs[1:]):
            last = Resample(nn.ConvTranspose1d(a, a, 4, 2, 1))
            self.ups.append(nn.ModuleList([ResidualBlock(2 * b, a, dim), ResidualBlock(a, a, dim), last]))
        self.final_conv = nn.Sequential(Conv1dBlock(dim, dim), nn.Conv1d(dim, data_dim, 1))


class Normalizer:
    def __init__(self, low: np.ndarray, high: np.ndarray):
        self.low, self.high = low, high

    def normalize(self) -> None:
        """Pickled as a bound method, which needs builtins.getattr."""


class TrajectoryDataset(Persistent):
    def __init__(self, low: np.ndarray, high: np.ndarray, horizon: int):
        self.normalizer = Normalizer(low, high)
        self.normalize = self.normalizer.normalize
        self.horizon = np.int64(horizon)
        self.rows = np.asfortranarray(np.stack([low, high]))
        self.labels = np.array(["a", None], dtype=object)
        self.names = {"maze", "local"}


class Preconditioner(Persistent, nn.Module):
    def __init__(self, low: np.ndarray, high: np.ndarray, horizon: int, dim: int, dim_mults: Sequence[int]):
        super().__init__()
        self._init_args = ()
        self._init_kwargs = EasyDict(horizon=horizon, cond_on_action=True)
        self.sigma_data = 0.5
        self.model = TemporalUnet(len(low), dim, dim_mults)
        self.dataset = TrajectoryDataset(low, high, horizon)
        self.register_buffer("cache", torch.zeros(3), persistent=False)


class Loss(Persistent):
    def __init__(self):
        self.use_cond = True


class Perceptron(nn.Module):
    """A policy or critic whose layers are called as in the published code."""

    def __init__(self, dims: Sequence[int], spread: bool = False):
        super().__init__()
        self.activation = nn.functional.relu
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(dims[:-1], dims[1:], strict=True))
        if spread:
            self.last_log_std = nn.Linear(dims[-2], dims[-1])


class DiffusionPolicy(nn.Module):
    def __init__(self, observation_dim: int, action_dim: int, hidden: int, steps: int):
        super().__init__()
        self.model = nn.Module()
        sizes = [(16, 32), (32, 16), (action_dim + 16 + observation_dim, hidden)]
        sizes += [(hidden, hidden), (hidden, hidden), (hidden, action_dim)]
        for name, size in zip(PUBLISHED_NAMES, sizes, strict=True):
            parent, _, index = name.partition(".")
            if not index:
                setattr(self.model, parent, nn.Linear(*size))
                continue
            sequence = getattr(self.model, parent, nn.Sequential())
            while len(sequence) < int(index):
                sequence.append(nn.Mish())
            setattr(self.model, parent, sequence.append(nn.Linear(*size)))
        self.register_buffer("betas", make_betas("vp", steps).float())


class NumpyArrayWrapper:
    """What joblib pickles in place of an array, whose bytes follow."""

    def __init__(self, array: np.ndarray):
        self.subclass, self.dtype, self.shape = type(array), array.dtype, array.shape
        self.order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
        self.allow_mmap, self.numpy_array_alignment_bytes = False, 16


class ArrayPickler(pickle._Pickler):
    """Writes arrays as joblib does."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, pickle.DEFAULT_PROTOCOL)
        self.file = file

    def save(self, value: object, save_persistent_id: bool = True) -> None:
        if not isinstance(value, np.ndarray):
            return super().save(value)
        super().save(NumpyArrayWrapper(value))
        self.framer.commit_frame(force=True)
        padding = 16 - (self.file.tell() + 1) % 16
        self.file.write(bytes([padding]) + b"\xff" * padding + value.tobytes("A"))


PUBLISHED = {
    "joblib.numpy_pickle": [NumpyArrayWrapper],
    "torch_utils.persistence": [_reconstruct_persistent_obj],
    "training.temporal": [Conv1dBlock, ResidualBlock, Resample, TemporalUnet],
    "training.dataset": [TrajectoryDataset, Normalizer],
    "training.networks": [Preconditioner],
    "training.loss": [Loss],
    "einops.layers.torch": [Rearrange],
    "dnnlib.util": [EasyDict],
    "rlkit.torch.networks": [Perceptron, DiffusionPolicy],
}


@contextlib.contextmanager
def published_modules() -> Iterator[None]:
    """The modules that published pickles name, and no longer than they are needed."""
    hidden = {}
    for path, things in PUBLISHED.items():
        names = [path[:end] for end in (*(i for i, letter in enumerate(path) if letter == "."), len(path))]
        for name in names:
            hidden.setdefault(name, sys.modules.get(name))
            sys.modules[name] = types.ModuleType(name)
        sys.modules[path].os = os  # what a module imports can be reached through it
        for thing in things:
            thing.__module__ = path
            setattr(sys.modules[path], thing.__name__, thing)
    try:
        yield
    finally:
        for name, module in hidden.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module
        for things in PUBLISHED.values():
            for thing in things:
                thing.__module__ = __name__


def dump(tree: object, protocol: int = pickle.DEFAULT_PROTOCOL) -> bytes:
    """A pickle of something that holds the classes above."""
    with published_modules():
        return pickle.dumps(tree, protocol)


def make_snapshot(low: np.ndarray, high: np.ndarray, horizon: int = 8, dim: int = 8, dim_mults: Sequence[int] = (1, 2)) -> dict:
    """The contents of a network-snapshot-*.pkl."""
    torch.manual_seed(0)
    ema = Preconditioner(low, high, horizon, dim, dim_mults).eval().requires_grad_(False)
    return {"ema": ema, "loss_fn": Loss(), "augment_pipe": None, "dataset_kwargs": EasyDict(path="x", use_labels=False)}


def make_layers(dims: Sequence[int], num_nets: int = 0) -> dict[str, Tensor]:
    """The tensors of an MLP, or of an ensemble of them, as the dynamics and reward files hold them."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for index, (a, b) in enumerate(zip(dims[:-1], dims[1:], strict=True)):
        shapes = ((num_nets, a, b), (num_nets, 1, b)) if num_nets else ((b, a), (b,))
        for kind, shape in zip(("weight", "bias"), shapes, strict=True):
            weights[f"layers.{index}.{kind}"] = torch.randn(shape, generator=generator)
    return weights


def make_policy(observation_dim: int, action_dim: int, spread: bool = False) -> dict:
    """The networks of a TD3+BC snapshot; with `spread`, means and log-stds come from a layer each."""
    torch.manual_seed(2)
    heads = action_dim if spread else 2 * action_dim
    networks = {name: Perceptron([observation_dim, 8, 8, heads], spread) for name in ("policy", "target_policy")}
    for name in ("qf1", "qf2", "target_qf1", "target_qf2"):
        networks[name] = Perceptron([observation_dim + action_dim, 8, 8, 1])
    return networks


def make_diffusion_policy(observation_dim: int, action_dim: int) -> dict:
    """The networks of a Diffusion-QL snapshot."""
    torch.manual_seed(3)
    networks = {name: DiffusionPolicy(observation_dim, action_dim, 8, 5) for name in ("policy", "ema")}
    return networks | {name: Perceptron([observation_dim + action_dim, 8, 1]) for name in ("qf1", "qf2")}


def save_with_torch(tree: object, zipped: bool = True) -> bytes:
    """A file of `torch.save`, in its present or its older format."""
    buffer = io.BytesIO()
    torch.save(tree, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def save_with_joblib(tree: object) -> bytes:
    """A file of joblib with zlib."""
    buffer = io.BytesIO()
    with published_modules():
        ArrayPickler(buffer).dump(tree)
    return zlib.compress(buffer.getvalue(), 3)
