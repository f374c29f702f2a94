"""Diffusion-QL and its actor: schedules, the coin in its loss, the choice among candidates, and the DDPM on known answers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from test_agents import ACTION_DIM, BATCH, OBSERVATION_DIM, generator, make_batch, train

from dydiff.agents.diffusion_actor import DiffusionActor, make_betas
from dydiff.agents.diffusion_ql import DiffusionQL
from dydiff.errors import DydiffError


def test_diffusion_ql_average_follows_on_schedule():
    agent = DiffusionQL(OBSERVATION_DIM, ACTION_DIM, [16], ema_start=3, ema_every=2, ema_decay=0.5, generator=generator())
    random = generator(1)
    moved = []
    for _ in range(8):
        before = copy.deepcopy(agent.ema_actor.state_dict())
        train(agent, random, 1)
        after = agent.ema_actor.state_dict()
        moved.append(not torch.equal(before["network.layers.0.weight"], after["network.layers.0.weight"]))
        if moved[-1]:
            for key, value in agent.actor.state_dict().items():
                torch.testing.assert_close(after[key], 0.5 * (before[key] + value))
    assert moved == [False, False, False, False, True, False, True, False]


def test_diffusion_ql_learning_rate_follows_a_cosine():
    agent = DiffusionQL(OBSERVATION_DIM, ACTION_DIM, [16], lr=1e-3, lr_decay=True, num_epochs=4, generator=generator())
    rates = []
    for _ in range(5):
        agent.end_epoch()
        rates.append(float(agent.critic_optimizer.lr))
    expected = [0.5e-3 * (1 + math.cos(math.pi * epoch / 4)) for epoch in (1, 2, 3, 4, 4)]
    assert rates == pytest.approx(expected)


def test_diffusion_ql_numerator_selects_the_critic():
    agent = DiffusionQL(OBSERVATION_DIM, ACTION_DIM, [16], generator=generator())
    batch, noise = make_batch(generator(1)), agent.draw_noise(BATCH, generator(2))
    _, action = agent.actor.denoising_loss(batch.action, batch.observation, noise.step, noise.action)
    q = agent.critics(torch.cat([batch.observation, action], dim=-1)).squeeze(-1)
    for i in (0, 1):
        q_loss = agent.policy_loss(batch, noise._replace(numerator=torch.tensor([i])))[2]
        torch.testing.assert_close(q_loss, -q[i].mean() / q[1 - i].abs().mean())


def test_diffusion_ql_evaluation_prefers_what_the_target_critics_prefer():
    agent = DiffusionQL(OBSERVATION_DIM, 1, [16], num_candidates=20, generator=generator())
    observation = torch.randn(5, OBSERVATION_DIM, generator=generator(1))
    candidates = agent.act(observation.repeat_interleave(20, dim=0), generator(2)).view(5, 20)
    slope = torch.nn.Linear(OBSERVATION_DIM + 1, 1, bias=False)
    with torch.no_grad():
        slope.weight.copy_(torch.tensor([[0.0] * OBSERVATION_DIM + [1e6]]))
    agent.target_critics = lambda x: slope(x).expand(2, -1, -1)  # so steep that the softmax is a maximum
    chosen = agent.act_for_evaluation(observation, generator(2))
    torch.testing.assert_close(chosen.squeeze(-1), candidates.amax(dim=1))


def test_diffusion_ql_acts_only_with_a_generator():
    agent = DiffusionQL(OBSERVATION_DIM, ACTION_DIM, [16], generator=generator())
    with pytest.raises(DydiffError, match="Generator"):
        agent.act(torch.zeros(1, OBSERVATION_DIM))


def test_beta_schedules_follow_their_formulas():
    vp = [1 - math.exp(-0.1 / 5 - 4.95 * (2 * t - 1) / 25) for t in range(1, 6)]
    assert make_betas("vp", 5).tolist() == pytest.approx(vp)
    assert make_betas("linear", 3).tolist() == pytest.approx([1e-4, (1e-4 + 2e-2) / 2, 2e-2])
    signal = [math.cos((t / 4 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(5)]
    cosine = [min(1 - signal[t + 1] / signal[t], 0.999) for t in range(4)]
    assert make_betas("cosine", 4).tolist() == pytest.approx(cosine)
    with pytest.raises(DydiffError, match="sigmoid"):
        make_betas("sigmoid", 5)


def test_diffusion_actor_reconstructs_and_samples_the_only_action():
    """With a perfect noise prediction for one action, both the reconstruction and the sampler return that action."""
    actor = DiffusionActor(OBSERVATION_DIM, ACTION_DIM, 16, generator=generator())
    goal = torch.tensor([[0.3, -0.7]])
    step, noise = torch.arange(5), torch.randn(5, ACTION_DIM, generator=generator(1))
    noisy = actor.signal_scale[:, None] * goal + actor.noise_scale[:, None] * noise
    torch.testing.assert_close(actor.predict_start(noisy, step, noise), goal.expand(5, -1), rtol=0, atol=1e-5)

    class PerfectPrediction(torch.nn.Module):
        remaining = iter(reversed(range(5)))

        def forward(self, inputs):
            t = next(self.remaining)
            return (inputs[:, :ACTION_DIM] - actor.signal_scale[t] * goal) / actor.noise_scale[t]

    actor.network = PerfectPrediction()
    initial, *steps = torch.randn(6, 8, ACTION_DIM, generator=generator(2))
    sample = actor.sample(torch.zeros(8, OBSERVATION_DIM), initial, torch.stack(steps))
    torch.testing.assert_close(sample, goal.expand(8, -1), rtol=0, atol=1e-5)
