"""Episodes of behaviour policies in the simulator, recorded by several processes at once.

What is recorded depends neither on their number nor on their speed: every episode has a random stream of its own, and episodes
are kept in their order.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dydiff.collecting.behaviour import BehaviourPolicy
from dydiff.environments import EnvironmentSpec
from dydiff.environments.simulate import shared_simulators
from dydiff.errors import DydiffError

MAX_SIMULATORS = 16  # stepped in turn within a process, so that the policy is called once for all
MAX_EPISODES = 32  # in one piece of work

Rows = dict[str, np.ndarray]  # by their keys in a D4RL file, [N, ...] each


class Part(NamedTuple):
    """A run of rows that one policy makes."""

    policy: BehaviourPolicy
    rows: int


class Work(NamedTuple):
    """Some episodes of one policy: what a process does at a time."""

    spec: EnvironmentSpec
    policy: BehaviourPolicy
    seed: tuple[int, int]  # of the collection, and the number of the part
    episodes: range


def record_parts(spec: EnvironmentSpec, parts: Sequence[Part], seed: int, processes: int, bar: tqdm) -> Rows:
    """Record the rows of every part, one part after the other, each of whole episodes but for its last one.

    seed: at least 0. processes: 1 records in this process. Raises DydiffError for what goes wrong in the simulator, and when
    a process is lost.
    """
    ahead = 2 * processes if processes > 1 else 1
    with _workers(processes) as workers:
        return _join([_record_part(workers, ahead, spec, part, (seed, index), bar) for index, part in enumerate(parts)])


def _record_part(
    workers: Executor, ahead: int, spec: EnvironmentSpec, part: Part, seed: tuple[int, int], bar: tqdm
) -> Rows:
    """Record one part, with up to `ahead` pieces of work under way; where its end cuts an episode off, that has timed out."""
    episodes = min(MAX_EPISODES, math.ceil(part.rows / spec.max_episode_steps))
    first = itertools.count(0, episodes)
    pending: deque[Future[Rows]] = deque()
    pieces: list[Rows] = []
    count = 0
    while count < part.rows:
        # No more than will be needed, going by the pieces so far.
        while not pending or (len(pending) < ahead and count + len(pending) * count / max(len(pieces), 1) < part.rows):
            start = next(first)
            pending.append(workers.submit(record_episodes, Work(spec, part.policy, seed, range(start, start + episodes))))
        pieces.append(pending.popleft().result())
        added = min(len(pieces[-1]["rewards"]), part.rows - count)
        bar.update(added)
        count += added
    for future in pending:
        future.cancel()
    rows = {key: values[: part.rows] for key, values in _join(pieces).items()}
    rows["timeouts"][-1] = not rows["terminals"][-1]
    return rows


def _join(pieces: Sequence[Rows]) -> Rows:
    return {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}


def record_episodes(work: Work) -> Rows:
    """Run some episodes to their ends; returns their rows, episode after episode."""
    spec, policy, waiting = work.spec, work.policy, deque(work.episodes)
    simulators = shared_simulators(spec, min(MAX_SIMULATORS, len(waiting)))
    finished: dict[int, Rows] = {}
    noise = np.zeros((simulators.size, spec.max_episode_steps, spec.action_dim), np.float32)
    observation = np.zeros((simulators.size, spec.observation_dim), np.float32)
    step = np.zeros(simulators.size, np.int64)
    running: dict[int, tuple[int, Rows]] = {}  # by simulator: the episode that it is in

    def begin(index: int) -> None:
        episode = waiting.popleft()
        generator = np.random.default_rng([*work.seed, episode])
        noise[index] = policy.draw_noise(generator, spec.max_episode_steps)
        observation[index] = simulators.reset(index, int(generator.integers(2**31)))
        step[index] = 0
        running[index] = episode, _empty_rows(spec)

    for index in range(simulators.size):
        begin(index)
    while running:
        # All rows, those of idle simulators too: a product's rounding may depend on how many rows it has.
        action, log_prob = policy.act(observation, noise[np.arange(simulators.size), step])
        for index, (episode, rows) in list(running.items()):
            row = step[index]
            rows["observations"][row], rows["actions"][row] = observation[index], action[index]
            rows["infos/action_log_probs"][row] = log_prob[index]
            rows["infos/qpos"][row], rows["infos/qvel"][row] = simulators.state(index)
            observation[index], rows["rewards"][row], terminal, timeout = simulators.step(index, action[index])
            rows["next_observations"][row] = observation[index]
            step[index] += 1
            if terminal or timeout:
                rows["terminals"][row], rows["timeouts"][row] = terminal, not terminal  # D4RL marks an episode's end once
                finished[episode] = {key: values[: row + 1] for key, values in rows.items()}
                del running[index]
                step[index] = 0
                if waiting:
                    begin(index)
    return _join([finished[episode] for episode in work.episodes])


def _empty_rows(spec: EnvironmentSpec) -> Rows:
    count = spec.max_episode_steps
    shapes = {
        "observations": spec.observation_dim,
        "actions": spec.action_dim,
        "next_observations": spec.observation_dim,
    }
    return {
        **{key: np.empty((count, width), np.float32) for key, width in shapes.items()},
        "rewards": np.empty(count, np.float32),
        "terminals": np.zeros(count, bool),
        "timeouts": np.zeros(count, bool),
        "infos/action_log_probs": np.empty(count, np.float32),
        "infos/qpos": np.empty((count, spec.position_dim)),
        "infos/qvel": np.empty((count, spec.velocity_dim)),
    }


class _ThisProcess(Executor):
    """Does its work at once."""

    def submit(self, work: Callable[[Work], Rows], argument: Work) -> Future[Rows]:
        future: Future[Rows] = Future()
        future.set_result(work(argument))
        return future


@contextmanager
def _workers(processes: int) -> Iterator[Executor]:
    if processes == 1:
        yield _ThisProcess()
        return
    # A process that is forked from one with threads may hang, and torch has threads.
    context = multiprocessing.get_context("spawn")
    pool, others = ProcessPoolExecutor(processes, context, initializer=_end_with_parent), multiprocessing.active_children()
    try:
        yield pool
    except BrokenProcessPool as error:
        raise DydiffError(
            "A process that was collecting ended before its work was done, most often because memory ran out: collect with "
            f"fewer processes than {processes} (--processes 1 does all in one)."
        ) from error
    except BaseException:  # the pool would wait for what is under way, and for ever where that is interrupted once more
        for worker in {*multiprocessing.active_children()}.difference(others):
            worker.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """An interrupt is for the parent; and its end, however it comes, is this process's too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
