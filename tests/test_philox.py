"""Philox noise: published vectors, the compiled step against its twin, moments, and independence of draws and passes."""

import pytest
import torch

from dydiff.errors import DydiffError
from dydiff.kernels import edm
from dydiff.kernels.philox import PhiloxNoise, philox_normal, philox_words

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
compiled = [pytest.param(d, marks=pytest.mark.skipif(bool(edm.why_unavailable(d)), reason="unit not built")) for d in DEVICES]


@pytest.mark.parametrize(
    "counter, key, expected",
    [  # known-answer vectors of the Random123 library, philox4x32-10
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter, key, expected):
    assert philox_words(torch.tensor(counter)[:, None], key).flatten().tolist() == expected


def churn_noise(device: str, draw, size: int, backend: str) -> torch.Tensor:
    """The noise that a churn step adds: from 0 to level 1 with factor 1 it is x_hat itself."""
    x_hat, _ = edm.churn_step(torch.zeros(1, size, 1, device=device), draw, 0.0, 1.0, 1.0, backend=backend)
    return x_hat.flatten()


@pytest.mark.parametrize("device", compiled)
@pytest.mark.parametrize("size", [1, 3, 4, 1001])
def test_compiled_step_draws_what_its_twin_draws(device, size):
    state = torch.tensor([-1234567890123456789, 2**33 + 5], device=device)
    draw = PhiloxNoise(state[0])
    draw.state = state
    for _ in range(3):
        name = draw((1, size, 1))
        ours = churn_noise(device, name, size, "extension")
        torch.testing.assert_close(ours, philox_normal(state, name.index, (size,)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(churn_noise(device, name, size, "reference"), ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", compiled)
def test_moments_and_independence(device):
    noise = PhiloxNoise(torch.tensor(7, device=device))
    size, draws = 200_000, []
    for _ in range(2):
        noise.advance()
        draws += [churn_noise(device, noise((1, size, 1)), size, "extension").double() for _ in range(2)]
    every = torch.stack(draws)
    # Bounds are five standard deviations of each statistic over this many normal numbers.
    assert every.mean(dim=1).abs().max() < 5 / size**0.5
    assert (every.var(dim=1) - 1).abs().max() < 5 * (2 / size) ** 0.5
    assert ((every**4).mean(dim=1) - 3).abs().max() < 5 * (96 / size) ** 0.5
    assert (torch.corrcoef(every) - torch.eye(4, device=device)).abs().max() < 5 / size**0.5
    neighbours = torch.stack([every[0, i::4] for i in range(4)])
    assert (torch.corrcoef(neighbours) - torch.eye(4, device=device)).abs().max() < 5 / (size / 4) ** 0.5


def test_the_same_seed_gives_the_same_noise():
    def draw_all() -> list[torch.Tensor]:
        noise = PhiloxNoise(torch.tensor(3))
        noise.advance()
        return [churn_noise("cpu", noise((1, 8, 1)), 8, "reference") for _ in range(2)]

    assert all(torch.equal(a, b) for a, b in zip(draw_all(), draw_all(), strict=True))


@pytest.mark.parametrize("state", [torch.zeros(2), torch.zeros(3, dtype=torch.int64)])
@pytest.mark.skipif(bool(edm.why_unavailable("cpu")), reason="unit not built")
def test_a_wrong_state_is_refused(state):
    with pytest.raises(DydiffError, match="Philox state"):
        churn_noise("cpu", edm.PhiloxDraw(state, 0), 4, "extension")
