"""What rollouts are given: models, policies and settings that do not fit each other, told before or where they would do harm."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dydiff.arguments import check_count, describe
from dydiff.data import Spaces
from dydiff.diffusion.edm import Denoiser
from dydiff.diffusion.sampler import sample_edm
from dydiff.errors import DydiffError, NotFinite

DEFAULTS = {name: each.default for name, each in inspect.signature(sample_edm).parameters.items()}
SAMPLER_SETTINGS = [name for name, default in DEFAULTS.items() if isinstance(default, (int, float))]


class TrainedModel(Protocol):
    """What `load_diffusion_model` gives."""

    denoiser: Denoiser


def check_finite(what: str, values: Tensor, remedy: str) -> None:
    """Raise NotFinite unless `values` [B, ...] are finite; it names the first row, and the step of [B, H, ...]. Waits for them."""
    finite = values.isfinite()
    if not finite.all():
        row, *step, _ = finite.logical_not().nonzero()[0].tolist()
        place = "".join([f"row {row}", *(f", step {each}" for each in step)])
        raise NotFinite(f"{what} a NaN or an infinity, first in {place}. {remedy}")


def check_sampler(sampler: Mapping[str, float] | None) -> None:
    """Raise DydiffError unless these are settings of `sample_edm`; a misspelt one is told the nearest."""
    if not isinstance(sampler, Mapping | None):
        raise DydiffError(f"sampler must be a dictionary of sample_edm's settings, not {describe(sampler)}.")
    for name in sampler or {}:
        if name not in SAMPLER_SETTINGS:
            nearest = difflib.get_close_matches(str(name).lower(), SAMPLER_SETTINGS, n=1)
            hint = f"did you mean '{nearest[0]}'?" if nearest else f"choose one of {', '.join(SAMPLER_SETTINGS)}."
            raise DydiffError(f"sampler has no setting {name!r}: {hint}")
    check_count("sampler's num_steps", (sampler or {}).get("num_steps", DEFAULTS["num_steps"]), 2)


def fitting_denoiser(model: Denoiser | TrainedModel, spaces: Spaces, horizon: int) -> Denoiser:
    """The denoiser of a diffusion model, if it is one for rollouts in these spaces over this horizon, as far as it can know.

    One that was loaded tells by its `manifest` what it was trained with; of others, a U-Net knows its horizon.

    Raises:
        DydiffError: it is not, or no diffusion model at all.
    """
    denoiser = getattr(model, "denoiser", model)
    if not isinstance(denoiser, Denoiser):
        raise DydiffError(f"denoisers must hold what load_diffusion_model gives, or Denoisers, not {describe(model)}.")
    manifest = getattr(denoiser, "manifest", {})
    for option in ("include_action", "use_cond", "cond_on_action"):
        if not manifest.get(option, True):
            raise DydiffError(
                f"The diffusion model was trained with --{option}=False, but rollouts show it a start and the policy's "
                f"actions, of which it would make nothing. Train one with --{option}=True."
            )
    own = manifest.get("network", {}).get("horizon") or getattr(denoiser.network, "horizon", horizon)
    for name, theirs, given in (
        ("horizon", own, horizon),
        ("spaces.observation_dim", denoiser.observation_dim, spaces.observation_dim),
        ("spaces.device", next(denoiser.parameters()).device, spaces.device),
    ):
        if theirs != given:
            raise DydiffError(f"{name} is {given}, but the diffusion model was made for {theirs}: let both be the same.")
    limits = getattr(model, "limits", None)
    if limits is not None and not _agree(limits, spaces.observation_limits, spaces.action_limits, names=("minimum", "maximum")):
        raise DydiffError("spaces has other limits than the diffusion model: take those of the dataset that it was trained on.")
    return denoiser


def check_policys_spaces(policy: object, spaces: Spaces) -> None:
    """Raise DydiffError where a loaded policy, which knows its spaces, would take an observation for another one."""
    own = getattr(policy, "spaces", None)
    if isinstance(own, Spaces) and not (
        own.observation_dim == spaces.observation_dim
        and _agree(own.z_score, spaces.z_score, names=("mean", "std"))
        and _agree(own, spaces, names=("action_center", "action_half_range"))
    ):
        raise DydiffError(
            "The policy was trained in other spaces than the engine's: what it takes for an observation would be another one. Load "
            "a policy that was trained on the engine's dataset, or wrap it in a function that converts through raw space."
        )


def _agree(one: Any, *parts: Any, names: Sequence[str]) -> bool:
    """Whether the named tensors of one are those of the others, side by side; statistics may differ in their last bits."""
    pairs = ((getattr(one, name), torch.cat([getattr(part, name) for part in parts])) for name in names)
    return all(a.shape == b.shape and torch.allclose(a.cpu(), b.cpu(), rtol=1e-3, atol=1e-6) for a, b in pairs)
