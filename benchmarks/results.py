"""How measurements are shown: a table that grows case by case, and a picture of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    """Time and share of the matrix rate, one column a case: over the batch or the horizon, or as bars where there is one shape."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(line["case"] for line in lines))
    variants = list(dict.fromkeys(line["variant"] for line in lines))
    colors = {variant: f"C{index % 10}" for index, variant in enumerate(variants)}
    figure = Figure(figsize=(max(4.4 * len(cases), 6.0), 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(cases), squeeze=False)
    for case, column in zip(cases, axes.T, strict=True):
        mine = [line for line in lines if line["case"] == case]
        swept = len({(line["batch"], line["horizon"]) for line in mine}) > 1
        (_draw_sweep if swept else _draw_bars)(*column, mine, colors)
    handles = {label: handle for ax in axes[0] for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), ncols=min(len(handles), 5 * len(cases)), loc="outside lower center")
    figure.suptitle(f"{lines[0]['device']}, commit {lines[0]['commit']}", fontsize="small")
    figure.savefig(path, dpi=150)


def _draw_sweep(times: Axes, shares: Axes, lines: Sequence[dict[str, Any]], colors: dict[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    sweep = "batch" if len({line["batch"] for line in lines}) >= len({line["horizon"] for line in lines}) else "horizon"
    other = "horizon" if sweep == "batch" else "batch"
    fixed = max((line[other] for line in lines), key=[line[other] for line in lines].count)  # the one with the longest sweep
    shown = sorted((line for line in lines if line[other] == fixed), key=lambda line: line[sweep])
    for variant in dict.fromkeys(line["variant"] for line in shown):
        mine = [line for line in shown if line["variant"] == variant]
        x, style = [line[sweep] for line in mine], {"marker": "o", "label": variant, "color": colors[variant]}
        times.plot(x, [line["median_s"] for line in mine], **style)
        shares.plot(x, [_share(line) for line in mine], **style)
    times.set(title=f"{lines[0]['case']}, {other} {fixed}", ylabel="median time", xscale="log", yscale="log")
    times.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    times.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: show_seconds(seconds)))
    times.yaxis.set_minor_formatter(NullFormatter())
    shares.set(xlabel=sweep, ylabel="share of the measured matrix rate", xscale="log", ylim=(0, None))
    for ax in (times, shares):
        ticks = sorted({line[sweep] for line in shown})
        ax.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        ax.xaxis.minorticks_off()
        ax.grid(alpha=0.3)


def _draw_bars(times: Axes, shares: Axes, lines: Sequence[dict[str, Any]], colors: dict[str, str]) -> None:
    places = range(len(lines))
    names = [line["variant"] for line in lines]
    faster = ["" if line["speedup"] is None else f" ({line['speedup']:.1f}x)" for line in lines]
    told = [show_seconds(line["median_s"]) + ratio for line, ratio in zip(lines, faster, strict=True)]
    values = [line["median_s"] for line in lines], [_share(line) for line in lines]
    labels = told, [f"{share:.0%}" for share in values[1]]
    for ax, lengths, texts in zip((times, shares), values, labels, strict=True):
        bars = ax.barh(places, lengths, color=[colors[name] for name in names])
        ax.bar_label(bars, texts, padding=3, fontsize="small")
        ax.set_yticks(places, names)
        ax.invert_yaxis()
        ax.margins(x=0.38)
        ax.grid(axis="x", alpha=0.3)
    times.set(title=f"{lines[0]['case']}, batch {lines[0]['batch']}, horizon {lines[0]['horizon']}", xlabel="median time (s)")
    shares.set(xlabel="share of the measured matrix rate")
    shares.set_visible(any(values[1]))  # of epochs and the like nobody has counted what they multiply


def _share(line: dict[str, Any]) -> float:
    return line["tflops"] / line["matrix_tflops"]


def _row(cells: Sequence[str]) -> str:
    first, *others = zip(cells, WIDTHS, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()
