"""The matrix of bad inputs, and random ones beyond it: each is answered in one paragraph, soon, and nothing is left behind."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import bad_inputs
import h5py
import hypothesis
import numpy as np
import pytest
import yaml
from bad_inputs import COMMANDS, DATASETS, TRAINS, YAML, BadDataset
from conftest import check_refusal, check_usage
from hypothesis import given
from hypothesis import strategies as st

from dydiff.data import Limits, Windows, load_dataset, make_transitions
from dydiff.errors import DydiffError
from dydiff.experiments.experiment import load_experiment
from dydiff.runs import list_runs, read_log, read_run, read_settings


def check_answer(outcome, answer: str, runs: Path) -> None:
    if answer == TRAINS:
        assert outcome.status == 0, outcome.errors
        (run,) = runs.iterdir()
        figures = [value for line in read_log(run) for value in line.values()]
        assert figures and all(map(math.isfinite, figures))
    else:
        check_refusal(outcome, answer)
        assert not runs.exists(), "a folder was left behind"


@pytest.mark.parametrize("case", DATASETS, ids=lambda case: case.what)
def test_datasets(train, run_stage, dataset_file, tmp_path, case: BadDataset):
    case.damage(dataset_file)
    check_answer(train(dataset_file, "--duration=0.00008"), case.to_diffusion, tmp_path / "runs")
    once = ["--set=dyn_model_params.max_epochs=1", "--device=cpu"]
    check_answer(run_stage("dynamics", dataset_file, *once, root=tmp_path / "more"), case.to_dynamics, tmp_path / "more")


@pytest.mark.parametrize("what, text, answer", YAML, ids=[what for what, _, _ in YAML])
def test_experiment_files(command, tmp_path, monkeypatch, what, text, answer):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(text)
    began = time.process_time()
    check_refusal(command("run", "-e", "bad.yaml", "--device=cpu", "--outdir=runs"), answer)
    assert time.process_time() - began < 10  # most take a hundredth; the limit allows for a busy machine
    (tmp_path / "bad.yaml").unlink()
    assert not os.listdir(tmp_path), "something was left behind"


@pytest.mark.parametrize("arguments, status, answer", COMMANDS, ids=[arguments or "nothing" for arguments, _, _ in COMMANDS])
def test_commands(command, tmp_path, monkeypatch, arguments, status, answer):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    (check_usage if status == 2 else check_refusal)(command(*arguments.split()), answer)
    assert not os.listdir(tmp_path), "something was left behind"


def test_the_page_shows_these_tables():
    text = bad_inputs.PAGE.read_text()
    shown = text.split(bad_inputs.BEGIN)[1].split(bad_inputs.END)[0]
    assert shown == bad_inputs.render(), "docs/faults.md is behind: python tests/bad_inputs.py writes its tables"


# Beyond the tables: whatever comes, it is read or refused

words = st.sampled_from(["dataset_name", "seed", "td3_bc_params", "rl_trainer_params", "keep_condition", "gpu", "lr", "tau", "a.b"])
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates(), st.binary(max_size=4), words
)
trees = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words | leaves, inner, max_size=4))
sections = st.dictionaries(words | leaves, trees, max_size=4)
constants = sections | st.just({"dataset_name": "x", "td3_bc_params": {}})
experiments = st.fixed_dictionaries({"constants": constants}, optional={"variables": sections, "meta_data": sections})
fragments = st.text(alphabet="{}[]:,-?!&*#|>%@`'\"\n\t <0aé~.=", max_size=60)


def load_or_refuse(path: Path, content: bytes, *overrides: str) -> None:
    path.write_bytes(content)
    try:
        load_experiment(path, list(overrides))
    except DydiffError as error:
        assert str(error)


@hypothesis.settings(max_examples=50)
@given(experiments | trees)
def test_any_values_in_an_experiment_file(tmp_path_factory, content):
    text = yaml.dump(content, allow_unicode=True)
    load_or_refuse(tmp_path_factory.getbasetemp() / "fuzz.yaml", text.encode("utf-8", "surrogatepass"))


@given(fragments, st.integers(0, 100), st.binary(max_size=3))
def test_any_text_in_an_experiment_file(tmp_path_factory, fragment, place, raw):
    whole = (bad_inputs.HEAD + "variables: {seed: [1, 2]}\nmeta_data: {exp_name: a}\n").encode()
    place = min(place, len(whole))
    load_or_refuse(tmp_path_factory.getbasetemp() / "fuzz.yaml", whole[:place] + fragment.encode() + raw + whole[place:])


@given(st.text(max_size=30), fragments)
def test_any_override(tmp_path_factory, key, value):
    load_or_refuse(tmp_path_factory.getbasetemp() / "fuzz.yaml", bad_inputs.HEAD.encode(), f"{key}={value}", "seed=" + value)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory) -> bytes:
    """A small dataset file of D4RL's make: compressed rows, flags, text."""
    path, rows, source = tmp_path_factory.mktemp("small") / "small.hdf5", 40, np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for key, width in {"observations": 4, "actions": 2}.items():
            file.create_dataset(key, data=source.uniform(-1, 1, (rows, width)).astype("f4"), compression="gzip", chunks=(16, width))
        file["rewards"] = source.normal(size=rows).astype("f4")
        file["terminals"] = file["timeouts"] = np.arange(rows) % 10 == 9
        file["metadata/environment"] = "maze2d-umaze"
    return path.read_bytes()


def use_or_refuse(path: Path) -> None:
    """Everything that the trainings do with a file before they begin."""
    try:
        dataset = load_dataset(path)
        make_transitions(dataset)
        Windows(dataset, 4, Limits.from_dataset(dataset))
    except DydiffError as error:
        assert str(error)


@hypothesis.settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255) | st.binary(min_size=2, max_size=8)), min_size=1, max_size=4))
def test_damaged_hdf5(tmp_path_factory, small_file, changes):
    damaged = bytearray(small_file)
    for place, value in changes:
        value = bytes([value]) if isinstance(value, int) else value
        place %= len(damaged)
        damaged[place : place + len(value)] = value
    path = tmp_path_factory.getbasetemp() / "fuzz.hdf5"
    path.write_bytes(damaged)
    use_or_refuse(path)


arrays = st.sampled_from(["f2", "f4", "f8", "i8", "u1", "bool", "c8", "S3", "M8[s]"]).flatmap(
    lambda kind: st.lists(st.integers(0, 5), max_size=3).map(lambda shape: np.ones(shape, kind))
)


@given(st.dictionaries(st.sampled_from([*bad_inputs.REQUIRED, "timeouts", "next_observations", "metadata/x"]), arrays))
def test_any_arrays(tmp_path_factory, content):
    for path in (tmp_path_factory.getbasetemp() / f"fuzz.{suffix}" for suffix in ("hdf5", "npz")):
        if path.suffix == ".npz":
            np.savez(path, **content)
        else:
            with h5py.File(path, "w") as file:
                for key, values in content.items():
                    file[key] = values.astype("i8") if values.dtype.kind == "M" else values
        use_or_refuse(path)


@given(st.text(max_size=300), st.sampled_from(["", ".hdf5", ".npz", "-local", "-v2", "/x.h5"]))
def test_any_name_of_a_dataset(tmp_path_factory, name, suffix):
    try:
        load_dataset(name + suffix)
    except DydiffError as error:
        assert str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**40) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.sampled_from(["settings.yaml", "run.json", "log.jsonl"]), json_values)
def test_any_content_of_a_run_folder(tmp_path_factory, name, value):
    folder = tmp_path_factory.getbasetemp() / "folder"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(value))
    read_run(folder), list_runs(folder.parent)
    assert isinstance(read_settings(folder), dict | None) and all("epoch" in line for line in read_log(folder))
