"""The ensemble dynamics model: seven networks that predict the observation's change, of which five elites are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dydiff.data.transitions import Transitions
from dydiff.errors import DydiffError
from dydiff.networks.ensemble import EnsembleMLP

Predictor = Callable[[Tensor, Tensor, torch.Generator | Tensor], Tensor]  # observation, action, elite -> next observation
BOUND_PENALTY = 0.01  # keeps learnt log-variance bounds tight


class DynamicsEnsemble(nn.Module):
    """Probabilistic ensemble over the observation's change, in policy space (PETS, arXiv 1805.12114; SPEC section 4).

    `weight_decay` has one value per linear layer (Adam's L2 term). With `learn_log_var_bounds` the bounds of the
    log-variance are parameters, as in the ensemble papers; by default they stay constant. The elites are a buffer,
    hence in `state_dict`.

    Raises:
        DydiffError: more elites than networks, or a weight-decay list whose length is not the number of layers.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden_dims: Sequence[int] = (200, 200, 200, 200),
        num_nets: int = 7,
        num_elites: int = 5,
        activation: Callable[[Tensor], Tensor] = F.silu,
        weight_decay: Sequence[float] = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4),
        max_log_var: float = 0.5,
        min_log_var: float = -10.0,
        learn_log_var_bounds: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if num_elites > num_nets:
            raise DydiffError(f"num_elites is {num_elites} but the ensemble has only num_nets = {num_nets}.")
        if len(weight_decay) != len(hidden_dims) + 1:
            raise DydiffError(
                f"weight_decay holds {len(weight_decay)} values but the networks have {len(hidden_dims) + 1} layers "
                f"(hidden_dims {list(hidden_dims)} and the output): give one value per layer."
            )
        self.num_nets = num_nets
        self.weight_decay = tuple(weight_decay)
        self.network = EnsembleMLP(
            num_nets, observation_dim + action_dim, hidden_dims, 2 * observation_dim, activation, generator
        )
        # One bound per network and dimension, so that the best bounds too can be kept per network.
        shape = (num_nets, 1, observation_dim)
        self.max_log_var = nn.Parameter(torch.full(shape, max_log_var), requires_grad=learn_log_var_bounds)
        self.min_log_var = nn.Parameter(torch.full(shape, min_log_var), requires_grad=learn_log_var_bounds)
        self.register_buffer("elites", torch.arange(num_elites))

    def forward(self, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance `[E, B, O]` of the change; inputs `[B, O]`, `[B, A]`, or `[E, B, ...]` by network."""
        mean, raw = self.network(torch.cat([observation, action], dim=-1)).chunk(2, dim=-1)
        log_var = self.max_log_var - F.softplus(self.max_log_var - raw)
        return mean, self.min_log_var + F.softplus(log_var - self.min_log_var)

    def draw_elite(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Uniform positions in `elites`, one per sample: `[B]`, long, on the model's device."""
        position = torch.randint(len(self.elites), (batch_size,), generator=generator, device=generator.device)
        return position.to(self.elites.device)

    def predict(self, observation: Tensor, action: Tensor, elite: torch.Generator | Tensor) -> Tensor:
        """Next observation `[B, O]`: every sample takes the mean of one elite.

        `elite` is the generator to draw it from, or the positions in `elites` as a long tensor `[B]` (`draw_elite`).
        """
        return self.predictor()(observation, action, elite)

    @torch.no_grad()
    def predictor(self) -> Predictor:
        """`predict` with the weights as they are now, for many calls in a row: the elites' are gathered once."""
        weights = self.network.gather(self.elites)

        @torch.no_grad()
        def predict(observation: Tensor, action: Tensor, elite: torch.Generator | Tensor) -> Tensor:
            if isinstance(elite, torch.Generator):
                elite = self.draw_elite(len(observation), elite)
            change = self.network(torch.cat([observation, action], dim=-1), weights)[..., : observation.shape[-1]]
            return observation + change.gather(0, elite[None, :, None].expand(1, *observation.shape))[0]

        return predict

    # What `fit.Fit` needs to know of a model.

    def target(self, batch: Transitions) -> Tensor:
        """What is to be predicted from observation and action: the change `[..., O]`."""
        return batch.next_observation - batch.observation

    def nll_per_network(self, observation: Tensor, action: Tensor, target: Tensor) -> Tensor:
        """Gaussian negative log-likelihood `[E]`, without its constants: mean((mu - target)^2 e^-lv) + mean(lv)."""
        mean, log_var = self(observation, action)
        weighted = (mean - target).square() * torch.exp(-log_var)
        return weighted.mean(dim=(1, 2)) + log_var.mean(dim=(1, 2))

    def loss(self, observation: Tensor, action: Tensor, target: Tensor) -> Tensor:
        """Training loss, 0-dim: the likelihood's mean over the networks plus the price of wide bounds."""
        bounds = self.max_log_var.mean() - self.min_log_var.mean()
        return self.nll_per_network(observation, action, target).mean() + BOUND_PENALTY * bounds

    def error_per_network(self, observation: Tensor, action: Tensor, target: Tensor) -> Tensor:
        """Mean squared error `[E]` of the means."""
        return (self(observation, action)[0] - target).square().mean(dim=(1, 2))

    def parameter_groups(self) -> list[dict]:
        """Adam's groups: one per layer with its own weight decay, and the bounds (without decay) if they are learnt."""
        groups = [
            {"params": list(layer.parameters()), "weight_decay": decay}
            for layer, decay in zip(self.network.layers, self.weight_decay, strict=True)
        ]
        if self.max_log_var.requires_grad:
            groups.append({"params": [self.max_log_var, self.min_log_var], "weight_decay": 0.0})
        return groups

    def tensors_per_network(self) -> list[Tensor]:
        """Every weight as a view whose first dimension is the network, `[E, ...]`."""
        return [parameter.detach() for parameter in self.parameters()]

    def set_elites(self, error: Tensor) -> None:
        """Take as elites the networks with the smallest `error [E]`."""
        self.elites.copy_(error.argsort(stable=True)[: len(self.elites)])
