"""The update of many weights at once on NVIDIA cards, as one Triton kernel: the same as training_cpu.py's `adam_average`.

    g: NaN -> 0, +-inf -> +-limit
    m = m + (1 - beta_1) (g - m)                       Adam, arXiv 1412.6980
    v = beta_2 v + (1 - beta_2) g^2
    p = p - step_size m / (sqrt(v) / root_correction + epsilon)
    average = average + rate (p - average)
    copy = bfloat16(p)

The weights lie one behind the other in a row, and so do all other tensors: one launch for as many as there are. 36 bytes a weight,
with the gradient in bfloat16 and a copy or in float32 without one, where PyTorch's operators move 60. Unmeasured on a card so far.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dydiff.kernels.launch import Launch
from dydiff.kernels.training_cpu import AdamCoefficients

BLOCK = 2048  # weights of a program; a row's length is a multiple of it
WARPS = 4


@triton.jit
def adam_kernel(
    weight,
    first_moment,
    second_moment,
    average,
    gradient,
    copy,
    one_minus_beta_1,
    beta_2,
    one_minus_beta_2,
    epsilon,
    step_size,
    root_correction,
    rate,
    limit,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gradient + place).to(tl.float32)
    g = tl.where(g == g, g, 0.0)
    infinite = tl.abs(g) == float("inf")
    g = tl.where(infinite, tl.where(g > 0, limit, -limit), g)

    m = tl.load(first_moment + place)
    m += one_minus_beta_1 * (g - m)
    v = beta_2 * tl.load(second_moment + place) + one_minus_beta_2 * (g * g)
    p = tl.load(weight + place) - step_size * (m / (tl.sqrt(v) / root_correction + epsilon))
    e = tl.load(average + place)
    # From the nearer end, as PyTorch's lerp: a rate of 1 leaves no rounding.
    e = tl.where(rate < 0.5, e + rate * (p - e), p - (1.0 - rate) * (p - e))

    tl.store(first_moment + place, m)
    tl.store(second_moment + place, v)
    tl.store(weight + place, p)
    tl.store(average + place, e)
    if copy is not None:
        tl.store(copy + place, p.to(tl.bfloat16))


def adam_average(
    weight: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    average: Tensor,
    gradient: Tensor,
    copy: Tensor | None,
    coefficients: AdamCoefficients,
) -> Launch:
    """The launch that updates all but the gradient in place: rows [n] float32, n a multiple of BLOCK, gradient of any float type;
    `copy` is bfloat16 or None."""
    names = "one_minus_beta_1 beta_2 one_minus_beta_2 epsilon step_size root_correction rate limit".split()
    rows = {"weight": weight, "first_moment": first_moment, "second_moment": second_moment, "average": average}
    rows |= {"gradient": gradient, "copy": copy}
    numbers = dict(zip(names, coefficients.arguments(), strict=True))
    return Launch(adam_kernel, (len(weight) // BLOCK,), rows | numbers | {"BLOCK": BLOCK}, warps=WARPS)


def is_right(device: torch.device) -> bool:
    """Whether two updates are on a device what PyTorch's Adam and average are there."""
    generator = torch.Generator().manual_seed(0)
    weight, average, *gradients = torch.randn(4, BLOCK, generator=generator).to(device)
    first_moment, second_moment, copy = torch.zeros_like(weight), torch.zeros_like(weight), weight.bfloat16()
    lr, betas, epsilon, rate = 0.01, (0.9, 0.999), 1e-8, 0.3
    expected, expected_average = weight.clone(), average.clone()
    optimizer = torch.optim.Adam([expected], lr, betas, epsilon)
    for step, gradient in enumerate(gradients, start=1):
        coefficients = AdamCoefficients(lr, *betas, epsilon, step, rate, limit=1.0)
        adam_average(weight, first_moment, second_moment, average, gradient.bfloat16(), copy, coefficients).run()
        expected.grad = gradient.bfloat16().float()
        optimizer.step()
        expected_average.lerp_(expected, rate)
    pairs = (weight, expected), (average, expected_average)
    return torch.equal(copy, weight.bfloat16()) and all(torch.allclose(*pair, rtol=1e-4, atol=1e-5) for pair in pairs)
