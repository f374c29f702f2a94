"""`dydiff report`: rollouts of the trained models against the simulator, and the scores of the policies trained with them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from dydiff.checkpoint import make_folder, write_atomically
from dydiff.errors import DydiffError
from dydiff.progress import say
from dydiff.reports import plots
from dydiff.reports.comparison import DYDIFF, SINGLE_STEP, compare_rollouts
from dydiff.reports.policy_runs import Subject, behaviour_return, describe_models, describe_run, group_runs, load_models, load_runs
from dydiff.reports.tables import format_table, plus_minus

SHOWN = {"position": "position error (m)", "state": "state error (root mean square of z-scored observations)"}


def report(root: Path, dataset_name: str, starts: int, seed: int, device: str) -> None:
    """Print the tables and write report.json and the pictures into `root`/report.

    Rollouts are left out, and the reason is told, where the simulator cannot be put into recorded states, and where no policy was
    trained with them and there are no models to show.

    Raises:
        DydiffError: no finished policy run on the dataset under `root`, one with DyDiff whose models are missing, no simulator of
            its environment, or `root` cannot be written.
    """
    runs, run, problem = load_runs(root, dataset_name)
    dataset, steps = problem.dataset, min(problem.spec.max_episode_steps, run.constants.rl_trainer_params.max_path_length)
    try:
        subject = load_models(root, device, runs, run, problem)
    except DydiffError as error:
        if run.uses_dydiff and problem.spec.has_states:
            raise
        whose = "No policy here was trained with DyDiff, and its rollouts" if problem.spec.has_states else "Rollouts"
        say(f"{whose} cannot be shown: {error}")
        subject = None
    folder = make_folder(root / "report")
    scores = [variant.summary(dataset) for variant in group_runs(runs)]
    scores.sort(key=lambda score: score["dydiff"])  # base algorithms first
    record = {
        **describe_run(run, problem),
        "rows": len(dataset),
        "scores": scores,
        "behaviour_return": behaviour_return(dataset, steps),
    }
    texts, files = [], []
    if subject is not None:
        rollouts, files = _measure_rollouts(subject, folder, starts, seed)
        record = {**record, **rollouts}
        texts = [_rollout_text(record)]
    files += [folder / "learning_curve.png", folder / "report.json"]
    plots.draw_curves({"": scores}, record["behaviour_return"], files[-2])
    write_atomically(files[-1], lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    print("\n\n".join([*texts, _score_text(record, steps), "\n".join(map(str, files))]))


def _measure_rollouts(subject: Subject, folder: Path, starts: int, seed: int) -> tuple[dict[str, Any], list[Path]]:
    """What report.json says of the models' rollouts, and the pictures of them that were drawn into `folder`."""
    problem, engine = subject.problem, subject.rollouts.engine
    comparison = compare_rollouts({DYDIFF: engine}, subject, starts, seed)
    measured = comparison.errors(comparison.deviations(problem.spec, problem.spaces))
    errors = {quantity: by_model for quantity, by_model in measured.items() if quantity in SHOWN}
    draw = plots.draw_maze_rollouts if problem.spec.is_maze else plots.draw_columns
    files = [folder / "rollout_error.png", folder / ("maze_rollouts.png" if problem.spec.is_maze else "rollouts.png")]
    plots.draw_errors({"": errors}, files[0])
    modelled = {name: comparison.modelled[name].observation for name in (SINGLE_STEP, DYDIFF)}
    draw(problem.spec.name, comparison.simulated.observation, comparison.alive, modelled, files[1])
    record = {
        "horizon": engine.horizon,
        "iterations": engine.iterations,
        "fast": None if engine.fast is None else dataclasses.asdict(engine.fast),
        "starts": len(comparison.simulated.reward),
        "seed": seed,
        "models": describe_models(subject.models, problem.dataset, engine.dynamics),
        "rollout_error": errors,
        "alive": comparison.alive.sum(axis=0).tolist(),
    }
    return record, files


def _rollout_text(record: dict[str, Any]) -> str:
    ensemble, diffusion = record["models"]["dynamics"], record["models"]["diffusion"]
    windows = diffusion[0]["training_windows"]
    shown = [2**power for power in range(20) if 2**power < record["horizon"] - 1] + [record["horizon"] - 1]
    text = [
        f"Rollout error against the simulator ({record['simulator']}): mean ± standard error over {record['starts']} starts",
        f"from {record['dataset']} ({record['rows']:,} rows). The policy acts closed loop in the simulator and in both models;",
        f"it is the last one of {record['policy']}.",
        f"Single-step: {ensemble['networks']} networks, {ensemble['parameters']:,} parameters in all.",
        f"DyDiff: {record['horizon']} rows, {record['iterations']} policy injections{_mode(record['fast'])}, "
        f"{len(diffusion)} diffusion model(s) of {diffusion[0]['parameters']:,} parameters"
        + (f", trained on {windows:,} windows." if windows else "."),
        "No motion: what a model that stays at the start would score.",
    ]
    for quantity, title in SHOWN.items():
        if quantity not in record["rollout_error"]:
            continue
        by_model = record["rollout_error"][quantity]
        rows = [["step", "starts", *by_model]]
        for step in shown:
            figures = [plus_minus(values["mean"][step], values["standard_error"][step], 3) for values in by_model.values()]
            rows.append([str(step), str(record["alive"][step]), *figures])
        text += ["", title, format_table(rows)]
    return "\n".join(text)


def _mode(fast: dict[str, Any] | None) -> str:
    if fast is None:
        return ""
    return f" in fast mode ({fast['first_evaluations']} network evaluations, then {fast['warm_evaluations']} each)"


def _score_text(record: dict[str, Any], steps: int) -> str:
    normalized = any(score["last"]["normalized_score"] is not None for score in record["scores"])
    rows = [["variant", "seeds", "updates", "episodes", "last return", "best return"]]
    rows[0] += ["last score", "best score"] if normalized else []
    for score in record["scores"]:
        row = [score["variant"], str(len(score["seeds"])), f"{score['updates'][0][-1]:,}", str(score["episodes"][0])]
        row += [plus_minus(score[name]["mean"], score[name]["standard_error"], 1) for name in ("last", "best")]
        row += [f"{score[name]['normalized_score']:.1f}" for name in ("last", "best")] if normalized else []
        rows.append(row)
    simulators = sorted({simulator for score in record["scores"] for simulator in score["simulator"]})
    text = [
        f"Return of an episode in {record['environment']} ({'; '.join(simulators)}): mean ± standard error over seeds.",
        "Last: of the last evaluation. Best: of the best evaluation in hindsight, which flatters noisy curves.",
        format_table(rows),
    ]
    text.append(f"The data's behaviour earns {record['behaviour_return']:.1f} in an episode of at most {steps} steps.")
    return "\n".join(text)
