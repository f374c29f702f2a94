"""The trajectory networks: shapes, conditioning on the noise level, causality, gradients, and that they learn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dydiff.errors import DydiffError
from dydiff.networks import TRAJECTORY_NETWORKS, build_trajectory_network
from dydiff.networks.embedding import NoiseEmbedding, sinusoidal_embedding
from dydiff.networks.unet import UNet

HORIZON, DATA_DIM = 8, 5
every_network = pytest.mark.parametrize("kind", TRAJECTORY_NETWORKS)


def build(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_trajectory_network(kind, DATA_DIM, HORIZON, dim=16, dim_mults=[1, 2]).eval()


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@every_network
@pytest.mark.parametrize("batch_size", [1, 3, 17])
def test_shapes(kind, batch_size):
    output = build(kind)(draw(batch_size, HORIZON, DATA_DIM), draw(batch_size))
    assert output.shape == (batch_size, HORIZON, DATA_DIM) and output.dtype == torch.float32


@every_network
def test_rows_of_a_batch_do_not_see_each_other(kind):
    network, x, label = build(kind), draw(5, HORIZON, DATA_DIM), draw(5)
    alone = torch.cat([network(x[i : i + 1], label[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(network(x, label), alone, rtol=1e-4, atol=1e-5)


@every_network
def test_one_noise_label_for_the_batch_equals_the_expanded_one(kind):
    network, x, label = build(kind), draw(3, HORIZON, DATA_DIM), torch.tensor([-0.7])
    torch.testing.assert_close(network(x, label), network(x, label.expand(3)), rtol=1e-5, atol=1e-6)


@every_network
def test_the_noise_level_matters(kind):
    network, x = build(kind), draw(3, HORIZON, DATA_DIM)
    assert (network(x, torch.tensor([-1.0])) - network(x, torch.tensor([1.0]))).abs().max() > 1e-3


@every_network
def test_gradients_reach_every_parameter(kind):
    network = build(kind).train()
    (network(draw(4, HORIZON, DATA_DIM), draw(4)) * draw(4, HORIZON, DATA_DIM, seed=2)).sum().backward()
    without = [name for name, parameter in network.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    # The transformer attends to one row of memory: softmax over it is 1 whatever the query, so what makes the query is idle.
    assert not [name for name in without if "norm2" not in name and "multihead_attn.in_proj" not in name]


@every_network
def test_networks_learn(kind):
    """To give each of eight trajectories its own, shifted by a row: needs every row and every column."""
    network = build(kind).train()
    x, label = draw(8, HORIZON, DATA_DIM), draw(8)
    target = x.roll(1, dims=1)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (network(x, label) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@every_network
def test_equal_seeds_build_equal_networks(kind):
    one, other, third = build(kind).state_dict(), build(kind).state_dict(), build(kind, seed=1).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], third[name]) for name in one)


def test_published_size_of_the_unet():
    with torch.device("meta"):
        network = UNet(data_dim=14, horizon=100)
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 2) == 58.75


@pytest.mark.parametrize("horizon, dim_mults, advice", [(10, (1, 4, 8), 8), (3, (1, 4, 8), 4), (9, (1, 2), 8)])
def test_horizons_that_the_unet_cannot_halve(horizon, dim_mults, advice):
    with pytest.raises(DydiffError, match=f"divisible by {2 ** (len(dim_mults) - 1)}; {horizon} is not, {advice} is."):
        UNet(5, horizon, dim=8, dim_mults=dim_mults)


@pytest.mark.parametrize("horizon, dim_mults", [(4, (1, 4, 8)), (12, (1, 4, 8)), (3, (1,)), (100, (1, 2, 2))])
def test_horizons_and_depths_that_the_unet_takes(horizon, dim_mults):
    network = UNet(5, horizon, dim=8, dim_mults=dim_mults)
    assert network(draw(2, horizon, 5), draw(2)).shape == (2, horizon, 5)


def test_sizes_and_names_that_do_not_exist():
    with pytest.raises(DydiffError, match="divisible by 8.*12 is not"):
        UNet(5, 8, dim=12)
    for width in (2, 7):
        with pytest.raises(DydiffError, match=f"{width} is not"):
            build_trajectory_network("Transformer_RL", 5, 8, dim=width)
    with pytest.raises(DydiffError, match="'unet' is unknown; choose one of UNet_RL"):
        build_trajectory_network("unet", 5, 8)


@pytest.mark.parametrize("training", [False, True])
def test_the_transformer_is_causal_over_the_horizon(training):
    torch.manual_seed(0)
    network = build("Transformer_RL").train(training)
    for block in network.decoder.layers:
        block.self_attn.dropout = block.multihead_attn.dropout = 0.0
    x, label = draw(2, HORIZON, DATA_DIM), draw(2)
    output = network(x, label)
    for row in range(HORIZON):
        changed = x.clone()
        changed[:, row] += 1
        difference = (network(changed, label) - output).abs().amax(dim=(0, 2))  # [H]
        assert difference[:row].max() < 1e-5 if row else True
        assert (difference[row:] > 1e-5).all(), "later rows attend to this one"


def test_the_transformer_drops_attention_in_training_only():
    network, x, label = build("Transformer_RL"), draw(64, HORIZON, DATA_DIM), draw(64)
    assert torch.equal(network(x, label), network(x, label))
    network.train()
    assert not torch.equal(network(x, label), network(x, label))


def test_sinusoidal_embedding_by_hand():
    embedding = sinusoidal_embedding(torch.tensor([0.0, 2.0]), 6)
    frequency = torch.tensor([1.0, 1e-2, 1e-4])
    expected = torch.cat([torch.sin(2 * frequency), torch.cos(2 * frequency)])
    assert embedding[0].tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(embedding[1], expected)
    assert NoiseEmbedding(6)(torch.zeros(3)).shape == (3, 6)
