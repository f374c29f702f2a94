"""Policy training: epochs of rollout, updates and evaluation. This loop only schedules; the work is done elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dydiff.agents import Agent
from dydiff.capture import capture_if_gpu
from dydiff.data import Spaces, d4rl
from dydiff.errors import DydiffError, NotFinite
from dydiff.evaluate import episode_seed
from dydiff.evaluation_worker import EvaluationWorker, PolicyEvaluator, PolicyScore, freeze
from dydiff.filters import keep_mask
from dydiff.finite import find_not_finite
from dydiff.models import POLICY, store_spaces
from dydiff.replay import ReplayBuffer
from dydiff.reward import RewardModel
from dydiff.rollout import RolloutEngine, Trajectory, make_synthetic_transitions, score
from dydiff.updates import Updates


@dataclass
class Rollouts:
    """Everything that synthetic data need: the engine, the models behind the filter, and when and how much."""

    engine: RolloutEngine
    reward_model: RewardModel
    is_terminal: Callable[[Tensor], Tensor]  # raw next observations -> done
    num_starts: int  # start states of one rollout, drawn from the real data
    length: int  # rows of a rollout that are used
    every: int  # epochs from one rollout to the next
    filter_type: str
    threshold: float
    softmax_temp: float

    def __post_init__(self):
        if self.filter_type == "softmax" and int(self.threshold * self.num_starts) < 1:  # the other one keeps one at least
            raise DydiffError(
                f"The filter keeps none of {self.num_starts} rollouts. Raise keep_condition.threshold or rollout_batch_size."
            )

    @torch.no_grad()
    def judge(self, generator: torch.Generator, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [B] of rollouts, which of them to keep [B], and whether all scores are finite [].

        Nothing here may wait for the device: on a GPU it is captured.
        """
        trajectory = Trajectory(observation, action)
        scores = score(self.reward_model, trajectory)
        keep = keep_mask(scores, self.filter_type, self.threshold, self.softmax_temp, generator)
        return scores, keep, scores.isfinite().all()


@dataclass
class Evaluation:
    """How the policy is evaluated: in this process, or by a worker while the next epoch trains."""

    evaluator: PolicyEvaluator | EvaluationWorker
    dataset_name: str  # for the reference scores
    seed: int
    every: int  # epochs from one evaluation to the next


@dataclass
class Saving:
    """Which checkpoints of the policy are kept, and what they hold."""

    every: int  # epochs from one periodic checkpoint to the next
    best: bool
    replay: bool  # periodic checkpoints hold the real transitions
    model_replay: bool  # and the synthetic ones
    describe: dict[str, Any]  # the manifest: algorithm and constructor arguments


@dataclass
class Epoch:
    """An epoch, what is known of it, and the agent's state if that is evaluated."""

    number: int
    record: dict[str, float]
    before: tuple[dict[str, Any], Tensor]  # the agent's and the generator's states before the updates
    state: dict[str, Any] | None = None
    ticket: int | None = None  # of a worker that evaluates the state


class PolicyTrainer:
    """Trains an agent on real transitions and, with `rollouts`, on synthetic ones beside them; a stage for `runs.drive`.

    Without `rollouts` this is the base algorithm. `evaluation` is None where no simulator exists. All randomness of training
    comes from one generator seeded by `seed`; evaluation has seeds of its own, so that it never disturbs training.
    """

    def __init__(
        self,
        agent: Agent,
        spaces: Spaces,
        real: ReplayBuffer,
        synthetic: ReplayBuffer,
        rollouts: Rollouts | None,
        evaluation: Evaluation | None,
        saving: Saving,
        num_epochs: int,
        updates_per_epoch: int,
        batch_size: int,
        real_ratio: float,
        seed: int,
        on_update: Callable[[int], None] = lambda count: None,
        update_mode: str = "auto",
        update_precision: str = "float32",
        on_rollout: Callable[[str], None] = lambda text: None,
    ):
        self.agent = agent
        self.spaces = spaces
        self.real = real
        self.synthetic = synthetic
        self.rollouts = rollouts
        self.evaluation = evaluation
        self.saving = saving
        self.num_epochs = num_epochs
        self.updates_per_epoch = updates_per_epoch
        self.on_update = on_update
        self.on_rollout = on_rollout
        self.generator = torch.Generator(agent.device).manual_seed(seed)
        num_updates = num_epochs * updates_per_epoch
        how = batch_size, real_ratio, self.generator, update_mode, num_updates, update_precision
        self.updates = Updates(agent, real, synthetic, *how)
        judge = partial(rollouts.judge, self.generator) if rollouts else None
        self._judge = judge and capture_if_gpu(judge, agent.device, self.generator)
        self.epoch = 0
        self.best_return = -float("inf")
        self._best: Epoch | None = None  # whose policy is the best so far and not saved yet
        self._evaluated: Epoch | None = None  # which a worker is evaluating
        self._epochs: list[Epoch] = []  # whose records nobody has taken yet

    @property
    def finished(self) -> bool:
        return self.epoch >= self.num_epochs

    def run_epoch(self) -> dict[str, float] | None:
        """Train one epoch; its record, or None where a worker evaluates and `late_records` gives it."""
        (record,) = run_epochs([self], self.updates)
        return record

    def begin_epoch(self) -> Epoch:
        """The part of an epoch before its updates: the rollout, where one is due."""
        began, record = time.perf_counter(), {}
        if self.rollouts is not None and self.epoch % self.rollouts.every == 0:
            record |= self._roll_out(self.rollouts)
            record["time/rollout"] = time.perf_counter() - began
        return Epoch(self.epoch + 1, record, (freeze(self.agent.state_dict()), self.generator.get_state()))

    def end_epoch(self, epoch: Epoch, means: dict[str, float], seconds: float) -> dict[str, float] | None:
        """The part behind its updates, which logged `means` and took `seconds`: evaluation. Returns what `run_epoch` does."""
        if find_not_finite(self.agent.state_dict()) or not np.isfinite([*means.values()]).all():
            raise NotFinite(self._find_divergence(*epoch.before))
        epoch.record |= {f"train/{name}": mean for name, mean in means.items()} | {"time/updates": seconds}
        self.agent.end_epoch()
        self.epoch, began, evaluation = epoch.number, time.perf_counter(), self.evaluation
        due = evaluation is not None and (self.epoch % evaluation.every == 0 or self.finished)
        if evaluation is None or isinstance(evaluation.evaluator, PolicyEvaluator):
            if due:
                epoch.state = self.agent.state_dict()
                self._conclude(epoch, evaluation.evaluator.evaluate(epoch.state, self._evaluation_seed(epoch)))
                epoch.record["time/evaluation"] = time.perf_counter() - began
            return epoch.record
        if due:
            self._await_evaluation()
            epoch.state = freeze(self.agent.state_dict())
            epoch.ticket = evaluation.evaluator.submit(epoch.state, self._evaluation_seed(epoch))
            self._evaluated = epoch
            # What it costs here, most of it waiting for the one before.
            epoch.record["time/evaluation"] = time.perf_counter() - began
        self._epochs.append(epoch)
        return None

    def late_records(self, wait: bool) -> list[tuple[int, dict[str, float]]]:
        """Epochs and records that are complete and were not returned before; with `wait`, all are."""
        if self._evaluated is not None and (wait or self.evaluation.evaluator.ready(self._evaluated.ticket)):
            self._await_evaluation()
        until = self.epoch + 1 if self._evaluated is None else self._evaluated.number
        complete = [epoch for epoch in self._epochs if epoch.number < until]
        self._epochs = self._epochs[len(complete) :]
        return [(epoch.number, epoch.record) for epoch in complete]

    def _roll_out(self, rollouts: Rollouts) -> dict[str, float]:
        self.on_rollout(f"rolling out {rollouts.num_starts:,} starts")
        start = self.real.sample(rollouts.num_starts, self.generator).observation
        trajectory = rollouts.engine.roll_out(self.agent, start, self.generator)
        trajectory = Trajectory(*(field[:, : rollouts.length] for field in trajectory))
        scores, keep, finite = self._judge(*trajectory)
        if not finite:
            raise NotFinite(
                f"The reward model scores a rollout of epoch {self.epoch + 1} with NaN or infinity, though the rollout is finite: "
                "look at the log of its training."
            )
        kept = Trajectory(*(field[keep] for field in trajectory))
        transitions, mean_length = make_synthetic_transitions(kept, rollouts.reward_model, rollouts.is_terminal, self.spaces)
        self.synthetic.extend(transitions)
        return {
            "rollout/score": float(scores.mean()),
            "rollout/score_kept": float(scores[keep].mean()),
            "rollout/mean_length": float(mean_length),
            "rollout/transitions": float(len(transitions.reward)),
            "rollout/buffer_size": float(self.synthetic.size),
        }

    def _find_divergence(self, state: dict[str, Any], draws: Tensor) -> str:
        """Repeat the epoch's updates one by one from its beginning, to say in which one what ceased to be finite."""
        self.agent.load_state_dict(state)
        self.generator.set_state(draws)
        own = self.updates
        how = own.batch_size, own.real_ratio, self.generator, "eager", self.updates_per_epoch, own.precision
        one_by_one = Updates(self.agent, self.real, self.synthetic, *how)
        for count in range(self.updates_per_epoch):
            figures = one_by_one.run(1)
            wrong = [f"train/{name}" for name, value in figures.items() if not np.isfinite(value)]
            weight = find_not_finite(self.agent.state_dict())
            wrong += [f"tensor '{weight}'"] if weight else []
            if wrong:
                where = f"update {self.epoch * self.updates_per_epoch + count + 1} (epoch {self.epoch + 1})"
                break
        else:  # rounded otherwise, one by one it goes well
            wrong, where = ["a loss or a weight"], f"epoch {self.epoch + 1}"
        return (
            f"Training has diverged in {where}, with NaN or infinity in {', '.join(wrong)}; data and rollouts are finite. Lower "
            "the learning rates, or look for extreme rewards."
        )

    def _evaluation_seed(self, epoch: Epoch) -> int:
        return episode_seed(self.evaluation.seed, epoch.number)

    def _await_evaluation(self) -> None:
        if self._evaluated is not None:
            self._conclude(self._evaluated, self.evaluation.evaluator.take(self._evaluated.ticket))
            self._evaluated = None

    def _conclude(self, epoch: Epoch, score: PolicyScore) -> None:
        """Enter an evaluation into its epoch's record, and remember the policy if it is the best."""
        if score.mean_return > self.best_return:
            self.best_return = score.mean_return
            self._best = epoch
        epoch.record |= {
            "evaluation/return": score.mean_return,
            "evaluation/return_std": score.std_return,
            "evaluation/length": score.mean_length,
            "evaluation/episodes": float(score.num_episodes),
            "evaluation/best_return": self.best_return,
            "time/evaluating": score.seconds,
        }
        normalized = d4rl.normalized_score(self.evaluation.dataset_name, score.mean_return)
        if normalized is not None:
            epoch.record["evaluation/normalized_score"] = normalized

    def save_products(self, save: Callable[[str, str, Any, dict], None], final: bool) -> None:
        tree = {"agent": self.agent.state_dict(), "spaces": store_spaces(self.spaces)}
        manifest = {**self.saving.describe, "epoch": self.epoch}
        if self.saving.best and self._best is not None:
            about = {"epoch": self._best.number, "return": self.best_return}
            save("agent-best.safetensors", POLICY, {**tree, "agent": self._best.state}, {**manifest, **about})
        self._best = None
        if final or self.epoch % self.saving.every == 0:
            buffers = {
                **({"replay": self.real.state_dict()} if self.saving.replay else {}),
                **({"model_replay": self.synthetic.state_dict()} if self.saving.model_replay else {}),
            }
            save("agent.safetensors" if final else f"agent-{self.epoch:06d}.safetensors", POLICY, tree | buffers, manifest)

    def state_dict(self) -> dict[str, Any]:
        self._await_evaluation()  # it may change the best return
        return {
            "agent": self.agent.state_dict(),
            "synthetic": self.synthetic.state_dict(),
            "generator": self.generator.get_state(),
            "epoch": self.epoch,
            "best_return": self.best_return,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.agent.load_state_dict(state["agent"])
        self.synthetic.load_state_dict(state["synthetic"])
        self.generator.set_state(state["generator"])
        self.epoch = state["epoch"]
        self.best_return = state["best_return"]


def run_epochs(trainers: Sequence[PolicyTrainer], updates: Updates) -> list[dict[str, float] | None]:
    """Train one epoch of trainers that share their `updates`; what `run_epoch` returns, for each."""
    epochs = [trainer.begin_epoch() for trainer in trainers]
    began = time.perf_counter()
    means = updates.run_all(trainers[0].updates_per_epoch, trainers[0].on_update)
    seconds = (time.perf_counter() - began) / len(trainers)
    return [trainer.end_epoch(*each, seconds) for trainer, *each in zip(trainers, epochs, means, strict=True)]
