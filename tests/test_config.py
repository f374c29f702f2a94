"""Settings: their types and ranges, what is refused and in which words, and that none is accepted and ignored."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import typing
from pathlib import Path

import pytest
import torch
import yaml
from conftest import refusal

from dydiff import config
from dydiff.agents import AGENTS
from dydiff.config import Constants, DiffQLParams, EnvSpecs, KeepCondition, MetaData, RLTrainerParams
from dydiff.experiments.experiment import ALGORITHMS
from dydiff.experiments.settings import from_mapping
from dydiff.filters import keep_mask
from dydiff.updates import MODES, PRECISIONS

REPOSITORY = Path(__file__).parents[1]
SECTIONS = [item for item in vars(config).values() if inspect.isclass(item) and dataclasses.is_dataclass(item)]


# Keys and types


def test_unknown_keys_name_the_nearest():
    assert "'x.discont': did you mean 'discount'?" in refusal(from_mapping, DiffQLParams, {"discont": 1}, "x")
    assert "valid keys are hidden_dims, discount" in refusal(from_mapping, DiffQLParams, {"zzzzzz": 1}, "x")
    assert "Unknown setting 'x.7'" in refusal(from_mapping, DiffQLParams, {7: 1}, "x")
    nested = {"rl_trainer_params": {"keep_condition": {"treshold": 0.5}}}
    assert "'x.rl_trainer_params.keep_condition.treshold': did you mean 'threshold'?" in refusal(
        from_mapping, Constants, nested, "x"
    )


@pytest.mark.parametrize("value, expected", [("3e-4", 3e-4), (1, 1.0), (0.5, 0.5), ("1", 1.0)])
def test_numbers_with_a_point_may_be_written_as_yaml_misreads_them(value, expected):
    lr = from_mapping(DiffQLParams, {"lr": value}, "x").lr
    assert lr == expected and isinstance(lr, float)


@pytest.mark.parametrize("value", [True, "fast", [1], None, math.nan, 10**400, "inf"])
def test_other_values_of_a_float_are_refused(value):
    assert "x.lr" in refusal(from_mapping, DiffQLParams, {"lr": value}, "x")


def test_whole_numbers_lists_words_and_flags():
    assert from_mapping(DiffQLParams, {"n_timesteps": 5.0}, "x").n_timesteps == 5
    for value in ("5", "5.0", "5e0"):
        assert from_mapping(DiffQLParams, {"n_timesteps": value}, "x").n_timesteps == 5
    for value in (5.5, "5.5", "", "five", True, math.inf, "inf", "1e999", None):
        assert "x.n_timesteps' must be of type int" in refusal(from_mapping, DiffQLParams, {"n_timesteps": value}, "x")
    assert from_mapping(DiffQLParams, {"hidden_dims": [1, 2]}, "x").hidden_dims == [1, 2]
    assert "must be a list" in refusal(from_mapping, DiffQLParams, {"hidden_dims": 256}, "x")
    assert "x.hidden_dims[1]" in refusal(from_mapping, DiffQLParams, {"hidden_dims": [256, "a"]}, "x")
    assert "x.beta_schedule" in refusal(from_mapping, DiffQLParams, {"beta_schedule": 3}, "x")
    for value in (1, "yes"):
        assert "x.lr_decay" in refusal(from_mapping, DiffQLParams, {"lr_decay": value}, "x")
    assert "must be a mapping of settings, not [1]" in refusal(from_mapping, DiffQLParams, [1], "x")


def test_optional_settings_and_the_word_that_stands_for_a_list():
    assert from_mapping(EnvSpecs, {"env_num": None}, "x").env_num is None
    assert "x.env_num" in refusal(from_mapping, EnvSpecs, {"env_num": "many"}, "x")
    for paths in ("auto", ["a", "b"]):
        settings = from_mapping(Constants, {"diff_model_params": {"model_paths": paths}}, "x")
        assert settings.diff_model_params.model_paths == paths
    assert "model_paths[0]" in refusal(from_mapping, Constants, {"diff_model_params": {"model_paths": [1]}}, "x")


def test_whole_numbers_as_published_files_write_them():
    settings = yaml.safe_load("{replay_buffer_size: 2e6, model_replay_buffer_size: 2.0e+6, batch_size: '256'}")
    params = from_mapping(Constants, {"rl_trainer_params": settings, "td3_bc_params": {"hidden_dims": ["256", 2e1]}}, "x")
    sizes = [params.rl_trainer_params.replay_buffer_size, params.rl_trainer_params.model_replay_buffer_size]
    sizes += [params.rl_trainer_params.batch_size, *params.td3_bc_params.hidden_dims]
    assert sizes == [2_000_000, 2_000_000, 256, 256, 20] and {type(size) for size in sizes} == {int}
    assert from_mapping(Constants, {"seed": str(2**63 - 1)}, "x").seed == 2**63 - 1  # which no float holds
    assert "must be at least 0" in refusal(from_mapping, Constants, {"seed": "-1"}, "x")


def test_one_gpu_may_stand_for_a_list_of_them():
    for value in (1, "1", 1.0):
        assert from_mapping(MetaData, {"gpu": value}, "x").gpu == [1]
    for value in (True, "0,1", None, {}, -1):
        assert "x.gpu" in refusal(from_mapping, MetaData, {"gpu": value}, "x")
    assert "must be a list" in refusal(from_mapping, Constants, {"seeds": 3}, "x")  # the seed 3, or three of them?


def test_a_text_with_nothing_behind_its_key_is_the_default():
    assert from_mapping(MetaData, dict.fromkeys(("exp_name", "description", "script_path")), "x") == MetaData()
    nothing = {"model_params": {"load_path": None}, "diff_model_params": {"model_paths": None}, "env_specs": {"env_name": None}}
    settings = from_mapping(Constants, nothing, "x")
    assert settings.model_params.load_path == settings.diff_model_params.model_paths == "auto"
    assert settings.env_specs.env_name is None
    assert "model_paths[0]" in refusal(from_mapping, Constants, {"diff_model_params": {"model_paths": [None]}}, "x")


def test_the_home_folder_in_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/here")
    paths = {"model_params": {"load_path": "~/a"}, "diff_model_params": {"model_paths": ["~/b", "c~"]}}
    settings = from_mapping(Constants, paths, "x")
    assert settings.model_params.load_path == "/here/a" and settings.diff_model_params.model_paths == ["/here/b", "c~"]
    assert from_mapping(Constants, {"dyn_model_params": {"load_path": "~\0"}}, "x").dyn_model_params.load_path == "~\0"
    assert from_mapping(MetaData, {"description": "~/a"}, "x").description == "~/a"


def test_a_section_with_nothing_under_it_is_asked_for():
    assert from_mapping(Constants, {"td3_bc_params": None}, "x").td3_bc_params == config.TD3BCParams()
    assert from_mapping(Constants, {}, "x").td3_bc_params is None


def test_numbers_out_of_range():
    for section, values in {
        "rl_trainer_params": {"num_epochs": 0, "real_ratio": -0.1, "rollout_length": -2, "freq_saving": -1},
        "sampler_kwargs": {"num_steps": 1, "iterative_times": -1, "S_churn": -1.0, "S_noise": math.inf},
        "td3_bc_params": {"discount": 1.1, "tau": -0.1, "policy_lr": 0},
    }.items():
        for name, value in values.items():
            message = refusal(from_mapping, Constants, {section: {name: value}}, "x")
            assert f"'x.{section}.{name}' must be" in message and message.endswith(f"not {type_of(section, name)(value)}.")
    fine = {"sampler_kwargs": {"S_max": math.inf, "iterative_times": 0}, "rl_trainer_params": {"real_ratio": 0}}
    assert from_mapping(Constants, fine, "x").sampler_kwargs.iterative_times == 0


def type_of(section: str, name: str) -> type:
    return type(getattr(from_mapping(Constants, {section: {}}, "x").__dict__[section], name))


def test_every_default_is_within_its_range():
    """A file that spells the defaults out means the same as one that leaves them away."""
    for section in SECTIONS:
        spelled_out = {name: value for name, value in dataclasses.asdict(section()).items() if value is not None}
        assert from_mapping(section, spelled_out, "x") == section()


def test_words_to_choose_from_are_those_that_the_parts_know():
    hints = typing.get_type_hints(RLTrainerParams)
    assert typing.get_args(hints["update_mode"]) == MODES
    assert typing.get_args(hints["update_precision"]) == PRECISIONS
    for word in typing.get_args(typing.get_type_hints(KeepCondition)["filter_type"]):
        assert keep_mask(torch.zeros(4), word, 0.5, 1.0, torch.Generator()).any()
    for word in typing.get_args(typing.get_type_hints(DiffQLParams)["beta_schedule"]):
        AGENTS["diffusion_ql"](2, 1, hidden_dims=[4], beta_schedule=word, generator=torch.Generator())
    assert "must be one of auto, eager, compiled, graph, not 'compled' (did you mean 'compiled'?)" in refusal(
        from_mapping, RLTrainerParams, {"update_mode": "compled"}, "x"
    )
    for value in (3, None, ["eager"], True):
        assert "x.update_mode' must be one of" in refusal(from_mapping, RLTrainerParams, {"update_mode": value}, "x")


def test_values_are_shown_cut():
    for value in ("x" * 10**5, list(range(10**5)), 16**9000, {1: {2: {3: {4: {5: {6: {7: {8: 9}}}}}}}}):
        assert len(refusal(from_mapping, DiffQLParams, {"lr": value}, "x")) < 300


# Nothing is accepted and ignored


def read_names() -> set[str]:
    """Every attribute that is read anywhere in dydiff/ but in config.py."""
    names = set()
    for file in REPOSITORY.glob("dydiff/**/*.py"):
        if file.name != "config.py":
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    names.add(node.attr)
    return names


def test_every_setting_is_read():
    hints = typing.get_type_hints(Constants)
    algorithms = {typing.get_args(hints[section])[0]: AGENTS[name] for section, name in ALGORITHMS.items() if name in AGENTS}
    read = read_names() | set(ALGORITHMS)  # the algorithms' sections are found by name
    for section in SECTIONS:
        # An algorithm's settings are its constructor's arguments.
        taken = set(inspect.signature(algorithms[section]).parameters) if section in algorithms else read
        ignored = {field.name for field in dataclasses.fields(section)} - taken
        assert not ignored, f"{section.__name__} has settings that nothing reads: {ignored}"


def test_algorithm_defaults_agree_with_the_constructors():
    hints = typing.get_type_hints(Constants)
    for section, name in ALGORITHMS.items():
        if name not in AGENTS:  # anybody's own
            continue
        settings = dataclasses.asdict(typing.get_args(hints[section])[0]())
        for parameter in inspect.signature(AGENTS[name]).parameters.values():
            if parameter.name in settings:
                ours = settings[parameter.name]
                assert (tuple(ours) if isinstance(ours, list) else ours) == parameter.default, (name, parameter.name)
