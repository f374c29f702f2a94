"""The EDM sampler step: the compiled extension and plain PyTorch against float64, known answers, and misuse."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dydiff.errors import DydiffError
from dydiff.kernels import edm, native, reference

DEVICES = ["cpu", "cuda"]
# B, H, O, A: single rows and columns, the sizes of Hopper and HalfCheetah, one that fills several CUDA blocks
SHAPES = [(1, 1, 2, 1), (3, 5, 11, 3), (1, 100, 17, 8), (3, 100, 11, 3)]
# Where the sampler starts, where churn ends, and its last steps
LEVELS = [(80.0, 113.1, 72.0), (0.9, 1.27, 0.7), (0.0025, 0.0025, 0.002)]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every torch.empty is filled with NaN, so that an element which a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    """A device type for which the extension can run."""
    if reason := edm.why_unavailable(request.param):
        pytest.skip(reason)
    return request.param


def draw(shape: tuple[int, ...], seed: int, device: str = "cpu", scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(device)


def run_step(x, noise, outputs, levels, first_observation, actions, step) -> dict[str, Tensor]:
    """One whole step with `step(name, *arguments)`, every intermediate result by name."""
    sigma, sigma_hat, sigma_next = levels
    condition = sigma_hat, sigma_next, first_observation, actions
    x_hat, input_hat = step("churn_step", x, noise, sigma, sigma_hat, 1.002)
    x_next, input_next = step("euler_step", x_hat, outputs[0], *condition)
    x_new = step("heun_step", x_hat, x_next, outputs[1], *condition)
    return {"x_hat": x_hat, "input_hat": input_hat, "x_next": x_next, "input_next": input_next, "x_new": x_new}


def with_backend(backend: str):
    return lambda name, *arguments: getattr(edm, name)(*arguments, backend=backend)


@pytest.mark.parametrize("parts", ["neither", "observation", "actions", "both"])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_extension_is_as_close_to_float64_as_pytorch(shape, levels, parts, device):
    batch, horizon, observation_dim, action_dim = shape
    full = (batch, horizon, observation_dim + action_dim)
    first_observation = draw((batch, observation_dim), 1, device) if parts in ("observation", "both") else None
    actions = draw((batch, horizon, action_dim), 2, device) if parts in ("actions", "both") else None
    x = draw(full, 3, device, scale=math.hypot(levels[0], 0.5))
    arguments = [x, draw(full, 4, device), [draw(full, 5, device), draw(full, 6, device)], levels]

    def double(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.double()

    exact = run_step(
        *(double(x), double(arguments[1]), [double(output) for output in arguments[2]], levels),
        *(double(first_observation), double(actions)),
        with_backend("reference"),
    )
    plain = run_step(*arguments, first_observation, actions, with_backend("reference"))
    compiled = run_step(*arguments, first_observation, actions, with_backend("extension"))
    for name, expected in exact.items():
        floor = torch.finfo(torch.float32).eps * expected.abs().max()
        bound = 2 * torch.maximum((plain[name] - expected).abs().max(), floor)
        assert (compiled[name] - expected).abs().max() <= bound, name
        assert compiled[name].dtype == torch.float32 and compiled[name].is_contiguous()
    for name in ("x_next", "x_new"):
        if first_observation is not None:
            assert torch.equal(compiled[name][:, 0, :observation_dim], first_observation)
        if actions is not None:
            assert torch.equal(compiled[name][:, :, observation_dim:], actions)


def test_extension_writes_its_output_and_nothing_else():
    if edm.why_unavailable():
        pytest.skip(edm.why_unavailable())
    shape, guard = (3, 5, 14), 32
    size = math.prod(shape)
    tensors = [draw(shape, seed) for seed in range(3)]
    first_observation, actions = draw((3, 11), 3), draw((3, 5, 3), 4)
    condition = first_observation.data_ptr(), actions.data_ptr(), 5, 11, 3
    inputs = [tensor.data_ptr() for tensor in tensors]
    for name, number_of_inputs, number_of_outputs, arguments in (
        ("churn", 2, 2, (size, 0.9, 1.2, 1.002, 0.5)),
        ("euler", 2, 2, (15, 1.2, 0.7, 0.5, *condition)),
        ("heun", 3, 1, (15, 1.2, 0.7, 0.5, *condition)),
    ):
        buffers = [torch.full((size + 2 * guard,), math.nan) for _ in range(number_of_outputs)]
        outputs = [buffer[guard:].data_ptr() for buffer in buffers]
        getattr(native.extension.cpu, name)(*inputs[:number_of_inputs], *outputs, *arguments)
        for buffer in buffers:
            assert buffer[guard:-guard].isfinite().all(), name
            assert buffer[:guard].isnan().all() and buffer[-guard:].isnan().all(), name


def test_last_step_has_no_network_input(device):
    x_hat, output = draw((3, 5, 14), 1, device), draw((3, 5, 14), 2, device)
    for backend in edm.BACKENDS:
        x, model_input = edm.euler_step(x_hat, output, 0.002, 0.0, backend=backend)
        c_skip, c_out, _ = reference.precondition(0.002)
        torch.testing.assert_close(x, c_skip * x_hat + c_out * output)  # the denoised trajectory itself
        assert model_input is None


def test_any_layout_is_taken(device):
    wide = draw((5, 3, 28), 1, device)
    x_hat, output = wide[..., :14].transpose(0, 1), wide[..., 14:].transpose(0, 1)
    tau = draw((3, 5, 14), 2, device)
    arguments = 1.2, 0.7, tau[:, 0, :11], tau[..., 11:]
    for name, states in (("euler_step", (x_hat, output)), ("heun_step", (x_hat, tau, output))):
        function = getattr(edm, name)
        results = [function(*states, *arguments, backend=backend) for backend in edm.BACKENDS]
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("part", ["first_observation", "actions", "both"])
def test_no_trajectories_are_no_error(part, device):
    first_observation = torch.empty(0, 11, device=device) if part != "actions" else None
    actions = torch.empty(0, 5, 3, device=device) if part != "first_observation" else None
    x = torch.empty(0, 5, 14, device=device)
    outcome = edm.euler_step(x, x.clone(), 1.2, 0.7, first_observation, actions, backend="extension")
    assert outcome[0].shape == outcome[1].shape == x.shape


def test_operators_keep_torchs_contract(device):
    """Schema, fake kernel and torch.compile's tracing, as torch checks them itself."""
    x, noise, output = (draw((3, 5, 14), seed, device) for seed in range(3))
    condition = draw((3, 11), 4, device), draw((3, 5, 3), 5, device), 0.5
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    operators = torch.ops.dydiff
    torch.library.opcheck(operators.edm_churn.default, (x, noise, 0.9, 1.2, 1.002, 0.5), test_utils=checks)
    torch.library.opcheck(operators.edm_euler.default, (x, output, 1.2, 0.7, *condition), test_utils=checks)
    torch.library.opcheck(operators.edm_euler.default, (x, output, 1.2, 0.0, None, None, 0.5), test_utils=checks)
    torch.library.opcheck(operators.edm_heun.default, (x, noise, output, 1.2, 0.7, *condition), test_utils=checks)


def misuses():
    x = torch.zeros(3, 5, 14)
    observation, actions = torch.zeros(3, 11), torch.zeros(3, 5, 3)
    return {
        "noise shape": ("churn_step", (x, x[:2], 0.9, 1.2, 1.0), "noise"),
        "integer state": ("churn_step", (x.long(), x.long(), 0.9, 1.2, 1.0), "floating-point"),
        "flat state": ("churn_step", (x[0], x[0], 0.9, 1.2, 1.0), "[B, H, D]"),
        "falling churn": ("churn_step", (x, x, 1.2, 0.9, 1.0), "sigma_hat"),
        "other device": ("churn_step", (x, x.to("meta"), 0.9, 1.2, 1.0), "device"),
        "rising step": ("euler_step", (x, x, 0.7, 1.2), "sigma_next"),
        "Heun at zero": ("heun_step", (x, x, x, 0.7, 0.0), "sigma_next"),
        "network width": ("euler_step", (x, x[..., 1:], 1.2, 0.7), "network_output"),
        "state of another batch": ("heun_step", (x, x[:1], x, 1.2, 0.7), "shape"),
        "observation batch": ("euler_step", (x, x, 1.2, 0.7, observation[:2], actions), "first_observation"),
        "observation of every row": ("euler_step", (x, x, 1.2, 0.7, x, None), "first_observation"),
        "too wide an observation": ("heun_step", (x, x, x, 1.2, 0.7, torch.zeros(3, 15)), "first_observation"),
        "action width": ("euler_step", (x, x, 1.2, 0.7, observation, actions[..., :2]), "[3, 5, 3]"),
        "action horizon": ("heun_step", (x, x, x, 1.2, 0.7, None, actions[:, 1:]), "actions"),
        "action device": ("euler_step", (x, x, 1.2, 0.7, None, actions.to("meta")), "meta"),
    }


@pytest.mark.parametrize("backend", edm.BACKENDS)
@pytest.mark.parametrize("misuse", misuses())
def test_misuse_is_told(misuse, backend):
    if backend == "extension" and edm.why_unavailable():
        pytest.skip(edm.why_unavailable())
    name, arguments, culprit = misuses()[misuse]
    with pytest.raises(DydiffError) as told:
        getattr(edm, name)(*arguments, backend=backend)
    assert culprit in str(told.value)


def test_extension_refuses_what_it_cannot_address():
    if edm.why_unavailable():
        pytest.skip(edm.why_unavailable())
    x = torch.zeros(3, 5, 14)
    with pytest.raises(DydiffError, match="contiguous float32, but x is .* float64"):
        edm.churn_step(x.double(), x.double(), 0.9, 1.2, 1.0, backend="extension")
    with pytest.raises(DydiffError, match="network_output is .* bfloat16"):
        edm.euler_step(x, x.bfloat16(), 1.2, 0.7, backend="extension")
    with pytest.raises(DydiffError, match="not contiguous"):
        torch.ops.dydiff.edm_churn(x.transpose(0, 1), x.transpose(0, 1), 0.9, 1.2, 1.0, 0.5)
    with pytest.raises(DydiffError, match='"cuda" is no backend'):
        edm.churn_step(x, x, 0.9, 1.2, 1.0, backend="cuda")


def test_missing_extension_explains_itself(monkeypatch):
    monkeypatch.setattr(native, "extension", None)
    edm._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="pip install -e"):
        assert edm.available_backend("cpu", torch.float32) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once is enough, and float64 never wanted the extension
        assert edm.available_backend("cpu", torch.float32) == "reference"
        assert edm.available_backend("cuda", torch.float64) == "reference"
    assert "nvcc" in edm.why_unavailable("cuda")
    x = torch.zeros(3, 5, 14)
    with pytest.raises(DydiffError, match="pip install -e"):
        edm.churn_step(x, x, 0.9, 1.2, 1.0, backend="extension")
    edm.churn_step(x, x, 0.9, 1.2, 1.0, backend="reference")


def test_a_card_without_code_for_it_is_named_and_asked_once(monkeypatch):
    asked = []

    def obstacle(device: int) -> str:
        asked.append(device)
        return "no kernel image is available for execution on the device" if device == 1 else ""

    monkeypatch.setattr(native, "extension", SimpleNamespace(cuda=SimpleNamespace(obstacle=obstacle)))
    edm._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="cannot use cuda:1: no kernel image .* Plain PyTorch takes its place"):
        chosen = [edm.available_backend(card, torch.float32) for card in ("cuda", "cuda:0", "cuda:1", "cuda:1")]
    assert chosen == ["extension", "extension", "reference", "reference"] and asked == [-1, 0, 1]


def test_schedule_and_churn():
    schedule = reference.noise_schedule(34, 0.002, 80.0, 7.0)
    assert len(schedule) == 35 and schedule[-1] == 0.0
    assert schedule[0] == pytest.approx(80.0, rel=1e-14) and schedule[33] == pytest.approx(0.002, rel=1e-12)
    roots = [sigma ** (1 / 7) for sigma in schedule[:-1]]
    steps = [after - before for before, after in zip(roots, roots[1:], strict=False)]
    assert max(steps) - min(steps) < 1e-12 and max(steps) < 0  # evenly spaced in sigma^(1/rho)
    assert reference.churned(1.0, 34, 60.0, 0.37, 52.0) == pytest.approx(math.sqrt(2))  # 60/34 is capped
    assert reference.churned(1.0, 1000, 60.0, 0.37, 52.0) == pytest.approx(1.06)
    assert reference.churned(0.3, 34, 60.0, 0.37, 52.0) == 0.3 and reference.churned(53.0, 34, 60.0, 0.37, 52.0) == 53.0
    with pytest.raises(ValueError, match="at least 2"):
        reference.noise_schedule(1, 0.002, 80.0, 7.0)


def run_loop(latents, network, num_steps, backend, noises=None, first_observation=None, actions=None) -> Tensor:
    """The sampler composed of the three steps; network(model_input, sigma) is the raw F. Without noises: no churn."""
    schedule = reference.noise_schedule(num_steps, 0.002, 80.0, 7.0)
    s_churn = 0.0 if noises is None else 60.0
    x = reference.inpaint(latents * schedule[0], first_observation, actions)
    for i, sigma in enumerate(schedule[:-1]):
        sigma_hat, sigma_next = reference.churned(sigma, num_steps, s_churn, 0.36995, 52.242), schedule[i + 1]
        noise = torch.zeros_like(x) if noises is None else noises[i]
        x_hat, model_input = edm.churn_step(x, noise, sigma, sigma_hat, 1.002, backend=backend)
        condition = sigma_hat, sigma_next, first_observation, actions
        x, model_input = edm.euler_step(x_hat, network(model_input, sigma_hat), *condition, backend=backend)
        if sigma_next > 0:
            x = edm.heun_step(x_hat, x, network(model_input, sigma_next), *condition, backend=backend)
    return x


def gaussian_network(std: float):
    """The raw network whose denoiser is exact for data N(0, std^2): D(x; sigma) = std^2 / (std^2 + sigma^2) x."""

    def network(model_input: Tensor, sigma: float) -> Tensor:
        c_skip, c_out, c_in = reference.precondition(sigma)
        return (std**2 / (std**2 + sigma**2) - c_skip) / c_out * (model_input / c_in)

    return network


def test_gaussian_data_have_a_closed_form(device):
    """Without churn the sampler solves dx/dsigma = sigma x / (std^2 + sigma^2), to second order in the step."""
    std, latents = 0.3, draw((3, 5, 14), 1, device)
    exact = 80.0 * latents.double() * std / math.hypot(std, 80.0)

    def error(num_steps: int) -> float:
        x = run_loop(latents, gaussian_network(std), num_steps, "extension")
        return ((x - exact).abs().max() / exact.abs().max()).item()

    errors = [error(num_steps) for num_steps in (18, 36, 72)]
    assert errors[1] < 2e-2
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 3 < coarse / fine < 6, errors  # twice the steps, a quarter of the error


@pytest.mark.parametrize("backend", edm.BACKENDS)
def test_composed_steps_are_the_published_algorithm(backend):
    """Against EDM algorithm 2 written out in one piece, with churn, inpainting and a network that bends."""
    if backend == "extension" and edm.why_unavailable():
        pytest.skip(edm.why_unavailable())
    batch, horizon, observation_dim, action_dim, num_steps = 3, 4, 5, 2, 6
    shape = (batch, horizon, observation_dim + action_dim)
    latents, start, actions = draw(shape, 1), draw((batch, observation_dim), 2), draw((batch, horizon, action_dim), 3)
    noises = [draw(shape, 10 + i) for i in range(num_steps)]

    def network(model_input: Tensor, sigma: float) -> Tensor:
        return torch.sin(2 * model_input + math.log(sigma)) + 0.1 * model_input.mean(dim=1, keepdim=True)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        total = sigma**2 + 0.25
        return 0.25 / total * x + sigma * 0.5 / math.sqrt(total) * network(x / math.sqrt(total), sigma)

    def overwrite(x: Tensor) -> None:
        x[:, 0, :observation_dim] = start
        x[:, :, observation_dim:] = actions

    t = [(80 ** (1 / 7) + i / (num_steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(num_steps)] + [0.0]
    x = latents.double() * t[0]
    overwrite(x)
    for i in range(num_steps):
        gamma = min(60 / num_steps, math.sqrt(2) - 1) if 0.36995 <= t[i] <= 52.242 else 0
        t_hat = t[i] * (1 + gamma)
        x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * 1.002 * noises[i]
        d = (x_hat - denoise(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        overwrite(x)
        if i < num_steps - 1:
            d_next = (x - denoise(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d + d_next) / 2
        overwrite(x)
    composed = run_loop(latents, network, num_steps, backend, noises, start, actions)
    assert (composed - x).abs().max() < 2e-4 * x.abs().max()
