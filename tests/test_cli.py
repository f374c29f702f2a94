"""The command line: help at once, every mistake told in one paragraph, and sweeps that neither stop nor go wrong silently."""

from __future__ import annotations

import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import tiny
import torch
from conftest import DATASET, check_refusal, check_usage

import dydiff
from dydiff.cli import main, quiet_without_readers
from dydiff.config import RANGES
from dydiff.options import MAX_SEED
from dydiff.runs import read_run

REPOSITORY = Path(__file__).parents[1]
COMMANDS = ("train", "run", "collect", "report")


# Help and typing mistakes


def processor_time_of_children() -> float:
    """Seconds, of those that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_answers_at_once_and_imports_no_torch():
    code = "import sys, dydiff.cli\ntry: dydiff.cli.main()\nfinally: print(sorted({'torch', 'numpy', 'yaml'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for arguments in (["--help"], ["train", "--help"]):
        begin = processor_time_of_children()
        ended = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
        assert processor_time_of_children() - begin < 1  # it takes 0.1 s
        assert ended.returncode == 0 and ended.stdout.splitlines()[-1] == "[]"


def test_help_names_every_command_and_option(command):
    listing = command("--help").output
    assert all(f"\n    {name} " in listing for name in COMMANDS) and "worker" not in listing
    for name in COMMANDS:
        outcome = command(name, "--help")
        assert outcome.status == 0 and "None" not in outcome.output
        for text in " ".join(outcome.output.split()).split(" --"):  # option by option
            assert text.count("(default:") <= 1 and "(default: False)" not in text, text


def test_version_says_what_a_report_needs(command):
    outcome = command("--version")
    commit = r"( \([0-9a-f]{12}\+?\))?"  # of a clone
    assert outcome.status == 0 and re.match(rf"dydiff {dydiff.__version__}{commit}, Python 3\.", outcome.output)
    assert f"torch {torch.__version__}" in outcome.output and "compiled parts: there" in outcome.output.splitlines()[2]


def test_misspelt_commands_and_options(command):
    check_usage(command("trian"), "trian", "train")
    check_usage(command(), "COMMAND")
    check_usage(command("train"), "--dataset")
    check_usage(command("train", "-m", "x", "--durtion=4"), "--durtion=4", "did you mean --duration?")
    check_usage(command("run", "-e", "x", "--sett", "a=1"), "did you mean --set?")
    check_usage(command("train", "-m", "x", "--dur=4"), "unrecognized")  # no abbreviations


@pytest.mark.parametrize(
    "option",
    [
        "--duration=0",
        "--duration=inf",
        "--duration=nan",
        "--batch=0",
        "--batch=2.5",
        "--dim_mults=1,x",
        "--dim_mults=1,0",
        "--tick=-1",
    ],
)
def test_impossible_values_of_options(command, option):
    check_usage(command("train", "-m", "x", option), option.partition("=")[0], option.partition("=")[2])


@pytest.mark.parametrize("value", ["-1", "1.5", "x", str(2**63)])
def test_impossible_seeds(command, value):
    """The same are refused everywhere, experiment files included."""
    for words in (["train", "-m", "x"], ["collect", "x"], ["report", "--dataset=x"], ["sampler-quality", "--dataset=x"]):
        check_usage(command(*words, f"--seed={value}"), "argument --seed", value)
    assert (0, MAX_SEED) == RANGES["seed"] == RANGES["seeds"] == RANGES["eval_env_seed"]


def test_the_home_folder_in_paths(train, command, dataset, tmp_path, monkeypatch):
    """In `--outdir=~/runs` bash leaves `~` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    tiny.write_experiment(tmp_path / "a.yaml", "reward", dataset)
    assert command("run", "-e=~/a.yaml", "--device=cpu", "--outdir=~/here").status == 0
    assert train(dataset, "--outdir=~/here").status == 0
    assert len(list((tmp_path / "here").iterdir())) == 2
    refused = train(dataset, "--resume=~/here/none")
    check_refusal(refused, f"'{tmp_path}/here/none' is not a run folder")
    check_refusal(command("import", "~/none.pkl", f"--dataset={dataset}"), f"{tmp_path}/none.pkl")
    assert command("collect", dataset, "--steps=20", "--path=~/b.hdf5").status == 0
    assert command("data", "inspect", "~/b.hdf5", "--picture=~/b.png").status == 0
    assert (tmp_path / "b.hdf5").is_file() and (tmp_path / "b.png").is_file() and not (tmp_path / "~").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["data", "list"], ["data", "validate", "bad.npz"]])
def test_output_that_nobody_reads_ends_quietly(arguments, tmp_path):
    """As behind `| head -1`: no traceback, and the status of a tool that SIGPIPE ends."""
    np.savez(tmp_path / "bad.npz", observations=np.zeros((3, 2)))
    command = [sys.executable, "-m", "dydiff.cli", *arguments]
    # Unbuffered, argparse would see the pipe first, and end as well as if it had written.
    own = {"PYTHONPATH": str(REPOSITORY), "D4RL_DATASET_DIR": str(tmp_path), "PYTHONUNBUFFERED": ""}
    environment = {**os.environ, **own}
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    told = process.stderr.read()
    assert process.wait() == 128 + signal.SIGPIPE
    assert told == "" or told.startswith("error: Dataset 'bad.npz' has ") and len(told.splitlines()) == 1


def test_what_a_terminal_cannot_show_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "\xfc"))
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert main(["data", "list"]) == 0 and sys.stdout.buffer.getvalue().splitlines()[0].endswith(b"/\\xfc")


def test_other_broken_pipes_are_not_hidden():
    with pytest.raises(BrokenPipeError), quiet_without_readers():
        raise BrokenPipeError


def test_booleans_as_people_type_them(command):
    check_usage(command("train", "-m", "x", "--use_cond=maybe"), "neither True nor False")
    check_refusal(command("train", "-m", "no-such-dataset", "--use_cond", "True", "--device=cpu"), "no-such-dataset")


# Mistakes in what a command is given


def test_missing_dataset(train, run_stage, tmp_path):
    check_refusal(train("hopper-medium-expert-v9"), "'hopper-medium-expert-v9'")
    check_refusal(train(tmp_path / "none.hdf5"), "none.hdf5")
    check_refusal(run_stage("reward", tmp_path / "none.hdf5"), "none.hdf5")
    assert not (tmp_path / "runs").exists(), "a folder was left behind"
    (tmp_path / "runs").mkdir()
    check_refusal(train(tmp_path / "none.hdf5"), "none.hdf5")
    assert not list((tmp_path / "runs").iterdir()), "what was there before stays, and nothing more"


def test_what_a_signal_stops_before_the_training_leaves_nothing_behind(train, run_stage, tmp_path, monkeypatch):
    monkeypatch.setattr("dydiff.experiments.stages.seed_everything", lambda seed: os.kill(os.getpid(), signal.SIGTERM))
    for outcome in (train("x"), run_stage("reward", "x")):
        assert outcome.status == 130 and outcome.errors == "error: interrupted; what is not saved yet is lost.\n"
        assert not (tmp_path / "runs").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_unknown_environment(run_stage, command, dataset_file):
    with h5py.File(dataset_file, "a") as file:
        del file["metadata"]
    check_refusal(run_stage("td3_bc", dataset_file), "does not say which environment", "env_specs.env_name")
    with h5py.File(dataset_file, "a") as file:
        file["metadata/environment"] = "foo"
    check_refusal(run_stage("td3_bc", dataset_file), "'foo' is unknown", "the metadata of dataset 'copy.hdf5' say")
    with h5py.File(dataset_file, "a") as file:
        del file["metadata"]
    (dataset_file.parent / "model.pkl").write_bytes(b"")
    imported = command("import", dataset_file.parent / "model.pkl", "--dataset", dataset_file)
    check_refusal(imported, "does not say which environment", "--environment of `dydiff import`")
    check_refusal(run_stage("reward", dataset_file, "--device=cpu", "--set=env_specs.env_name=hoper"), "'hoper'", "hopper")
    check_refusal(run_stage("reward", dataset_file, "--device=cpu", "--set=env_specs.env_name=hopper"), "11", "4")


def test_an_environment_that_is_not_the_datasets(run_stage, dataset_file):
    outcome = run_stage("reward", dataset_file, "--device=cpu", "--set=env_specs.env_name=maze2d-large")
    check_refusal(outcome, "is from maze2d-umaze, but env_specs.env_name is maze2d-large")


def test_missing_checkpoints(run_stage, dataset, tmp_path):
    check_refusal(run_stage("td3_bc", dataset), "No finished diffusion model run", DATASET)
    check_refusal(
        run_stage("td3_bc", dataset, "--device=cpu", "--set=diff_model_params.model_paths=[/nowhere/model.safetensors]"),
        "No diffusion model checkpoint at '/nowhere/model.safetensors'",
    )


def test_checkpoint_of_another_kind_or_dataset(run_stage, dataset, dataset_file, trained):
    product = {read_run(file.parent)["kind"]: file for file in trained.glob("*/model.safetensors")}
    swapped = f"--set=diff_model_params.model_paths={product['reward model']}"
    check_refusal(
        run_stage("td3_bc", dataset, "--device=cpu", swapped, root=trained),
        "holds a reward model, but a diffusion model is needed",
    )
    with h5py.File(dataset_file, "a") as file:
        file["rewards"][0] += 1
    check_refusal(run_stage("td3_bc", dataset_file, root=trained), "No finished diffusion model run", "copy.hdf5")
    given = [
        f"--set=diff_model_params.model_paths={product['diffusion model']}",
        f"--set=dyn_model_params.load_path={product['dynamics model']}",
        f"--set=model_params.load_path={product['reward model']}",
    ]
    check_refusal(run_stage("td3_bc", dataset_file, "--device=cpu", *given), f"was trained on dataset '{DATASET}'")


def test_unwritable_folders(command, run_stage, dataset, tmp_path):
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "runs", Path("/proc/dydiff")):
        check_refusal(run_stage("reward", dataset, root=root), str(root), "--outdir")
        check_refusal(command("train", "-m", dataset, *tiny.TRAIN, f"--outdir={root}"), str(root), "--outdir")
        check_refusal(command("collect", DATASET, "--steps=20", f"--path={root / 'x.hdf5'}"), str(root))


@pytest.mark.parametrize(
    "setting",
    [
        *(f"rl_trainer_params.{name}=0" for name in ("num_epochs", "rollout_freq", "eval_freq", "freq_saving", "batch_size")),
        *(f"rl_trainer_params.{name}=0" for name in ("replay_buffer_size", "rollout_batch_size", "each_rollout_size")),
        *("rl_trainer_params.real_ratio=1.5", "rl_trainer_params.rollout_length=9", "rl_trainer_params.rollout_length=1"),
        *("rl_trainer_params.keep_condition.threshold=0", "rl_trainer_params.keep_condition.filter_type=hardmx"),
        *("rl_trainer_params.keep_condition.threshold=0.01", "sampler_kwargs.num_steps=1", "sampler_kwargs.backend=cuda"),
        *("td3_bc_params.policy_lr=.nan", "td3_bc_params.qf_lr=-1", "td3_bc_params.hidden_dims=[8,0]", "seed=-1"),
        *("env_specs.env_num=0", "env_specs.eval_env_seed=-1", "diff_model_params.model_paths=[]", "meta_data.num_workers=0"),
    ],
)
def test_impossible_settings(run_stage, dataset, trained, tmp_path, setting):
    root = tmp_path / "runs"
    shutil.copytree(trained, root)
    check_refusal(run_stage("td3_bc", dataset, "--device=cpu", f"--set={setting}"))


def test_gpu_of_the_file_on_a_machine_without_one(run_stage, dataset, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_refusal(run_stage("reward", dataset, "--set=meta_data.gpu=[0]"), "'cuda:0'", "Use --device cpu")
    assert run_stage("reward", dataset, "--set=seed=1").status == 0
    check_refusal(run_stage("reward", dataset, "--device=gpu"), "'gpu' is not a device")


def test_networks_that_cannot_be_built(train, dataset):
    check_refusal(train(dataset, "--rl_model_type=UNet"), "--rl_model_type 'UNet'", "UNet_RL")
    check_refusal(train(dataset, "--rl_model_type=UNet_RL", "--max_length_of_trajectory=10"), "divisible by 4; 10 is not, 8 is")
    check_refusal(train(dataset, "--rl_model_type=UNet_RL", "--dim=12"), "divisible by 8")
    check_refusal(train(dataset, "--rl_model_type=Transformer_RL", "--dim=7"), "dim", "7")
    check_refusal(train(dataset, "--include_action=False"), "--cond_on_action=True needs --include_action=True")


def test_rollouts_refuse_models_that_were_shown_less(train, run_stage, dataset, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "runs")
    for option in ("include_action", "cond_on_action", "use_cond"):
        more = ["--cond_on_action=False"] if option == "include_action" else []
        assert train(dataset, f"--{option}=False", *more).status == 0
        check_refusal(run_stage("td3_bc", dataset), f"was trained with --{option}=False", f"Train one with --{option}=True")
