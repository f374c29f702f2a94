"""Is this the published method? Runs every recorded case in a folder through dydiff's public code and compares the numbers.

    python tests/conformance.py DIR [--backend NAME | all] [--mode NAME | all] [--device cuda]

Each case is an .npz: `meta` (JSON: kind and settings), inputs, weights under published names, expected outputs. One line per
case (and backend, for the sampler and rollout kinds; and mode, for updates); exit status 1 on any failure or unknown kind, and
if nothing passed. A case is skipped, which is no pass, where a backend is not for its network.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from conformance_case import Case
from conformance_kinds import KINDS
from torch import Tensor

from dydiff.backends import BACKENDS, IN_16_BIT, is_available
from dydiff.capture import can_compile
from dydiff.errors import NotForNetwork
from dydiff.updates import MODES

AGENT_KINDS = ("td3bc", "diffql")
LIMITS_16_BIT = {"edm_sample": 2e-2, "rollout": 2e-2}  # for backends that compute in fp16 or bf16


def relative_error(ours: Tensor, expected: Tensor) -> float:
    """|ours - expected| / |expected| in the 2-norm; infinite where shapes differ, or where booleans do not agree exactly."""
    if ours.shape != expected.shape:
        return float("inf")
    if expected.dtype == torch.bool:
        return 0.0 if torch.equal(ours, expected) else float("inf")
    ours, expected = ours.detach().double(), expected.double()
    expected = expected.to(ours.device)
    same = (ours == expected) | (ours.isnan() & expected.isnan())  # what is not finite, too
    distance = torch.where(same, 0.0, ours - expected).norm().item()
    norm = expected.nan_to_num(0.0, 0.0, 0.0).norm().item()
    if norm == 0:
        return 0.0 if distance == 0 else float("inf")
    return distance / norm


def run_file(
    path: Path, backends: list[str], device: str = "cpu", modes: Sequence[str] = ("eager",)
) -> Iterator[tuple[str, float, float, str, str]]:
    """Yield (kind, worst relative error, limit, verdict, backend or mode or "") of a case, once per way where that matters.

    The verdict is pass, FAIL, or skip where a backend is not for the case's network.
    """
    try:
        kind = Case(path).meta["kind"]
    except Exception as error:  # the other cases go on
        yield "?", float("nan"), 0.0, "FAIL", f"cannot be read: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return
    ways = backends if kind in LIMITS_16_BIT else modes if kind in AGENT_KINDS else None
    case = Case(path, device if ways is not None else "cpu")
    if kind not in KINDS:
        yield kind, float("nan"), 0.0, "FAIL", "unknown kind"
        return
    runner, limit = KINDS[kind]
    for way in [""] if ways is None else ways:
        allowed = LIMITS_16_BIT[kind] if way in IN_16_BIT else limit
        try:
            errors = [relative_error(*pair) for pair in runner(case, way).values()]
        except Exception as error:  # the other cases go on
            verdict, text = "skip" if isinstance(error, NotForNetwork) else "FAIL", str(error).strip().partition("\n")[0]
            yield kind, float("nan"), allowed, verdict, f"{way}: {type(error).__name__}: {text}"
            continue
        worst = max(errors, key=lambda error: float("inf") if error != error else error)
        yield kind, worst, allowed, "pass" if worst <= allowed else "FAIL", way  # NaN fails


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with .npz cases")
    parser.add_argument("--backend", choices=("all", *BACKENDS[1:]), default="reference", help="of sampler and rollout cases")
    parser.add_argument("--mode", choices=("all", *MODES[1:]), default="eager", help="of updates")
    parser.add_argument("--device", default="cpu", help="of sampler and rollout cases, and of updates")
    options = parser.parse_args(arguments)
    files = sorted(options.folder.glob("*.npz"))
    if not files:
        print(f"error: no .npz cases in '{options.folder}'", file=sys.stderr)
        return 1
    backends = [options.backend]
    if options.backend == "all":
        backends = [name for name in BACKENDS[1:] if is_available(name, options.device)]
    modes = [options.mode]
    if options.mode == "all":
        on_gpu = options.device.startswith("cuda")
        modes = ["eager", *["compiled"] * can_compile(torch.device(options.device)), *["graph"] * on_gpu]
    count = Counter()
    for path in files:
        for kind, error, limit, verdict, way in run_file(path, backends, options.device, modes):
            count[verdict] += 1
            print(f"{path.name:36s}  {kind:15s}  {error:9.2e}  {limit:7.0e}  {verdict}  {way}".rstrip())
    if count["skip"]:
        print(f"{count['skip']} skipped: the backend is not for the network")
    print(f"{count['pass']} passed, {count['FAIL']} failed")
    return 1 if count["FAIL"] or not count["pass"] else 0


if __name__ == "__main__":
    sys.exit(main())
