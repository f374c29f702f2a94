"""How measurements are shown: a table that grows case by case, and a picture of all of them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ("variant", "dtype", "evaluations", "median", "range", "n", "speed-up", "TFLOP/s", "of matrix", "memory", "error")
MOST_COLUMNS = 3  # of a picture
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


def show_ratio(ratio: float) -> str:
    """A speed-up."""
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


class Quantity(NamedTuple):
    """What is drawn of a record."""

    label: str
    value: Callable[[dict[str, Any]], float]
    show: Callable[[float], str]


TIME = Quantity("median time", lambda line: line["median_s"], show_seconds)
SHARE = Quantity("of the matrix rate", lambda line: line["tflops"] / line["matrix_tflops"], "{:.0%}".format)


def draw(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Time and share of the matrix rate of every case: over the batch or the horizon, or as bars where there is one shape."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from dydiff.reports.plots import COLOURS, MARKERS

    looks = [{"color": colour, "marker": marker} for marker in MARKERS for colour in COLOURS]
    styles = dict(zip(dict.fromkeys(line["variant"] for line in lines), looks, strict=False))
    panels = [panel for case in dict.fromkeys(line["case"] for line in lines) for panel in _split(lines, case)]
    columns, rows = min(len(panels), MOST_COLUMNS), []
    for first in range(0, len(panels), columns):
        block = panels[first : first + columns]
        rows.append((TIME, block))
        if any(map(_counted, block)):
            rows.append((SHARE, block))
    figure = Figure(figsize=(max(3.8 * columns, 5.5), 0.8 + 2.8 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (quantity, block) in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for ax, panel in zip(axes, [*block, *[[]] * (columns - len(block))], strict=True):
            if not panel or (quantity is SHARE and not _counted(panel)):
                ax.remove()
                continue
            (_draw_sweep if len(set(map(_shape, panel))) > 1 else _draw_bars)(ax, panel, quantity, styles)
    handles = {label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), ncols=min(len(handles), 2 * columns), loc="outside lower center")
    about = [f"{name} {lines[0][name]}" for name in ("threads", "torch", "commit")]
    figure.suptitle(", ".join([lines[0]["device"], *about]), fontsize="small")
    figure.savefig(path, dpi=200)


def _split(lines: Sequence[dict[str, Any]], case: str) -> list[list[dict[str, Any]]]:
    """A case's lines in few panels, none left out: each has all shapes of one horizon or of one batch."""
    mine = [line for line in lines if line["case"] == case]
    left, panels = set(map(_shape, mine)), []
    groups = [{shape for shape in left if shape[held] == each[held]} for held in (1, 0) for each in sorted(left)]
    while left:
        largest = max(groups, key=lambda group: len(group & left))
        left -= largest
        panels.append([line for line in mine if _shape(line) in largest])
    return panels


def _draw_sweep(ax: Axes, lines: Sequence[dict[str, Any]], quantity: Quantity, styles: dict[str, dict[str, str]]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    sweep, held = ("batch", "horizon") if len({line["horizon"] for line in lines}) == 1 else ("horizon", "batch")
    shown = sorted(lines, key=lambda line: line[sweep])
    for variant in dict.fromkeys(line["variant"] for line in lines):
        points = [(line[sweep], quantity.value(line)) for line in shown if line["variant"] == variant]
        ax.plot(*zip(*points, strict=True), label=variant, **styles[variant])
    ax.set(xlabel=sweep, ylabel=quantity.label, xscale="log")
    ticks = sorted({line[sweep] for line in lines})
    ax.set_xticks(ticks, [str(tick) for tick in ticks], minor=False, fontsize="small")
    ax.xaxis.minorticks_off()
    ax.grid(alpha=0.3)
    if quantity is TIME:
        ax.set(yscale="log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_formatter(NullFormatter())
        _set_title(ax, lines, [held])
    else:
        ax.set(ylim=(0, 1.08 * max(map(quantity.value, lines))))
    ax.yaxis.set_major_formatter(lambda value, _: quantity.show(value))


def _draw_bars(ax: Axes, lines: Sequence[dict[str, Any]], quantity: Quantity, styles: dict[str, dict[str, str]]) -> None:
    from matplotlib.ticker import MaxNLocator

    places, names, values = range(len(lines)), [line["variant"] for line in lines], list(map(quantity.value, lines))
    bars = ax.barh(places, values, color=[styles[name]["color"] for name in names])
    told = list(map(quantity.show, values))
    if quantity is TIME:
        ratios = [f" ({show_ratio(line['speedup'])})" if line["speedup"] else "" for line in lines]
        told = [text + ratio for text, ratio in zip(told, ratios, strict=True)]
        _set_title(ax, lines, [name for name in ("batch", "horizon") if lines[0][name] > 1])
    ax.bar_label(bars, told, padding=3, fontsize="small")
    ax.set(xlabel=quantity.label)
    ax.set_yticks(places, names)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.6 * max(values))  # to hold the longest bar's label
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter(lambda value, _: quantity.show(value) if value else "0")
    ax.grid(axis="x", alpha=0.3)
    ax.set_axisbelow(True)


def _set_title(ax: Axes, lines: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """What was timed, and below what else the table says of it."""
    case = ", ".join([lines[0]["case"], *(f"{name} {lines[0][name]}" for name in names)])
    notes = dict.fromkeys(line["note"] for line in lines if line["note"])
    ax.set_title("\n".join([case, *(part for note in notes for part in textwrap.wrap(note, 40))]), fontsize="medium")


def _counted(lines: Sequence[dict[str, Any]]) -> bool:
    """Whether somebody has counted what is multiplied: not of epochs and the like."""
    return any(line["tflops"] for line in lines)


def _shape(line: dict[str, Any]) -> tuple[int, int]:
    return line["batch"], line["horizon"]


def _row(cells: Sequence[str]) -> str:
    first, *others = zip(cells, WIDTHS, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()
