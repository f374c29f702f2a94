"""Reads pickles as data: of what a file names nothing is imported, and of what it asks for nothing is called.

A pickle is a program: it names objects of any module and calls them. Here a name stays a name (`Global`), a call or an
instance becomes a `Record` of what the file says about it, and the few functions that rebuild tensors have stand-ins below
that check their arguments. What published checkpoints do not need is refused: other names, other instructions.

It builds on the standard library's unpickler in Python, whose instructions can be replaced one by one. The one in C fills any
object that has a `__dict__` or `__setstate__`, and its memo is an array as long as the file claims; this one needs no more than
a small multiple of the file's size in memory.
"""

from __future__ import annotations

import codecs
import hashlib
import pickle
import re
from collections.abc import Callable
from io import BytesIO
from typing import Any, NoReturn

import torch
from torch import Tensor

from dydiff.errors import DydiffError
from dydiff.importing.records import Global, Record, Storage, array_layout

MAX_DIMENSIONS = 8  # of a tensor
PERSISTENCE_VERSION = 6
MAX_NAME = 200  # characters of a name
SHARED_BYTES = 16 << 20  # how much more than the file holds may be copied: embedded sources are written once for many objects

# Classes under these become records. Nothing is imported from there: it only tells a checkpoint from an attack.
OPAQUE_MODULES = re.compile(r"(torch\.nn\.modules|torch\.nn\.functional|training|einops|dnnlib|rlkit)(\.\w+)*")
OPAQUE = {
    "builtins.getattr",
    "joblib.numpy_pickle.NumpyArrayWrapper",
    "numpy.dtype",
    "numpy.ndarray",
    "torch.Size",
    "torch.device",
    *(f"torch.{name}" for name in ("float16", "bfloat16", "float32", "float64", "int32", "int64", "uint8", "bool")),
    *(
        f"numpy.{core}.{name}"
        for core in ("core", "_core")
        for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
    ),
}
STORAGES = {
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.ByteStorage": torch.uint8,
    "torch.CharStorage": torch.int8,
    "torch.ShortStorage": torch.int16,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
    "torch.BoolStorage": torch.bool,
}
OLD_MODULES = {"__builtin__": "builtins"}  # protocol 2 writes Python 2's names

# Instructions that only move plain values about, or go through find_class or persistent_load. Missing are those that the class
# below replaces, that no pickler writes since protocol 2 (DUP, INST, OBJ and the other text of protocol 0), that find objects
# without find_class (EXT1/2/4), or whose data are not in the file (NEXT_BUFFER and READONLY_BUFFER).
OPCODES = [
    getattr(pickle, name)[0]
    for name in """
        PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT
        SHORT_BINBYTES BINBYTES BINBYTES8 SHORT_BINUNICODE BINUNICODE BINUNICODE8
        EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST EMPTY_DICT EMPTY_SET
        BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL BINPERSID
    """.split()
]


def rebuild_tensor(
    storage: Storage, offset: int, size: tuple, stride: tuple, requires_grad: bool, hooks: Any, metadata: Any = None
) -> Tensor:
    """A view of a storage, as `torch._utils._rebuild_tensor_v2` gives it, but checked: it never reaches outside or grows."""
    sizes = (offset, *size, *stride)
    if not isinstance(storage, Storage) or len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
        raise ValueError("a tensor without a storage, or of a strange shape")
    if any(type(value) is not int or not 0 <= value < 2**48 for value in sizes):
        raise ValueError("a tensor of negative or enormous size")
    count, end = 1, offset
    for length, step in zip(size, stride, strict=True):
        count *= length
        end += max(length - 1, 0) * step
    available = len(storage.flat)
    if count > available or (count and end >= available):
        raise ValueError("a tensor that is larger than its storage")
    return storage.flat.as_strided(size, stride, offset)


def rebuild_parameter(data: Tensor, requires_grad: bool, hooks: Any) -> Tensor:
    """The values of a parameter."""
    if not isinstance(data, Tensor):
        raise ValueError("a parameter without a tensor")
    return data


def rebuild_dict(pairs: list | tuple = ()) -> dict:
    """An ordered dict as a dict."""
    return {check_key(key): value for key, value in pairs}


def rebuild_set(values: list = ()) -> set:
    """A set, as protocol 2 writes it."""
    return {check_key(value) for value in values}


def rebuild_bytes(text: str, encoding: str) -> bytes:
    """The bytes that protocol 2 writes as text."""
    if encoding != "latin1":
        raise ValueError("text in a strange encoding")
    return codecs.latin_1_encode(text)[0]


def rebuild_persistent(meta: dict) -> Record:
    """An object that was pickled with its module's source: a record of its state; of the source only its hash is kept."""
    if meta["type"] != "class" or meta["version"] != PERSISTENCE_VERSION:
        raise ValueError(f"an embedded object of another type or version than 'class' and {PERSISTENCE_VERSION}")
    if not meta["class_name"].isidentifier() or len(meta["class_name"]) > MAX_NAME:
        raise ValueError("an embedded object whose class has a strange name")
    source = hashlib.sha256(meta["module_src"].encode("utf-8", "surrogatepass")).hexdigest()
    return Record(f"persistent.{meta['class_name']}", (source,), meta["state"])


def count_copied(argument: Any) -> int:
    """About how many bytes or items of an argument a rebuilder copies or reads."""
    if isinstance(argument, dict):
        return len(argument.get("module_src", ""))
    return len(argument) if isinstance(argument, (str, bytes, bytearray, list)) else 0


def check_key(key: Any) -> Any:
    """`key`, which must be a plain value: hashing nested tuples can take longer than the world has lasted."""
    for part in key if type(key) is tuple else (key,):
        if not isinstance(part, (str, bytes, int, float, type(None))):
            raise ValueError(f"a key that is a {type(part).__name__}")
    return key


REBUILDERS = {
    "builtins.set": rebuild_set,
    "collections.OrderedDict": rebuild_dict,
    "_codecs.encode": rebuild_bytes,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_parameter": rebuild_parameter,
    "torch_utils.persistence._reconstruct_persistent_obj": rebuild_persistent,
}
LOAD_FROM_BYTES = "torch.storage._load_from_bytes"


class DataUnpickler(pickle._Unpickler):
    """Reads one pickle from `file` as data; `source` is its name in messages.

    `load_storage` takes the persistent id of a storage, `load_bytes` the contents of `torch.storage._load_from_bytes`; without
    them neither may occur. `load()` raises DydiffError for what is refused and any other exception for what is damaged.
    """

    def __init__(
        self,
        file: BytesIO,
        source: str,
        load_storage: Callable[[Any], Storage] | None = None,
        load_bytes: Callable[[bytes], Storage] | None = None,
    ):
        super().__init__(file)
        self.source = source
        self.load_storage = load_storage
        self.rebuilders = REBUILDERS if load_bytes is None else {**REBUILDERS, LOAD_FROM_BYTES: load_bytes}
        self.may_copy = 2 * file.getbuffer().nbytes + (SHARED_BYTES if load_bytes is not None else 0)

    def refuse(self, what: str) -> NoReturn:
        """Stop reading; nothing of the file has run."""
        raise DydiffError(
            f"'{self.source}' {what}, which no published checkpoint that dydiff knows does. It may be an attack: nothing of it "
            "was run. Get the file from its authors, or train the model with dydiff."
        )

    def find_class(self, module: str, name: str) -> Global:
        """The name as a name, if published checkpoints have use for it."""
        if len(module) + len(name) > MAX_NAME:
            self.refuse(f"asks for a name of {len(module) + len(name)} characters")
        path = f"{OLD_MODULES.get(module, module)}.{name}"
        known = path in OPAQUE or path in self.rebuilders or path in STORAGES
        if not known and not (OPAQUE_MODULES.fullmatch(module) and name.isidentifier() and not name.startswith("__")):
            self.refuse(f"asks for {path!r}")
        return Global(path)

    def persistent_load(self, identity: Any) -> Storage:
        """A storage that lies elsewhere in the file."""
        if self.load_storage is None:
            self.refuse("holds a persistent id")
        return self.load_storage(identity)

    def call(self, function: Any, arguments: Any) -> None:
        """Put the result of a call on the stack: of a rebuilder above, or a record."""
        if not isinstance(function, Global) or function.path in STORAGES:
            self.refuse(f"calls '{function.path}'" if isinstance(function, Global) else "calls what is not a name")
        if type(arguments) is not tuple:
            raise ValueError("a call without a tuple of arguments")
        rebuild = self.rebuilders.get(function.path)
        if rebuild is not None:  # what lies in the memo once can be copied a million times
            self.may_copy -= sum(map(count_copied, arguments))
            if self.may_copy < 0:
                raise ValueError("contents that are repeated endlessly")
        self.append(Record(function.path, arguments) if rebuild is None else rebuild(*arguments))

    def call_function(self) -> None:  # REDUCE
        arguments = self.stack.pop()
        self.call(self.stack.pop(), arguments)

    def make_object(self) -> None:  # NEWOBJ
        self.call_function()

    def make_object_with_words(self) -> None:  # NEWOBJ_EX
        words = self.stack.pop()
        self.call_function()
        self.stack[-1].items.extend(words.items())

    def set_state(self) -> None:  # BUILD
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record):
            target.state = state
            if target.name == "joblib.numpy_pickle.NumpyArrayWrapper":
                self.read_array_behind(target)
        elif not isinstance(target, dict):  # an ordered dict's attributes are metadata of torch
            self.refuse(f"sets the state of a {type(target).__name__}")

    def read_array_behind(self, wrapper: Record) -> None:
        """joblib writes an array's bytes right behind its description; keep them with it."""
        if wrapper.state.get("numpy_array_alignment_bytes") is not None:
            self.read(self.read(1)[0])
        _, count = array_layout(wrapper.state["dtype"], wrapper.state["shape"])
        wrapper.items = [self.read(count)]

    def append_one(self) -> None:  # APPEND
        value = self.stack.pop()
        self.extend([value])

    def append_many(self) -> None:  # APPENDS
        self.extend(self.pop_mark())

    def extend(self, values: list) -> None:
        """Lengthen the list on the stack, or the contents of a record."""
        target = self.stack[-1]
        if not isinstance(target, (list, Record)):
            self.refuse(f"appends to a {type(target).__name__}")
        (target.items if isinstance(target, Record) else target).extend(values)

    def set_item(self) -> None:  # SETITEM
        value = self.stack.pop()
        self.set_items([self.stack.pop(), value])

    def set_many(self) -> None:  # SETITEMS
        self.set_items(self.pop_mark())

    def set_items(self, flat: list) -> None:
        """Fill the dict on the stack, or the contents of a record, with `[key, value, key, value, ...]`."""
        target = self.stack[-1]
        pairs = [(check_key(key), value) for key, value in zip(flat[::2], flat[1::2], strict=True)]
        if isinstance(target, Record):
            target.items.extend(pairs)
        elif isinstance(target, dict):
            target.update(pairs)
        else:
            self.refuse(f"sets items of a {type(target).__name__}")

    def add_items(self) -> None:  # ADDITEMS
        values = self.pop_mark()
        if not isinstance(self.stack[-1], set):
            self.refuse(f"adds to a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(check_key(value) for value in values)

    def make_frozenset(self) -> None:  # FROZENSET
        self.append(frozenset(check_key(value) for value in self.pop_mark()))

    def read_bytearray(self) -> None:  # BYTEARRAY8; the library reserves whatever length the file claims
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def refuse_instruction(self) -> None:
        """What is in Python's repertoire, but not in `OPCODES`."""
        self.refuse("uses an instruction of pickle's")

    dispatch = dict.fromkeys(pickle._Unpickler.dispatch, refuse_instruction)
    dispatch.update((code, pickle._Unpickler.dispatch[code]) for code in OPCODES)
    dispatch |= {
        pickle.REDUCE[0]: call_function,
        pickle.NEWOBJ[0]: make_object,
        pickle.NEWOBJ_EX[0]: make_object_with_words,
        pickle.BUILD[0]: set_state,
        pickle.APPEND[0]: append_one,
        pickle.APPENDS[0]: append_many,
        pickle.SETITEM[0]: set_item,
        pickle.SETITEMS[0]: set_many,
        pickle.ADDITEMS[0]: add_items,
        pickle.FROZENSET[0]: make_frozenset,
        pickle.BYTEARRAY8[0]: read_bytearray,
    }
