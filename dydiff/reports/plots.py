"""The pictures of `dydiff report`: every function draws plain arrays into one PNG file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws into files: no display is needed, and none is opened

import numpy as np  # noqa: E402 - pyplot must come after the choice above
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from dydiff.checkpoint import write_atomically

# Okabe and Ito's palette: told apart by colour-blind eyes, and in grey by lightness.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
REFERENCE = "#777777"
TRUTH = "#222222"
LABELS = {"position": "position error (m)", "state": "state error\n(RMS of z-scored observations)"}
ERROR_LABELS = {
    **LABELS,
    "step": "error of single steps\n(RMS of z-scored observations)",
    "reward": "reward error",
    "return": "return error",
    "ending": "episode goes on in one alone",
}
YARDSTICKS = {"no motion": REFERENCE, "true states": TRUTH}
MAZE_ROLLOUTS = 16
ROLLOUTS, COLUMNS = 3, 4  # of other environments
LEGEND = {"loc": "outside upper center", "frameon": False}


@contextmanager
def _figure(path: Path, rows: int, columns: int, width: float, height: float, share: bool = False) -> Iterator[Any]:
    shared = {"sharex": share, "sharey": "row" if share else False}
    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained", **shared)
    yield figure, axes
    kind = path.suffix.removeprefix(".")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, bbox_inches="tight", format=kind))
    pyplot.close(figure)


def draw_errors(panels: dict[str, dict[str, Any]], path: Path) -> None:
    """Rollout error by step, one row of panels per title: `errors[quantity][model]` holds `mean` and `standard_error` by row."""
    first = next(iter(panels.values()))
    quantities = [quantity for quantity in ERROR_LABELS if quantity in first]
    # Yardsticks are dotted, single-step models dashed; the others take the colours in turn.
    styles: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(name for errors in panels.values() for by_model in errors.values() for name in by_model):
        if name in YARDSTICKS:
            styles[name] = {"color": YARDSTICKS[name], "linestyle": ":"}
        else:
            colour = COLOURS[sum(style["linestyle"] != ":" for style in styles.values()) % len(COLOURS)]
            styles[name] = {"color": colour, "linestyle": "--" if name == "single-step" else "-"}
    with _figure(path, len(panels), len(quantities), 4.6 * len(quantities), 3.8 * len(panels)) as (figure, axes):
        for row, (title, errors) in zip(axes, panels.items(), strict=True):
            for ax, quantity in zip(row, quantities, strict=True):
                for name, values in errors[quantity].items():
                    mean, error = (np.array(values[key], float) for key in ("mean", "standard_error"))  # None becomes NaN
                    steps = np.arange(1, len(mean))  # in row 0 all of them are at the start
                    ax.plot(steps, mean[1:], label=name, linewidth=2, **styles[name])
                    low, high = (mean - error)[1:], (mean + error)[1:]
                    ax.fill_between(steps, low, high, color=styles[name]["color"], alpha=0.2, linewidth=0)
                scale = "linear" if quantity == "ending" else "log"
                ax.set(xlabel="step of the rollout", ylabel=ERROR_LABELS[quantity], yscale=scale, title=title)
                ax.grid(alpha=0.3, which="both")
        _legend(figure, axes.flat, "band: ± one standard error over the starts")


def draw_maze_rollouts(
    environment: str, simulated: np.ndarray, alive: np.ndarray, modelled: dict[str, np.ndarray], path: Path
) -> None:
    """The first rollouts on the maze's plan, one panel per model: raw observations [B, H, O], alive [B, H]."""
    with _figure(path, 1, len(modelled), 4.4 * len(modelled), 5.1, share=True) as (figure, axes):
        for ax, (name, observation), colour in zip(axes[0], modelled.items(), COLOURS, strict=False):
            _draw_plan(ax, environment)
            for row in range(min(MAZE_ROLLOUTS, len(simulated))):
                truth, model = (positions[row, alive[row], :2].T for positions in (simulated, observation))
                first = row == 0
                ax.plot(*truth, color=TRUTH, linewidth=3.5, alpha=0.45, label="simulator" if first else None)
                ax.plot(*model, color=colour, linewidth=1.4, label=name if first else None)
                ax.plot(*truth[:, :1], "o", color=TRUTH, markersize=5, label="start" if first else None)
                ax.plot(*truth[:, -1:], "x", color=TRUTH, markersize=6, label="end in the simulator" if first else None)
            ax.set(title=name, xlabel="x (m)", aspect="equal")
        axes[0, 0].set(ylabel="y (m)")
        _legend(figure, axes[0])


def _draw_plan(ax: Axes, environment: str) -> None:
    """Walls, and the disk that is rewarded, in the particle's coordinates."""
    from dydiff.environments.maze import BODY_OFFSET, GOAL_RADIUS, LAYOUTS, goal_cell  # loads MuJoCo

    layout = environment.split("-")[1]
    for i, tiles in enumerate(LAYOUTS[layout]):
        for j, tile in enumerate(tiles):
            if tile == "#":
                corner = (i - BODY_OFFSET - 0.5, j - BODY_OFFSET - 0.5)
                ax.add_patch(pyplot.Rectangle(corner, 1, 1, facecolor="#C8C8C8", edgecolor="#C8C8C8"))
    goal = pyplot.Circle(goal_cell(layout), GOAL_RADIUS, facecolor="#F0E442", alpha=0.6, label="rewarded", zorder=0.5)
    ax.add_patch(goal)
    height, width = len(LAYOUTS[layout]), len(LAYOUTS[layout][0])
    ax.set(xlim=(-BODY_OFFSET, height - 1 - BODY_OFFSET), ylim=(-BODY_OFFSET, width - 1 - BODY_OFFSET))  # half of the rim


def draw_columns(environment: str, simulated: np.ndarray, alive: np.ndarray, modelled: dict[str, np.ndarray], path: Path) -> None:
    """The first observation columns of the first rollouts over time: raw observations [B, H, O], alive [B, H]."""
    rows, columns = min(COLUMNS, simulated.shape[-1]), min(ROLLOUTS, len(simulated))
    with _figure(path, rows, columns, 3.6 * columns, 1.9 * rows + 0.6, share=True) as (figure, axes):
        for column in range(rows):
            axes[column, 0].set(ylabel=f"observation {column}\n(raw units)")
            for start in range(columns):
                ax, steps = axes[column, start], np.flatnonzero(alive[start])
                ax.plot(steps, simulated[start, steps, column], color=TRUTH, linewidth=3.5, alpha=0.45, label="simulator")
                for (name, observation), colour, line in zip(modelled.items(), COLOURS, ("--", "-"), strict=False):
                    ax.plot(steps, observation[start, steps, column], line, color=colour, linewidth=1.6, label=name)
                ax.grid(alpha=0.3)
        for start in range(columns):
            axes[0, start].set(title=f"{environment}, start {start + 1}")
            axes[-1, start].set(xlabel="step")
        _legend(figure, axes[0, :1])


def draw_curves(panels: dict[str, list[dict[str, Any]]], behaviour: float, path: Path) -> None:
    """Returns over the gradient updates, one panel per title: `policy_runs.Variant.summary` as a line with its band."""
    with _figure(path, 1, len(panels), 6.4 if len(panels) == 1 else 4.8 * len(panels), 4.2) as (figure, axes):
        for ax, (title, scores) in zip(axes[0], panels.items(), strict=True):
            for index, score in enumerate(scores):
                _draw_curve(ax, score, COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)])
            ax.axhline(behaviour, color=REFERENCE, linestyle=":", label="the data's behaviour")
            ax.set(xlabel="gradient updates of the policy", title=title)
            ax.grid(alpha=0.3)
        axes[0, 0].set(ylabel="return of an episode")
        several = any(len(score["seeds"]) > 1 for scores in panels.values() for score in scores)
        title = "thin lines: single seeds; band: 95 % bootstrap interval of their mean" if several else None
        if len(panels) == 1:
            _legend(figure, axes[0], title)
        else:  # the same colour is another variant in the next panel
            for ax in axes[0]:
                ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize="small", frameon=False)
            figure.suptitle(title, fontsize="small")


def _draw_curve(ax: Axes, score: dict[str, Any], colour: str, marker: str) -> None:
    seeds, curve = len(score["seeds"]), score["curve"]
    label = f"{score['variant']} ({seeds} seed{'s' if seeds > 1 else ''})"
    style = {"marker": marker, "markersize": 4, "markevery": max(len(curve["updates"]) // 25, 1)}
    ax.plot(curve["updates"], curve["mean"], label=label, linewidth=2, color=colour, **style)
    if curve["interval"] is not None:
        ax.fill_between(curve["updates"], *curve["interval"], color=colour, alpha=0.2, linewidth=0)
        for updates, returns in zip(score["updates"], score["returns"], strict=True):
            ax.plot(updates, returns, color=colour, linewidth=0.6, alpha=0.4)


def draw_sampler_quality(lines: list[dict[str, Any]], path: Path) -> None:
    """Rollout error over network evaluations: `lines` are the settings of `sampler_quality`, the single-step model first."""
    single, *samplers = lines
    quantities = [quantity for quantity in LABELS if quantity in single["error"]]
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in samplers:
        # Without its number of steps a sampler's name is its family's, as in "Heun 34, S_churn 0".
        group = re.sub(r" \d+", "", line["setting"], count=1)
        if "warm_sigma" in line:
            group = f"fast, warm start at {line['warm_sigma']:g}"
        groups.setdefault(group, []).append(line)
    with _figure(path, 1, len(quantities), 5.2 * len(quantities), 4.4) as (figure, axes):
        for ax, quantity in zip(axes[0], quantities, strict=True):
            ax.axhline(single["error"][quantity]["mean"], color=REFERENCE, linestyle=":", label="single-step")
            for index, (group, members) in enumerate(groups.items()):
                values = [line["error"][quantity] for line in members]
                ax.errorbar(
                    [line["evaluations"] for line in members],
                    [value["mean"] for value in values],
                    [value["standard_error"] or 0 for value in values],
                    color=COLOURS[index % len(COLOURS)],
                    fmt=MARKERS[index % len(MARKERS)],
                    markersize=4,
                    linewidth=0.6,
                    label=group,
                )
            ax.set(xlabel="network evaluations of a rollout", ylabel=LABELS[quantity], xscale="log", ylim=(0, None))
            ax.grid(alpha=0.3)
        _legend(figure, axes[0, :1])


def _legend(figure: Figure, axes: Sequence[Axes], title: str | None = None) -> None:
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    columns = 2 if len(figure.axes) == 1 else 3
    figure.legend(handles.values(), handles.keys(), ncols=columns, title=title, title_fontsize="small", **LEGEND)
