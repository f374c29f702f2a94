"""Experiment files: what they may say, what is refused and in which words, and the variants that they stand for."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml
from conftest import refusal

from dydiff.config import DiffQLParams
from dydiff.experiments.experiment import load_experiment
from dydiff.experiments.identity import describe, label

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def write(tmp_path):
    """Writes an experiment file: a mapping, or the text of it."""

    def write_file(content: dict | str) -> Path:
        path = tmp_path / "spec.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return path

    return write_file


def td3(**constants: object) -> dict:
    return {"constants": {"dataset_name": "hopper-medium-v2", "td3_bc_params": {}, **constants}}


# Files


def test_files_that_are_not_experiments(write, tmp_path):
    assert "Cannot read" in refusal(load_experiment, tmp_path / "none.yaml")
    assert "Is a directory" in refusal(load_experiment, tmp_path)
    assert "is not plain YAML" in refusal(load_experiment, write("a: [1"))
    assert "must be a YAML mapping, not list" in refusal(load_experiment, write("[1, 2]"))
    assert "must be a YAML mapping, not NoneType" in refusal(load_experiment, write(""))
    assert "'constants' must be a mapping, not 3" in refusal(load_experiment, write("constants: 3"))
    (tmp_path / "latin.yaml").write_bytes(b"constants: {description: \xff}")
    assert "is not plain YAML" in refusal(load_experiment, tmp_path / "latin.yaml")


def test_yaml_that_constructs_objects_is_refused(write, tmp_path):
    file = write(f'constants: !!python/object/apply:os.mkdir ["{tmp_path / "made"}"]')
    assert "is not plain YAML" in refusal(load_experiment, file)
    assert not (tmp_path / "made").exists()


def test_unknown_keys_of_a_file(write):
    message = refusal(load_experiment, write({"constnts": {}}))
    assert "constnts" in message and "did you mean 'constants'?" in message
    assert "meta_data.gpus': did you mean 'gpu'?" in refusal(load_experiment, write({**td3(), "meta_data": {"gpus": [0]}}))
    assert "constants.1'" in refusal(load_experiment, write("constants: {1: 2, td3_bc_params: {}, dataset_name: x}"))
    assert "constants.td3_bc_params.alhpa': did you mean 'alpha'?" in refusal(
        load_experiment, write(td3(td3_bc_params={"alhpa": 1}))
    )


def test_dataset_name_is_needed(write):
    assert "constants.dataset_name is missing" in refusal(load_experiment, write({"constants": {"td3_bc_params": {}}}))


# What is trained


@pytest.mark.parametrize(
    "section, script, stage",
    [
        ("dyn_model_params", "", "dynamics"),
        ("model_params", "", "reward"),
        ("td3_bc_params", "run_scripts/dydiff_td3bc.py", "td3_bc"),
        ("diffql_params", "", "diffusion_ql"),
        ("cql_params", "", "cql"),
    ],
)
def test_the_section_tells_what_is_trained(write, section, script, stage):
    content = {"constants": {"dataset_name": "x", section: {}}, "meta_data": {"script_path": script}}
    assert load_experiment(write(content)).variants[0].stage == stage


def test_a_dydiff_run_may_hold_the_models_sections_too(write):
    (variant,) = load_experiment(write(td3(model_params={"lr": 1e-3}, dyn_model_params={}))).variants
    assert variant.stage == "td3_bc" and variant.is_policy and variant.constants.model_params.lr == 1e-3


def test_ambiguous_and_contradicting_files(write):
    assert "asks for td3_bc and cql" in refusal(load_experiment, write(td3(cql_params={})))
    assert "asks for none of them" in refusal(load_experiment, write({"constants": {"dataset_name": "x"}}))
    both = {"dataset_name": "x", "model_params": {}, "dyn_model_params": {}}
    assert "asks for dynamics and reward" in refusal(load_experiment, write({"constants": both}))
    decided = {"constants": both, "meta_data": {"script_path": "run_scripts/rew_model_script.py"}}
    assert load_experiment(write(decided)).variants[0].stage == "reward"
    contradiction = {**td3(), "meta_data": {"script_path": "run_scripts/diffql_script.py"}}
    assert "names diffusion_ql, but the sections in 'constants' ask for td3_bc" in refusal(
        load_experiment, write(contradiction)
    )


def test_every_section_that_is_used_is_filled_with_its_defaults(write):
    (variant,) = load_experiment(write(td3())).variants
    assert variant.constants.model_params and variant.constants.dyn_model_params and variant.constants.td3_bc_params
    assert variant.constants.cql_params is None and variant.constants.diffql_params is None


# Variants


def test_every_combination_of_nested_and_dotted_variables_is_a_variant(write):
    variables = {"seed": [1, 2], "rl_trainer_params.keep_condition.threshold": [0.5, 0.6], "td3_bc_params": {"alpha": [1, 2.5]}}
    experiment = load_experiment(write({**td3(), "variables": variables, "meta_data": {"exp_name": "sweep"}}))
    found = [
        (v.constants.seed, v.constants.rl_trainer_params.keep_condition.threshold, v.constants.td3_bc_params.alpha)
        for v in experiment.variants
    ]
    assert found == list(itertools.product([1, 2], [0.5, 0.6], [1.0, 2.5]))
    last = experiment.variants[-1]
    assert last.choices == {"seed": 2, "rl_trainer_params.keep_condition.threshold": 0.6, "td3_bc_params.alpha": 2.5}
    assert label("sweep", last) == "sweep-threshold=0.6-alpha=2.5-s2"
    assert len({str(describe("sweep", variant)) for variant in experiment.variants}) == 8


def test_variants_do_not_share_their_settings(write):
    first, second = load_experiment(write({**td3(), "variables": {"seed": [1, 2]}})).variants
    first.constants.td3_bc_params.hidden_dims.append(7)
    assert second.constants.td3_bc_params.hidden_dims == [256, 256]


def test_variables_that_vary_nothing_or_too_much(write):
    for values in ([], 3, "ab", None):
        file = write({**td3(), "variables": {"seed": values}})
        assert "variable 'seed' must be a non-empty list" in refusal(load_experiment, file)
    many = {"seed": list(range(101)), "td3_bc_params": {"alpha": list(range(1, 101))}}
    assert "expands to 10,100 variants; the limit is 10,000" in refusal(load_experiment, write({**td3(), "variables": many}))
    assert "td3_bc_params.alpa" in refusal(load_experiment, write({**td3(), "variables": {"td3_bc_params.alpa": [1]}}))
    through_a_value = {"dataset_name.x": [1]}
    assert "'dataset_name' is a value, not a section" in refusal(
        load_experiment, write({**td3(), "variables": through_a_value})
    )


# Overrides


def test_overrides_win_over_everything(write):
    variables = {"seed": [1, 2], "td3_bc_params.alpha": [1, 2]}
    file = write({**td3(rl_trainer_params={"num_epochs": 5}), "variables": variables})
    overrides = [
        "rl_trainer_params.num_epochs=7",
        "td3_bc_params.alpha=9",
        "meta_data.num_workers=3",
        "variables.seed=[4, 5, 6]",
    ]
    experiment = load_experiment(file, overrides)
    assert experiment.meta.num_workers == 3
    assert [variant.constants.seed for variant in experiment.variants] == [4, 5, 6]
    for variant in experiment.variants:
        assert (variant.constants.rl_trainer_params.num_epochs, variant.constants.td3_bc_params.alpha) == (7, 9)
        assert variant.choices.keys() == {"seed"}


def test_an_override_wins_over_variables_above_and_below_it(write):
    below = write({**td3(), "variables": {"td3_bc_params.alpha": [1, 2]}})
    (variant,) = load_experiment(below, ["td3_bc_params={tau: 0.1}"]).variants
    assert (variant.constants.td3_bc_params.alpha, variant.constants.td3_bc_params.tau) == (2.5, 0.1)
    above = {"rl_trainer_params.keep_condition": [{"threshold": 0.1}, {"threshold": 0.2, "filter_type": "hardmax"}]}
    variants = load_experiment(
        write({**td3(), "variables": above}), ["rl_trainer_params.keep_condition.threshold=0.9"]
    ).variants
    kept = [variant.constants.rl_trainer_params.keep_condition for variant in variants]
    assert [(keep.filter_type, keep.threshold) for keep in kept] == [("softmax", 0.9), ("hardmax", 0.9)]


def test_the_last_of_two_overrides_wins_and_mistakes_are_named(write):
    file = write(td3())
    (variant,) = load_experiment(file, ["seed=1", "seed=2", "td3_bc_params.hidden_dims=[8, 8]"]).variants
    assert variant.constants.seed == 2 and variant.constants.td3_bc_params.hidden_dims == [8, 8]
    assert "'seed' is not of that form" in refusal(load_experiment, file, ["seed"])
    assert "the value is not YAML" in refusal(load_experiment, file, ["seed=[1"])
    assert "did you mean 'seed'?" in refusal(load_experiment, file, ["sed=1"])
    (variant,) = load_experiment(file, ["constants.seed=3"]).variants  # as messages name it
    assert variant.constants.seed == 3
    assert "meta_data.workers" in refusal(load_experiment, file, ["meta_data.workers=1"])


def test_an_override_asks_for_no_other_stage(write):
    """Settings of another algorithm may be overridden for a whole folder of files at once."""
    (variant,) = load_experiment(write(td3()), ["dyn_model_params.load_path=x"]).variants
    assert variant.stage == "td3_bc" and variant.constants.dyn_model_params.load_path == "x"


@pytest.mark.parametrize(
    ("own", "change"),
    [
        ("model_params", "td3_bc_params.alpha=9"),
        ("model_params", "dyn_model_params.lr=1.0"),
        ("dyn_model_params", "sampler_kwargs.num_steps=5"),
        ("td3_bc_params", "cql_params={}"),
    ],
)
def test_a_setting_that_the_stage_does_not_use_is_refused(write, own, change):
    content = {"constants": {"dataset_name": "maze", own: {}}}
    key, _, value = change.partition("=")
    message = refusal(load_experiment, write(content), [change])
    assert f"does not use {key.partition('.')[0]}" in message and f"stands under {own}" in message
    varied = {**content, "variables": {"sampler_kwargs.num_steps": [5, 6]}}
    assert own == "td3_bc_params" or "does not use sampler_kwargs" in refusal(load_experiment, write(varied))
    # A file may hold what is for another stage, and every stage has a dataset, a seed and an environment.
    both = {"constants": {**content["constants"], "rl_trainer_params": {"num_epochs": 3}}}
    assert load_experiment(write(both), ["seed=3", "env_specs.env_name=hopper", f"{own}={{}}"]).variants


# --dataset


@pytest.fixture
def with_differences(write, tmp_path):
    differences = {"maze": {"diffql_params": {"eta": 7.0, "lr": 1e-2}, "rl_trainer_params": {"num_epochs": 9}}, "wrong": 3}
    (tmp_path / "datasets.yaml").write_text(yaml.safe_dump(differences))

    def load(constants: dict, dataset: str = "maze", variables: dict | None = None):
        return load_experiment(write({"constants": constants, "variables": variables or {}}), dataset=dataset).variants

    return load


def test_another_dataset_brings_its_differences_below_the_files_settings(with_differences):
    (variant,) = with_differences(
        {"dataset_name": "hopper", "diffql_params": {"lr": 1e-3}}, variables={"dataset_name": ["a", "b"]}
    )
    settings = variant.constants
    assert (settings.dataset_name, settings.diffql_params.eta, settings.diffql_params.lr) == ("maze", 7.0, 1e-3)
    assert settings.rl_trainer_params.num_epochs == 9
    (variant,) = with_differences({"diffql_params": {}}, dataset="other")
    assert variant.constants.dataset_name == "other" and variant.constants.diffql_params == DiffQLParams()


def test_differences_reach_empty_sections_and_sections_named_by_variables_alone(with_differences):
    (variant,) = with_differences({"diffql_params": None})
    assert variant.constants.diffql_params.eta == 7.0
    (variant,) = with_differences({}, variables={"diffql_params.grad_norm": [3.0]})
    assert (variant.constants.diffql_params.eta, variant.constants.diffql_params.grad_norm) == (7.0, 3.0)


def test_differences_of_an_algorithm_that_is_not_run_are_left_out(with_differences):
    (variant,) = with_differences({"td3_bc_params": {}})
    assert variant.stage == "td3_bc" and variant.constants.rl_trainer_params.num_epochs == 9


def test_a_file_without_differences_above_it_says_so(write, with_differences, tmp_path, capsys):
    with_differences({"td3_bc_params": {}})
    assert "datasets.yaml" not in capsys.readouterr().err
    (tmp_path / "datasets.yaml").unlink()
    load_experiment(write({"constants": {"td3_bc_params": {}}}), dataset="maze")
    assert "what differs from one dataset to the next is not applied to maze" in capsys.readouterr().err


def test_differences_that_are_no_mapping(with_differences):
    assert "'wrong' must be a mapping, not 3" in refusal(with_differences, {"td3_bc_params": {}}, "wrong")


# The files that ship


def shipped() -> list[Path]:
    return sorted(file for file in REPOSITORY.glob("exp_specs/**/*.yaml") if "meta_data" in yaml.safe_load(file.read_text()))


@pytest.mark.parametrize("file", shipped(), ids=lambda file: file.stem)
def test_shipped_experiments_load(file):
    experiment = load_experiment(file)
    assert experiment.variants and experiment.meta.exp_name and experiment.meta.description


def test_shipped_differences_load_for_every_dataset():
    file = REPOSITORY / "exp_specs/dydiff_diffql/hardmax/dydiff_diffql_hopper_me_hardmax.yaml"
    differences = yaml.safe_load((REPOSITORY / "exp_specs/datasets.yaml").read_text())
    assert len(shipped()) >= 4 and differences
    for dataset, sections in differences.items():
        (variant,) = load_experiment(file, dataset=dataset).variants
        for name, value in sections["diffql_params"].items():
            assert getattr(variant.constants.diffql_params, name) == value
