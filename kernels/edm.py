"""The EDM sampler step, compiled (csrc/) or in plain PyTorch (reference.py), chosen per call.

    churn   x_hat = x + sqrt(sigma_hat^2 - sigma^2) s_noise noise                 model_input = c_in(sigma_hat) x_hat
    euler   x = inpaint(x_hat + (sigma_next - sigma_hat) d)                       model_input = c_in(sigma_next) x
    heun    x_new = inpaint(x_hat + (sigma_next - sigma_hat) (d + d') / 2)
    with d = (x - c_skip x - c_out F) / sigma at each end, F the raw network output

All tensors are [B, H, D], observation columns first, D = O + A. Compiled, a step touches every tensor once, 16 bytes
an element; PyTorch's chains of elementwise operations move 28, 84 and 116. The extension works on contiguous float32:
other layouts are copied first, other types are refused.
"""

import warnings
from functools import cache

import torch
from torch import Tensor

from dydiff.errors import DydiffError
from dydiff.kernels import native, reference
from dydiff.kernels.checks import check_addressable, check_conditioning, check_like, check_philox
from dydiff.kernels.native import why_unavailable
from dydiff.kernels.philox import PhiloxDraw, PhiloxNoise, philox_normal

__all__ = [
    "PhiloxDraw",
    "PhiloxNoise",
    "available_backend",
    "churn_step",
    "euler_step",
    "heun_step",
    "why_unavailable",
]

BACKENDS = ("reference", "extension")


def available_backend(device: torch.device | str, dtype: torch.dtype) -> str:
    """The fastest backend for tensors of this device and dtype: "extension" or "reference".

    Warns once if only a missing extension stands in the way.
    """
    if dtype != torch.float32:
        return "reference"
    reason = why_unavailable(device)
    if reason:
        _warn_once(reason)
        return "reference"
    return "extension"


def churn_step(
    x: Tensor,
    noise: Tensor | PhiloxDraw,
    sigma: float,
    sigma_hat: float,
    s_noise: float,
    sigma_data: float = 0.5,
    *,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`reference.churn_step` on the named backend: x_hat and the network's input, both [B, H, D].

    Raises DydiffError if the tensors do not fit together or the backend cannot take them (EDM alg. 2, line 6).
    """
    if isinstance(noise, PhiloxDraw):
        if _is_compiled(backend):
            return _churn_philox(x.contiguous(), *noise, sigma, sigma_hat, s_noise, sigma_data)
        noise = philox_normal(noise.state, noise.index, x.shape)
    _check_churn(x, noise, sigma, sigma_hat)
    if _is_compiled(backend):
        return _churn(x.contiguous(), noise.contiguous(), sigma, sigma_hat, s_noise, sigma_data)
    return reference.churn_step(x, noise, sigma, sigma_hat, s_noise, sigma_data)


def euler_step(
    x_hat: Tensor,
    network_output: Tensor,
    sigma_hat: float,
    sigma_next: float,
    first_observation: Tensor | None = None,
    actions: Tensor | None = None,
    sigma_data: float = 0.5,
    *,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """`reference.euler_step` on the named backend: x [B, H, D] and the network's input (None at sigma_next = 0).

    Raises DydiffError if the tensors do not fit together or the backend cannot take them (EDM alg. 2, lines 7-8).
    """
    levels = sigma_hat, sigma_next
    _check_euler(x_hat, network_output, *levels, first_observation, actions)
    if _is_compiled(backend):
        condition = _contiguous(first_observation), _contiguous(actions)
        x, model_input = _euler(x_hat.contiguous(), network_output.contiguous(), *levels, *condition, sigma_data)
        return x, None if sigma_next == 0 else model_input
    return reference.euler_step(x_hat, network_output, *levels, first_observation, actions, sigma_data)


def heun_step(
    x_hat: Tensor,
    x: Tensor,
    network_output: Tensor,
    sigma_hat: float,
    sigma_next: float,
    first_observation: Tensor | None = None,
    actions: Tensor | None = None,
    sigma_data: float = 0.5,
    *,
    backend: str,
) -> Tensor:
    """`reference.heun_step` on the named backend: the corrected x [B, H, D]; x is what `euler_step` returned.

    Raises DydiffError if the tensors do not fit together or the backend cannot take them (EDM alg. 2, lines 10-11).
    """
    levels = sigma_hat, sigma_next
    _check_heun(x_hat, x, network_output, *levels, first_observation, actions)
    if _is_compiled(backend):
        states = x_hat.contiguous(), x.contiguous(), network_output.contiguous()
        return _heun(*states, *levels, _contiguous(first_observation), _contiguous(actions), sigma_data)
    return reference.heun_step(x_hat, x, network_output, *levels, first_observation, actions, sigma_data)


# The operators below are the only callers of the extension. They check what a pointer cannot tell, because torch.ops
# reaches them without the functions above; inside them torch.compile's stand-ins have become real tensors.
_LEVELS = "float sigma_hat, float sigma_next"
_CONDITION = "Tensor? first_observation, Tensor? actions, float sigma_data"


@torch.library.custom_op(
    "dydiff::edm_churn",
    mutates_args=(),
    schema="(Tensor x, Tensor noise, float sigma, float sigma_hat, float s_noise, float sigma_data) -> (Tensor, Tensor)",
)
def _churn(x, noise, sigma, sigma_hat, s_noise, sigma_data):
    _check_churn(x, noise, sigma, sigma_hat)
    check_addressable({"x": x, "noise": noise})
    x_hat, model_input = torch.empty_like(x), torch.empty_like(x)
    addresses = _addresses(x, noise, x_hat, model_input)
    _call("churn", x.device, *addresses, x.numel(), sigma, sigma_hat, s_noise, sigma_data)
    return x_hat, model_input


@torch.library.custom_op(
    "dydiff::edm_churn_philox",
    mutates_args=(),
    schema="(Tensor x, Tensor state, int index, float sigma, float sigma_hat, float s_noise, float sigma_data) "
    "-> (Tensor, Tensor)",
)
def _churn_philox(x, state, index, sigma, sigma_hat, s_noise, sigma_data):
    _check_churn(x, x, sigma, sigma_hat)
    check_addressable({"x": x})
    check_philox(x, state, index)
    x_hat, model_input = torch.empty_like(x), torch.empty_like(x)
    levels = sigma, sigma_hat, s_noise, sigma_data
    _call("churn_philox", x.device, *_addresses(x, state), index, *_addresses(x_hat, model_input), x.numel(), *levels)
    return x_hat, model_input


@torch.library.custom_op(
    "dydiff::edm_euler",
    mutates_args=(),
    schema=f"(Tensor x_hat, Tensor network_output, {_LEVELS}, {_CONDITION}) -> (Tensor, Tensor)",
)
def _euler(x_hat, network_output, sigma_hat, sigma_next, first_observation, actions, sigma_data):
    _check_euler(x_hat, network_output, sigma_hat, sigma_next, first_observation, actions)
    condition = {"first_observation": first_observation, "actions": actions}
    check_addressable({"x_hat": x_hat, "network_output": network_output, **condition})
    x, model_input = torch.empty_like(x_hat), _model_input_like(x_hat, sigma_next)
    addresses = _addresses(x_hat, network_output, x, model_input if sigma_next else None)
    rows, condition = x.shape[0] * x.shape[1], _condition_arguments(x, first_observation, actions)
    _call("euler", x.device, *addresses, rows, sigma_hat, sigma_next, sigma_data, *condition)
    return x, model_input


@torch.library.custom_op(
    "dydiff::edm_heun",
    mutates_args=(),
    schema=f"(Tensor x_hat, Tensor x, Tensor network_output, {_LEVELS}, {_CONDITION}) -> Tensor",
)
def _heun(x_hat, x, network_output, sigma_hat, sigma_next, first_observation, actions, sigma_data):
    _check_heun(x_hat, x, network_output, sigma_hat, sigma_next, first_observation, actions)
    condition = {"first_observation": first_observation, "actions": actions}
    check_addressable({"x_hat": x_hat, "x": x, "network_output": network_output, **condition})
    x_new = torch.empty_like(x)
    addresses = _addresses(x_hat, x, network_output, x_new)
    rows, condition = x.shape[0] * x.shape[1], _condition_arguments(x, first_observation, actions)
    _call("heun", x.device, *addresses, rows, sigma_hat, sigma_next, sigma_data, *condition)
    return x_new


@_churn.register_fake
def _(x, noise, sigma, sigma_hat, s_noise, sigma_data):
    return torch.empty_like(x), torch.empty_like(x)


@_churn_philox.register_fake
def _(x, state, index, sigma, sigma_hat, s_noise, sigma_data):
    return torch.empty_like(x), torch.empty_like(x)


@_euler.register_fake
def _(x_hat, network_output, sigma_hat, sigma_next, first_observation, actions, sigma_data):
    return torch.empty_like(x_hat), _model_input_like(x_hat, sigma_next)


@_heun.register_fake
def _(x_hat, x, network_output, sigma_hat, sigma_next, first_observation, actions, sigma_data):
    return torch.empty_like(x)


def _model_input_like(x: Tensor, sigma_next: float) -> Tensor:
    return torch.empty_like(x) if sigma_next else x.new_empty(0)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _condition_arguments(x: Tensor, first_observation: Tensor | None, actions: Tensor | None) -> list[int]:
    if first_observation is not None:
        observation_dim = first_observation.shape[1]
    else:
        observation_dim = x.shape[2] - (0 if actions is None else actions.shape[2])
    return [*_addresses(first_observation, actions), x.shape[1], observation_dim, x.shape[2] - observation_dim]


def _call(operation: str, device: torch.device, *arguments: int | float) -> None:
    unit = getattr(native.extension, device.type, None)
    if unit is None:
        raise DydiffError(why_unavailable(device))
    function = getattr(unit, operation)
    if device.type == "cpu":
        function(*arguments)
        return
    with torch.cuda.device(device):
        function(*arguments, torch.cuda.current_stream(device).cuda_stream)


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _is_compiled(backend: str) -> bool:
    if backend not in BACKENDS:
        raise DydiffError(f'"{backend}" is no backend of the EDM step; choose one of {", ".join(BACKENDS)}.')
    return backend == "extension"


def _check_churn(x: Tensor, noise: Tensor, sigma: float, sigma_hat: float) -> None:
    check_like(x, {"noise": noise})
    if not 0 <= sigma <= sigma_hat or sigma_hat == 0:
        raise DydiffError(
            f"The churn needs 0 <= sigma <= sigma_hat and sigma_hat > 0, not sigma {sigma}, sigma_hat {sigma_hat}."
        )


def _check_euler(x_hat, network_output, sigma_hat, sigma_next, first_observation, actions) -> None:
    check_like(x_hat, {"network_output": network_output})
    check_conditioning(x_hat, first_observation, actions)
    if not 0 <= sigma_next < sigma_hat:
        raise DydiffError(f"An Euler step needs 0 <= sigma_next < sigma_hat, not {sigma_next} and {sigma_hat}.")


def _check_heun(x_hat, x, network_output, sigma_hat, sigma_next, first_observation, actions) -> None:
    check_like(x_hat, {"x": x, "network_output": network_output})
    check_conditioning(x_hat, first_observation, actions)
    if not 0 < sigma_next < sigma_hat:
        raise DydiffError(f"A Heun step needs 0 < sigma_next < sigma_hat, not {sigma_next} and {sigma_hat}.")
