"""The benchmarks on a tiny network: what they compute is right, a wrong variant stops them, and their records are complete."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import harness  # noqa: E402 - the folder is not a package, and must be found first
import rollout_speed  # noqa: E402
import roofline  # noqa: E402
import summary  # noqa: E402
import workload  # noqa: E402
from harness import BenchmarkError, Case, Failures, Measurement, Patience, Variant, check_output, make_lines, race  # noqa: E402
from results import draw, table_rows  # noqa: E402
from workload import Ours, Published, Shape, Stock, Workload  # noqa: E402

from dydiff.diffusion.fast_sampler import FastMode  # noqa: E402
from dydiff.networks.unet import UNet  # noqa: E402

TINY = Shape(batch=3, horizon=8, dim=16, dim_mults=(1, 2))
OPTIONS = "--device=cpu --batch=3 --horizon=8 --dim=16 --dim-mults=1,2".split()
PROMISED = "case variant device dtype batch horizon evaluations median_s speedup tflops peak_bytes commit".split()


@pytest.fixture(scope="module")
def work() -> Workload:
    return Workload(TINY, "cpu", num_steps=4, sampler_steps=3)


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("case", rollout_speed.CASES)
@torch.no_grad()
def test_every_variant_computes_the_same(work, case):
    expected = getattr(Ours(work, "reference"), case)()
    assert relative_error(getattr(Published(work), case)(), expected) < 1e-4
    assert relative_error(getattr(Stock(work, compile=False), case)(), expected) < (0.04 if case == "evaluation" else 0.02)
    assert relative_error(getattr(Ours(work, "auto"), case)(), expected) < 0.1  # another noise would be off by about 1
    fast = getattr(Ours(work, "reference", FastMode(4, 0.8, 3)), case)()
    assert fast.shape == expected.shape and fast.isfinite().all()


@pytest.mark.parametrize("fast, dtype", [(True, "bfloat16"), (False, "float32")])
def test_no_bfloat16_where_a_cpu_would_emulate_it(work, fast, dtype, monkeypatch):
    for module in (rollout_speed, workload):
        monkeypatch.setattr(module, "has_fast_bf16", lambda device: fast)
    assert Stock(work, compile=False).dtype == dtype
    for quick in (True, False):
        assert ("bf16" in rollout_speed.list_skipped("cpu", quick)) != fast
        assert "published" not in rollout_speed.list_skipped("cpu", quick)
    assert rollout_speed.list_skipped("cuda:0", True) == []


def test_flops_of_the_full_network():
    """SPEC's network: 3.21 GFLOP a trajectory at H = 100; they scale with the batch and with the evaluations."""
    counts = rollout_speed.Counts(Shape(1, 100, 128, (1, 4, 8)))
    assert counts.evaluation == pytest.approx(3.21e9, rel=2e-3)
    runner = Ours(Workload(TINY, "cpu"), "reference")
    assert counts.of(runner, "sampler") == 3 * 67 * counts.evaluation
    assert counts.of(runner, "rollout") == 3 * (134 * counts.evaluation + counts.start)
    assert runner.evaluations("rollout") == 134
    assert Ours(runner.work, "reference", FastMode(20, 0.8, 7)).evaluations("rollout") == 27


def make_variant(name: str, value: float, trusted=None, dtype: str = "bfloat16") -> Variant:
    def run() -> torch.Tensor:
        return torch.full((4,), value)

    return Variant(name, dtype, run, trusted or run, evaluations=1, flops=1e6)


def fails() -> torch.Tensor:
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize(
    "bad, told",
    [(1.03, "relative error 3.00e-02"), (float("nan"), "relative error nan"), (fails, "RuntimeError: no such instruction")],
)
def test_a_wrong_variant_costs_only_itself(bad, told, capsys):
    reference = make_variant("reference", 1.0)
    good = make_variant("published", 1.01, reference.run)
    wrong = make_variant("bad", 1.0 if callable(bad) else bad, reference.run)
    wrong.run = bad if callable(bad) else wrong.run
    failures = Failures()
    measured = race(Case("case", 1, 1, [wrong, good, reference]), Patience(0, 3), failures)
    assert [each.variant.name for each in measured] == ["published", "reference"]
    assert measured[0].error == pytest.approx(0.01, rel=1e-3) and len(measured[0].seconds) == 3
    assert failures.status() == 1 and told in failures.told[0]
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: 1 failed, see above: bad in case of batch 1, horizon 1"
    with pytest.raises(BenchmarkError, match="No variant"):
        race(Case("case", 1, 1, [wrong]), Patience(0, 3), Failures())
    with pytest.raises(BenchmarkError, match="instead of"):
        check_output(good, torch.ones(3), torch.ones(4))


def test_variants_are_timed_in_turn():
    order = []

    def recorder(name: str):
        return lambda: order.append(name) or torch.ones(1)

    variants = [Variant(name, "float32", recorder(name), torch.ones, 1, 1.0) for name in "abc"]
    for variant in variants:
        variant.trusted = variant.run
    measured = race(Case("case", 1, 1, variants), Patience(seconds=0, least=4), Failures())
    assert [len(each.seconds) for each in measured] == [4, 4, 4]
    turns = ["".join(order[i : i + 3]) for i in range(3, len(order), 3)]  # behind the checked runs
    assert turns == ["abc", "bca", "cab", "abc"]
    order.clear()
    race(Case("case", 1, 1, variants), Patience(seconds=0, least=1, warm_up=True), Failures())
    assert "".join(order) == "aabbccabc"
    once = race(Case("case", 1, 1, variants), Patience(seconds=-1, least=4, reuse=True), Failures())
    assert [len(each.seconds) for each in once] == [1, 1, 1]  # the checked run counts where one is too long to repeat


def test_lines_and_table():
    slow, quick = make_variant("published", 1.0), make_variant("ours", 1.0)
    case = Case("case", 2, 8, [slow, quick], "shortened")
    measured = [Measurement(slow, 0.0, [3.0, 1.0, 2.0]), Measurement(quick, 1e-3, [0.5])]
    lines = make_lines(case, measured, harness.describe_machine("cpu"), {"bfloat16": 1e12}, {"ours": 2**20})
    assert all(key in line for line in lines for key in PROMISED)
    assert [line["speedup"] for line in lines] == [1.0, 4.0]
    assert [line["repeats"] for line in lines] == [3, 1]
    assert lines[0]["tflops"] == pytest.approx(0.5e-6) and lines[0]["peak_bytes"] is None
    text = table_rows(lines)
    assert "4.00x" in text and "shortened" in text and "1 MiB" in text
    assert make_lines(case, measured[1:], {}, {"bfloat16": 1e12}, {})[0]["speedup"] is None


DESCRIBED = {"device": "d", "threads": 2, "torch": "t", "commit": "c"}


def draw_figure(lines, monkeypatch) -> Figure:
    """The picture of these records, laid out."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: drawn.append(figure))
    draw(lines, Path("any.png"))
    drawn[0].canvas.draw()
    return drawn[0]


@pytest.mark.parametrize("horizons", [[8], [8, 16, 32]])
def test_a_picture_names_every_variant_once(horizons, monkeypatch):
    """As bars where there is one shape, else as lines over what varies, with one legend for all cases."""
    lines = []
    for horizon in horizons:
        variants = [make_variant("published", 1.0), make_variant("ours", 1.0)]
        measured = [Measurement(variants[0], 0.0, [1.0]), Measurement(variants[1], 0.0, [0.02 * horizon])]
        for name in ("evaluation", "rollout"):
            lines += make_lines(Case(name, 2, horizon, variants), measured, DESCRIBED, {"bfloat16": 1e12}, {})
    figure = draw_figure(lines, monkeypatch)
    for ax in figure.axes[:2]:
        if horizons == [8]:
            assert [text.get_text() for text in ax.texts] == ["1 s (1.0x)", "160 ms (6.2x)"]
            assert [label.get_text() for label in ax.get_yticklabels()] == ["published", "ours"]
        else:
            assert [line.get_label() for line in ax.lines] == ["published", "ours"]
            times = [label.get_text() for label in ax.get_yticklabels()]
            assert {"200 ms", "500 ms", "1 s"} <= set(times)
            assert [label.get_text() for label in ax.get_xticklabels()] == ["8", "16", "32"]
    assert len(figure.legends) == (len(horizons) > 1)
    title = figure._suptitle.get_window_extent()
    assert not any(title.overlaps(part.get_window_extent()) for part in [*figure.legends, *figure.axes])


def test_a_picture_shows_every_shape_and_what_the_table_says_of_it(monkeypatch):
    note = "3 epochs a call: 500 updates and 1000 environment steps each; small network: dim 16, multiples 1,2"
    lines = []
    for batch, horizon in ((16, 32), (16, 64), (16, 100), (32, 100), (64, 100)):
        variant = make_variant("published", 1.0)
        case = Case("rollout", batch, horizon, [variant], note)
        lines += make_lines(case, [Measurement(variant, 0.0, [1.0])], DESCRIBED, {"bfloat16": 1e12}, {})
    figure = draw_figure(lines, monkeypatch)
    whole = figure.canvas.get_width_height()[0]
    assert [list(ax.lines[0].get_xdata()) for ax in figure.axes] == [[16, 32, 64], [32, 64, 100]] * 2
    for ax, held in zip(figure.axes, ("horizon 100", "batch 16"), strict=False):
        assert ax.get_title().replace("\n", " ") == f"rollout, {held} {note}"
        title = ax.title.get_window_extent()
        assert 0 <= title.x0 and title.x1 <= whole, "the title is cut off"


def test_a_picture_has_no_room_for_shares_that_nobody_counted(monkeypatch):
    lines = []
    for name, flops in (("epoch", 0.0), ("updates", 1e6)):
        variant = dataclasses.replace(make_variant("published", 1.0), flops=flops)
        lines += make_lines(Case(name, 2, 8, [variant]), [Measurement(variant, 0.0, [1.0])], DESCRIBED, {"bfloat16": 1e12}, {})
    assert [ax.get_xlabel() for ax in draw_figure(lines, monkeypatch).axes] == ["median time", "median time", "of the matrix rate"]
    assert len(draw_figure(lines[:1], monkeypatch).axes) == 1


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness, "measure_matrix_rate", lambda dtype, device: 1e9)
    measure = rollout_speed.measure_peak  # in a process of its own, which takes a while to start: once is enough
    monkeypatch.setattr(rollout_speed, "measure_peak", lambda label, *rest: measure(label, *rest) if label == "fast" else 0)
    file, picture = tmp_path / "speed.jsonl", tmp_path / "speed.png"
    variants = "--variants=published,reference,fast"
    status = rollout_speed.main([*OPTIONS, "--quick", "--seconds=0.05", variants, f"--json={file}", f"--plot={picture}"])
    output = capsys.readouterr()
    assert status == 0, output.err
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    found = {(line["case"], line["variant"]): line for line in lines}
    both = ("published", "reference")
    expected = [(case, variant) for case in rollout_speed.CASES for variant in both] + [("rollout", "fast")]
    assert set(found) == set(expected) and len(lines) == len(expected)
    assert all(key in line for line in lines for key in PROMISED)
    evaluations = {key: line["evaluations"] for key, line in found.items()}
    assert evaluations["rollout", "published"] == 134 and evaluations["rollout", "fast"] == 8 + 3
    assert evaluations["sampler", "reference"] == 9 and "5 of 34 steps" in found["sampler", "reference"]["note"]
    assert found["rollout", "fast"]["peak_bytes"] > 0
    assert found["rollout", "published"]["speedup"] == 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "rollout, batch 3, horizon 8" in output.out


def test_a_device_that_is_not_there_is_told(capsys):
    assert rollout_speed.main([*OPTIONS, "--variants=published", "--device=cuda:99"]) == 1
    assert "cuda:99" in capsys.readouterr().err


def test_matrix_rate_is_a_rate():
    assert 1e8 < harness.measure_matrix_rate("float32", "cpu", size=128, seconds=0.01) < 1e14


def test_roofline_counts_what_runs_and_draws_it(tmp_path, capsys):
    unet = UNet(14, 100).to("meta")
    counted = sum(block.flops for block in roofline.count_costs(unet, 3, 100, 4))
    embedding = sum(layer.weight.numel() for layer in unet.modules() if isinstance(layer, torch.nn.Linear))
    assert counted == 3 * rollout_speed.Counts(Shape(1, 100, 128, (1, 4, 8))).evaluation - 3 * 2 * embedding
    picture, file = tmp_path / "roofline.png", tmp_path / "roofline.jsonl"
    small = ["--device=cpu", "--seconds=0.01", "--batch=2", "--horizon=8", "--dim=16", "--dim-mults=1,2,4"]
    assert roofline.main([*small, "--variants=reference", f"--plot={picture}", f"--json={file}"]) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == len(roofline.count_costs(UNet(14, 8, 16, (1, 2, 4)), 2, 8, 4)) == 17
    assert all(line["repeats"] >= roofline.LEAST and line["median_s"] > 0 for line in lines) and picture.stat().st_size > 10_000
    output = capsys.readouterr().out
    assert "residual blocks" in output and "small network: dim 16, multiples 1,2,4" in output


def test_roofline_of_what_cannot_run_here_ends_at_once(monkeypatch, capsys):
    monkeypatch.setattr(roofline, "measure_matrix_rate", lambda dtype, device: pytest.fail("it is not needed, and on a CPU slow"))
    assert roofline.main(["--device=cpu", "--batch=1", "--horizon=8", "--dim=16", "--variants=cudnn"]) == 1
    error = capsys.readouterr().err
    assert "error: cudnn: The Triton blocks need an NVIDIA GPU" in error and "Traceback" not in error


def test_the_profile_of_a_rollout_shows_its_ranges():
    script = Path(__file__).parents[1] / "profiling" / "torch_profile.py"
    command = [sys.executable, str(script), "--batch=1", "--horizon=8", "--steps=2", "--device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "autoregressive start" in done.stdout and "sampler" in done.stdout


@pytest.mark.parametrize("readme, table", [("README.md", summary.overview), ("benchmarks/README.md", summary.every)])
def test_the_readmes_say_what_the_records_hold(readme, table):
    text = (Path(__file__).parents[1] / readme).read_text()
    assert table(summary.read_measurements()) in text, f"{readme} has another table than `python benchmarks/summary.py` prints"


def test_a_summary_of_records(tmp_path):
    common = {"note": "", "batch": 8, "horizon": 100, "threads": 2, "commit": "abc", "evaluations": 4, "detail": ""}
    lines = [
        common | {"case": case, "variant": variant, "median_s": seconds, "speedup": 6 / seconds}
        for case in ("td3bc", "rollout")
        for variant, seconds in (("published", 6.0), ("eager", 4.0), ("bf16", 3.0), ("fast", 0.5))
    ]
    (tmp_path / "any-cpu-xeon-amx-batch8.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = summary.every(summary.read_measurements(tmp_path))
    machine = summary.MACHINES["cpu-xeon-amx"]
    assert text.splitlines()[2:] == [
        f"| rollout, 8 starts | {machine} | 6 s |  | 3 s (2.0x, bf16) | abc |",
        f"| rollout, 8 starts, in fast mode | {machine} | 6 s |  | 500 ms (12x, fast) | abc |",
        f"| TD3+BC update, bf16 products | {machine} | 1.5 s |  | 750 ms (2.0x, bf16) | abc |",
        f"| TD3+BC update, in fast mode | {machine} | 1.5 s |  | 125 ms (12x, fast) | abc |",
    ]
