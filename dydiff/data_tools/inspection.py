"""What is in a dataset: the figures that `dydiff data inspect` prints, and its picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files: no display is needed, and none is opened

import numpy as np  # noqa: E402 - pyplot must come after the choice above
from matplotlib import pyplot  # noqa: E402

from dydiff.data import RawDataset, normalized_score  # noqa: E402
from dydiff.data.windows import find_episodes  # noqa: E402
from dydiff.data_tools.validation import check_structure  # noqa: E402
from dydiff.errors import DydiffError  # noqa: E402

BINS = 12
BAR = 40  # characters
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


@dataclass(frozen=True)
class Inspection:
    """The figures of a dataset, in raw space; NaN stays NaN and is counted."""

    name: str
    arrays: dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape by key
    lengths: np.ndarray  # [E] of the episodes that end
    returns: np.ndarray  # [E] undiscounted
    terminals: int  # episodes that ended so
    timeouts: int
    rest: int  # rows behind the last end of an episode
    actions: np.ndarray  # [N, A]
    observations: np.ndarray  # [N, O]
    rewards: np.ndarray  # [N]
    odd_numbers: dict[str, int]  # NaN or infinite, by array


def inspect(raw: RawDataset) -> Inspection:
    """Compute the figures of a dataset; raises DydiffError where rows do not belong together."""
    arrays = raw.arrays
    if check_structure(arrays):
        raise DydiffError(
            f"Dataset {raw.name!r} is not in D4RL's schema; `dydiff data validate {raw.path or raw.name}` tells what is wrong."
        )
    count = len(arrays["observations"])
    terminals = arrays["terminals"].reshape(count) != 0
    timeouts = arrays["timeouts"].reshape(count) != 0 if "timeouts" in arrays else np.zeros(count, bool)
    begins, episode_lengths = find_episodes(terminals | timeouts)
    rewards = arrays["rewards"].reshape(count).astype(np.float64)
    numeric = {key: values for key, values in arrays.items() if values.dtype.kind == "f" and len(values.shape)}
    return Inspection(
        name=raw.name,
        arrays={key: (str(values.dtype), values.shape) for key, values in arrays.items()},
        lengths=episode_lengths,
        returns=np.add.reduceat(rewards[: episode_lengths.sum()], begins) if len(begins) else rewards[:0],
        terminals=int(terminals.sum()),
        timeouts=int((timeouts & ~terminals).sum()),
        rest=int(count - episode_lengths.sum()),
        actions=arrays["actions"].reshape(count, -1),
        observations=arrays["observations"],
        rewards=rewards,
        odd_numbers={key: int((~np.isfinite(values)).sum()) for key, values in numeric.items()},
    )


def describe(inspection: Inspection) -> str:
    """The figures as text."""
    lines = [f"rows          {len(inspection.rewards):,}"]
    lines += [
        f"{'' if number else 'arrays':14}{key} {kind} {list(shape)}"
        for number, (key, (kind, shape)) in enumerate(inspection.arrays.items())
    ]
    odd = ", ".join(f"{key} {count:,}" for key, count in inspection.odd_numbers.items() if count)
    lines.append(f"NaN, infinite {odd or 'none'}")
    lines.append(
        f"episodes      {len(inspection.lengths):,} ({inspection.terminals:,} end by a terminal, {inspection.timeouts:,} by "
        f"time), {inspection.rest:,} rows behind the last"
    )
    if len(inspection.lengths):
        lines.append(f"lengths       {_spread(inspection.lengths)}")
        lines.append(f"returns       {_spread(inspection.returns)}")
        score = normalized_score(inspection.name, float(inspection.returns.mean()))
        if score is not None:
            lines.append(f"score         {score:.1f} (the mean return, normalised as D4RL does)")
    lines.append(f"rewards       {_spread(inspection.rewards)}")
    for name in ("actions", "observations"):
        for column, values in enumerate(getattr(inspection, name).T.astype(np.float64)):
            lines.append(f"{name if column == 0 else '':14}column {column}: {_spread(values)}")
    if len(inspection.lengths):
        lines += ["histogram of the episodes' returns", *_histogram(inspection.returns)]
    return "\n".join(lines)


def _spread(values: np.ndarray) -> str:
    finite = values[np.isfinite(values)]
    if len(finite) == 0:
        return "no finite number"
    return (
        f"min {finite.min():.6g}, mean {finite.mean():.6g}, median {np.median(finite):.6g}, max {finite.max():.6g}, "
        f"std {finite.std():.4g}"
    )


def _histogram(values: np.ndarray) -> list[str]:
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return []
    counts, edges = np.histogram(values, BINS)
    width = max(len(f"{edge:.5g}") for edge in edges)
    return [
        f"  {low:>{width}.5g} to {high:>{width}.5g}  {'#' * round(BAR * count / counts.max()):{BAR}}  {count:,}"
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
    ]


def draw(inspection: Inspection, path: Path) -> None:
    """Draw returns, lengths, and the spread of every action and observation column; raises DydiffError on a bad path."""
    figure, ((returns, lengths), (actions, observations)) = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for ax, values, label in ((returns, inspection.returns, "return"), (lengths, inspection.lengths, "length (in steps)")):
        ax.hist(values[np.isfinite(values)], bins=40, color="#0072B2")
        ax.set(xlabel=f"{label} of an episode", ylabel="episodes")
    for ax, values, label in ((actions, inspection.actions, "action"), (observations, inspection.observations, "observation")):
        finite = [column[np.isfinite(column)] for column in values.T.astype(np.float64)]
        spread = np.array([np.quantile(column, QUANTILES) if len(column) else [np.nan] * 5 for column in finite])
        columns = np.arange(len(spread))
        ax.vlines(columns, spread[:, 0], spread[:, 4], color="#777777", linewidth=1, label="smallest to largest")
        ax.vlines(columns, spread[:, 1], spread[:, 3], color="#0072B2", linewidth=4, label="5 % to 95 %")
        ax.plot(columns, spread[:, 2], "o", color="#D55E00", markersize=4, label="median")
        ax.set(xlabel=f"{label} column", ylabel="raw units")
        ax.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*actions.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    for ax in figure.axes:
        ax.grid(alpha=0.3)
    figure.suptitle(f"{inspection.name}: {len(inspection.rewards):,} rows, {len(inspection.lengths):,} episodes")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise DydiffError(f"Cannot draw the picture {str(path)!r}: {error}. Give another path by --picture.") from error
    finally:
        pyplot.close(figure)
