"""How measurements are shown: a table that grows case by case, and a picture of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("variant", "dtype", "evaluations", "median", "range", "n", "speed-up", "TFLOP/s", "of matrix", "memory", "error")
WIDTHS = (22, 8, 11, 8, 20, 3, 8, 8, 9, 10, 7)


def table_header() -> str:
    """The columns' names."""
    return _row(COLUMNS)


def table_rows(lines: Sequence[dict[str, Any]]) -> str:
    """The records of one case (`harness.make_lines`) under a line that names the case."""
    first = lines[0]
    note = f" ({first['note']})" if first["note"] else ""
    rows = [f"{first['case']}, batch {first['batch']}, horizon {first['horizon']}{note}"]
    for line in lines:
        peak = line["peak_bytes"]
        cells = (
            "  " + line["variant"] + (f" ({line['detail']})" if line["detail"] else ""),
            line["dtype"],
            str(line["evaluations"]),
            show_seconds(line["median_s"]),
            f"{show_seconds(line['min_s'])} .. {show_seconds(line['max_s'])}" if line["repeats"] > 1 else "",
            str(line["repeats"]),
            "" if line["speedup"] is None else f"{line['speedup']:.2f}x",
            f"{line['tflops']:.3g}",
            f"{line['tflops'] / line['matrix_tflops']:.1%}",
            "" if peak is None else f"{peak / 2**20:,.0f} MiB",
            f"{line['error']:.1e}",
        )
        rows.append(_row(cells))
    return "\n".join(rows)


def show_seconds(seconds: float) -> str:
    """A duration in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 100 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds * 1e6:.3g} us"


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Time and share of the matrix rate over the batch, and over the horizon where several were measured; one column a case."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(line["case"] for line in lines))
    variants = list(dict.fromkeys(line["variant"] for line in lines))
    figure = Figure(figsize=(4.2 * len(cases), 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(cases), squeeze=False)
    for column, case in enumerate(cases):
        mine = [line for line in lines if line["case"] == case]
        sweep = "batch" if len({line["batch"] for line in mine}) >= len({line["horizon"] for line in mine}) else "horizon"
        other = "horizon" if sweep == "batch" else "batch"
        fixed = max((line[other] for line in mine), key=[line[other] for line in mine].count)  # the one with the longest sweep
        for variant in variants:
            points = [(line[sweep], line) for line in mine if line["variant"] == variant and line[other] == fixed]
            points.sort(key=lambda point: point[0])
            style = {"marker": "o", "label": variant, "color": f"C{variants.index(variant)}"}
            x = [position for position, _ in points]
            axes[0, column].plot(x, [line["median_s"] for _, line in points], **style)
            axes[1, column].plot(x, [line["tflops"] / line["matrix_tflops"] for _, line in points], **style)
        axes[0, column].set(title=f"{case}, {other} {fixed}", ylabel="median time (s)", xscale="log", yscale="log")
        axes[1, column].set(xlabel=sweep, ylabel="share of the measured matrix rate", xscale="log", ylim=(0, None))
        for ax in axes[:, column]:
            ticks = sorted({line[sweep] for line in mine})
            ax.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
            ax.minorticks_off()
            ax.grid(alpha=0.3)
    handles = {label: handle for ax in axes[0] for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), ncols=len(handles), loc="outside upper center")
    figure.suptitle(f"{lines[0]['device']}, commit {lines[0]['commit']}", fontsize="small")
    figure.savefig(path, dpi=150)


def _row(cells: Sequence[str]) -> str:
    first, *others = zip(cells, WIDTHS, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()
