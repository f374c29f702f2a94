"""Hostile and damaged files: whatever they hold, the import refuses them in one sentence, and nothing of them runs."""

from __future__ import annotations

import codecs
import contextlib
import copyreg
import pickle
import pickletools
import sys
import time
import tracemalloc
import zlib
from collections.abc import Iterator

import pytest
import standins
import torch
from hostile import EXTENSION, attacks, enormous_files, text, with_evil_source
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from standins import dump, make_layers, make_policy, make_snapshot, published_modules, save_with_joblib, save_with_torch
from torch import nn

from dydiff.data import Limits
from dydiff.errors import DydiffError
from dydiff.experiments.policy_stage import make_importer
from dydiff.importing import Importer, files
from dydiff.importing.files import read_published
from dydiff.problem import load_problem

FORBIDDEN = ("os.", "exec", "compile", "import", "open", "subprocess.", "pickle.find_class", "socket.", "marshal.", "code.")
watched: list[str] | None = None  # Python tells every one of these through an audit hook


def record_event(event: str, arguments: tuple) -> None:
    if watched is not None and event.startswith(FORBIDDEN):
        watched.append(f"{event} {arguments}")


sys.addaudithook(record_event)


@contextlib.contextmanager
def nothing_runs() -> Iterator[None]:
    """Fails when anything is opened, imported, executed or looked up inside."""
    global watched
    watched = []
    try:
        yield
    finally:
        events, watched = watched, None
    assert not events


@pytest.fixture(scope="module")
def importer(dataset_folder) -> Importer:
    (file,) = dataset_folder.iterdir()
    return make_importer(load_problem(str(file)))


@pytest.fixture(scope="module")
def valid(importer) -> dict[str, bytes]:
    """One valid file of every make, small; each has been imported once, so that torch has loaded what it loads late."""
    limits = Limits.from_dataset(importer.dataset)
    tensors = make_layers([6, 3, 8], num_nets=2)
    found = {
        "snapshot": dump(make_snapshot(limits.minimum.numpy(), limits.maximum.numpy(), dim_mults=[1])),
        "old snapshot": dump(make_snapshot(limits.minimum.numpy(), limits.maximum.numpy(), dim_mults=[1]), protocol=2),
        "zip": save_with_torch(tensors),
        "older torch": save_with_torch({**tensors, "elites": torch.tensor([1])}, zipped=False),
        "reward": dump(make_layers([6, 3, 1])),
        "policy": dump(make_policy(4, 2)),
        "joblib": save_with_joblib(make_policy(4, 2, spread=True)),
    }
    codecs.lookup("cp437")  # zipfile's, for the names in some archives
    for content in found.values():
        importer.read(content, "x.pkl")
    return found


NAMES = list(attacks("true"))


@pytest.mark.parametrize("name", NAMES)
def test_attacks_are_refused_and_nothing_runs(importer, valid, tmp_path, name):
    canary = tmp_path / "canary"
    content, load = attacks(f"touch {canary}")[name]
    with nothing_runs(), pytest.raises(DydiffError, match="x.pkl"):
        importer.read(content, "x.pkl")
    assert not canary.exists()

    # The attack is one: the usual loader falls for it.
    standins.Persistent.source, source = "", standins.Persistent.source
    copyreg.add_extension("posix", "system", EXTENSION)
    try:
        with published_modules(), contextlib.suppress(Exception):
            load(attacks(f"touch {canary}")[name][0])
    finally:
        copyreg.remove_extension("posix", "system", EXTENSION)
        standins.Persistent.source = source
    assert canary.exists()


def test_embedded_source_is_never_run(importer, valid, tmp_path):
    canary = tmp_path / "canary"
    content = with_evil_source(f"touch {canary}")
    with nothing_runs():
        tree = read_published(content, "x.pkl")
    assert not canary.exists() and tree["ema"].name == "persistent.Preconditioner"
    with published_modules():
        pickle.loads(content)
    assert canary.exists(), "the published loader runs it"


REFUSED = """
    os.system posix.system nt.system subprocess.Popen pty.spawn builtins.eval builtins.exec builtins.compile builtins.open
    builtins.__import__ builtins.globals builtins.type builtins.object builtins.bytearray builtins.bytes builtins.setattr
    builtins.map builtins.print __builtin__.eval __builtin__.apply functools.partial functools.reduce operator.attrgetter
    operator.methodcaller importlib.import_module importlib.__import__ types.FunctionType types.CodeType marshal.loads
    copyreg._reconstructor copyreg.__newobj__ copy_reg._reconstructor sys.modules sys.exit runpy._run_code shutil.rmtree
    pathlib.Path pickle.loads pickle._Unpickler ctypes.CDLL code.interact timeit.timeit webbrowser.open socket.socket
    numpy.load numpy.fromfile numpy.testing._private.utils.runstring numpy.memmap numpy.core.multiarray.frombuffer
    joblib.load joblib.numpy_pickle.load joblib.numpy_pickle.NDArrayWrapper
    torch.load torch.save torch.hub.load torch.serialization.load torch.storage.TypedStorage torch.storage.UntypedStorage
    torch.storage._TypedStorage torch.jit.load torch.tensor torch.empty torch.from_file torch.classes.load_library
    torch.ops.load_library torch._utils._rebuild_sparse_tensor torch._utils._rebuild_wrapper_subclass
    torch._tensor._rebuild_from_type_v2 torch.nn.Linear torch.nn.parameter.Parameter torch.nn.modulesx.Linear
    torch.nn.modules..Linear
    torch_utils.persistence.import_hook torch_utils.persistence.persistent_class torch_utils.other.x trainingx.y training_.y
    training.networks.__import__ einops.__builtins__ dydiff.importing.Importer dydiff.checkpoint.save_checkpoint
""".split()


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_are_refused(importer, valid, name):
    module, _, thing = name.rpartition(".")
    by_text = f"c{module}\n{thing}\n.".encode()
    by_stack = b"\x80\x04" + text(module) + text(thing) + b"\x93."
    for content in (by_text, by_stack, b"\x80\x02}" + text("a") + by_text[:-1] + b"s."):
        with (
            nothing_runs(),
            pytest.raises(DydiffError, match=f"asks for '{OLD.get(module, module)}.{thing}'.*nothing of it was run"),
        ):
            importer.read(content, "x.pkl")


OLD = {"__builtin__": "builtins"}
LINEAR = b"ctorch.nn.modules.linear\nLinear\n"
TENSOR = pickle.dumps(torch.ones(2), 2)[2:-1]


@pytest.mark.parametrize(
    "content, words",
    [
        (LINEAR + b"}" + text("__setstate__") + b"Nsb.", "sets the state of a Global"),
        (LINEAR + b"N}" + text("forward") + b"Ns\x86b.", "sets the state of a Global"),
        (LINEAR + b")\x81Nb" + b"}" + text("__class__") + LINEAR + b"sb.", "neither a network"),
        (TENSOR + b"(K\x01tb.", "sets the state of a Tensor"),
        (TENSOR + b"K\x00K\x05s.", "sets items of a Tensor"),
        (TENSOR + b"K\x05a.", "appends to a Tensor"),
        (b"]Nb.", "sets the state of a list"),
        (b"]K\x01K\x02s.", "sets items of a list"),
        (b"\x80\x04](K\x01\x90.", "adds to a list"),
        (b"]K\x05R.", "calls what is not a name"),
        (TENSOR + b")R.", "calls what is not a name"),
        (LINEAR + b")R)R.", "calls what is not a name"),
        (b"cbuiltins\ngetattr\n" + LINEAR + text("__init__") + b"\x86R)R.", "calls what is not a name"),
        (b"ctorch\nFloatStorage\n)R.", "calls 'torch.FloatStorage'"),
        (LINEAR + b"]R.", "without a tuple"),
        (b"\x80\x02" + text("x") + b"Q.", "holds a persistent id"),
        (b"Px\n.", "uses an instruction"),
        (b"\x82\x01.", "uses an instruction"),
        (b"NK\x012.", "uses an instruction"),
        (b"\x80\x05\x97.", "uses an instruction"),
        (b"h\x07.", "damaged"),
        (b"\x80\x09N.", "damaged"),
        (b"N", "damaged"),
        (b"0.", "damaged"),
        (b"\xff.", "damaged"),
    ],
)
def test_misused_instructions(importer, valid, content, words):
    with nothing_runs(), pytest.raises(DydiffError, match=words):
        importer.read(content, "x.pkl")
    assert not hasattr(nn.Linear, "__setstate__") or "__setstate__" not in vars(nn.Linear)


def reconstruct(**change: object) -> bytes:
    """A call of the embedded-source constructor with one thing changed."""
    meta = {"type": "class", "version": 6, "module_src": "", "class_name": "X", "state": None, **change}
    return (
        pickle.dumps(meta, 2)[:-1].replace(b"\x80\x02", b"\x80\x02ctorch_utils.persistence\n_reconstruct_persistent_obj\n", 1)
        + b"\x85R."
    )


def test_embedded_objects_of_another_make(importer, valid):
    for change in ({"version": 7}, {"type": "function"}, {"module_src": 5}):
        with nothing_runs(), pytest.raises(DydiffError, match="another type or version|damaged"):
            importer.read(reconstruct(**change), "x.pkl")


# Files that claim much more than they hold


@pytest.mark.parametrize("name", enormous_files())
def test_claims_cost_no_memory_and_no_time(importer, valid, name, monkeypatch):
    monkeypatch.setattr(files, "MAX_UNPACKED", 1 << 20)
    content = enormous_files()[name]
    tracemalloc.start()
    before = time.process_time()
    try:
        with nothing_runs(), pytest.raises(DydiffError):
            importer.read(content, "x.pkl")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20 and time.process_time() - before < 10


# Damaged files


def places(content: bytes) -> list[int]:
    """Where the instructions of a pickle are: elsewhere there are mostly weights."""
    with contextlib.suppress(Exception):
        return [position for _, _, position in pickletools.genops(content)]
    return [0]


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "delete", "cut", "repeat", "swap"]),
        st.floats(0, 1, exclude_max=True),  # where, as a fraction of the instructions
        st.integers(0, 12),  # bytes behind the instruction
        st.integers(0, 255),
        st.integers(1, 40),
    ),
    min_size=1,
    max_size=4,
)


def edit(content: bytes, edits: list[tuple[str, float, int, int, int]]) -> bytes:
    starts = places(content)
    changed = bytearray(content)
    for kind, where, behind, value, length in edits:
        at = min(starts[int(where * len(starts))] + behind, len(changed) - 1)
        if kind == "set":
            changed[at] = value
        elif kind == "insert":
            changed.insert(at, value)
        elif kind == "delete":
            del changed[at : at + length]
        elif kind == "cut":
            del changed[at + 1 :]
        elif kind == "repeat":
            changed[at:at] = changed[at : at + length]
        else:
            other = starts[value * len(starts) // 256]
            changed[at : at + length] = content[other : other + length]
        if not changed:
            break
    return bytes(changed)


def check(importer: Importer, content: bytes) -> None:
    """A damaged file is refused, or read when what was changed does not matter; it never ends otherwise."""
    with nothing_runs(), contextlib.suppress(DydiffError):
        product = importer.read(content, "x.pkl")
        assert product.kind in ("diffusion model", "dynamics model", "reward model", "policy")


@settings(max_examples=350, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_files_end_in_one_sentence_or_a_model(importer, valid, data):
    name = data.draw(st.sampled_from(sorted(valid)))
    edits = data.draw(EDITS)
    if name == "joblib" and data.draw(st.booleans()):
        check(importer, zlib.compress(edit(zlib.decompress(valid[name]), edits), 1))
    else:
        check(importer, edit(valid[name], edits))


@settings(max_examples=150)
@given(st.binary(max_size=200))
def test_random_pickles_end_in_one_sentence(importer, valid, content):
    for head in (b"", b"\x80\x04", b"\x80\x02ctorch.nn.modules.linear\nLinear\n"):
        check(importer, head + content + b".")
