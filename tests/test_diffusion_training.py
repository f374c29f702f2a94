"""Training of the diffusion model: batches, the average of the weights, resume, and what divergence tells."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from small_denoiser import ACTION_DIM, HORIZON, OBSERVATION_DIM, generator, make_denoiser, normal
from torch import Tensor, nn

from dydiff.data import Dataset, Limits, Windows
from dydiff.diffusion.edm import Denoiser, ForeignActions, draw_sigma, edm_loss, show_foreign_actions
from dydiff.diffusion.training import DiffusionTrainer
from dydiff.errors import DydiffError, NotFinite


@pytest.fixture(scope="module")
def windows() -> Windows:
    source = np.random.default_rng(0)
    rows = 60
    dataset = Dataset(
        name="made-up",
        path=None,
        observations=np.stack([np.sin(np.arange(rows) / 3), np.cos(np.arange(rows) / 3)], axis=1).astype(np.float32),
        actions=source.uniform(-1, 1, (rows, ACTION_DIM)).astype(np.float32),
        rewards=np.zeros(rows, np.float32),
        terminals=np.arange(rows) % 20 == 19,
    )
    return Windows(dataset, HORIZON, Limits.from_dataset(dataset))


def make_trainer(windows: Windows, network: nn.Module | None = None, **changes: object) -> DiffusionTrainer:
    settings = {"batch_size": 6, "duration": 120, "tick": 30, "seed": 1, "lr": 1.0, "half_life": 500.0} | changes
    denoiser = make_denoiser() if network is None else Denoiser(network, OBSERVATION_DIM)
    return DiffusionTrainer(denoiser, windows, {"made": "up"}, **settings)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("foreign_actions", [0.0, 0.5])
@pytest.mark.parametrize("micro_batch", [1, 4, 6, 100])
def test_splitting_a_batch_changes_nothing(windows, micro_batch, foreign_actions):
    whole, split = (make_trainer(windows, micro_batch=each, foreign_actions=foreign_actions) for each in (None, micro_batch))
    whole_log, split_log = whole.run_epoch(), split.run_epoch()
    assert whole_log == pytest.approx(split_log, rel=1e-5)
    torch.testing.assert_close(weights(whole.denoiser), weights(split.denoiser), rtol=1e-3, atol=1e-6)
    assert torch.equal(whole.generator.get_state(), split.generator.get_state())


def test_training_lowers_the_loss_of_the_average(windows):
    trainer = make_trainer(windows, batch_size=32, duration=32 * 150, tick=32 * 50, lr=2e-3, lr_ramp=100)
    clean, sigma = windows.gather(torch.arange(len(windows))), draw_sigma(len(windows), generator(5))
    noise = normal(*clean.shape, seed=6)
    before = float(edm_loss(trainer.ema, clean, sigma, noise).mean())
    while not trainer.finished:
        trainer.run_epoch()
    assert float(edm_loss(trainer.ema, clean, sigma, noise).mean()) < 0.8 * before


def test_foreign_actions_teach_not_to_read_states_out_of_later_actions():
    """Actions here are the states that they are taken in: what reads them is right with its own and wrong with foreign ones."""
    state = np.random.default_rng(0).uniform(-1, 1, (2000, 1)).astype(np.float32)
    columns = {"observations": np.repeat(state, OBSERVATION_DIM, axis=1), "actions": np.repeat(state, ACTION_DIM, axis=1)}
    dataset = Dataset("made-up", None, **columns, rewards=np.zeros(2000, np.float32), terminals=np.arange(2000) % 20 == 19)
    windows = Windows(dataset, HORIZON, Limits.from_dataset(dataset))
    losses = {}
    for share in (0.0, 0.9):
        trainer = make_trainer(
            windows, batch_size=64, duration=64 * 400, tick=64 * 400, lr=3e-3, lr_ramp=100, foreign_actions=share
        )
        trainer.run_epoch()
        clean = windows.gather(torch.arange(500))
        sigma, noise, foreign = draw_sigma(500, generator(1)), normal(*clean.shape, seed=2), torch.full((500,), 1)
        cut = ForeignActions(foreign, torch.ones(500))
        shown, counted = show_foreign_actions(clean, clean.roll(250, 0), cut, OBSERVATION_DIM)
        loss = edm_loss(trainer.ema, clean, sigma, noise, shown_action=shown) * counted
        losses[share] = float(loss.sum() / counted.sum())
    assert losses[0.9] < 0.7 * losses[0.0]


def test_average_of_the_weights_by_hand(windows):
    trainer = make_trainer(windows, tick=6, lr=0.05, lr_ramp=1, half_life=9.0, duration=240)
    average = weights(trainer.ema).double()
    for step in range(40):
        trainer.run_epoch()
        half_life = min(9.0, 0.05 * 6 * step)  # by what was seen before, as the learning rate; the bound is met at step 30
        beta = 0.5 ** (6 / half_life) if step else 0
        average = beta * average + (1 - beta) * weights(trainer.denoiser).double()
        torch.testing.assert_close(weights(trainer.ema).double(), average, rtol=1e-4, atol=1e-5)
    assert trainer.finished and not torch.isclose(weights(trainer.ema), weights(trainer.denoiser)).all()


def test_half_life_of_the_average_is_bounded(windows):
    """From 2,000 samples on the half-life stays at 100: one batch of 100 halves the distance."""
    trainer = make_trainer(windows, half_life=100.0, batch_size=100, duration=10_000)
    trainer.seen = 9_000
    average = weights(trainer.ema)
    trainer._find_gradients()
    trainer.update.step(0.0, trainer._ema_rate())
    torch.testing.assert_close(weights(trainer.ema), average)
    with torch.no_grad():
        for parameter in trainer.denoiser.parameters():
            parameter += 1
    trainer.update.step(0.0, trainer._ema_rate())
    torch.testing.assert_close(weights(trainer.ema), average + 0.5, rtol=1e-4, atol=1e-5)


def test_learning_rate_rises_with_the_samples_seen(windows):
    trainer = make_trainer(windows, tick=6)
    rates = [trainer.run_epoch()["lr"] for _ in range(3)]
    assert rates == pytest.approx([0, 6 / 10e6, 12 / 10e6])
    trainer.lr_ramp = 20
    assert [trainer.run_epoch()["lr"] for _ in range(3)] == pytest.approx([18 / 20, 1, 1])


def test_broken_gradients_are_replaced(windows):
    """What Adam sees of (nan, inf, -inf, 2): its first moment becomes a tenth of that, and its step lr times the sign."""
    trainer = make_trainer(windows, tick=6)
    first = next(trainer.denoiser.parameters())
    before = first.detach().clone()
    pattern = torch.tensor([math.nan, math.inf, -math.inf, 2.0])
    first.register_hook(lambda gradient: pattern.repeat(gradient.numel() // 4).view_as(gradient))
    trainer.seen = 10_000_000
    trainer._step()
    moment = trainer.update.state_dict()["state"][0]["exp_avg"].flatten()[:4]
    torch.testing.assert_close(moment, torch.tensor([0, 1e4, -1e4, 0.2]))
    moved = (first.detach() - before).flatten()[:4] / trainer.lr
    torch.testing.assert_close(moved, torch.tensor([0.0, -1, 1, -1]), rtol=0, atol=1e-3)


def test_resume_is_exact(windows):
    whole, begun = make_trainer(windows), make_trainer(windows)
    log = [whole.run_epoch() for _ in range(4)]
    resumed_log = [begun.run_epoch(), begun.run_epoch()]
    state = copy.deepcopy(begun.state_dict())
    begun.run_epoch()  # what happens after the state was taken does not touch it
    resumed = make_trainer(windows, seed=99)
    resumed.load_state_dict(state)
    while not resumed.finished:
        resumed_log.append(resumed.run_epoch())
    assert resumed_log == log and whole.finished
    assert torch.equal(weights(resumed.ema), weights(whole.ema))
    assert torch.equal(weights(resumed.denoiser), weights(whole.denoiser))


@pytest.mark.parametrize("duration", [80, 300])
def test_another_duration_may_be_chosen_on_resume(windows, duration):
    whole, begun, resumed = (make_trainer(windows, duration=size) for size in (duration, 120, duration))
    begun.run_epoch(), begun.run_epoch()
    resumed.load_state_dict(begun.state_dict())
    for trainer in (whole, resumed):
        while not trainer.finished:
            trainer.run_epoch()
    assert resumed.seen == whole.seen and torch.equal(weights(resumed.ema), weights(whole.ema))
    enough, short = make_trainer(windows, duration=60), make_trainer(windows, duration=54)
    enough.load_state_dict(begun.state_dict())
    assert enough.finished
    with pytest.raises(DydiffError, match="has seen 60 windows, more than the 54 that were asked for"):
        short.load_state_dict(begun.state_dict())


def test_every_tick_trains_on_something(windows):
    trainer = make_trainer(windows, tick=1, duration=20)
    log = []
    while not trainer.finished:
        log.append(trainer.run_epoch())
    assert [line["kimg"] * 1000 for line in log] == pytest.approx([6, 12, 18, 24]) and all(line["loss"] > 0 for line in log)


def make_spoiled_trainer(windows: Windows, samples: int, before: bool) -> DiffusionTrainer:
    """A trainer with a NaN in its weights before, or else after, the batch that begins after so many samples."""
    trainer = make_trainer(windows)
    step = trainer._step

    def spoilt_step() -> Tensor:
        first = trainer.seen
        loss = None if before else step()
        if first == samples:
            with torch.no_grad():
                next(trainer.denoiser.parameters()).fill_(math.nan)
        return step() if before else loss

    trainer._step = spoilt_step
    return trainer


def test_divergence_is_told_with_batch_and_tensor(windows):
    told = "diffusion loss is nan after 18 samples .first in the tensor 'network.*Lower --lr"
    with pytest.raises(NotFinite, match=told):
        make_spoiled_trainer(windows, samples=12, before=True).run_epoch()


def test_weights_that_the_last_batch_of_a_tick_spoils_are_told_before_they_are_saved(windows):
    with pytest.raises(NotFinite, match="weights are not finite after 30 samples .first in the tensor 'network"):
        make_spoiled_trainer(windows, samples=24, before=False).run_epoch()


def test_products_are_the_average_with_its_limits(windows):
    trainer = make_trainer(windows, snapshot_ticks=2, duration=150)
    saved: dict[str, dict] = {}
    while not trainer.finished:
        trainer.run_epoch()
        trainer.save_products(lambda name, kind, tree, manifest: saved.update({name: copy.deepcopy(tree)}), trainer.finished)
    assert list(saved) == ["snapshot-000000.safetensors", "model.safetensors"]
    network = trainer.ema.network.state_dict()
    assert all(torch.equal(value, network[name]) for name, value in saved["model.safetensors"]["weights"].items())
    assert torch.equal(saved["model.safetensors"]["limits"]["minimum"], windows.limits.minimum)
