"""Tables of everything in benchmarks/results/, as the READMEs have them.

`python benchmarks/summary.py` prints two: what dydiff is worth on each machine, and every measurement with its commit. Records are
the benchmarks' JSON lines, in files named WHAT-MACHINE.jsonl or WHAT-MACHINE-batchN.jsonl.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from command_line import documented_parser
from results import show_ratio, show_seconds

RESULTS = Path(__file__).parent / "results"
MACHINES = {
    "cpu-epyc-zen5": "EPYC, Zen 5 (AVX-512 bf16)",
    "cpu-xeon-amx": "Xeon (AMX)",
    "cpu-epyc-zen4": "EPYC, Zen 4 (AVX-512 bf16)",
    "cpu-epyc-zen3": "EPYC, Zen 3 (AVX2)",
}
UPDATES = ("td3bc", "diffusion_ql", "cql")
SEVERAL_A_CALL = (*UPDATES, "epoch")
CASES = {  # in the order of the tables
    "rollout": "rollout, {batch} starts",
    "evaluation": "network evaluation, {batch} starts",
    "td3bc": "TD3+BC update",
    "diffusion_ql": "Diffusion-QL update",
    "cql": "CQL update",
    "pretrain": "diffusion training step, batch {batch}",
    "epoch": "epoch, {batch} starts",
    "episodes": "evaluation, {batch} episodes",
    "replay_insert": "{batch:,} transitions into the replay",
}
ONE_THREAD = "one thread"
BASELINES = ("published", "stock", "reference", "eager")  # the last two are dydiff's, but not what it takes to be fast


class Measurement(NamedTuple):
    """One of dydiff's variants on a case: seconds, and those of the baselines in the same run."""

    case: str  # in words
    rank: tuple[int, ...]
    machine: str
    published: float
    stock: float | None
    variant: str
    ours: float
    speedup: float
    commit: str


def read_measurements(folder: Path = RESULTS) -> list[Measurement]:
    """What the records hold of dydiff's variants that were run beside `published`, in the order of the tables."""
    found = []
    for file in folder.glob("*.jsonl"):
        machine = re.sub(r"-batch\d+$", "", file.stem.partition("-")[2])
        runs: dict[tuple, dict[str, dict[str, Any]]] = {}
        for line in map(json.loads, file.read_text().splitlines()):
            if line.get("speedup"):
                case = "episodes" if line["note"].startswith("episodes") else line["case"]
                key = (case, line["batch"], line["horizon"], line["threads"], line["commit"])
                runs.setdefault(key, {})[line["variant"]] = line
        for (case, *_), run in runs.items():
            found += [_measure(case, machine, run, variant) for variant in run if variant not in BASELINES]
    return sorted(found, key=lambda each: (*each.rank, list(MACHINES).index(each.machine)))


def _measure(case: str, machine: str, run: dict[str, dict[str, Any]], variant: str) -> Measurement:
    line = run[variant]
    count = line["evaluations"] if case in SEVERAL_A_CALL else 1
    published, stock, ours = (name in run and run[name]["median_s"] / count for name in ("published", "stock", variant))
    asked_for = {  # what is not the default
        "in fast mode": variant == "fast",
        "bf16 products": variant == "bf16" and case in UPDATES,
        "evaluated by another process": variant == "beside",
        ONE_THREAD: line["threads"] == 1,
    }
    name = ", ".join([CASES[case].format(batch=line["batch"]), *(what for what, holds in asked_for.items() if holds)])
    rank = (list(CASES).index(case), -line["batch"], *asked_for.values())
    return Measurement(
        name, rank, machine, published, stock or None, line["detail"] or variant, ours, line["speedup"], line["commit"]
    )


def overview(measurements: Sequence[Measurement]) -> str:
    """Seconds of `published` and of dydiff, a line a case, a column a machine; not those with one thread: Markdown."""
    rows: dict[str, dict[str, str]] = {}
    commits: dict[str, dict[str, None]] = {machine: {} for machine in MACHINES}
    for each in measurements:
        if not each.case.endswith(ONE_THREAD):
            cell = f"{show_seconds(each.published)} → {show_seconds(each.ours)} (**{show_ratio(each.speedup)}**)"
            rows.setdefault(each.case, {})[each.machine] = cell
            commits[each.machine][each.commit] = None
    cells = [[case, *(of.get(machine, "") for machine in MACHINES)] for case, of in rows.items()]
    return _markdown(["", *MACHINES.values()], [*cells, ["commits", *(", ".join(of) for of in commits.values())]])


def every(measurements: Sequence[Measurement]) -> str:
    """All measurements, a line each: Markdown."""
    rows = []
    for each in measurements:
        stock = "" if each.stock is None else f"{show_seconds(each.stock)} ({show_ratio(each.published / each.stock)})"
        ours = f"{show_seconds(each.ours)} ({show_ratio(each.speedup)}, {each.variant})"
        rows.append([each.case, MACHINES[each.machine], show_seconds(each.published), stock, ours, each.commit])
    return _markdown(["case", "machine", "published", "stock", "dydiff", "commit"], rows)


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    documented_parser(__doc__).parse_args()
    print(f"{overview(read_measurements())}\n\n{every(read_measurements())}")
