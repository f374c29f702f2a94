"""Hostile files: attacks that run a command with the usual loaders, and files that claim much more than they hold."""

from __future__ import annotations

import importlib
import io
import os
import pickle
import subprocess
import zipfile
import zlib
from collections.abc import Callable

import torch
from standins import dump, make_snapshot, save_with_torch
from torch import nn

from dydiff.importing.files import TORCH_MAGIC, TORCH_PROTOCOL

EXTENSION = 0xF0  # a code of copyreg's registry, for the time of a test


class Call:
    """Pickled as the call of something, which may itself be a Call."""

    def __init__(self, function: object, *arguments: object):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced

    def __call__(self) -> None:
        """Pickle wants to see that the result of a call can be called."""


def text(value: str) -> bytes:
    """The pickle instruction for a text."""
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def load_torch(content: bytes) -> object:
    return torch.load(io.BytesIO(content), weights_only=False)


def nested_in_snapshot(place: Callable[[dict, object], None], payload: object) -> bytes:
    """A snapshot with a payload somewhere inside."""
    low = torch.zeros(6).numpy()
    tree = make_snapshot(low, low + 1, dim_mults=[1])
    place(tree, payload)
    return dump(tree)


def with_evil_source(command: str) -> bytes:
    """A snapshot that is as it should be, but for the source that its objects bring along."""
    tree = make_snapshot(torch.zeros(6).numpy(), torch.ones(6).numpy(), dim_mults=[1])
    for thing in (tree["ema"], tree["loss_fn"], tree["ema"].dataset):
        thing.source = f"import os; os.system({command!r})"
    return dump(tree)


def zip_with(pickled: bytes) -> bytes:
    """A file of torch's with another pickle in it."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(save_with_torch({"a": torch.ones(1)}))) as source,
        zipfile.ZipFile(buffer, "w") as target,
    ):
        for name in source.namelist():
            target.writestr(name, pickled if name.endswith("/data.pkl") else source.read(name))
    return buffer.getvalue()


def older_torch_with(pickled: bytes, tail: bytes = b"") -> bytes:
    """A file or storage of torch's older format with another pickle in it."""
    head = (pickle.dumps(part, 2) for part in (TORCH_MAGIC, TORCH_PROTOCOL, {"little_endian": True}))
    return b"".join(head) + pickled + tail


def attacks(command: str) -> dict[str, tuple[bytes, Callable[[bytes], object]]]:
    """Files that run a command, each with the usual loader that they work against."""
    system = Call(os.system, command)
    python = f"__import__('os').system({command!r})"
    plain = {
        "os.system": system,
        "eval": Call(eval, python),
        "exec": Call(exec, python),
        "subprocess": Call(subprocess.check_call, ["sh", "-c", command]),
        "import and getattr": Call(Call(getattr, Call(importlib.import_module, "os"), "system"), command),
        "in a list in a dict": {"layers.0.weight": torch.ones(1, 6), "layers.0.bias": [system]},
        "in a key": {Call(os.system, command): 1},
        "storage": Call(torch.storage._load_from_bytes, older_torch_with(pickle.dumps(system, 2))),
        "storage in a storage": Call(
            torch.storage._load_from_bytes,
            older_torch_with(pickle.dumps(Call(torch.storage._load_from_bytes, older_torch_with(pickle.dumps(system, 2))), 2)),
        ),
    }
    # Only names that published checkpoints need (getattr, a torch module) and what getattr returns.
    module_globals = Call(getattr, Call(getattr, nn.Linear, "__init__"), "__globals__")
    everything = Call(Call(getattr, module_globals, "get"), "__builtins__")
    plain["chain of getattr"] = Call(Call(Call(getattr, everything, "get"), "eval"), python)
    found = {name: (pickle.dumps(payload), pickle.loads) for name, payload in plain.items()}
    found |= {
        "protocol 2": (pickle.dumps(system, 2), pickle.loads),
        "INST": (b"(" + text(command) + b"ios\nsystem\n.", pickle.loads),
        "OBJ": (b"(cos\nsystem\n" + text(command) + b"o.", pickle.loads),
        "Python 2's name": (b"c__builtin__\neval\n" + text(python) + b"\x85R.", pickle.loads),
        "dotted name": (
            b"\x80\x04" + text("training.temporal") + text("os.system") + b"\x93" + text(command) + b"\x85R.",
            pickle.loads,
        ),
        "extension registry": (b"\x80\x02\x82" + bytes([EXTENSION]) + text(command) + b"\x85R.", pickle.loads),
        "memo overwritten": (
            b"ccollections\nOrderedDict\nq\x000cos\nsystem\nq\x000h\x00" + text(command) + b"\x85R.",
            pickle.loads,
        ),
        "second pickle": (older_torch_with(pickle.dumps(system, 2)), load_torch),
        "first pickle": (pickle.dumps(system, 2) + older_torch_with(b"N."), pickle.loads),
        "zip": (zip_with(pickle.dumps(system, 2)), load_torch),
        "type of a storage": (zip_with(b"\x80\x02(" + text("storage") + pickle.dumps(system, 2)[2:-1] + b"tQ."), load_torch),
        "joblib": (zlib.compress(pickle.dumps(system)), lambda content: pickle.loads(zlib.decompress(content))),
        "weights": (
            nested_in_snapshot(lambda tree, payload: setattr(tree["ema"].model, "extra", payload), system),
            pickle.loads,
        ),
        "dataset": (
            nested_in_snapshot(lambda tree, payload: setattr(tree["ema"].dataset, "more", payload), system),
            pickle.loads,
        ),
        "settings": (nested_in_snapshot(lambda tree, payload: tree["dataset_kwargs"].update(x=payload), system), pickle.loads),
    }
    return found


# Files that claim much more than they hold

HUGE = (1 << 40).to_bytes(8, "little")
BIG_INT = b"\x8a\x06" + (1 << 40).to_bytes(6, "little")


def storage_id(count: bytes = b"K\x02") -> bytes:
    return b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + count + b"tQ"


def rebuild(size: bytes, stride: bytes, offset: bytes = b"K\x00") -> bytes:
    """A tensor over two numbers."""
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage_id() + offset + size + stride + b"\x89Nt" + b"R."


def embedded(copies: int) -> bytes:
    """Many objects that were pickled with one source."""
    meta = {"type": "class", "version": 6, "module_src": "x" * 65536, "class_name": "X", "state": None}
    once = pickle.dumps(meta, 2)[2:-1] + b"r\xff\x00\x00\x000"
    return b"\x80\x02" + once + b"ctorch_utils.persistence\n_reconstruct_persistent_obj\nj\xff\x00\x00\x00\x85R" * copies + b"."


def enormous_files() -> dict[str, bytes]:
    shared = torch.ones(256, 256)
    two = (2).to_bytes(8, "little") + bytes(8)
    keys = pickle.dumps(["0"], 2)
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + BIG_INT + b"\x85" + text("b") + b"\x87R."
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"N.")
        archive.writestr("archive/data/0", bytes(1 << 22))
    return {
        "memo index": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "bytearray": b"\x80\x05\x96" + HUGE + b".",
        "bytes": b"\x80\x04\x8e" + HUGE + b".",
        "text": b"\x80\x04\x8d" + HUGE + b".",
        "frame": b"\x80\x04\x95" + HUGE + b"N.",
        "integer": b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
        "array": b"\x80\x02" + array,
        "storage": older_torch_with(b"\x80\x02" + storage_id(BIG_INT) + b".", keys + two),
        "storages": older_torch_with(
            b"\x80\x02(" + b"".join(storage_id(b"K\x40").replace(b"\x000", b"\x00" + bytes([i])) for i in range(65, 90)) + b"t."
        ),
        "size": older_torch_with(b"\x80\x02" + rebuild(BIG_INT + b"\x85", b"K\x01\x85"), keys + two),
        "stride 0": older_torch_with(b"\x80\x02" + rebuild(BIG_INT + b"\x85", b"K\x00\x85"), keys + two),
        "stride": older_torch_with(b"\x80\x02" + rebuild(b"K\x02\x85", BIG_INT + b"\x85"), keys + two),
        "negative": older_torch_with(b"\x80\x02" + rebuild(b"K\x01\x85", b"K\x01\x85", b"J\xff\xff\xff\xff"), keys + two),
        "offset": older_torch_with(b"\x80\x02" + rebuild(b"K\x01\x85", b"K\x01\x85", b"K\x02"), keys + two),
        "deflated archive": bomb.getvalue(),
        "zip's storage": zip_with(b"\x80\x02" + storage_id(BIG_INT) + b"."),
        "compressed": zlib.compress(bytes(1 << 22)),
        # 2^60 paths through 60 tuples of the one before, to be hashed, walked or compared.
        "key": b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"Ns.",
        "element": b"\x80\x04\x8f()" + b"q\x00h\x00\x86" * 60 + b"\x90.",
        "laughs": b"\x80\x02)" + b"q\x00h\x00\x86" * 60 + b".",
        "depth": b"\x80\x02N" + b"\x85" * 100_000 + b".",
        "modules": b"\x80\x02N" + b"".join(b"q\x010}" + text("a") + b"h\x01s" for _ in range(5000)) + b".",
        "copies of a text": b"\x80\x02"
        + text("x" * 65536)
        + b"q\x000"
        + b"c_codecs\nencode\nq\x01"
        + text("latin1")
        + b"q\x02"
        + b"h\x01h\x00h\x02\x86R" * 20_000
        + b".",
        "copies of a name": b"\x80\x04"
        + text("training." + "x" * 65536)
        + b"\x94"
        + text("y")
        + b"\x94"
        + b"h\x00h\x01\x93" * 20_000
        + b".",
        "copies of a source": embedded(copies=20_000),
        "copies of a storage": save_with_torch({f"layers.{i}.weight": shared for i in range(3000)}),
        "storage in storage": pickle.dumps(Call(torch.storage._load_from_bytes, b"\x80\x02" * 1000)),
    }
