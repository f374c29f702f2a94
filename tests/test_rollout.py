"""The method against known answers: a linear system in place of the ensemble, diffusion models that know what they want."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dydiff.data import Limits, Spaces, ZScore
from dydiff.diffusion.edm import Denoiser, precondition
from dydiff.dynamics import DynamicsEnsemble
from dydiff.errors import DydiffError, NotFinite
from dydiff.networks import build_trajectory_network
from dydiff.reward import RewardModel
from dydiff.rollout import RolloutEngine, Trajectory, make_synthetic_transitions, score

HORIZON, OBSERVATION_DIM, ACTION_DIM = 6, 2, 1
DRIFT = torch.tensor([[0.9, 0.1], [-0.2, 0.8]])
GAIN = torch.tensor([[0.3, -0.1]])
FEEDBACK = torch.tensor([[0.2], [-0.4]])


class LinearDynamics:
    """o' = o DRIFT + a GAIN, in place of the ensemble."""

    def predict(self, observation: Tensor, action: Tensor, elite: torch.Generator) -> Tensor:
        return observation @ DRIFT + action @ GAIN

    def predictor(self):
        return self.predict


class Certain(nn.Module):
    """The raw network of a diffusion model whose every sample is `trajectory` [H, D], in model space."""

    def __init__(self, trajectory: Tensor):
        super().__init__()
        self.trajectory = nn.Parameter(trajectory, requires_grad=False)

    def forward(self, model_input: Tensor, noise_label: Tensor) -> Tensor:
        c_skip, c_out, c_in, _ = precondition((4 * noise_label).exp()[:, None, None], 0.5)
        return (self.trajectory - c_skip * model_input / c_in) / c_out


def policy(observation: Tensor) -> Tensor:
    return torch.tanh(observation @ FEEDBACK)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_spaces() -> Spaces:
    limits = Limits(torch.tensor([-40.0, -30.0, -1.0]), torch.tensor([50.0, 20.0, 1.0]))
    z_score = ZScore(torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5]))
    return Spaces(limits, z_score, torch.tensor([-1.0]), torch.tensor([1.0]))


def certain(seed: int) -> Denoiser:
    trajectory = torch.rand(HORIZON, OBSERVATION_DIM + ACTION_DIM, generator=generator(seed)) - 0.5
    return Denoiser(Certain(trajectory), OBSERVATION_DIM)


def learnt() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(build_trajectory_network("MLP_RL", OBSERVATION_DIM + ACTION_DIM, HORIZON, dim=16), OBSERVATION_DIM)


def make_engine(*denoisers: Denoiser, dynamics: object = None, **settings: object) -> RolloutEngine:
    settings = {"backend": "reference", "sampler": {"num_steps": 4}} | settings
    return RolloutEngine(denoisers or [certain(1)], dynamics or LinearDynamics(), make_spaces(), HORIZON, **settings)


def starts(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, OBSERVATION_DIM, generator=generator(seed))


def closed_loop(start: Tensor) -> Trajectory:
    observations, actions = [start], [policy(start)]
    for _ in range(HORIZON - 1):
        observations.append(observations[-1] @ DRIFT + actions[-1] @ GAIN)
        actions.append(policy(observations[-1]))
    return Trajectory(torch.stack(observations, 1), torch.stack(actions, 1))


def assert_close(one: Trajectory, other: Trajectory) -> None:
    for name in Trajectory._fields:
        torch.testing.assert_close(
            getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_without_injections_it_is_the_closed_loop_of_the_linear_system():
    trajectory = make_engine(iterations=0).roll_out(policy, starts(7), generator())
    assert trajectory.observation.shape == (7, HORIZON, OBSERVATION_DIM)
    assert trajectory.action.shape == (7, HORIZON, ACTION_DIM)
    assert_close(trajectory, closed_loop(starts(7)))
    assert_close(make_engine(iterations=3).roll_out(policy, starts(7), generator(), iterations=0), trajectory)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_injections_average_with_the_samples_and_relabel(iterations):
    denoiser, spaces = certain(1), make_spaces()
    wanted = spaces.observation_model_to_policy(denoiser.network.trajectory[:, :OBSERVATION_DIM])
    observation = closed_loop(starts(5)).observation
    for _ in range(iterations):
        observation = torch.cat([observation[:, :1], (observation[:, 1:] + wanted[1:]) / 2], dim=1)
    trajectory = make_engine(denoiser, iterations=iterations).roll_out(policy, starts(5), generator())
    assert_close(trajectory, Trajectory(observation, policy(observation)))


def test_the_first_observation_is_kept_and_every_action_is_the_policys():
    trajectory = make_engine(learnt(), iterations=2).roll_out(policy, starts(9), generator())
    torch.testing.assert_close(trajectory.observation[:, 0], starts(9), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trajectory.action, policy(trajectory.observation), rtol=1e-4, atol=1e-4)


def test_samples_are_made_around_the_injected_actions():
    seen: list[Tensor] = []

    class Watching(Certain):
        def forward(self, model_input, noise_label):
            seen.append(model_input / precondition((4 * noise_label).exp()[:, None, None], 0.5)[2])
            return super().forward(model_input, noise_label)

    denoiser = Denoiser(Watching(certain(1).network.trajectory.data), OBSERVATION_DIM)
    make_engine(denoiser, iterations=1).roll_out(policy, starts(3), generator())
    guess, spaces = closed_loop(starts(3)), make_spaces()
    second_call = seen[1]  # after the first Euler step and its overwriting
    torch.testing.assert_close(
        second_call[..., OBSERVATION_DIM:], spaces.action_policy_to_model(guess.action), rtol=0, atol=1e-3
    )
    first = spaces.observation_policy_to_model(starts(3))
    torch.testing.assert_close(second_call[:, 0, :OBSERVATION_DIM], first, rtol=0, atol=1e-3)


@pytest.mark.parametrize("chunk_size", [1, 4, 9, 10, 100])
def test_chunks_change_nothing(chunk_size):
    pattern = torch.linspace(-1, 1, HORIZON * 3).view(1, HORIZON, 3)
    trajectories = [
        make_engine(learnt(), chunk_size=size).roll_out(policy, starts(10), generator(), draw=pattern.expand)
        for size in (10, chunk_size)
    ]
    assert_close(*trajectories)


def test_equal_seeds_give_equal_rollouts_and_others_do_not():
    torch.manual_seed(0)
    dynamics = DynamicsEnsemble(OBSERVATION_DIM, ACTION_DIM, [8], num_nets=3, num_elites=3, weight_decay=[0, 0])
    engine = make_engine(learnt(), dynamics=dynamics)
    one, same, other = (engine.roll_out(policy, starts(4), generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.observation, same.observation) and torch.equal(one.action, same.action)
    assert not torch.isclose(one.observation[:, 1:], other.observation[:, 1:]).all(dim=-1).any()


def test_every_start_is_given_to_one_of_several_models():
    denoisers = [certain(seed) for seed in (1, 2, 3)]
    spaces, count = make_spaces(), 60
    trajectory = make_engine(*denoisers, iterations=1, chunk_size=25).roll_out(policy, starts(count), generator())
    loop = closed_loop(starts(count)).observation
    owners = torch.zeros(count, 3, dtype=torch.bool)
    for index, denoiser in enumerate(denoisers):
        wanted = spaces.observation_model_to_policy(denoiser.network.trajectory[:, :OBSERVATION_DIM])
        expected = (loop[:, 1:] + wanted[1:]) / 2
        owners[:, index] = (trajectory.observation[:, 1:] - expected).abs().amax(dim=(1, 2)) < 1e-3
    assert (owners.sum(dim=1) == 1).all()
    for part in owners.split(25):
        assert (part.sum(dim=0) <= -(-len(part) // 3)).all(), "dealt out evenly"
    assert (owners[:50].sum(dim=0) >= 14).all()


def test_a_single_start_is_given_to_any_of_several_models():
    denoisers = [certain(seed) for seed in (1, 2, 3)]
    engine, source, start = make_engine(*denoisers, iterations=1), generator(), starts(1)
    first_guess = closed_loop(start).observation[0, -1]
    wanted = [make_spaces().observation_model_to_policy(each.network.trajectory[:, :OBSERVATION_DIM])[-1] for each in denoisers]
    owners = []
    for _ in range(60):
        sampled = 2 * engine.roll_out(policy, start, source).observation[0, -1] - first_guess
        distances = [(sampled - end).norm() for end in wanted]
        owners.append(distances.index(min(distances)))
    assert all(owners.count(index) >= 10 for index in range(3))


def test_a_stochastic_policy_may_be_injected():
    source = generator(5)

    def stochastic(observation: Tensor) -> Tensor:
        return torch.tanh(torch.randn(len(observation), ACTION_DIM, generator=source))

    trajectory = make_engine(learnt()).roll_out(stochastic, starts(8), generator())
    assert trajectory.action.isfinite().all() and trajectory.action.flatten().unique().numel() == 8 * HORIZON


def test_everything_stays_float32_and_in_the_policys_shape():
    seen = []

    def watched(observation: Tensor) -> Tensor:
        seen.append((observation.dtype, observation.device, observation.shape[1:], observation.requires_grad))
        return policy(observation)

    start = starts(3)
    trajectory = make_engine(learnt()).roll_out(watched, start, generator())
    assert set(seen) == {(torch.float32, start.device, (OBSERVATION_DIM,), False)}
    assert all(field.dtype == torch.float32 and not field.requires_grad for field in trajectory)


def test_observations_outside_of_the_data_come_back_clipped():
    start = torch.tensor([[1000.0, 0.0]])
    trajectory = make_engine(iterations=1).roll_out(policy, start, generator())
    raw = make_spaces().observation_policy_to_raw(trajectory.observation)
    assert raw[0, 0, 0] == pytest.approx(50.0)


def test_a_policy_may_change_what_it_is_given():
    def in_place(observation: Tensor) -> Tensor:
        return policy(observation.mul_(2).sub_(1))

    engines = make_engine(learnt()), make_engine(learnt())
    one, other = (
        engine.roll_out(act, starts(4), generator())
        for engine, act in zip(engines, (in_place, lambda o: policy(o * 2 - 1)), strict=True)
    )
    assert torch.equal(one.observation, other.observation) and torch.equal(one.action, other.action)


def test_nan_is_told_with_its_place():
    start = starts(4)

    def diverges(observation: Tensor) -> Tensor:
        return policy(observation).index_fill(0, torch.tensor(3), math.nan)

    with pytest.raises(NotFinite, match="^A rollout holds in its observation a NaN or an infinity, first in row 3, step 1. "):
        make_engine(iterations=0).roll_out(diverges, start, generator())
    start[2, 1] = math.nan
    with pytest.raises(NotFinite, match="^start holds a NaN or an infinity, first in row 2. "):
        make_engine().roll_out(policy, start, generator())


def test_engines_that_cannot_be():
    with pytest.raises(DydiffError, match="at least one diffusion model"):
        RolloutEngine([], LinearDynamics(), make_spaces(), HORIZON)
    with pytest.raises(DydiffError, match="chunk_size .*each_rollout_size.* at least 1, not 0"):
        make_engine(chunk_size=0)
    with pytest.raises(DydiffError, match="'gpu' is unknown; choose one of"):
        make_engine(backend="gpu")


# From rollouts to transitions


def random_rollouts(count: int) -> tuple[Trajectory, RewardModel]:
    source = generator(3)
    observation = torch.randn(count, HORIZON, OBSERVATION_DIM, generator=source)
    action = torch.rand(count, HORIZON, ACTION_DIM, generator=source) * 2 - 1
    return Trajectory(observation, action), RewardModel(OBSERVATION_DIM, ACTION_DIM, [8], generator=source)


def test_score_sums_the_modelled_reward_over_all_rows():
    trajectory, reward = random_rollouts(4)
    for index, value in enumerate(score(reward, trajectory)):
        rows = [float(reward(trajectory.observation[index, h], trajectory.action[index, h]).detach()) for h in range(HORIZON)]
        assert float(value) == pytest.approx(sum(rows), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("limit", [-100.0, 1.0, 3.0, 100.0])
def test_transitions_against_a_loop(limit):
    """Rollouts end where the raw observation (policy space times 3 plus 1) passes a limit: at once, midway, or never."""
    trajectory, reward = random_rollouts(11)
    transitions, mean_length = make_synthetic_transitions(trajectory, reward, lambda raw: raw[..., 0] > limit, make_spaces())
    expected, over = [], [False] * 11
    for h in range(HORIZON - 1):
        for k in range(11):
            if over[k]:
                continue
            observation, action, following = (
                trajectory.observation[k, h],
                trajectory.action[k, h],
                trajectory.observation[k, h + 1],
            )
            over[k] = float(following[0]) * 3 + 1 > limit
            expected.append(
                (observation, action, reward(observation, action).detach(), following, torch.tensor(float(over[k])))
            )
    assert len(transitions.reward) == len(expected)
    for field, wanted in zip(transitions, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(field, torch.stack(wanted), rtol=1e-5, atol=1e-6)
        assert field.dtype == torch.float32 and not field.requires_grad
    assert float(mean_length) == pytest.approx(len(expected) / 11)
    assert int(transitions.terminal.sum()) == sum(over)
