"""The report of offline_returns.py: everything finished under a folder, as Markdown, JSON, and a picture a dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine

from dydiff.checkpoint import write_atomically
from dydiff.data import d4rl, load_dataset
from dydiff.environments import choose_environment, environment_spec
from dydiff.errors import DydiffError
from dydiff.models import DIFFUSION, DYNAMICS, POLICY, load_dynamics
from dydiff.reports import plots
from dydiff.reports.policy_runs import ALGORITHM_NAMES, behaviour_return, describe_models, find_policy_runs, group_runs
from dydiff.reports.tables import format_markdown, plus_minus
from dydiff.reports.uncertainty import bootstrap_difference
from dydiff.runs import list_runs, read_run, read_settings
from dydiff.runs.model_files import recorded_models

LEGEND = (
    "Return of an episode: mean ± standard error over the seeds, in brackets the 95 % bootstrap interval of that mean (with three "
    "seeds it is too narrow). **Last**: of the last evaluation. **Best**: of the best evaluation in hindsight, which flatters "
    "noisy curves. **Scaled**: 100 (return - random) / (expert - random) with D4RL's reference returns of the environment{note}."
)
LOCAL_NOTE = "; this data is not D4RL's, so this is a scale and no D4RL score"


def write_report(folder: Path) -> str:
    """Write report.md, report.json and the pictures into `folder`; returns the Markdown.

    Raises:
        DydiffError: nothing is finished there, or a dataset is missing.
    """
    tasks = [describe_task(root, name) for root, name in find_tasks(folder)]
    if not tasks:
        raise DydiffError(f"No finished policy run under '{folder}': there is nothing to report on yet.")
    for task in tasks:
        panels: dict[str, list[dict[str, Any]]] = {}
        for score in task["scores"]:
            panels.setdefault(ALGORITHM_NAMES[score["algorithm"]], []).append(score)
        plots.draw_curves(panels, task["behaviour_return"], folder / task["picture"])
    text = "\n\n".join(["# Returns of offline training", *(show_task(task) for task in tasks)]) + "\n"
    record = {"machine": describe_machine("cpu"), "tasks": tasks}
    write_atomically(folder / "report.json", lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    write_atomically(folder / "report.md", lambda path: path.write_text(text))
    return text


def find_tasks(folder: Path) -> list[tuple[Path, str]]:
    """The folders with finished policy runs, and the datasets of these."""
    found: dict[tuple[Path, str], None] = {}
    for run, record in list_runs(folder):
        settings = read_settings(run)
        if record["kind"] == POLICY and record["status"] == "finished" and settings:
            found[run.parent, settings["constants"]["dataset_name"]] = None
    return sorted(found)


def describe_task(root: Path, dataset_name: str) -> dict[str, Any]:
    """Everything that is known of one dataset's runs; no path of this machine is in it."""
    dataset = load_dataset(dataset_name)
    variants = group_runs(find_policy_runs(root, dataset))
    variants.sort(key=lambda variant: (variant.first.settings["stage"], variant.first.uses_dydiff, variant.name))
    scores = [variant.summary(dataset) | {"settings": variant.first.changed_settings} for variant in variants]
    for score in scores:
        score["folders"] = [Path(run).name for run in score["folders"]]
    models = next((recorded_models(v.first.folder, root)[0] for v in reversed(variants) if v.first.uses_dydiff), None)
    environment = choose_environment(variants[0].first.constants.env_specs.env_name or dataset.environment)
    unfinished = [run.name for run, record in list_runs(root) if record["kind"] == POLICY and record["status"] != "finished"]
    records = [read_run(run.folder) for variant in variants for run in variant.runs.values()]
    return {
        "dataset": dataset.name,
        "d4rl": d4rl.is_d4rl_name(dataset.name),
        "rows": len(dataset),
        "environment": environment,
        "reference_returns": d4rl.REFERENCE_RETURNS.get(environment),
        "behaviour_return": behaviour_return(dataset, environment_spec(environment).max_episode_steps),
        "models": name_models(models, dataset) if models else None,
        "scores": scores,
        "differences": compare(scores),
        "software": sorted({f"dydiff {run['dydiff']}, torch {run['torch']}" for run in records}),
        "unfinished": unfinished,
        "picture": f"{root.name}.png",
    }


def name_models(files: dict[str, list[str]], dataset: Any) -> dict[str, Any]:
    """`describe_models` with the names of run folders in place of paths."""
    models = describe_models(files, dataset, load_dynamics(files[DYNAMICS][0], dataset))
    for model in (*models["diffusion"], models["dynamics"]):
        model["path"] = Path(model["path"]).parent.name
    models["horizon"] = (read_settings(Path(files[DIFFUSION][0]).parent) or {}).get("network", {}).get("horizon")
    return models


def compare(scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each DyDiff variant's last return less that of its base algorithm after as many updates, where there is one such base."""
    differences = []
    for score in scores:
        bases = [
            base
            for base in scores
            if not base["dydiff"]
            and (base["algorithm"], base["simulator"]) == (score["algorithm"], score["simulator"])
            and base["curve"]["updates"][-1:] == score["curve"]["updates"][-1:]
        ]
        if not score["dydiff"] or len(bases) != 1:
            continue
        ours, theirs = (np.array(each["last"]["by_seed"]) for each in (score, bases[0]))
        interval = bootstrap_difference(ours, theirs)
        difference = {"variant": score["variant"], "base": bases[0]["variant"], "mean": float(ours.mean() - theirs.mean())}
        differences.append(difference | {"interval": None if interval is None else interval.tolist()})
    return differences


def show_task(task: dict[str, Any]) -> str:
    """A dataset's section of the report."""
    scores, references = task["scores"], task["reference_returns"]
    head = ["variant", "seeds", "updates", "episodes", "last return", "best return"]
    head += ["last scaled", "best scaled"] if references else []
    rows = [[*head, "hours a run", "simulator"]]
    for score in scores:
        row = [score["variant"], ", ".join(map(str, score["seeds"])), f"{score['updates'][0][-1]:,}", str(score["episodes"][0])]
        row += [show_mean(score[which]) for which in ("last", "best")]
        row += [f"{score[which]['scaled_return']:.1f}" for which in ("last", "best")] if references else []
        rows.append([*row, f"{np.mean(score['hours']):.2f}", "; ".join(score["simulator"])])
    parts = [
        f"## {task['dataset']}",
        f"{task['rows']:,} rows of {task['environment']}. " + LEGEND.format(note="" if task["d4rl"] else LOCAL_NOTE),
        format_markdown(rows),
        f"![learning curves]({task['picture']})",
    ]
    parts.append(f"The data's behaviour earns {task['behaviour_return']:.1f} an episode (dotted line).")
    if task["differences"]:
        rows = [["last return, difference", "mean", "95 % bootstrap interval"]]
        for each in task["differences"]:
            name = f"{each['variant']} - {each['base']}"
            rows.append([name, f"{each['mean']:+.1f}", show_interval(each["interval"], "+")])
        parts.append(format_markdown(rows))
    if task["models"]:
        parts.append(show_models(task["models"]))
    common = {name: value for name, value in scores[0]["settings"].items() if all(s["settings"].get(name) == value for s in scores)}
    settings = [f"- all: {show_settings(common)}"]
    for score in scores:
        own = {name: value for name, value in score["settings"].items() if name not in common}
        settings += [f"- {score['variant']}: {show_settings(own)}"] * bool(own)
    parts += ["Settings other than the defaults:", "\n".join(settings)]
    parts.append(f"Trained with {'; '.join(task['software'])}.")
    if task["unfinished"]:
        parts.append(f"Not finished, and not in the table: {', '.join(task['unfinished'])}.")
    return "\n\n".join(parts)


def show_mean(value: dict[str, Any]) -> str:
    """A mean over seeds with its error and interval."""
    text = plus_minus(value["mean"], value["standard_error"], 1)
    return f"{text} [{show_interval(value['interval'])}]" if value["interval"] else text


def show_interval(interval: list[float] | None, sign: str = "") -> str:
    """An interval, or a dash where there is none."""
    return "-" if interval is None else f"{interval[0]:{sign}.1f}, {interval[1]:{sign}.1f}"


def show_models(models: dict[str, Any]) -> str:
    """What the rollouts were made with."""
    diffusion, ensemble = models["diffusion"], models["dynamics"]
    windows = diffusion[0]["training_windows"]
    return (
        f"Models: {len(diffusion)} diffusion model(s) of {diffusion[0]['parameters']:,} parameters"
        + (f", horizon {models['horizon']}" if models["horizon"] else "")
        + (f", trained on {windows:,} windows" if windows else "")
        + f"; {ensemble['networks']} dynamics networks of {ensemble['parameters']:,} parameters in all."
    )


def show_settings(settings: dict[str, Any]) -> str:
    """Settings in one line."""
    return ", ".join(f"`{name}={value}`" for name, value in settings.items()) or "none"
