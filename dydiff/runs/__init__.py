"""Run folders: settings, logs, checkpoints, and how stages find each other's results."""

from dydiff.runs.folders import (
    find_run_of,
    find_unfinished,
    list_runs,
    list_settings,
    new_folder,
    nothing_left_empty,
    read_log,
    read_run,
    read_settings,
    read_state,
    remove_unbegun,
)
from dydiff.runs.run import STATE, Run, Stage

__all__ = [
    "STATE",
    "Run",
    "Stage",
    "find_run_of",
    "find_unfinished",
    "list_runs",
    "list_settings",
    "new_folder",
    "nothing_left_empty",
    "read_log",
    "read_run",
    "read_settings",
    "read_state",
    "remove_unbegun",
]
