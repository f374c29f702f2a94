"""The command line: help at once, every mistake told in one paragraph, and sweeps that neither stop nor go wrong silently."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import pytest
import tiny
from conftest import DATASET

from dydiff import workers
from dydiff.runs import read_log, read_run

REPOSITORY = Path(__file__).parents[1]
COMMANDS = ("train", "run", "collect", "report")


def check_refusal(outcome, *parts: str) -> None:
    """The command failed with one readable paragraph that holds all `parts`."""
    assert outcome.status == 1, outcome.errors
    (line,) = (line for line in outcome.errors.splitlines() if line.startswith("error: "))
    assert outcome.errors.rstrip().endswith(line), "something follows the message"
    assert "Traceback" not in outcome.errors
    for part in parts:
        assert part in line, line


def check_usage(outcome, *parts: str) -> None:
    """argparse refused the command: usage, then one line that holds all `parts`."""
    assert outcome.status == 2 and outcome.errors.startswith("usage: ")
    line = outcome.errors.splitlines()[-1]
    for part in ("error: ", *parts):
        assert part in line, line


@pytest.fixture
def dataset_file(dataset_folder, tmp_path) -> Path:
    """A copy of the dataset that a test may damage."""
    return Path(shutil.copy(dataset_folder / f"{DATASET}.hdf5", tmp_path / "copy.hdf5"))


# Help and typing mistakes


def test_help_answers_at_once_and_imports_no_torch():
    code = (
        "import sys, dydiff.cli\ntry: dydiff.cli.main()\nfinally: print(sorted({'torch', 'numpy', 'yaml'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for arguments in (["--help"], ["train", "--help"]):
        begin = time.perf_counter()
        ended = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
        assert time.perf_counter() - begin < 2  # it takes 0.1 s; the limit allows for a busy machine
        assert ended.returncode == 0 and ended.stdout.splitlines()[-1] == "[]"


def test_help_names_every_command_and_option(command):
    listing = command("--help").output
    assert all(f"\n    {name} " in listing for name in COMMANDS) and "worker" not in listing
    for name in COMMANDS:
        outcome = command(name, "--help")
        assert outcome.status == 0 and "None" not in outcome.output.split("(default:")[0]


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


def test_booleans_as_people_type_them(command):
    check_usage(command("train", "-m", "x", "--use_cond=maybe"), "neither True nor False")
    check_refusal(command("train", "-m", "no-such-dataset", "--use_cond", "True", "--device=cpu"), "no-such-dataset")


# Mistakes in what a command is given


@pytest.fixture
def train(command, tmp_path):
    """Runs `dydiff train` with tiny settings under tmp_path/runs."""

    def run(dataset: object, *more: str):
        return command("train", "-m", dataset, "--rl_model_type=MLP_RL", *tiny.TRAIN, f"--outdir={tmp_path / 'runs'}", *more)

    return run


@pytest.fixture
def run_stage(command, tmp_path):
    """Runs `dydiff run` on a tiny experiment of one stage under tmp_path/runs."""

    def run(stage: str, dataset: object, *more: str, variables: dict | None = None, root: Path = tmp_path / "runs"):
        file = tiny.write_experiment(tmp_path / "experiment.yaml", stage, str(dataset), variables)
        return command("run", "-e", file, f"--outdir={root}", *(more or ["--device=cpu"]))

    return run


def test_missing_dataset(train, run_stage, tmp_path):
    check_refusal(train("hopper-medium-expert-v9"), "'hopper-medium-expert-v9'")
    check_refusal(train(tmp_path / "none.hdf5"), "none.hdf5")
    check_refusal(run_stage("reward", tmp_path / "none.hdf5"), "none.hdf5")
    assert not list((tmp_path / "runs").iterdir()), "an empty run folder was left behind"


def test_damaged_datasets(train, run_stage, dataset_file):
    whole = dataset_file.read_bytes()
    dataset_file.write_bytes(whole[: len(whole) // 2])
    check_refusal(train(dataset_file), "truncated or damaged")
    dataset_file.write_bytes(b"<html>")
    check_refusal(run_stage("dynamics", dataset_file), "is not an HDF5 file")


@pytest.mark.parametrize(
    "damage, parts",
    [
        (lambda file: file["observations"].__setitem__((7, 1), float("nan")), ["observations", "NaN", "row 7"]),
        (lambda file: file["rewards"].__setitem__(9, float("inf")), ["rewards", "row 9"]),
        (lambda file: file["actions"].__setitem__((5, 0), 40.0), ["actions outside", "row 5"]),
        (lambda file: file.__delitem__("terminals"), ["lacks terminals"]),
        (lambda file: replace(file, "actions", file["actions"][:100]), ["actions has 100 rows"]),
        (lambda file: replace(file, "observations", file["observations"][:, :3]), ["3 observation", "maze2d-umaze"]),
    ],
)
def test_wrong_content_of_a_dataset(run_stage, dataset_file, damage, parts):
    with h5py.File(dataset_file, "a") as file:
        damage(file)
    check_refusal(run_stage("dynamics", dataset_file), "copy.hdf5", *parts)


def replace(file: h5py.File, key: str, values: object) -> None:
    del file[key]
    file[key] = values


def test_unknown_environment(run_stage, dataset_file):
    with h5py.File(dataset_file, "a") as file:
        del file["metadata"]
    check_refusal(run_stage("td3_bc", dataset_file), "does not say which environment", "env_specs.env_name")
    check_refusal(run_stage("reward", dataset_file, "--device=cpu", "--set=env_specs.env_name=hoper"), "'hoper'", "hopper")
    check_refusal(run_stage("reward", dataset_file, "--device=cpu", "--set=env_specs.env_name=hopper"), "11", "4")


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


def test_mistakes_in_an_experiment_file(run_stage, command, dataset, tmp_path):
    check_refusal(run_stage("reward", dataset, "--device=cpu", "--set=model_params.lrr=1"), "model_params.lrr", "'lr'")
    check_refusal(run_stage("reward", dataset, "--device=cpu", "--set=model_params.lr=fast"), "model_params.lr", "'fast'")
    check_refusal(command("run", "-e", tmp_path / "none.yaml"), "none.yaml", "No such file")
    (tmp_path / "bad.yaml").write_text("constants: [")
    check_refusal(command("run", "-e", tmp_path / "bad.yaml"), "bad.yaml", "is not plain YAML")


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
    check_refusal(run_stage("reward", dataset, "--set=seed=1"), "'cuda:0'", "Use --device cpu")
    check_refusal(run_stage("reward", dataset, "--set=meta_data.gpu=[]"), "meta_data.gpu is empty")
    check_refusal(run_stage("reward", dataset, "--device=gpu"), "'gpu' is not a device")


def test_networks_that_cannot_be_built(train, dataset):
    check_refusal(train(dataset, "--rl_model_type=UNet"), "--rl_model_type 'UNet'", "UNet_RL")
    check_refusal(train(dataset, "--rl_model_type=UNet_RL", "--max_length_of_trajectory=10"), "divisible by 4", "=8")
    check_refusal(train(dataset, "--rl_model_type=UNet_RL", "--dim=12"), "divisible by 8")
    check_refusal(train(dataset, "--rl_model_type=Transformer_RL", "--dim=7"), "dim", "7")
    check_refusal(train(dataset, "--include_action=False"), "--cond_on_action=True needs --include_action=True")


def test_rollouts_refuse_a_model_without_actions(train, run_stage, dataset, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "runs")
    assert train(dataset, "--include_action=False", "--cond_on_action=False").status == 0
    check_refusal(run_stage("td3_bc", dataset), "--include_action=False")


# Runs and their folders


def test_dry_run_writes_nothing(train, dataset, tmp_path):
    outcome = train(dataset, "--dry-run")
    assert outcome.status == 0 and "windows of 8 x 6" in outcome.errors
    assert not (tmp_path / "runs").exists()


def test_resume_of_the_diffusion_training_wants_the_same_options(train, dataset, tmp_path):
    assert train(dataset).status == 0
    (run,) = (tmp_path / "runs").iterdir()
    check_refusal(train(dataset, f"--resume={run}"), "is finished")
    check_refusal(train(dataset, f"--resume={run}", "--lr=0.1"), "lr was 0.001, now 0.1")
    check_refusal(train(dataset, f"--resume={tmp_path}"), "is not a run folder")


def test_two_runs_in_one_folder(train, dataset, tmp_path):
    assert train(dataset).status == 0
    (run,) = (tmp_path / "runs").iterdir()
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        check_refusal(train(dataset, f"--resume={run}"), "Another process is working in")
    assert train(dataset, f"--resume={run}").status == 0


def test_a_damaged_state_is_told_and_does_not_block_the_folder(train, dataset, tmp_path):
    assert train(dataset).status == 0
    (run,) = (tmp_path / "runs").iterdir()
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    state = run / "state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    for _ in range(2):
        check_refusal(train(dataset, f"--resume={run}"), "state.safetensors", "damaged")
    state.unlink()
    assert train(dataset, f"--resume={run}").status == 0, "without its state a run starts over"


def test_foreign_files_among_the_runs_are_passed_over(run_stage, dataset, tmp_path):
    for name, text in {"a": "[1, 2]", "b": '{"id": 3}', "c": "nonsense"}.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text(text)
    assert run_stage("reward", dataset, "--device=cpu", "--resume").status == 0


def test_run_folder_tells_what_was_run(run_stage, dataset, tmp_path):
    described = "--set=meta_data.description=a small test"
    assert run_stage("reward", dataset, "--device=cpu", described, "--set=model_params.lr=2e-3").status == 0
    (run,) = (tmp_path / "runs").iterdir()
    record = read_run(run)
    assert record["status"] == "finished" and record["description"] == "a small test" and record["dataset"] == DATASET
    assert "lr: 0.002" in (run / "settings.yaml").read_text()
    assert [line["epoch"] for line in read_log(run)] == list(range(1, 11))
    # The description identifies nothing: with another one the run is still found.
    outcome = run_stage("reward", dataset, "--device=cpu", "--resume", "--set=model_params.lr=2e-3")
    assert "Already finished" in outcome.output and len(list((tmp_path / "runs").iterdir())) == 1


# Sweeps


@pytest.fixture
def processes(monkeypatch) -> list[tuple[subprocess.Popen, int]]:
    """The worker processes that a sweep starts, each with the number of those that ran beside it at its start."""
    started: list[tuple[subprocess.Popen, int]] = []

    class Recorded(subprocess.Popen):
        def __init__(self, command, stdout, stderr, env, start_new_session):
            beside = sum(process.poll() is None for process, _ in started)
            super().__init__(command, stdout=stdout, stderr=stderr, env=env, start_new_session=start_new_session)
            started.append((self, beside))

    monkeypatch.setattr(workers.subprocess, "Popen", Recorded)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    return started


def test_sweep_with_a_failing_variant(run_stage, dataset, tmp_path, processes):
    variables = {"model_params.lr": [1e-3, 1e30, 2e-3]}
    options = ["--device=cpu", "--set=meta_data.num_workers=2"]
    outcome = run_stage("reward", dataset, *options, variables=variables)
    check_refusal(outcome, "1 of 3 variants failed", "lr=1e_30-s0/output.log", "--resume")
    runs = sorted((tmp_path / "runs").iterdir())
    assert [read_run(run)["status"] for run in runs] == ["finished", "failed", "finished"]
    assert [(run / "model.safetensors").exists() for run in runs] == [True, False, True]
    assert "error: " in (runs[1] / "output.log").read_text()
    besides = [beside for _, beside in processes]  # how many ran when each started; both of the first may end within one look
    assert besides[:2] == [0, 1] and max(besides) == 1, "variants did not run two at a time"

    # Resuming runs only what is not finished, and in its folder.
    outcome = run_stage("reward", dataset, *options, "--resume", variables=variables)
    check_refusal(outcome)
    assert outcome.output.count("Already finished") == 2 and sorted((tmp_path / "runs").iterdir()) == runs
    assert len(processes) == 3, "a finished variant ran again"
    assert not list(tmp_path.glob("**/*.part"))


def test_sweep_passes_a_signal_on_and_waits(run_stage, dataset, tmp_path, processes):
    def interrupt_when_training(seconds: float) -> None:
        """Stand in for the pause between looks at the workers."""
        time.sleep(0.02)
        logs = list((tmp_path / "runs").glob("*/log.jsonl"))
        if len(logs) == 2 and all(log.stat().st_size for log in logs):
            # A terminal's Ctrl-C reaches every process of its session; a worker's second signal would cut its saving short.
            assert all(os.getsid(process.pid) == process.pid for process, _ in processes)
            os.kill(os.getpid(), signal.SIGTERM)

    variables = {"seed": [1, 2]}
    options = [
        "--device=cpu",
        "--set=meta_data.num_workers=2",
        "--set=model_params.max_epochs=100000",
        "--set=model_params.patience=100000",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "time", SimpleNamespace(sleep=interrupt_when_training))
        outcome = run_stage("reward", dataset, *options, variables=variables)
    check_refusal(outcome, "Stopped by signal 15", "--resume")
    assert [process.poll() for process, _ in processes] == [1, 1]
    for run in (tmp_path / "runs").iterdir():
        assert read_run(run)["status"] == "interrupted" and (run / "state.safetensors").exists()
