"""Settles the open GPU questions in one command: builds, tests and races everything on the card at hand, within ten minutes.

    python profiling/gpu_report.py [--out FOLDER] [--cases DIR] [--wheels DIR] [--only PART ...] [--seconds S]

Every part runs as a process of its own with a time limit, so that one that fails or hangs costs only itself; what is right comes
before what is fast, and what does not begin within --seconds is left out. The report is one JSON file: the machine, and for each
part its command, exit status, seconds, the numbers it wrote and the end of its output. Exit status 1 if any part failed or was
left out; the last lines say which. The part "epoch" steps a simulator: without mujoco and gymnasium, or wheels of them and of what
they need, there is none.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO / "benchmarks"), str(REPO)]  # the options' modules need nothing that the part "build" installs
from command_line import documented_parser, input_folder, one_of, output_folder, tells_errors  # noqa: E402

from dydiff.options import positive  # noqa: E402

DEVICE_TESTED = "edm_step philox unet_kernels finish adam backend_choice rollout_capture memory updates training_precision"
DEVICE_TESTS = [f"tests/test_{name}.py" for name in (*DEVICE_TESTED.split(), "one_step_models")]
UPDATES = "--variants=published,stock,eager,graph,bf16"
COMPILED = "--variants=published,compiled,graph", "--cases=td3bc,diffusion_ql"  # apart: the compiler takes most of the time
LAST_WORDS = 5.0  # seconds for a killed part's output
KEPT_OUTPUT = 4000  # characters of a part's output that the report keeps


@dataclass
class Part:
    """One question: what to run, for how long at most, and the JSON-lines file it writes (if any)."""

    name: str
    command: list[str]
    seconds: int
    writes: str | None = None


def list_parts(out: Path, numbers: Path, cases: Path, wheels: Path | None) -> list[Part]:
    """All parts, the ones that everything else depends on first; a picture goes to `out`, what the report takes up to `numbers`."""
    python = sys.executable
    install = [python, "-m", "pip", "install", "--no-build-isolation", "-e", "."]
    install += ["--no-deps"] if wheels is None else ["--no-index", "--find-links", str(wheels), "hypothesis"]
    names = ("race", "race-triton", "roofline", "epoch", "updates", "compiled", "pretrain")
    race, race_triton, roofline, epoch, updates, compiled, pretrain = (str(numbers / f"{name}.jsonl") for name in names)
    picture = f"--plot={out / 'roofline.png'}"
    side_by_side = ["-n", "12", "--dist=worksteal"] if find_spec("xdist") else []  # compiling kernels is what takes time
    loaded = "import sys; from dydiff.kernels.edm import why_unavailable; sys.exit(why_unavailable('cuda') or 0)"
    rollouts = [python, "benchmarks/rollout_speed.py", "--quick", "--no-memory", "--batch=64,2048", "--cases=evaluation,rollout"]
    plain, ours = "--variants=published,stock,cudnn,extension,fast", "--variants=published,triton-a,triton-b,triton-c,fast"
    parts = [
        Part("build", install, 120),
        Part("cuda unit", [python, "-c", loaded], 30),
        Part("compile", [python, __file__, "--compile"], 120),
        Part("conformance", [python, __file__, "--conformance", str(cases)], 120),
        Part("tests", [python, "-m", "pytest", "-q", *side_by_side, *DEVICE_TESTS], 150),
        Part("race", [*rollouts, plain, "--json", race], 180, race),  # apart: a kernel may leave the GPU unusable to its process
        Part("race of triton", [*rollouts, ours, "--json", race_triton], 180, race_triton),
        Part("updates", [python, "benchmarks/updates_speed.py", "--quick", UPDATES, "--json", updates], 60, updates),
        Part("pretrain", [python, "benchmarks/pretrain_speed.py", "--quick", "--json", pretrain], 60, pretrain),
        Part("epoch", [python, "benchmarks/epoch_speed.py", "--quick", "--starts=2048", "--json", epoch], 120, epoch),
        Part("kernels", [python, "-m", "pytest", "-q", "-s", "benchmarks/test_kernel_speed.py"], 60),
        Part("roofline", [python, "benchmarks/roofline.py", "--quick", "--batch=2048", "--json", roofline, picture], 40, roofline),
        Part("compiled", [python, "benchmarks/updates_speed.py", "--quick", *COMPILED, "--json", compiled], 120, compiled),
    ]
    if wheels is None and not find_spec("mujoco"):
        parts = [part for part in parts if part.name != "epoch"]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer:
        check = [sanitizer, "--error-exitcode=9", python, "-m", "pytest", "-q", "-x", "tests/test_edm_step.py", "-k", "cuda"]
        parts.append(Part("sanitizer", check, 60))
    return parts


def compile_kernels() -> int:
    """Compile what the race runs, a process a backend and batch, into Triton's cache on disk; the exit status."""
    commands = [
        [sys.executable, "benchmarks/rollout_speed.py", f"--batch={batch}", "--device=cuda:0", f"--peak-memory-of={backend}"]
        for backend in ("cudnn", "triton-a", "triton-b", "triton-c")
        for batch in (64, 2048)
    ]
    children = [subprocess.Popen(command, cwd=REPO) for command in commands]
    return max(abs(child.wait()) for child in children)


def check_conformance(cases: str) -> int:
    """Run the cases, a process a backend, since compiling kernels is what takes time; the exit status."""
    from dydiff.backends import BACKENDS

    command = [sys.executable, "tests/conformance.py", cases, "--device=cuda"]
    children = [subprocess.Popen([*command, f"--backend={name}"], cwd=REPO, stdout=subprocess.PIPE) for name in BACKENDS[1:]]
    for child in children:
        sys.stdout.buffer.write(child.communicate()[0])
    return max(abs(child.returncode) for child in children)


def describe_machine() -> dict[str, str]:
    """Card, driver, versions and commit."""
    import torch
    import triton

    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "nvidia_smi": read_output(query),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
        "commit": read_output(["git", "-C", str(REPO), "rev-parse", "HEAD"]),
        "uncommitted": read_output(["git", "-C", str(REPO), "status", "--porcelain"]),
    }


def read_output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not available: {error}"


def run_part(part: Part, seconds: float) -> dict[str, object]:
    """Run one part for at most so long and say what came out. Nothing that it started outlives it."""
    begin = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    unbuffered = os.environ | {"PYTHONUNBUFFERED": "1"}  # or what a part printed would be lost with it
    try:
        with subprocess.Popen(part.command, cwd=REPO, start_new_session=True, env=unbuffered, **pipes) as process:
            try:
                output, _ = process.communicate(timeout=seconds)
                status = process.returncode
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                status, output = "timeout", read_rest(process)
            except KeyboardInterrupt:
                os.killpg(process.pid, signal.SIGKILL)
                raise
    except OSError as error:
        status, output = "not started", str(error)
    record: dict[str, object] = {
        "command": " ".join(part.command),
        "status": status,
        "seconds": round(time.perf_counter() - begin, 1),
        "output_tail": output[-KEPT_OUTPUT:],
    }
    if part.writes and os.path.exists(part.writes):
        lines = Path(part.writes).read_text().splitlines()
        record["numbers"] = [json.loads(line) for line in lines if line.strip()]
    return record


def read_rest(process: subprocess.Popen) -> str:
    """What a killed part printed; what it started in another session may hold its pipe a while longer."""
    try:
        return process.communicate(timeout=LAST_WORDS)[0]
    except subprocess.TimeoutExpired as late:
        return (late.output or b"").decode(errors="replace")


@tells_errors
def main() -> int:
    parser = documented_parser(__doc__)
    parser.add_argument("--out", type=output_folder, default=os.environ.get("OUT", "gpu-report"), help="folder for the report")
    parser.add_argument("--cases", type=input_folder, default=REPO / "tests" / "data" / "conformance", help="conformance cases")
    parser.add_argument("--wheels", type=input_folder, help="folder with wheels of what is missing, for a machine without network")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts to run (default: all)")
    parser.add_argument("--seconds", type=positive(float), default=570, help="time for everything")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)  # these two in processes that parts started
    parser.add_argument("--conformance", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        return compile_kernels()
    if options.conformance:
        return check_conformance(options.conformance)
    end = time.perf_counter() + options.seconds
    out = options.out.resolve()
    report: dict[str, object] = {"machine": describe_machine(), "parts": {}}
    failed = []
    with tempfile.TemporaryDirectory() as numbers:
        parts = list_parts(out, Path(numbers), options.cases.resolve(), options.wheels and options.wheels.resolve())
        try:
            only = [one_of(part.name for part in parts)(name) for name in options.only or ()]
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument --only: {error}")
        for part in parts:
            if only and part.name not in only:
                continue
            left = end - time.perf_counter()
            late = {"status": "left out", "seconds": 0.0, "output_tail": ""}
            record = run_part(part, min(part.seconds, left)) if left > 0 else late
            report["parts"][part.name] = record
            (out / "gpu_report.json").write_text(json.dumps(report, indent=1) + "\n")  # after each part: a kill loses nothing
            print(f"{part.name:12s} {record['status']!s:>8s} {record['seconds']:6.1f} s", flush=True)
            if record["status"] != 0:
                failed.append(part.name)
                print("\n".join(str(record["output_tail"]).splitlines()[-15:]), flush=True)
    print(f"Report: {out / 'gpu_report.json'}; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
