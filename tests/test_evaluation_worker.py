"""The evaluation beside training: the same numbers as without it, and errors that say where."""

from __future__ import annotations

import dataclasses
import os
import signal

import numpy as np
import pytest
import tiny
import torch

from dydiff.agents import AGENTS
from dydiff.checkpoint import load_checkpoint
from dydiff.data import Limits, Spaces, ZScore
from dydiff.environments import environment_spec
from dydiff.errors import DydiffError
from dydiff.evaluation_worker import EvaluationWorker, PolicyEvaluator, describe_evaluation
from dydiff.experiments.experiment import load_experiment
from dydiff.experiments.policy_stage import build_policies
from dydiff.models import POLICY
from dydiff.problem import load_problem
from dydiff.progress import Progress
from dydiff.runs import Run, read_log
from dydiff.runs.drive import Interrupted, drive

MODELS = {
    "td3_bc": {"observation_dim": 11, "action_dim": 3, "hidden_dims": [8]},
    "diffusion_ql": {"observation_dim": 11, "action_dim": 3, "hidden_dims": [8], "actor_hidden_dim": 8},
}


def describe(algorithm: str, steps: int = 60) -> dict:
    limits = Limits(-torch.ones(14), torch.ones(14))
    spaces = Spaces(limits, ZScore(torch.zeros(11), torch.ones(11)), -np.ones(3, np.float32), np.ones(3, np.float32))
    return describe_evaluation(algorithm, MODELS[algorithm], spaces, environment_spec("hopper"), steps, 30, None, "cpu")


def initial_state(algorithm: str, seed: int) -> dict:
    return AGENTS[algorithm](**MODELS[algorithm], generator=torch.Generator().manual_seed(seed)).state_dict()


def without_time(score) -> dict:
    return {name: value for name, value in dataclasses.asdict(score).items() if name != "seconds"}


def test_a_worker_finds_the_same_numbers():
    here, beside = PolicyEvaluator(describe("diffusion_ql")), EvaluationWorker(describe("diffusion_ql"))
    scores = []
    for seed in (0, 1):
        state = initial_state("diffusion_ql", seed)
        ticket = beside.submit(state, seed=5)
        scores.append(without_time(here.evaluate(state, seed=5)))
        assert without_time(beside.take(ticket)) == scores[-1]
    assert scores[0] != scores[1]
    beside.close()


def test_failures_name_environment_and_seed():
    worker = EvaluationWorker(describe("td3_bc"))
    state = initial_state("td3_bc", 0)
    diverged = {**state, "policy": {name: weight * torch.nan for name, weight in state["policy"].items()}}
    first, second = worker.submit(diverged, seed=7), worker.submit({"nothing": 0}, seed=8)
    with pytest.raises(DydiffError, match="hopper with seed 8.*KeyError"):
        worker.take(second)
    assert worker.ready(first)
    with pytest.raises(DydiffError, match="non-finite action in hopper.*seed"):
        worker.take(first)
    worker.submit(state, seed=9)
    after = worker.submit(state, seed=9)
    os.kill(worker._child.process.pid, signal.SIGKILL)
    worker._child.process.wait()
    with pytest.raises(DydiffError, match="hopper with seed 9 ended by SIGKILL.*evaluation_worker"):
        worker.take(after)
    with pytest.raises(DydiffError, match="hopper.*SIGKILL"):
        worker.submit(state, seed=10)


def test_a_device_that_the_worker_cannot_use_is_an_error_with_a_remedy():
    description = describe("diffusion_ql")
    description["agent"]["device"] = "cuda:99"
    worker = EvaluationWorker(description)
    with pytest.raises(DydiffError, match="Evaluating hopper, in a process of its own, failed: .*evaluation_worker to false"):
        worker.take(worker.submit(initial_state("diffusion_ql", 0), seed=1))


def test_only_policies_of_many_evaluations_act_on_the_device():
    for algorithm, device in (("td3_bc", "cpu"), ("diffusion_ql", "cuda:0")):
        spaces = PolicyEvaluator(describe(algorithm)).spaces
        given = describe_evaluation(algorithm, MODELS[algorithm], spaces, environment_spec("hopper"), 60, 30, None, "cuda:0")
        assert given["agent"]["device"] == device


def train(folder, file, dataset, beside: bool, stop_after: int | None = None) -> None:
    """Train td3_bc without rollouts; from epoch `stop_after` on, the next line that is logged is followed by a signal."""
    settings = [f"rl_trainer_params.evaluation_worker={beside}", "rl_trainer_params.eval_freq=2"]
    (variant,) = load_experiment(str(file), settings, None).variants
    problem = load_problem(dataset)
    (stage,) = build_policies([variant], problem, "cpu", {}, Progress("test"))
    run = Run(folder, "policy", problem.dataset, {})

    def on_epoch(record: dict[str, float]) -> None:
        nonlocal stop_after
        if stop_after is not None and stage.epoch >= stop_after:
            stop_after = None  # a second one would mean: at once
            os.kill(os.getpid(), signal.SIGTERM)

    drive(stage, run, 5, on_epoch)


def figures(folder) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in read_log(folder)]


def test_training_with_a_worker_logs_and_saves_the_same(dataset, tmp_path):
    file = tiny.write_experiment(tmp_path / "experiment.yaml", "td3_bc", dataset)
    for name, beside in (("alone", False), ("beside", True)):
        train(tmp_path / name, file, dataset, beside)
    with pytest.raises(Interrupted):
        train(tmp_path / "resumed", file, dataset, beside=True, stop_after=3)
    train(tmp_path / "resumed", file, dataset, beside=True)
    expected = figures(tmp_path / "alone")
    assert [line["epoch"] for line in expected] == list(range(1, 9))
    assert ["evaluation/return" in line for line in expected] == [False, True] * 4
    for name in ("beside", "resumed"):
        assert figures(tmp_path / name) == expected
        for product in ("agent.safetensors", "agent-best.safetensors"):
            (ours, manifest), (theirs, expected_manifest) = (
                load_checkpoint(tmp_path / run / product, POLICY) for run in (name, "alone")
            )
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
            assert manifest == expected_manifest
