"""Fast mode: DPM-Solver++(2M) against Gaussians, whose denoiser and ODE are known, and its place in the rollout."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from torch import Tensor

from dydiff.data import Limits, Spaces, ZScore
from dydiff.diffusion.edm import Denoiser
from dydiff.diffusion.fast_sampler import FastMode, sample_fast
from dydiff.diffusion.sampler import sample_edm
from dydiff.dynamics import DynamicsEnsemble
from dydiff.errors import DydiffError
from dydiff.kernels import reference
from dydiff.rollout import RolloutEngine

HORIZON, OBSERVATIONS, ACTIONS = 4, 2, 1
WIDTH = OBSERVATIONS + ACTIONS


class GaussianDenoiser:
    """The exact denoiser of trajectories ~ N(mean, covariance) whose conditioned entries it is shown clean, in float64.

    `denoise` is E[x0 | the free entries are x0 + sigma n, the others clean]. `evaluations` lists the levels asked for.
    """

    sigma_data = 0.5

    def __init__(self, conditioned: bool):
        generator = torch.Generator().manual_seed(0)
        size = HORIZON * WIDTH
        factor = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
        self.mean = torch.randn(size, generator=generator, dtype=torch.float64) * 0.3
        self.covariance = 0.2 * factor @ factor.T + 0.01 * torch.eye(size, dtype=torch.float64)
        known = torch.zeros(HORIZON, WIDTH, dtype=torch.bool)
        if conditioned:
            known[0, :OBSERVATIONS], known[:, OBSERVATIONS:] = True, True
        self.known, self.free = known.flatten(), ~known.flatten()
        rows = self.covariance[self.free]
        self.gain = rows[:, self.known] @ torch.linalg.inv(self.covariance[self.known][:, self.known])
        self.free_covariance = rows[:, self.free] - self.gain @ rows[:, self.known].T
        self.evaluations: list[float] = []

    def free_mean(self, x: Tensor) -> Tensor:
        """Mean of the free entries given the clean ones, for x [B, H D]."""
        return self.mean[self.free] + (x[:, self.known] - self.mean[self.known]) @ self.gain.T

    def shrink(self, power: float, sigma: float, reference_sigma: float = 0.0) -> Tensor:
        """(C + reference_sigma^2)^power (C + sigma^2)^-power of the free entries' covariance C."""
        values, vectors = torch.linalg.eigh(self.free_covariance)
        return (vectors * ((values + reference_sigma**2) / (values + sigma**2)) ** power) @ vectors.T

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        mean = self.free_mean(x)
        denoised = x.clone()
        denoised[:, self.free] = mean + (x[:, self.free] - mean) @ self.shrink(1.0, sigma)
        return denoised

    def evaluate(self, model_input: Tensor, sigma: float) -> Tensor:
        self.evaluations.append(sigma)
        c_skip, c_out, c_in = reference.precondition(sigma, self.sigma_data)
        x = (model_input / c_in).flatten(1)
        return ((self.denoise(x, sigma) - c_skip * x) / c_out).reshape(model_input.shape)


def draw_from(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def draw_condition(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    first = torch.randn(1, OBSERVATIONS, generator=generator, dtype=torch.float64) * 0.3
    actions = torch.randn(1, HORIZON, ACTIONS, generator=generator, dtype=torch.float64) * 0.3
    return first.expand(count, -1), actions.expand(count, -1, -1)


@pytest.mark.parametrize("conditioned", [False, True])
def test_twenty_evaluations_match_the_reference_sampler(conditioned):
    """Mean and standard deviation of the samples, against the 67-evaluation sampler and against the truth."""
    count = 20_000
    denoiser = GaussianDenoiser(conditioned)
    condition = draw_condition(count) if conditioned else (None, None)
    shape = (count, HORIZON, WIDTH)
    fast = sample_fast(denoiser, shape, draw_from(1), *condition, evaluations=20)
    assert len(denoiser.evaluations) == 20
    heun = sample_edm(denoiser, shape, draw_from(2), *condition, backend="reference")
    assert len(denoiser.evaluations) == 20 + 67
    fast_free, heun_free = (sample.flatten(1)[:, denoiser.free] for sample in (fast, heun))
    deviation = denoiser.free_covariance.diagonal().sqrt()
    truth = denoiser.free_mean(fast.flatten(1))[0]
    noise = 5 * deviation / count**0.5  # five standard errors of a mean
    assert ((fast_free.mean(0) - truth).abs() < noise).all()
    assert ((fast_free.mean(0) - heun_free.mean(0)).abs() < 2 * noise).all()
    assert (fast_free.std(0) / heun_free.std(0) - 1).abs().max() < 0.06
    off, heun_off = ((sample.std(0) / deviation - 1).abs().max() for sample in (fast_free, heun_free))
    assert off < 0.04 and off < heun_off
    if conditioned:
        assert torch.equal(fast[:, 0, :OBSERVATIONS], condition[0])
        assert torch.equal(fast[:, :, OBSERVATIONS:], condition[1])


@pytest.mark.parametrize("conditioned", [False, True])
def test_error_falls_with_the_square_of_the_step(conditioned):
    """Against the ODE's exact solution, x(s) = mean + (C + s^2)^1/2 (C + S^2)^-1/2 (x(S) - mean), then one denoising."""
    denoiser = GaussianDenoiser(conditioned)
    condition = draw_condition(64) if conditioned else (None, None)
    shape, (start, end) = (64, HORIZON, WIDTH), (80.0, 0.002)
    exact = reference.inpaint(draw_from(3)(shape) * start, *condition).flatten(1)
    mean = denoiser.free_mean(exact)
    exact[:, denoiser.free] = mean + (exact[:, denoiser.free] - mean) @ denoiser.shrink(0.5, start, end)
    exact = denoiser.denoise(exact, end).reshape(shape)
    errors = []
    for evaluations in (20, 40, 80, 160):
        sampled = sample_fast(denoiser, shape, draw_from(3), *condition, evaluations=evaluations)
        errors.append((sampled - exact).norm().item())
    orders = [torch.tensor(coarse / fine).log2().item() for coarse, fine in zip(errors, errors[1:], strict=False)]
    assert orders[-1] == pytest.approx(2, abs=0.25), (errors, orders)
    assert min(orders) > 1.5, (errors, orders)


def test_warm_start_from_exact_samples_keeps_their_law():
    """Noise on exact samples and a few evaluations back: still N(mean, covariance)."""
    denoiser, count = GaussianDenoiser(conditioned=False), 20_000
    factor = torch.linalg.cholesky(denoiser.covariance)
    guess = denoiser.mean + draw_from(7)((count, HORIZON * WIDTH)) @ factor.T
    guess = guess.reshape(count, HORIZON, WIDTH)
    sampled = sample_fast(denoiser, tuple(guess.shape), draw_from(8), evaluations=7, guess=guess, sigma_start=0.8)
    assert len(denoiser.evaluations) == 7 and denoiser.evaluations[0] == pytest.approx(0.8)
    deviation = denoiser.covariance.diagonal().sqrt()
    error = sampled.flatten(1).mean(0) - denoiser.mean
    assert (error.abs() < 5 * deviation / count**0.5).all()
    assert (sampled.flatten(1).std(0) / deviation - 1).abs().max() < 0.05
    # It moved: the noise forgets part of the guess.
    assert (sampled - guess).square().mean().sqrt() > 0.2 * deviation.mean()


@pytest.mark.parametrize("settings", [{"evaluations": 1}, {"sigma_start": 0.001}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(DydiffError):
        sample_fast(GaussianDenoiser(False), (1, HORIZON, WIDTH), draw_from(0), **settings)


@pytest.mark.parametrize("settings", [{"first_evaluations": 1}, {"warm_evaluations": 0}, {"warm_sigma": 0.0}])
def test_impossible_modes_are_refused(settings):
    with pytest.raises(DydiffError):
        FastMode(**settings)


class CountingNetwork(torch.nn.Module):
    """F = 0 but for the batch size, which it notes at every evaluation."""

    def __init__(self):
        super().__init__()
        self.batches: list[int] = []
        self.place = torch.nn.Parameter(torch.zeros(()))  # engines look where a network's parameters are

    def forward(self, x: Tensor, noise_label: Tensor) -> Tensor:
        self.batches.append(len(x))
        return torch.zeros_like(x)


def make_engine(count: int, fast: FastMode | None) -> tuple[RolloutEngine, list[CountingNetwork]]:
    networks = [CountingNetwork() for _ in range(count)]
    spaces = Spaces(
        Limits(-torch.ones(WIDTH), torch.ones(WIDTH)),
        ZScore(torch.zeros(OBSERVATIONS), torch.ones(OBSERVATIONS)),
        -torch.ones(ACTIONS),
        torch.ones(ACTIONS),
    )
    dynamics = DynamicsEnsemble(
        OBSERVATIONS, ACTIONS, [4], num_nets=2, num_elites=2, weight_decay=[0, 0], generator=torch.Generator().manual_seed(1)
    )
    denoisers = [Denoiser(network, OBSERVATIONS) for network in networks]
    return RolloutEngine(denoisers, dynamics, spaces, HORIZON, iterations=3, backend="reference", fast=fast), networks


def act(observation: Tensor) -> Tensor:
    return observation[:, :ACTIONS] / 2


def roll_out(engine: RolloutEngine):
    return engine.roll_out(act, torch.full((6, OBSERVATIONS), 0.3), torch.Generator().manual_seed(2))


def test_a_fast_rollout_takes_the_evaluations_it_promises():
    engine, (network,) = make_engine(1, FastMode(first_evaluations=5, warm_sigma=0.1, warm_evaluations=3))
    trajectory = roll_out(engine)
    assert network.batches == [6] * (5 + 3 + 3)
    assert torch.allclose(trajectory.observation[:, 0], torch.full((6, OBSERVATIONS), 0.3))
    assert torch.allclose(trajectory.action.flatten(0, 1), act(trajectory.observation.flatten(0, 1)))


def test_later_iterations_of_a_fast_rollout_start_from_the_guess():
    """With hardly any noise on it, the warm start returns the guess: more iterations leave the trajectory as it is."""
    engine, _ = make_engine(1, FastMode(first_evaluations=5, warm_sigma=0.003, warm_evaluations=2))
    engine.iterations = 1
    one = roll_out(engine)
    engine.iterations = 3
    assert torch.allclose(roll_out(engine).observation, one.observation, atol=0.02)


def test_fast_mode_serves_several_models():
    engine, networks = make_engine(2, FastMode(4, 0.5, 2))
    trajectory = roll_out(engine)
    assert trajectory.observation.isfinite().all()
    assert all(networks[index].batches for index in (0, 1))
    rows = sum(sum(network.batches) for network in networks)
    assert rows == 6 * (4 + 2 + 2)


def test_fast_mode_is_off_unless_asked_for():
    engine, (network,) = make_engine(1, None)
    roll_out(engine)
    assert len(network.batches) == 3 * 67


def test_every_setting_of_fast_mode_reaches_the_engine(command, dataset, trained, tmp_path, monkeypatch):
    """An experiment file with fast mode on; a nonsensical number of evaluations is refused."""
    seen, sample = [], FastMode.sample

    def spy(self: FastMode, *arguments: object) -> Tensor:
        seen.append(self)
        return sample(self, *arguments)

    monkeypatch.setattr(FastMode, "sample", spy)
    root = shutil.copytree(trained, tmp_path / "runs")
    file = tiny.write_experiment(tmp_path / "fast.yaml", "td3_bc", dataset)

    def run(*settings: str):
        options = [word for setting in settings for word in ("--set", f"sampler_kwargs.{setting}")]
        return command("run", "-e", file, "--outdir", root, "--device=cpu", *options)

    settings = ["fast=true", "fast_first_evaluations=4", "fast_warm_sigma=0.5", "fast_warm_evaluations=3"]
    outcome = run(*settings)
    assert outcome.status == 0, outcome.errors
    assert set(seen) == {FastMode(4, 0.5, 3)}
    outcome = run("fast=true", "fast_warm_evaluations=1")
    assert outcome.status == 1 and "fast_warm_evaluations" in outcome.errors


def test_quality_command_measures_every_setting(command, dataset, trained, tmp_path):
    root = shutil.copytree(trained, tmp_path / "runs")
    file = tiny.write_experiment(tmp_path / "policy.yaml", "td3_bc", dataset)
    assert command("run", "-e", file, "--outdir", root, "--device=cpu").status == 0
    grid = ["--first=4,3", "--warm=2", "--warm_sigma=0.3,1.5"]
    outcome = command("sampler-quality", f"--outdir={root}", f"--dataset={dataset}", "--starts=5", "--device=cpu", *grid)
    assert outcome.status == 0, outcome.errors
    record = json.loads((root / "sampler-quality" / "quality.json").read_text())
    lines = {line["setting"]: line for line in record["settings"]}
    fast = [f"fast {first} + 2 from {sigma}" for first in (4, 3) for sigma in (0.3, 1.5)]
    heun = ["Heun 34", "Heun 34, inpaint_churn", "Heun 34, S_churn 0", "Heun 18", "Heun 10"]
    assert list(lines) == ["single-step", *heun, *fast]
    assert [line["evaluations"] for line in lines.values()] == [0, 134, 134, 134, 70, 38, 6, 6, 5, 5]
    assert all(name in outcome.output for name in lines)
    for quantity in ("state", "position"):
        errors = [line["error"][quantity]["mean"] for line in lines.values()]
        assert all(error > 0 for error in errors) and len(set(errors)) == len(errors)
        assert lines["Heun 34"]["excess"][quantity]["mean"] == 0
        difference = lines[fast[0]]["error"][quantity]["mean"] - lines["Heun 34"]["error"][quantity]["mean"]
        assert lines[fast[0]]["excess"][quantity]["mean"] == pytest.approx(difference)
    assert (root / "sampler-quality" / "quality.png").read_bytes().startswith(b"\x89PNG")
