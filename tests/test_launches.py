"""How many operations and kernels a GPU would be given: where they are small, launching them is what takes the time.

Counted without a card: what PyTorch dispatches that is more than a view, and the launches of our own kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dydiff.data import Limits, Spaces, ZScore
from dydiff.diffusion.edm import Denoiser, edm_loss
from dydiff.dynamics import DynamicsEnsemble
from dydiff.networks.fused_unet import FusedUNet
from dydiff.networks.policy import TanhGaussianPolicy
from dydiff.networks.training_unet import CudnnTrainingUNet
from dydiff.networks.unet import UNet
from dydiff.rollout import RolloutEngine

pytest.importorskip("triton")
from dydiff.diffusion.kernel_update import KernelUpdate  # noqa: E402
from dydiff.kernels import finish, launch  # noqa: E402
from dydiff.kernels.unet_winograd import WinogradBlocks  # noqa: E402

VIEWS = """view as_strided slice expand t transpose permute select unsqueeze squeeze split split_with_sizes alias unbind detach
_unsafe_view lift_fresh empty new_empty empty_like empty_strided new_empty_strided""".split()


class Counter(TorchDispatchMode):
    """Counts the operations within that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.__name__.split(".")[0] not in VIEWS
        return function(*args, **(kwargs or {}))


def count(function: Callable[[], object]) -> int:
    with Counter() as counter:
        function()
    return counter.count


def test_an_evaluation():
    """Less than half of what PyTorch's operators make."""
    launches: list[launch.Launch] = []
    with torch.device("meta"):
        unet, x, label = UNet(14, 100), torch.empty(16, 100, 14), torch.empty(1)
    fused = FusedUNet(unet, WinogradBlocks(capability=90, execute=launches.append))
    table = fused.time_table(label)[0]
    fused(x, table)  # splits the weights of concatenations
    launches.clear()
    assert count(lambda: fused(x, table)) + len(launches) == 70
    with torch.no_grad():
        assert count(lambda: unet(x, label)) == 145


@pytest.mark.parametrize(("precision", "most"), [("float32", 286), ("bf16", 308)])
def test_a_training_step(precision, most, monkeypatch):
    """Loss and gradients; the update itself is one launch for all weights of a kind."""
    launches: list[launch.Launch] = []
    monkeypatch.setattr(launch.Launch, "run", lambda one: launches.append(one))
    denoiser = Denoiser(UNet(14, 20, 8, (1, 4, 8)), 11)
    network = CudnnTrainingUNet(denoiser.network, precision, finish.finish_block)
    learner = Denoiser(network, 11)
    averages = [weight.detach().clone() for weight in denoiser.parameters()]
    update = KernelUpdate(list(denoiser.parameters()), averages, network.copies)
    clean, sigma, noise = torch.randn(2, 20, 14), torch.rand(2) + 0.1, torch.randn(2, 20, 14)

    def step() -> None:
        update.clear_gradients()
        edm_loss(learner, clean, sigma, noise).sum().backward()
        update.collect_gradients()

    step()
    launches.clear()
    assert count(step) + len(launches) <= most
    assert len(launches) == 50  # 25 convolutions, each way
    launches.clear()
    assert count(lambda: update.step(1e-3, 0.1)) == 0
    assert len(launches) == (2 if precision == "bf16" else 1)


def test_an_autoregressive_step():
    """Of which the policy makes seven, and the ensemble's products and activations nine."""
    limits = Limits(torch.full((14,), -3.0), torch.full((14,), 3.0))
    spaces = Spaces(limits, ZScore(torch.zeros(11), torch.ones(11)), -torch.ones(3), torch.ones(3))
    policy, dynamics = TanhGaussianPolicy(11, 3), DynamicsEnsemble(11, 3)

    def operations(horizon: int) -> int:
        engine = RolloutEngine([Denoiser(UNet(14, horizon, 8, (1, 2)), 11)], dynamics, spaces, horizon, backend="reference")
        start, actor = torch.zeros(4, 11), SimpleNamespace(act=lambda observation, generator: policy.mean_action(observation))
        return count(lambda: engine.roll_out(actor, start, torch.Generator().manual_seed(0), iterations=0))

    assert operations(30) - operations(20) == 10 * 26
