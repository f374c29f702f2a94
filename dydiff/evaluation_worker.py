"""Evaluation of frozen copies of a policy, in this process or in a worker that evaluates while training goes on.

Both give the same numbers: the copy, its seeds and the number of threads are the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from dydiff.agents import find_agent
from dydiff.child import Child, ChildEnded, connect_to_parent, decode, encode
from dydiff.data import Spaces
from dydiff.device import fast_float32
from dydiff.environments import EnvironmentSpec
from dydiff.errors import DydiffError
from dydiff.evaluate import Evaluator
from dydiff.models import in_raw_space, restore_spaces, store_spaces

# A handful of rows through one small network takes a CPU less time than it takes to launch them, and on a card a second process
# takes turns with training. Diffusion-QL's 50 candidates of five evaluations each stay on the device.
EVALUATED_ON_THE_DEVICE = ("diffusion_ql",)
REMEDY = "Continue with --resume, or set rl_trainer_params.evaluation_worker to false to evaluate in the training process."


@dataclasses.dataclass
class PolicyScore:
    """What one evaluation found."""

    mean_return: float
    std_return: float
    mean_length: float
    num_episodes: int
    seconds: float  # that it took


def describe_evaluation(
    algorithm: str,
    model: dict[str, Any],
    spaces: Spaces,
    spec: EnvironmentSpec,
    steps: int,
    max_path_length: int,
    num_environments: int | None,
    device: str,
) -> dict[str, Any]:
    """What a `PolicyEvaluator` is made of, in a form that can be sent; `model` holds the arguments of the agent on the device."""
    return {
        "agent": {"algorithm": algorithm, "model": model, "device": device if algorithm in EVALUATED_ON_THE_DEVICE else "cpu"},
        "spaces": {name: value.cpu() for name, value in store_spaces(spaces).items()},
        "spec": dataclasses.asdict(spec),
        "evaluator": {"steps": steps, "max_path_length": max_path_length, "num_environments": num_environments},
    }


class PolicyEvaluator:
    """Evaluates states of an agent with a copy of it, in this process.

    Raises:
        DydiffError: as `Evaluator`.
    """

    def __init__(self, description: dict[str, Any]):
        agent = description["agent"]
        build = find_agent(agent["algorithm"])
        self.agent = build(**agent["model"], device=agent["device"], generator=torch.Generator())
        self.spaces = restore_spaces(description["spaces"]).to(self.agent.device)
        self.evaluator = Evaluator(EnvironmentSpec(**description["spec"]), **description["evaluator"])

    def evaluate(self, state: dict[str, Any], seed: int) -> PolicyScore:
        """Evaluate the agent of `state` (its `state_dict`); raises DydiffError as `Evaluator.evaluate`."""
        began = time.perf_counter()
        self.agent.load_state_dict(state)
        generator = torch.Generator(self.agent.device).manual_seed(seed)
        # One thread is what a handful of rows keeps busy; and their number must not change the numbers.
        with _threads(1), fast_float32(self.agent.device):
            act = partial(self.agent.act_for_evaluation, generator=generator)
            result = self.evaluator.evaluate(in_raw_space(act, self.spaces), seed)
        figures = result.mean_return, result.std_return, result.mean_length, result.num_episodes
        return PolicyScore(*figures, time.perf_counter() - began)


class EvaluationWorker:
    """The same in a process of its own: `submit` returns at once, `take` waits for the result.

    Evaluations are made one after the other, in the order in which they were submitted.
    """

    def __init__(self, description: dict[str, Any]):
        self._environment = description["spec"]["name"]
        self._seeds: list[int] = []  # of all evaluations; the place of one is its ticket
        self._answers: list[dict[str, Any] | None] = []  # to the first of them; None once taken
        self._child = Child("dydiff.evaluation_worker")
        self.close = self._child.close
        self._send(description)

    def submit(self, state: dict[str, Any], seed: int) -> int:
        """Have the agent of `state` evaluated; returns the ticket with which its score is taken."""
        self._seeds.append(seed)
        self._send({"state": state, "seed": seed})
        return len(self._seeds) - 1

    def ready(self, ticket: int) -> bool:
        """Whether `take` would return at once."""
        while len(self._answers) <= ticket and self._child.has_message():
            self._receive()
        return len(self._answers) > ticket

    def take(self, ticket: int) -> PolicyScore:
        """Wait for the score of an evaluation, which can be taken once.

        Raises:
            DydiffError: evaluating failed, or the process ended; names environment and seed.
        """
        while len(self._answers) <= ticket:
            self._receive()
        answer, self._answers[ticket] = self._answers[ticket], None
        if "error" in answer:
            raise DydiffError(answer["error"])
        return PolicyScore(**answer)

    def _receive(self) -> None:
        try:
            self._answers.append(self._child.receive())
        except ChildEnded as end:
            raise self._explain(end) from end

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._child.send(message)
        except ChildEnded as end:
            raise self._explain(end) from end

    def _explain(self, end: ChildEnded) -> DydiffError:
        under_way = self._seeds[len(self._answers) :]
        seed = f" with seed {under_way[0]}" if under_way else ""
        return DydiffError(
            f"The process that evaluates {self._environment}{seed} ended {end} (what it printed stands above). {REMEDY}"
        )


def work(connection: Connection) -> None:
    """The body of the worker: evaluate what comes until the other end is closed."""
    evaluator, environment, seed = None, "", None
    # What is sent is read at once, also during an evaluation: the other end must not wait with more.
    messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_collect, args=(connection, messages), daemon=True).start()
    while (data := messages.get()) is not None:
        message = decode(data)
        try:
            if evaluator is None:
                environment = message["spec"]["name"]
                evaluator = PolicyEvaluator(message)
                continue
            seed = message["seed"]
            answer = dataclasses.asdict(evaluator.evaluate(message["state"], seed))
        except DydiffError as error:
            answer = {"error": str(error)}
        except Exception as error:
            where = f" with seed {seed}" if evaluator else ", in a process of its own,"
            what = f"{type(error).__name__}: {str(error).rstrip('.')}"
            answer = {"error": f"Evaluating {environment}{where} failed: {what}. {REMEDY}"}
        try:
            connection.send_bytes(encode(answer))
        except OSError:  # nobody waits for it any more
            return


def _collect(connection: Connection, messages: queue.SimpleQueue[bytes | None]) -> None:
    """Put everything that comes into a queue, and None at the end."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            messages.put(connection.recv_bytes())
    messages.put(None)


def freeze(state: Any) -> Any:
    """A copy of an agent's state in host memory, which further training does not touch."""
    if isinstance(state, dict):
        return {key: freeze(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [freeze(value) for value in state]
    return state.detach().to("cpu", copy=True) if isinstance(state, torch.Tensor) else state


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    work(connect_to_parent())
