"""What identifies a run of an experiment: its resolved settings, by which it is found again, and the name of its folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dydiff.config import Constants
from dydiff.errors import DydiffError
from dydiff.experiments.experiment import Variant, flatten
from dydiff.experiments.settings import from_mapping, show
from dydiff.runs import find_run_of

FEW = 4  # settings in which a run differs that was perhaps to be continued


def describe(experiment: str, variant: Variant) -> dict[str, Any]:
    """The resolved settings of a run: stored in its folder, and what identifies it when it is resumed."""
    constants = dataclasses.asdict(variant.constants)
    return {
        "experiment": experiment,
        "stage": variant.stage,
        "variables": variant.choices,
        "constants": {key: value for key, value in constants.items() if value is not None},
    }


def complete(settings: dict[str, Any]) -> dict[str, Any]:
    """Stored settings, as `describe` gives them, with the defaults of those that an older dydiff did not have."""
    try:
        constants = dataclasses.asdict(from_mapping(Constants, settings.get("constants"), "constants"))
    except DydiffError:  # of another kind of run, or of a setting that is no more
        return settings
    return {**settings, "constants": {key: value for key, value in constants.items() if value is not None}}


def _lengthen(settings: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """The stored settings of a policy with as many epochs as `settings` ask for, where it has fewer and they shape nothing."""
    stored, asked = complete(stored), settings["constants"].get("rl_trainer_params")
    params = stored.get("constants", {}).get("rl_trainer_params")
    if not asked or not params or settings["constants"].get("diffql_params", {}).get("lr_decay"):
        return stored
    longer = {**params, "num_epochs": max(params["num_epochs"], asked["num_epochs"])}
    return {**stored, "constants": {**stored["constants"], "rl_trainer_params": longer}}


def find_own(runs: Sequence[tuple[Path, dict[str, Any]]], settings: dict[str, Any]) -> tuple[Path | None, bool]:
    """The folder of `runs` (`list_settings`) that a run goes on in, and whether one with fewer epochs has finished there."""
    if folder := find_run_of(runs, settings, complete):
        return folder, False
    folder = find_run_of(runs, settings, partial(_lengthen, settings))
    return folder, folder is not None


def label(experiment: str, variant: Variant) -> str:
    """The name of a variant's run folder: the experiment and what sets the variant apart."""
    choices = [f"{key.rsplit('.', 1)[-1]}={value}" for key, value in variant.choices.items() if key != "seed"]
    return "-".join([experiment, *choices, f"s{variant.constants.seed}"])


def name_nearest(runs: Sequence[tuple[Path, dict[str, Any]]], settings: dict[str, Any]) -> None:
    """Tell which of `runs` is the nearest to a new one that asks for the same, where a few settings keep it from being resumed."""
    same, asked, near = {"dataset_name", "seed", *settings["variables"]}, _flatten(settings), []
    for folder, stored in runs:
        if any(stored.get(key) != settings[key] for key in ("experiment", "stage")):
            continue
        theirs = _flatten(complete(stored))
        different = [key for key in {**theirs, **asked} if theirs.get(key) != asked.get(key)]
        if 0 < len(different) <= FEW and same.isdisjoint(different):
            pairs = [f"{key} was {show(theirs.get(key))}, now {show(asked.get(key))}" for key in different]
            near.append((folder, pairs))
    if near:
        folder, pairs = min(near, key=lambda each: len(each[1]))
        differing = ", ".join(pairs)
        print(f"Starting a new run: '{folder}' was started with other settings: {differing}. Repeat them to resume it instead.")


def _flatten(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as `describe` gives them, by dotted name."""
    return flatten({"variables": settings.get("variables"), **settings.get("constants", {})})
