"""Checkpoints: what goes in comes out, what is damaged is refused in one sentence, and a kill never leaves half a file."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import children
from safetensors.torch import save_file
from test_resume import assert_equal_trees

from dydiff.checkpoint import FORMAT, load_checkpoint, save_checkpoint, write_atomically
from dydiff.errors import DydiffError


def round_trip(tree: object, folder: Path) -> object:
    save_checkpoint(folder / "x.safetensors", "thing", tree, {})
    return load_checkpoint(folder / "x.safetensors", "thing")[0]


def test_tree_round_trip(tmp_path):
    shared = torch.arange(6.0)
    tree = {
        "integer keys": {0: torch.ones(2), 1: {"exp_avg": torch.zeros(1)}},
        "list": [1, (2, 3.5), [], {}, ()],
        "scalars": {"none": None, "true": True, "zero": 0, "text": 'ä\n"', "small": 5e-324, "large": -math.inf, "third": 1 / 3},
        "bytes": torch.arange(256, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "long": torch.tensor([2**62, -1]),
        "half": torch.tensor([0.1], dtype=torch.bfloat16),
        "0-dim": torch.tensor(3.0, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "alias": shared,
        "alias of it": shared,
        "slice of it": shared[1:4],
        "transposed": shared.view(2, 3).T,
        "parameter": torch.nn.Parameter(torch.ones(1)).detach(),
    }
    assert_equal_trees(round_trip(tree, tmp_path), tree)


def test_nan_survives(tmp_path):
    tree = round_trip({"scalar": math.nan, "tensor": torch.tensor([math.nan, 1.0])}, tmp_path)
    assert math.isnan(tree["scalar"]) and tree["tensor"].isnan().tolist() == [True, False]


def test_paths_that_look_alike_stay_apart(tmp_path):
    tree = {"a": {"b": torch.zeros(1)}, "a.b": torch.ones(1), 1: torch.full((1,), 2.0), "1": torch.full((1,), 3.0)}
    assert_equal_trees(round_trip(tree, tmp_path), tree)


def test_one_tensor_is_a_tree(tmp_path):
    assert torch.equal(round_trip(torch.ones(2), tmp_path), torch.ones(2))


def test_saved_tensors_are_copies(tmp_path):
    tensor = torch.zeros(3)
    save_checkpoint(tmp_path / "x", "thing", {"tensor": tensor}, {})
    tensor.fill_(7)
    assert load_checkpoint(tmp_path / "x", "thing")[0]["tensor"].tolist() == [0, 0, 0]


def test_manifest_comes_back_with_kind_and_format(tmp_path):
    save_checkpoint(tmp_path / "x", "thing", {}, {"dataset": "maze", "sizes": [1, 2]})
    manifest = load_checkpoint(tmp_path / "x", "thing")[1]
    assert manifest.items() >= {"dataset": "maze", "sizes": [1, 2], "kind": "thing", "format": FORMAT}.items()


@pytest.mark.parametrize("value", [object(), np.zeros(2), {1, 2}, np.int64(3)])
def test_what_cannot_be_stored_is_a_type_error_that_names_the_place(tmp_path, value):
    with pytest.raises(TypeError, match="a.b.0"):
        save_checkpoint(tmp_path / "x", "thing", {"a": {"b": [value]}}, {})
    assert not list(tmp_path.iterdir())


def refusal(path: Path) -> str:
    with pytest.raises(DydiffError) as caught:
        load_checkpoint(path, "reward model")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_wrong_and_newer_files_are_refused(tmp_path):
    assert "Train the reward model first" in refusal(tmp_path / "none.safetensors")
    assert "does not exist" in refusal(tmp_path)
    save_checkpoint(tmp_path / "policy", "policy", {}, {})
    assert "holds a policy, but a reward model is needed" in refusal(tmp_path / "policy")
    # A newer format may store its tree in a way that this version cannot even parse.
    manifest = json.dumps({"format": FORMAT + 1, "kind": "reward model", "dydiff": "9.9"})
    save_file({}, tmp_path / "newer", metadata={"manifest": manifest, "structure": "?"})
    assert "written by dydiff 9.9" in refusal(tmp_path / "newer") and "Upgrade" in refusal(tmp_path / "newer")


def test_files_of_other_programs_are_refused(tmp_path):
    torch.save({"weights": torch.ones(2)}, tmp_path / "pickled")
    save_file({"weights": torch.ones(2)}, tmp_path / "foreign")
    (tmp_path / "text").write_text("<html>not found</html>")
    (tmp_path / "empty").touch()
    for name in ("pickled", "foreign", "text", "empty"):
        assert "is not a dydiff checkpoint or is damaged" in refusal(tmp_path / name)


def test_unpickling_never_happens(tmp_path):
    """A pickle that would run code when loaded: it must not."""

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save(Bomb(), tmp_path / "bomb")
    refusal(tmp_path / "bomb")
    assert not (tmp_path / "exploded").exists()


def test_truncated_and_damaged_files_are_refused(tmp_path):
    path = tmp_path / "x"
    save_checkpoint(path, "reward model", {"weights": {"a": torch.ones(4), 1: [torch.ones(2), 0.5]}}, {})
    whole = path.read_bytes()
    for size in range(0, len(whole), 37):
        path.write_bytes(whole[:size])
        assert "damaged" in refusal(path)
    draw = random.Random(0)
    header = int.from_bytes(whole[:8], "little")
    for _ in range(300):  # a wrong byte in the header: refused, or harmless, but never another kind of error
        damaged = bytearray(whole)
        damaged[draw.randrange(8 + header)] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            load_checkpoint(path, "reward model")
        except DydiffError:
            pass


def save_for_ever(path: Path) -> None:
    """The body of a child: checkpoints of one value throughout, which rises from one save to the next."""
    value = 0
    while True:
        value += 1
        save_checkpoint(path, "thing", {"value": value, "tensors": [torch.full((2_000,), value) for _ in range(8)]}, {})


def test_a_kill_at_any_instant_leaves_a_whole_file(tmp_path):
    draw = random.Random(0)
    path = tmp_path / "x.safetensors"
    values = []
    for _ in range(12):
        path.unlink(missing_ok=True)
        child = children.Process(target=save_for_ever, args=(path,))
        child.start()
        while not path.is_file():
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        tree, _ = load_checkpoint(path, "thing")
        assert all(bool((tensor == tree["value"]).all()) for tensor in tree["tensors"])
        values.append(tree["value"])
    assert max(values) > 1, "the children were killed before they ever replaced a file"


def test_a_file_is_replaced_and_never_overwritten(tmp_path):
    """Who has the old file open goes on reading the old file: the new one took its name, not its place."""
    path = tmp_path / "x"
    save_checkpoint(path, "thing", {"value": 1}, {})
    old = path.read_bytes()
    with open(path, "rb") as reader:
        save_checkpoint(path, "thing", {"value": 2}, {})
        assert reader.read() == old != path.read_bytes()


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(DydiffError, match="No space left on device.*the file that was there is untouched"):
        write_atomically(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "folder" / "x", Path("/proc/dydiff/x")):
        with pytest.raises(DydiffError, match=f"Cannot write '{path}'.*choose another --outdir"):
            save_checkpoint(path, "thing", {}, {})


def test_new_files_follow_the_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        save_checkpoint(tmp_path / "x", "thing", {}, {})
    finally:
        os.umask(mask)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
