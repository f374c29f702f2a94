"""EDM's preconditioning, loss and sampler against known answers."""

from __future__ import annotations

import math

import pytest
import torch
from small_denoiser import ACTION_DIM, DATA_DIM, HORIZON, OBSERVATION_DIM, generator, make_denoiser, normal
from torch import Tensor, nn

from dydiff.diffusion.edm import (
    Denoiser,
    ForeignActions,
    draw_foreign_actions,
    draw_sigma,
    edm_loss,
    precondition,
    show_foreign_actions,
)
from dydiff.diffusion.sampler import sample_edm
from dydiff.kernels import edm


def drawer(seed: int = 0):
    source = generator(seed)
    return lambda shape: torch.randn(shape, generator=source)


class Recorder(nn.Module):
    """A network that answers 0 and remembers its inputs."""

    def __init__(self):
        super().__init__()
        self.inputs: list[Tensor] = []
        self.labels: list[Tensor] = []

    def forward(self, x: Tensor, noise_label: Tensor) -> Tensor:
        self.inputs.append(x.clone())
        self.labels.append(noise_label.clone())
        return torch.zeros_like(x)


class GaussianNetwork(nn.Module):
    """The raw network that makes the denoiser ideal for independent data N(mean, std^2), column by column."""

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, model_input: Tensor, noise_label: Tensor) -> Tensor:
        sigma = (4 * noise_label).exp()[:, None, None]
        c_skip, c_out, c_in, _ = precondition(sigma, 0.5)
        x = model_input / c_in
        denoised = (self.std**2 * x + sigma**2 * self.mean) / (self.std**2 + sigma**2)
        return (denoised - c_skip * x) / c_out


# Preconditioning and loss


def test_preconditioning_at_the_ends_and_in_the_middle():
    c_skip, c_out, c_in, c_noise = precondition(torch.tensor([1e-6, 0.5, 1e6], dtype=torch.float64), 0.5)
    one = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(c_skip, torch.tensor([1.0, 0.5, 0.25e-12], dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(c_out, torch.tensor([1e-6, 0.125**0.5, 0.5], dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(c_in, torch.tensor([2.0, 2**0.5, 1e-6], dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(c_noise, torch.tensor([1e-6, 0.5, 1e6], dtype=torch.float64).log() / 4)
    # Network input and target have unit variance for data of variance sigma_data^2 (arXiv 2206.00364, B.6).
    sigma = torch.tensor([1e-6, 0.5, 1e6], dtype=torch.float64)
    torch.testing.assert_close(c_in**2 * (sigma**2 + 0.25), one)
    torch.testing.assert_close(((1 - c_skip) ** 2 * 0.25 + c_skip**2 * sigma**2) / c_out**2, one)


def test_training_noise_levels_are_log_normal():
    log = draw_sigma(20_000, generator()).log()
    assert abs(float(log.mean()) + 1.2) < 0.04 and abs(float(log.std()) - 1.2) < 0.03


@pytest.mark.parametrize("use_cond", [True, False])
@pytest.mark.parametrize("cond_on_action", [True, False])
def test_loss_against_a_loop(use_cond, cond_on_action):
    denoiser, clean, noise = make_denoiser(), normal(3, HORIZON, DATA_DIM), normal(3, HORIZON, DATA_DIM, seed=1)
    sigma = torch.tensor([0.01, 0.3, 5.0])
    expected = torch.empty_like(clean)
    for b in range(3):
        level = float(sigma[b])
        noisy = clean[b] + level * noise[b]
        for h in range(HORIZON):
            for d in range(DATA_DIM):
                if (use_cond and h == 0 and d < OBSERVATION_DIM) or (cond_on_action and d >= OBSERVATION_DIM):
                    noisy[h, d] = clean[b, h, d]
        root = math.sqrt(level**2 + 0.25)
        output = denoiser.network(noisy[None] / root, torch.tensor([math.log(level) / 4]))[0]
        denoised = 0.25 / root**2 * noisy + level * 0.5 / root * output
        expected[b] = (level**2 + 0.25) / (level * 0.5) ** 2 * (denoised - clean[b]) ** 2
    loss = edm_loss(denoiser, clean, sigma, noise, use_cond, cond_on_action)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_conditioning_is_shown_clean_and_the_rest_is_not():
    denoiser = Denoiser(Recorder(), OBSERVATION_DIM)
    clean, sigma = normal(5, HORIZON, DATA_DIM), torch.full((5,), 2.0)
    edm_loss(denoiser, clean, sigma, normal(5, HORIZON, DATA_DIM, seed=1))
    (shown,) = denoiser.network.inputs
    shown = shown * math.sqrt(4 + 0.25)
    given = torch.zeros(HORIZON, DATA_DIM, dtype=torch.bool)
    given[0, :OBSERVATION_DIM] = given[:, OBSERVATION_DIM:] = True
    torch.testing.assert_close(shown[:, given], clean[:, given])
    assert ((shown - clean)[:, ~given].abs() > 1e-3).all()


def test_foreign_actions_are_shown_from_the_cut_on_and_only_rows_before_it_count():
    clean, other = normal(4, 6, DATA_DIM), normal(4, 6, DATA_DIM, seed=1)
    foreign = ForeignActions(torch.tensor([1, 3, 5, 6]), torch.tensor([1.0, 0.25, 0.5, 0.7]))
    shown, counted = show_foreign_actions(clean, other, foreign, OBSERVATION_DIM)
    for b, (cut, blend) in enumerate(zip(*map(torch.Tensor.tolist, foreign), strict=True)):
        for h in range(6):
            own, foreigner = clean[b, h, OBSERVATION_DIM:], other[b, h, OBSERVATION_DIM:]
            expected = own if h < cut else (1 - blend) * own + blend * foreigner
            torch.testing.assert_close(shown[b, h], expected)
            assert counted[b, h, :OBSERVATION_DIM].all() == (h <= cut)  # the state that the last own action led to counts
            assert counted[b, h, OBSERVATION_DIM:].all() == (h < cut)
    assert counted[3].all() and torch.equal(shown[3], clean[3, :, OBSERVATION_DIM:])


def test_the_share_of_foreign_actions():
    cut, blend = draw_foreign_actions(20_000, 6, 0.3, generator())
    assert abs((cut < 6).float().mean() - 0.3) < 0.02 and (cut.bincount()[1:6] > 900).all() and cut.min() == 1
    assert abs(blend.mean() - 0.5) < 0.02 and 0 <= blend.min() and blend.max() < 1
    assert (draw_foreign_actions(100, 6, 0.0, generator()).cut == 6).all()
    assert (draw_foreign_actions(100, 6, 1.0, generator()).cut < 6).all()


def test_the_network_is_shown_the_given_actions():
    denoiser, shown_action = Denoiser(Recorder(), OBSERVATION_DIM), normal(5, HORIZON, DATA_DIM - OBSERVATION_DIM, seed=2)
    clean, sigma = normal(5, HORIZON, DATA_DIM), torch.full((5,), 2.0)
    edm_loss(denoiser, clean, sigma, normal(5, HORIZON, DATA_DIM, seed=1), shown_action=shown_action)
    torch.testing.assert_close(denoiser.network.inputs[0][..., OBSERVATION_DIM:] * math.sqrt(4.25), shown_action)


def test_the_ideal_denoiser_has_the_least_loss():
    """Among the loss's stationary points is E[clean | noisy]: no scaling of the ideal network does better."""
    mean, std = torch.tensor(0.3), torch.tensor(0.2)
    clean = mean + std * normal(20_000, 1, 1)
    sigma, noise = draw_sigma(20_000, generator(1)), normal(20_000, 1, 1, seed=2)

    def loss_of(shift: float) -> float:
        denoiser = Denoiser(GaussianNetwork(mean + shift, std), 1)
        return float(edm_loss(denoiser, clean, sigma, noise, use_cond=False, cond_on_action=False).mean())

    assert loss_of(0.0) < min(loss_of(0.1), loss_of(-0.1))


# Sampler


@pytest.mark.parametrize("num_steps, tolerance", [(34, 0.08), (256, 0.03)])
def test_sampler_reproduces_a_gaussian(num_steps, tolerance):
    mean, std = torch.tensor([0.5, -0.8, 0.0]), torch.tensor([0.1, 0.5, 1.0])
    count = 4096
    samples = sample_edm(Denoiser(GaussianNetwork(mean, std), 2), (count, 2, 3), drawer(), num_steps=num_steps)
    samples = samples.flatten(0, 1)
    assert ((samples.mean(dim=0) - mean).abs() < 5 * std / math.sqrt(2 * count)).all()
    assert ((samples.std(dim=0) / std - 1).abs() < tolerance).all()
    correlation = torch.corrcoef(samples.T)
    assert (correlation - torch.eye(3)).abs().max() < 0.06


def test_sampler_without_churn_follows_the_exact_flow():
    """With the ideal denoiser the probability flow ends at mean + (x_T - mean) std / sqrt(std^2 + sigma_max^2)."""
    mean, std = torch.tensor([0.5, -0.8]), torch.tensor([0.3, 1.0])
    denoiser = Denoiser(GaussianNetwork(mean, std), 2)
    start = 80 * normal(64, 3, 2)
    exact = mean + (start - mean) * std / (std**2 + 80**2).sqrt()
    errors = []
    for num_steps in (64, 128):
        samples = sample_edm(denoiser, (64, 3, 2), drawer(), num_steps=num_steps, s_churn=0.0)
        errors.append(float((samples - exact).abs().max()))
    assert errors[1] < 5e-3 and errors[0] / errors[1] > 3.5, "Heun's method is of second order"


def test_sampler_overwrites_what_is_given_and_only_that():
    first, actions = normal(5, OBSERVATION_DIM, seed=3), normal(5, HORIZON, ACTION_DIM, seed=4)
    settings = {"denoiser": make_denoiser(), "shape": (5, HORIZON, DATA_DIM), "num_steps": 3}
    samples = sample_edm(draw=drawer(), first_observation=first, actions=actions, **settings)
    assert torch.equal(samples[:, 0, :OBSERVATION_DIM], first) and torch.equal(samples[..., OBSERVATION_DIM:], actions)
    free = sample_edm(draw=drawer(), **settings)
    assert not torch.isclose(free[:, 0, :OBSERVATION_DIM], first).any()
    assert not torch.isclose(free[..., OBSERVATION_DIM:], actions).any()
    assert samples[:, 1:, :OBSERVATION_DIM].isfinite().all() and not torch.isclose(samples, free).all(dim=-1).any()


@pytest.mark.parametrize("step", ["reference", "auto"])
def test_churn_hides_the_condition_unless_it_is_overwritten_again(step):
    first, actions = normal(5, OBSERVATION_DIM, seed=3), normal(5, HORIZON, ACTION_DIM, seed=4)
    hidden = []
    for inpaint_churn in (False, True):
        denoiser = Denoiser(Recorder(), OBSERVATION_DIM)
        samples = sample_edm(denoiser, (5, HORIZON, DATA_DIM), drawer(), first, actions, inpaint_churn=inpaint_churn, backend=step)
        assert torch.equal(samples[:, 0, :OBSERVATION_DIM], first) and torch.equal(samples[..., OBSERVATION_DIM:], actions)
        inputs = [
            model_input / precondition((4 * label).exp(), 0.5)[2]
            for model_input, label in zip(denoiser.network.inputs, denoiser.network.labels, strict=True)
        ]
        shown = [
            torch.allclose(x[..., OBSERVATION_DIM:], actions, atol=1e-3)
            and torch.allclose(x[:, 0, :OBSERVATION_DIM], first, atol=1e-3)
            for x in inputs
        ]
        hidden.append(shown.count(False))
    assert hidden == [20, 0], "20 of 34 levels lie where the published sampler churns"


@pytest.mark.parametrize("num_steps", [2, 5, 34])
def test_number_of_network_evaluations_and_draws(num_steps):
    denoiser, draws = Denoiser(Recorder(), OBSERVATION_DIM), []

    def draw(shape):
        draws.append(tuple(shape))
        return torch.zeros(shape)

    sample_edm(denoiser, (2, HORIZON, DATA_DIM), draw, num_steps=num_steps)
    assert len(denoiser.network.inputs) == 2 * num_steps - 1
    assert draws == [(2, HORIZON, DATA_DIM)] * (num_steps + 1)
    assert all(label.shape == (1,) for label in denoiser.network.labels), "one noise label serves the whole batch"


def test_sampler_is_determined_by_its_draws():
    settings = {"denoiser": make_denoiser(), "shape": (2, HORIZON, DATA_DIM), "num_steps": 4}
    one, same, other = (sample_edm(draw=drawer(seed), **settings) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.isclose(one, other).any()
    assert one.dtype == torch.float32 and not one.requires_grad


@pytest.mark.skipif(bool(edm.why_unavailable("cpu")), reason="the compiled sampler step is not built")
def test_both_backends_agree():
    first, actions = normal(5, OBSERVATION_DIM, seed=3), normal(5, HORIZON, ACTION_DIM, seed=4)
    samples = [
        sample_edm(make_denoiser(), (5, HORIZON, DATA_DIM), drawer(), first, actions, num_steps=8, backend=backend)
        for backend in ("reference", "extension")
    ]
    torch.testing.assert_close(*samples, rtol=1e-4, atol=1e-4)
