"""Experiment files: YAML with `meta_data`, `variables` and `constants`, turned into resolved variants (SPEC section 9)."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dydiff.config import AgentParams, Constants, CQLParams, DiffQLParams, DynModelParams, MetaData, ModelParams, TD3BCParams
from dydiff.errors import DydiffError
from dydiff.experiments.settings import from_mapping, show, unknown_key
from dydiff.experiments.yaml_files import parse_yaml, read_yaml
from dydiff.progress import say

MAX_VARIANTS = 10_000
COMMON = ("dataset_name", "seed", "seeds", "env_specs")  # settings that every stage uses
OWN = "own"  # the stage of an algorithm that agent_params names
STAGE_SECTIONS = {"dyn_model_params": "dynamics", "model_params": "reward"}
SCRIPT_WORDS = {"dyn": "dynamics", "rew": "reward", "td3": "td3_bc", "diffql": "diffusion_ql", "cql": "cql"}
ALGORITHMS = {"td3_bc_params": "td3_bc", "diffql_params": "diffusion_ql", "cql_params": "cql", "agent_params": OWN}
SECTION_DEFAULTS = {
    "model_params": ModelParams,
    "dyn_model_params": DynModelParams,
    "td3_bc_params": TD3BCParams,
    "diffql_params": DiffQLParams,
    "cql_params": CQLParams,
    "agent_params": AgentParams,
}


@dataclass
class Variant:
    """One run of an experiment: what is trained, with which settings, and what sets it apart from its siblings."""

    stage: str  # dynamics, reward, td3_bc, diffusion_ql, cql or own
    constants: Constants
    choices: dict[str, Any]  # the `variables` of this run
    group: int  # equal for variants that are to train together: they differ in their seeds alone (`constants.seeds`)

    @property
    def is_policy(self) -> bool:
        return self.stage in ALGORITHMS.values()


@dataclass
class Experiment:
    """An experiment file with its variants resolved."""

    meta: MetaData
    variants: list[Variant]

    @property
    def groups(self) -> list[list[int]]:
        """The indices of the variants that train together, group by group."""
        groups: dict[int, list[int]] = {}
        for index, variant in enumerate(self.variants):
            groups.setdefault(variant.group, []).append(index)
        return list(groups.values())


def load_experiment(path: str | Path, overrides: list[str] = (), dataset: str | None = None) -> Experiment:
    """Read an experiment file and resolve its variants.

    `overrides` are `key=value` texts with dotted keys (`rl_trainer_params.num_epochs=2`, `meta_data.num_workers=2`), values in
    YAML; they win over `constants` and `variables`. `dataset` replaces `dataset_name` and, below the file's own settings,
    applies what `datasets.yaml` (in the file's folder or one above it) says about that dataset.

    Raises:
        DydiffError: the file cannot be read, or holds an unknown key, a wrong type, no variants or too many.
    """
    path = Path(path)
    content = read_yaml(path)
    for key in content:
        if key not in ("meta_data", "variables", "constants"):
            raise unknown_key(f"{path}: {key}", str(key), ["meta_data", "variables", "constants"])
    constants = _mapping(content, "constants", path)
    variables = flatten(_mapping(content, "variables", path))
    meta_data = _mapping(content, "meta_data", path)
    # Those of the file: an override asks for nothing new.
    sections = {str(key).split(".")[0] for key in (*constants, *variables)}
    if dataset is not None:
        constants = _merge(_dataset_differences(path, dataset, sections), constants)
        constants["dataset_name"] = dataset
        variables.pop("dataset_name", None)
    fixed: list[tuple[str, Any]] = []
    for text in overrides:
        key, value = _parse_override(text)
        if key.startswith("meta_data."):
            _assign(meta_data, key.removeprefix("meta_data."), value)
        elif key.startswith("variables."):
            variables[key.removeprefix("variables.")] = value
        else:
            variables = {name: values for name, values in variables.items() if not f"{name}.".startswith(f"{key}.")}
            fixed.append((key, value))
            if key in ("seed", "seeds"):  # in the place of the file's, whichever of the two that has
                for tree in (constants, variables):
                    tree.pop("seeds" if key == "seed" else "seed", None)
    meta = from_mapping(MetaData, meta_data, f"{path.name}: meta_data")
    stage = _find_stage(sections, meta.script_path, path)
    variants = _expand(constants, variables, fixed, stage, path)
    _insist_on_use([*variables, *(key for key, _ in fixed)], stage, path)
    return Experiment(meta, variants)


def override(constants: dict[str, Any], texts: Iterable[str]) -> None:
    """Set `key=value` texts with dotted keys in `constants`, in place.

    Raises:
        DydiffError: a text of another form, or a key below a value.
    """
    for text in texts:
        _assign(constants, *_parse_override(text))


def _expand(constants: dict, variables: dict[str, Any], fixed: list[tuple[str, Any]], stage: str, path: Path) -> list[Variant]:
    """Every combination of `variables` on top of `constants`, and the `fixed` overrides on top of both."""
    for key, values in variables.items():
        if not isinstance(values, list) or not values:
            raise DydiffError(f"{path.name}: variable '{key}' must be a non-empty list of values, not {show(values)}.")
    count = math.prod(len(values) for values in variables.values())
    if count > MAX_VARIANTS:
        raise _too_many(count, path)
    for key, values in variables.items():
        for index, value in enumerate(values):
            if value in values[:index]:  # two runs that could not be told apart
                raise DydiffError(f"{path.name}: variable '{key}' names {show(value)} more than once. Remove the repetition.")
    if "seeds" in variables:
        raise DydiffError(
            f"{path.name}: 'seeds' belongs under 'constants' and names seeds that train together. As a variable, take 'seed'."
        )
    variants = []
    for group, values in enumerate(itertools.product(*variables.values())):
        choices = dict(zip(variables, values, strict=True))
        resolved = copy.deepcopy(constants)
        for key, value in (*choices.items(), *fixed):
            _assign(resolved, key, copy.deepcopy(value))
        settings = from_mapping(Constants, resolved, f"{path.name}: constants")
        if not settings.dataset_name:
            raise DydiffError(f"{path.name}: constants.dataset_name is missing; name a dataset or give a path to a file.")
        settings = _complete(settings, stage)
        if settings.seeds is None:
            variants.append(Variant(stage, settings, choices, group))
            continue
        _check_seeds(settings.seeds, "seed" in resolved, stage, path)
        if count * len(settings.seeds) > MAX_VARIANTS:
            raise _too_many(count * len(settings.seeds), path)
        for seed in settings.seeds:  # from here on each is what it would be alone
            variants.append(Variant(stage, dataclasses.replace(settings, seed=seed, seeds=None), choices, group))
    return variants


def _too_many(count: int, path: Path) -> DydiffError:
    return DydiffError(f"{path.name} expands to {count:,} variants; the limit is {MAX_VARIANTS:,}. Shorten its 'variables'.")


def _check_seeds(seeds: list[int], has_seed: bool, stage: str, path: Path) -> None:
    if has_seed:
        raise DydiffError(
            f"{path.name}: 'seed' and 'seeds' are both given. 'seeds' trains all of its seeds together, 'seed' is one alone; "
            "remove one of the two."
        )
    if stage not in ALGORITHMS.values():
        raise DydiffError(f"{path.name}: only policies train with several seeds together, not a {stage} model. Give one 'seed'.")
    if not seeds or len(set(seeds)) < len(seeds):
        raise DydiffError(f"{path.name}: constants.seeds must name different seeds, at least one, not {show(seeds)}.")


def _find_stage(sections: set[str], script_path: str, path: Path) -> str:
    """What an experiment trains: told by its sections; `script_path` decides between models, and may not contradict."""
    stages = [name for section, name in ALGORITHMS.items() if section in sections]
    stages = stages or [name for section, name in STAGE_SECTIONS.items() if section in sections]
    script = Path(script_path).name.lower()
    named = [stage for word, stage in SCRIPT_WORDS.items() if word in script]
    if named and stages and not set(named) & set(stages):
        raise DydiffError(
            f"{path.name}: meta_data.script_path '{script_path}' names {named[0]}, but the sections in 'constants' ask for "
            f"{' and '.join(stages)}. Correct one of them."
        )
    stages = [stage for stage in stages if stage in named] or stages
    if len(stages) != 1:
        found = " and ".join(stages) or "none of them"
        raise DydiffError(
            f"{path.name}: cannot tell what to train. 'constants' needs exactly one of td3_bc_params, diffql_params, "
            "cql_params and agent_params (a policy), or else one of dyn_model_params (dynamics) and model_params (reward); it asks "
            f"for {found}."
        )
    return stages[0]


def _insist_on_use(keys: Iterable[str], stage: str, path: Path) -> None:
    """Whoever varies or overrides a setting means it to matter; a section that a file merely holds may be for another stage."""
    own = [section for section, name in (ALGORITHMS | STAGE_SECTIONS).items() if name == stage]
    for section in {key.partition(".")[0]: None for key in keys}:
        shared = section in COMMON or (stage in ALGORITHMS.values() and section not in ALGORITHMS)
        if section not in own and not shared:
            raise DydiffError(
                f"{path.name} trains {stage}, which does not use {section}: varying or setting it would change nothing. What is "
                f"particular to {stage} stands under {' and '.join(own)}."
            )


def _complete(settings: Constants, stage: str) -> Constants:
    """Fill the sections that the stage uses and the file leaves out, so that every run folder shows the complete settings."""
    filled = {}
    for section, defaults in SECTION_DEFAULTS.items():
        if section not in ALGORITHMS or ALGORITHMS[section] == stage:
            filled[section] = getattr(settings, section) or defaults()
    return dataclasses.replace(settings, **filled)


def _dataset_differences(path: Path, dataset: str, sections: set[str]) -> dict:
    """The entry of `datasets.yaml` for a dataset, less the sections that this experiment does not have."""
    for folder in path.resolve().parents:
        candidate = folder / "datasets.yaml"
        if candidate.is_file():
            entry = _mapping(read_yaml(candidate), dataset, candidate)
            return {key: value for key, value in entry.items() if key not in ALGORITHMS or key in sections}
    say(f"No datasets.yaml lies beside {path} or above: what differs from one dataset to the next is not applied to {dataset}.")
    return {}


def _mapping(content: dict, key: str, path: Path) -> dict:
    value = content.get(key)
    if value is not None and not isinstance(value, dict):
        raise DydiffError(f"{path.name}: '{key}' must be a mapping, not {show(value)}.")
    return copy.deepcopy(value or {})


def _parse_override(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise DydiffError(f"--set takes key=value, for example rl_trainer_params.num_epochs=2; '{text}' is not of that form.")
    return key.strip().removeprefix("constants."), parse_yaml(value, f"--set {text[:80]}: the value is not YAML")


def _assign(tree: dict, dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for name in parents:
        if tree.get(name) is None:
            tree[name] = {}
        tree = tree[name]
        if not isinstance(tree, dict):
            raise DydiffError(f"'{dotted}' cannot be set: '{name}' is a value, not a section with settings of its own.")
    tree[last] = value


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name: lists are leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _merge(below: dict, above: dict) -> dict:
    merged = copy.deepcopy(below)
    for key, value in above.items():
        # A section with nothing under it reads as None, and takes nothing away from the one below.
        both = isinstance(merged.get(key), dict) and (value is None or isinstance(value, dict))
        merged[key] = _merge(merged[key], value or {}) if both else value
    return merged
