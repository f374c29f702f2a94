"""What D4RL (arXiv 2004.07219) fixes: names, files and addresses of datasets, time limits, reference scores."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from dydiff.environments import MAZE_EPISODE_STEPS, environment_name
from dydiff.errors import DydiffError

BASE_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
URL_VARIABLE = "DYDIFF_D4RL_URL"
CACHE_VARIABLE = "D4RL_DATASET_DIR"
LOCAL_SUFFIX = "-local"

LOCOMOTION = ("hopper", "halfcheetah", "walker2d", "ant")
QUALITIES = ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert")
OTHERS = ("bullet", "carla", "door", "flow", "hammer", "kitchen", "minigrid", "pen", "relocate")  # known to the legacy package
# What `dydiff collect` makes, with the environments.
LOCAL_LOCOMOTION = ("hopper", "halfcheetah", "walker2d")
LOCAL_DATASETS = {
    **{f"maze2d-{layout}{LOCAL_SUFFIX}": f"maze2d-{layout}" for layout in MAZE_EPISODE_STEPS},
    **{
        f"{environment}-{quality}{LOCAL_SUFFIX}": environment
        for environment in LOCAL_LOCOMOTION
        for quality in ("random", "medium", "medium-replay", "medium-expert", "expert")
    },
}

# Steps after which the environment ends an episode of itself, by the environment's name.
MAX_EPISODE_STEPS = {
    **{environment: 1000 for environment in LOCOMOTION},
    **{f"maze2d-{size}{reward}": steps for size, steps in MAZE_EPISODE_STEPS.items() for reward in ("", "-dense")},
    "antmaze-umaze": 700,
    "antmaze-medium": 1000,
    "antmaze-large": 1000,
}

# Returns of a random and of an expert policy: what normalises to 0 and to 100.
REFERENCE_RETURNS = {
    "hopper": (-20.272305, 3234.3),
    "halfcheetah": (-280.178953, 12135.0),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99),
    "maze2d-umaze-dense": (68.537689, 193.66285642381482),
    "maze2d-medium-dense": (44.264742, 297.4552547777125),
    "maze2d-large-dense": (30.569041, 303.4857382709002),
    "antmaze-umaze": (0.0, 1.0),
    "antmaze-medium": (0.0, 1.0),
    "antmaze-large": (0.0, 1.0),
}


def _locomotion_files() -> dict[str, str]:
    files = {}
    for environment in LOCOMOTION:
        for quality in QUALITIES:
            stem = f"{environment}_{quality.replace('-', '_')}"
            files[f"{environment}-{quality}-v2"] = f"gym_mujoco_v2/{stem}-v2.hdf5"
            files[f"{environment}-{quality}-v1"] = f"gym_mujoco_v1/{stem}-v1.hdf5"
            if quality == "medium-replay":
                # The first release called it "mixed", and walker2d just "walker" there.
                stem = "walker_mixed" if environment == "walker2d" else f"{environment}_mixed"
            if quality != "full-replay":
                files[f"{environment}-{quality}-v0"] = f"gym_mujoco/{stem}.hdf5"
    return files


def _maze2d_files() -> dict[str, str]:
    files = {}
    for size in MAZE_EPISODE_STEPS:
        files[f"maze2d-{size}-v1"] = f"maze2d/maze2d-{size}-sparse-v1.hdf5"
        files[f"maze2d-{size}-dense-v1"] = f"maze2d/maze2d-{size}-dense-v1.hdf5"
    return files


def _antmaze_files() -> dict[str, str]:
    variants = {
        "umaze": ("u-maze", False, False),
        "umaze-diverse": ("u-maze", True, True),
        "medium-play": ("big-maze", True, False),
        "medium-diverse": ("big-maze", True, True),
        "large-play": ("hardest-maze", True, False),
        "large-diverse": ("hardest-maze", True, True),
    }
    files = {}
    for variant, (maze, multistart, multigoal) in variants.items():
        stem = f"Ant_maze_{maze}_noisy_multistart_{multistart}_multigoal_{multigoal}_sparse"
        files[f"antmaze-{variant}-v0"] = f"ant_maze_new/{stem}.hdf5"
        files[f"antmaze-{variant}-v2"] = f"ant_maze_v2/{stem}_fixed.hdf5"
    return files


# Address of every known dataset below BASE_URL or its mirror.
FILES = {**_locomotion_files(), **_maze2d_files(), **_antmaze_files()}
NAMES_BY_FILE = {address.rsplit("/", 1)[-1]: name for name, address in FILES.items()}


def is_d4rl_name(name: str) -> bool:
    """Tell whether `name` is a dataset that D4RL published (and not a path or a locally made one)."""
    return name in FILES


def is_local_name(name: str) -> bool:
    """Tell whether `name` is one for locally collected data: an environment, anything, then "-local"."""
    safe = re.fullmatch(r"[a-z0-9_-]+", name) is not None  # it becomes a file name
    return safe and name.endswith(LOCAL_SUFFIX) and environment_of(name) is not None


def dataset_url(name: str) -> str:
    """Return the address of the dataset `name`: where D4RL published it, or below `$DYDIFF_D4RL_URL`.

    KeyError for a name that is not D4RL's; DydiffError for a variable that is no http address.
    """
    base = os.environ.get(URL_VARIABLE) or BASE_URL
    if not base.startswith(("http://", "https://")):
        raise DydiffError(f"{URL_VARIABLE} must be an address that starts with http:// or https://, not {base!r}.")
    return f"{base.rstrip('/')}/{FILES[name]}"


def cache_folder() -> Path:
    """Return the folder that dataset files live in: `$D4RL_DATASET_DIR`, or `~/.d4rl/datasets` where it is not set."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.d4rl/datasets").expanduser()


def dataset_path(name: str) -> Path:
    """Return where the file of the dataset `name` belongs, whether it exists or not.

    `name` is a D4RL name or ends in "-local". Raises `unknown_dataset` for any other.
    """
    if is_d4rl_name(name):
        return cache_folder() / FILES[name].rsplit("/", 1)[-1]
    if is_local_name(name):
        return cache_folder() / f"{name}.hdf5"
    raise unknown_dataset(name)


def unknown_dataset(name: str, legacy_obstacle: str = "") -> DydiffError:
    """The error for a name that is none: the nearest ones, and what names there are.

    `legacy_obstacle` says why the `d4rl` package, which knows more of them, was not asked.
    """
    if legacy_obstacle and name.partition("-")[0] in OTHERS:
        return DydiffError(
            f"The dataset {name!r} needs the legacy package d4rl, which does not import here ({legacy_obstacle}): dydiff itself "
            'knows D4RL\'s locomotion and mazes. Install it (`pip install "dydiff[d4rl]"`; its mujoco-py needs MuJoCo 2.1 and an '
            "older Python), or write the dataset to an HDF5 file where it imports, and give the path of that."
        )
    nearest = ", ".join(nearest_names(name))
    near = f" The nearest known names are {nearest}." if nearest else ""
    return DydiffError(
        f"Unknown dataset {name!r}.{near} A dataset is a D4RL name such as hopper-medium-v2 (hopper, halfcheetah, walker2d, ant, "
        f"maze2d or antmaze), a name that starts with an environment and ends in {LOCAL_SUFFIX!r}, for data that `dydiff collect` "
        "makes, or the path of a .hdf5, .h5 or .npz file. `dydiff data list` shows the names."
    )


def nearest_names(name: str) -> list[str]:
    """The names that come closest: D4RL's, those that `dydiff collect` makes, and local ones whose file is there."""
    return difflib.get_close_matches(name, [*FILES, *local_names()], n=3, cutoff=0.5)


def local_names() -> list[str]:
    """The names of the datasets that `dydiff collect` makes, and of others that are in the cache folder."""
    there = sorted(file.stem for file in cache_folder().glob(f"*{LOCAL_SUFFIX}.hdf5") if is_local_name(file.stem))
    return list(dict.fromkeys([*LOCAL_DATASETS, *there]))


def environment_of(name: str) -> str | None:
    """Return the environment that the name of a dataset or of its file speaks of, or None where it is not known.

    "hopper-medium-v2" and "hopper_medium-v2.hdf5" give "hopper"; "maze2d-umaze-local" gives "maze2d-umaze".
    """
    # D4RL's own file names come first: "Ant_maze_u-maze_..." must not be read as the environment "ant".
    plain = NAMES_BY_FILE.get(name, Path(name).stem)
    try:
        return environment_name(plain)
    except DydiffError:
        return None


def max_episode_steps(environment: str | None) -> int | None:
    """Return D4RL's time limit in steps for an environment's name, or None where D4RL has no such environment."""
    return None if environment is None else MAX_EPISODE_STEPS.get(environment)


def scaled_return(environment: str | None, episode_return: float) -> float | None:
    """Return 100 (R - random) / (expert - random) for an undiscounted episode return R, or None without reference returns.

    A measure of any return in that environment. Only where data and simulator are D4RL's is it D4RL's score.
    Source: D4RL (arXiv 2004.07219), section 5; D4RL's own function leaves out the factor of 100.
    """
    if environment not in REFERENCE_RETURNS:
        return None
    random_return, expert_return = REFERENCE_RETURNS[environment]
    return 100.0 * (episode_return - random_return) / (expert_return - random_return)


def normalized_score(name: str, episode_return: float) -> float | None:
    """Return D4RL's score, `scaled_return`, for an episode return of a policy trained on the dataset `name`.

    None where it would be compared with scores that it is none of: for every dataset that is not one of D4RL's (a "-local" name,
    a path).
    """
    return scaled_return(environment_of(name), episode_return) if is_d4rl_name(name) else None
