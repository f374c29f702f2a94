"""The dynamics ensemble, the reward model and the fit that trains them."""

from __future__ import annotations

import copy

import pytest
import torch

from dydiff.capture import GraphedFunction
from dydiff.data.transitions import Transitions
from dydiff.dynamics import DynamicsEnsemble
from dydiff.errors import DydiffError
from dydiff.fit import Fit
from dydiff.reward import RewardModel

OBSERVATION_DIM, ACTION_DIM = 3, 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear_system(num_rows: int, seed: int = 0) -> Transitions:
    """o' = o + F o + G a with a linear reward: everything a one-step model can know exactly."""
    random = generator(seed)
    observation = torch.randn(num_rows, OBSERVATION_DIM, generator=random)
    action = torch.rand(num_rows, ACTION_DIM, generator=random) * 2 - 1
    drift = torch.tensor([[-0.1, 0.2, 0.0], [0.0, -0.1, 0.3], [0.1, 0.0, -0.2]])
    gain = torch.tensor([[0.5, -0.2, 0.1]])
    reward = observation[:, 0] - 0.5 * action[:, 0]
    following = observation + observation @ drift + action @ gain
    return Transitions(observation, action, reward, following, torch.zeros(num_rows))


def make_model(kind: str, seed: int = 0) -> DynamicsEnsemble | RewardModel:
    if kind == "reward":
        return RewardModel(OBSERVATION_DIM, ACTION_DIM, [32], generator=generator(seed))
    return DynamicsEnsemble(
        OBSERVATION_DIM,
        ACTION_DIM,
        [32],
        num_nets=4,
        num_elites=2,
        weight_decay=[1e-5, 1e-5],
        learn_log_var_bounds=kind == "learnt bounds",
        generator=generator(seed),
    )


def make_fit(kind: str, data: Transitions, seed: int = 0, **settings) -> Fit:
    settings = {"lr": 3e-3, "batch_size": 32} | settings
    return Fit(make_model(kind, seed), data, generator(seed + 1), bootstrap=kind != "reward", **settings)


every_model = pytest.mark.parametrize("kind", ["dynamics", "learnt bounds", "reward"])


def holdout_error(fit: Fit) -> torch.Tensor:
    held = Transitions(*(column[fit.holdout] for column in fit.data))
    with torch.no_grad():
        return fit.model.error_per_network(held.observation, held.action, fit.model.target(held))


@every_model
def test_learns_a_linear_system(kind):
    fit = make_fit(kind, linear_system(1000), max_epochs=25)
    while not fit.finished:
        figures = fit.run_epoch()
    fresh = linear_system(200, seed=9)
    if kind == "reward":
        error, scale = fit.model(fresh.observation, fresh.action) - fresh.reward, fresh.reward
    else:
        error = fit.model.predict(fresh.observation, fresh.action, generator()) - fresh.next_observation
        scale = fresh.next_observation - fresh.observation
    assert float(error.detach().square().mean()) < 0.01 * float(scale.square().mean())
    assert figures["best_holdout_error"] <= figures["holdout_error"]


@every_model
def test_finished_model_holds_every_networks_best_weights(kind):
    """Guards against bests kept by reference, which turn into the last weights (SPEC section 8)."""
    fit = make_fit(kind, linear_system(300), lr=0.05, steps_per_epoch=2, patience=3, max_epochs=200)
    errors, weights = [], []
    while True:
        fit.run_epoch()
        if fit.finished:
            break
        errors.append(holdout_error(fit))
        weights.append([tensor.clone() for tensor in fit.model.tensors_per_network()])
    assert fit.epoch < 200, "the test wants the fit to stop early"
    best_epoch = torch.stack(errors).argmin(dim=0)  # [E]
    assert (best_epoch < len(errors) - 1).any(), "the test wants a best epoch that is not the last"
    for i, tensor in enumerate(fit.model.tensors_per_network()):
        for network, epoch in enumerate(best_epoch.tolist()):
            assert torch.equal(tensor[network], weights[epoch][i][network])
    torch.testing.assert_close(holdout_error(fit), torch.stack(errors).amin(dim=0))
    if kind != "reward":
        assert fit.model.elites.tolist() == fit.best_error.argsort()[:2].tolist()


def test_stops_after_patience_epochs_without_any_improvement():
    fit = make_fit("dynamics", linear_system(100), lr=0.0, patience=3)
    stale = []
    while not fit.finished:
        stale.append(fit.run_epoch()["epochs_without_improvement"])
    assert stale == [0, 1, 2, 3]  # the first epoch improves on nothing at all; then equal errors do not count


@every_model
def test_state_dict_continues_bit_exactly(kind):
    data = linear_system(200)
    fit = make_fit(kind, data)
    for _ in range(2):
        fit.run_epoch()
    saved = copy.deepcopy(fit.state_dict())
    figures = [fit.run_epoch() for _ in range(3)]

    resumed = make_fit(kind, data, seed=7)
    resumed.run_epoch()
    resumed.load_state_dict(saved)
    assert [resumed.run_epoch() for _ in range(3)] == figures
    for first, second in zip(fit.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(first, second)
    fit.load_best()
    resumed.load_best()
    for first, second in zip(fit.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(first, second)


def test_resume_with_other_data_is_refused():
    fit = make_fit("reward", linear_system(50))
    with pytest.raises(DydiffError, match="50 transitions but the dataset now gives 60"):
        make_fit("reward", linear_system(60)).load_state_dict(fit.state_dict())


def test_split_holds_out_a_fifth_and_bootstraps_the_rest():
    fit = make_fit("dynamics", linear_system(1000))
    assert len(fit.holdout) == 200 and fit.rows.shape == (4, 800)
    for rows in fit.rows:
        assert not set(rows.tolist()) & set(fit.holdout.tolist())
        assert len(rows.unique()) == pytest.approx(800 * (1 - 1 / 2.71828), rel=0.05)  # with replacement
    assert not torch.equal(fit.rows[0], fit.rows[1])
    assert len(make_fit("reward", linear_system(1000), max_holdout=50).holdout) == 50
    plain = make_fit("reward", linear_system(1000))
    assert sorted(plain.rows.tolist() + plain.holdout.tolist()) == list(range(1000))


@every_model
def test_nan_in_the_data_is_named(kind):
    data = linear_system(100)
    used, unused = ("reward", "next_observation") if kind == "reward" else ("next_observation", "reward")
    getattr(data, unused)[3] = float("nan")  # this model does not look at it
    getattr(data, used)[17] = float("nan")
    with pytest.raises(DydiffError, match=rf"step \d+ \(epoch 1\).* row 17 \({used}\)"):
        make_fit(kind, data).run_epoch()


def test_divergence_is_named():
    fit = make_fit("reward", linear_system(100), lr=1e30)
    with pytest.raises(DydiffError, match="RewardModel is not finite at step 2 .*learning rate"):
        fit.run_epoch()


def test_one_transition_is_too_few():
    with pytest.raises(DydiffError, match="at least 2 transitions"):
        make_fit("reward", linear_system(1))


def test_log_variance_stays_within_its_bounds_and_loss_follows_its_formula():
    model = make_model("dynamics")
    data = linear_system(20)
    mean, log_var = model(1000 * data.observation, data.action)
    # The second softplus adds up to softplus(-10.5) on top of the upper bound.
    assert log_var.max() <= 0.5 + 1e-4 and log_var.min() >= -10
    assert mean.shape == log_var.shape == (4, 20, OBSERVATION_DIM)

    target = model.target(data)
    mean, log_var = model(data.observation, data.action)
    by_hand = ((mean - target) ** 2 / log_var.exp()).mean(dim=(1, 2)) + log_var.mean(dim=(1, 2))
    torch.testing.assert_close(model.nll_per_network(data.observation, data.action, target), by_hand)
    loss = model.loss(data.observation, data.action, target)
    torch.testing.assert_close(loss, by_hand.mean() + 0.01 * 0.5 + 0.01 * 10)


def test_bounds_are_learnt_only_on_request():
    for kind, learnt in (("dynamics", False), ("learnt bounds", True)):
        fit = make_fit(kind, linear_system(64))
        fit.run_epoch()
        assert bool((fit.model.max_log_var != 0.5).any()) is learnt


def assert_captured_steps_are_the_plain_ones(kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two fits of three epochs on a GPU, of which the second one is interrupted and resumed."""
    data = Transitions(*(column.to(device) for column in linear_system(300)))
    fits = []
    for capture in "0", "1":
        monkeypatch.setenv("DYDIFF_CAPTURE", capture)
        fit, again = (Fit(make_model(kind).to(device), data, generator(1), kind != "reward", lr=3e-3, batch_size=32) for _ in "12")
        assert isinstance(fit._gradients, GraphedFunction) == (capture == "1")
        for _ in range(2):
            fit.run_epoch()
        again.load_state_dict(copy.deepcopy(fit.state_dict()))
        again.run_epoch()
        fits.append(again)
    plain, captured = fits
    assert captured._gradients._graphs and captured.step == plain.step > 20
    for one, other in zip(plain.model.parameters(), captured.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(plain.best_error, captured.best_error, rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs; test_pretend_gpu.py does without a GPU")
@every_model
def test_captured_steps_are_the_plain_ones(kind, monkeypatch):
    assert_captured_steps_are_the_plain_ones(kind, "cuda", monkeypatch)


def test_prediction_takes_the_mean_of_the_elite_that_was_drawn():
    model = make_model("dynamics")
    model.set_elites(torch.tensor([0.3, 0.1, 0.4, 0.2]))
    assert model.elites.tolist() == [1, 3]
    data = linear_system(500)
    mean, _ = model(data.observation, data.action)
    position = model.draw_elite(500, generator(4))
    expected = data.observation + mean[model.elites[position], torch.arange(500)]
    torch.testing.assert_close(model.predict(data.observation, data.action, position), expected)
    torch.testing.assert_close(model.predict(data.observation, data.action, generator(4)), expected)
    assert 0.4 < float(position.float().mean()) < 0.6


def test_wrong_ensemble_settings_are_refused():
    with pytest.raises(DydiffError, match="num_elites is 8"):
        DynamicsEnsemble(OBSERVATION_DIM, ACTION_DIM, num_elites=8)
    with pytest.raises(DydiffError, match="weight_decay holds 5 values but the networks have 2 layers"):
        DynamicsEnsemble(OBSERVATION_DIM, ACTION_DIM, hidden_dims=[16])


def test_reward_model_scores_whole_trajectories():
    model = make_model("reward")
    observation = torch.randn(2, 5, OBSERVATION_DIM, generator=generator())
    action = torch.randn(2, 5, ACTION_DIM, generator=generator(1))
    reward = model(observation, action)
    assert reward.shape == (2, 5)
    torch.testing.assert_close(reward[1], model(observation[1], action[1]))
