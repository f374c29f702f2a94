"""Import of published checkpoints: every tensor comes out bit-equal, what does not fit is told, and experiments take them."""

from __future__ import annotations

import pickle
import zipfile

import numpy as np
import pytest
import standins
import tiny
import torch
from standins import dump, make_diffusion_policy, make_layers, make_policy, make_snapshot, save_with_joblib, save_with_torch

from dydiff.checkpoint import load_checkpoint
from dydiff.data import Limits
from dydiff.errors import DydiffError
from dydiff.experiments.policy_stage import make_importer
from dydiff.importing import Importer
from dydiff.importing.files import read_published
from dydiff.importing.records import named_tensors, to_array
from dydiff.models import load_diffusion_model, load_dynamics, load_policy, load_reward
from dydiff.networks.published import rename_unet
from dydiff.problem import load_problem

OBS, ACT = 4, 2  # columns of maze2d, which the fixtures collect


@pytest.fixture
def importer(dataset) -> Importer:
    return make_importer(load_problem(dataset))


@pytest.fixture
def bounds(importer) -> tuple[np.ndarray, np.ndarray]:
    limits = Limits.from_dataset(importer.dataset)
    return limits.minimum.numpy(), limits.maximum.numpy()


def assert_bit_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


# What comes out


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_diffusion_model(importer, bounds, tmp_path, protocol):
    snapshot = make_snapshot(*bounds, horizon=12, dim_mults=[1, 2, 4])
    product = importer.read(dump(snapshot, protocol), "network-snapshot-000001.pkl")
    importer.save(product, tmp_path / "model.safetensors")
    model = load_diffusion_model(tmp_path / "model.safetensors", importer.dataset)
    weights = snapshot["ema"].state_dict()
    assert_bit_equal(model.denoiser.network.state_dict(), rename_unet(weights))
    assert torch.equal(model.limits.minimum, torch.tensor(bounds[0])) and torch.equal(
        model.limits.maximum, torch.tensor(bounds[1])
    )
    network = {"kind": "UNet_RL", "data_dim": OBS + ACT, "dim": 8, "dim_mults": [1, 2, 4], "kernel_size": 5, "horizon": 12}
    assert model.manifest["network"] == network and model.horizon == 12
    assert model.manifest["include_action"] and model.manifest["use_cond"] and model.manifest["cond_on_action"]
    assert model.manifest["observation_dim"] == OBS and not product.notes
    imported = model.manifest["imported"]
    assert imported["file"] == "network-snapshot-000001.pkl" and len(imported["source_sha256"]) == 1
    assert "SystemExit" not in (tmp_path / "model.safetensors").read_bytes().decode("latin1"), "the source was copied"


def test_embedded_objects_are_read_as_data(bounds):
    tree = read_published(dump(make_snapshot(*bounds)), "x")
    dataset = tree["ema"].state["dataset"]
    assert dataset.name == "persistent.TrajectoryDataset" and to_array(dataset.state["horizon"]) == 8
    assert np.array_equal(to_array(dataset.state["rows"]), np.stack(bounds)) and dataset.state["names"] == {"maze", "local"}
    bound_method = dataset.state["normalize"]
    assert bound_method.name == "builtins.getattr" and bound_method.arguments == (dataset.state["normalizer"], "normalize")
    assert to_array(dataset.state["labels"]) is None, "an array of objects"
    assert dict(tree["dataset_kwargs"].items) == {"path": "x", "use_labels": False}
    assert "cache" not in named_tensors(tree["ema"])


FORMATS = {
    "zip": save_with_torch,
    "older torch": lambda tree: save_with_torch(tree, zipped=False),
    "pickle": dump,
    "joblib": save_with_joblib,
}


@pytest.mark.parametrize("form", FORMATS)
def test_reward_model(importer, tmp_path, form):
    weights = make_layers([OBS + ACT, 7, 5, 1])
    importer.save(importer.read(FORMATS[form](weights), "reward.pkl"), tmp_path / "reward.safetensors")
    model = load_reward(tmp_path / "reward.safetensors", importer.dataset)
    assert_bit_equal(model.network.state_dict(), weights)


@pytest.mark.parametrize("form", FORMATS)
def test_dynamics_model_with_elites_and_bounds(importer, tmp_path, form):
    weights = make_layers([OBS + ACT, 7, 7, 2 * OBS], num_nets=6)
    more = {"elite_indices": torch.tensor([4, 0, 5]), "max_logvar": torch.full((1, OBS), 0.25), "steps": torch.tensor(3)}
    product = importer.read(FORMATS[form]({**weights, **more}), "dynamics.pkl")
    importer.save(product, tmp_path / "dynamics.safetensors")
    model = load_dynamics(tmp_path / "dynamics.safetensors", importer.dataset)
    assert_bit_equal(model.network.state_dict(), weights)
    assert model.elites.tolist() == [4, 0, 5] and (model.max_log_var == 0.25).all() and (model.min_log_var == -10).all()
    assert any("taken at its word" in note for note in product.notes) and "Not used: steps." in product.notes


def test_elites_are_measured_where_the_file_names_none(importer):
    weights = {name: 0.1 * value for name, value in make_layers([OBS + ACT, 7, 2 * OBS], num_nets=7).items()}
    for name in weights:
        weights[name][2] *= 100
        weights[name][5] *= 50
    product = importer.read(save_with_torch(weights), "dynamics.pkl")
    assert sorted(product.tree["elites"].tolist()) == [0, 1, 3, 4, 6]
    assert any("smallest error on the dataset" in note for note in product.notes)


@pytest.mark.parametrize("spread", [False, True])
def test_td3_bc_policy(importer, tmp_path, spread):
    networks = make_policy(OBS, ACT, spread)
    importer.save(importer.read(save_with_joblib(networks), "params.pkl"), tmp_path / "agent.safetensors")
    policy = load_policy(tmp_path / "agent.safetensors")
    assert policy.manifest["algorithm"] == "td3_bc" and policy.manifest["model"]["hidden_dims"] == [8, 8]
    for ours, theirs in ((policy.agent.policy, "policy"), (policy.agent.target_policy, "target_policy")):
        expected = dict(networks[theirs].state_dict())
        if spread:
            for kind in ("weight", "bias"):
                head = expected.pop(f"last_log_std.{kind}")
                expected[f"layers.2.{kind}"] = torch.cat([expected[f"layers.2.{kind}"], head])
        assert_bit_equal(ours.network.state_dict(), expected)
    for index in (0, 1):
        assert_bit_equal(policy.agent.critics.member_state_dict(index), networks[f"qf{index + 1}"].state_dict())
        assert_bit_equal(policy.agent.target_critics.member_state_dict(index), networks[f"target_qf{index + 1}"].state_dict())
    assert policy(np.zeros((3, OBS))).shape == (3, ACT)


def test_a_policy_alone_can_act(importer):
    product = importer.read(save_with_joblib(make_policy(OBS, ACT)["policy"]), "policy.pkl")
    assert product.kind == "policy" and any("no critics" in note for note in product.notes)


def test_diffusion_ql_policy(importer, tmp_path):
    networks = make_diffusion_policy(OBS, ACT)
    importer.save(importer.read(save_with_joblib(networks), "params.pkl"), tmp_path / "agent.safetensors")
    agent = load_policy(tmp_path / "agent.safetensors").agent
    assert agent.actor.n_timesteps == 5
    for actor, name in ((agent.actor, "policy"), (agent.ema_actor, "ema")):
        weights = networks[name].state_dict()
        for theirs, ours in standins.PUBLISHED_NAMES.items():
            assert torch.equal(actor.state_dict()[f"{ours}.weight"], weights[f"model.{theirs}.weight"])
    assert_bit_equal(agent.target_critics.member_state_dict(1), networks["qf2"].state_dict())
    with pytest.raises(DydiffError, match="no critics"):
        importer.read(save_with_joblib({"policy": networks["policy"]}), "params.pkl")


def test_tensors_of_every_type_and_layout():
    base = torch.arange(24, dtype=torch.float64)
    tree = {
        str(kind): torch.ones(3, dtype=kind) for kind in (torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool)
    }
    tree |= {"transposed": base.view(4, 6).T, "slice": base[5:17:3], "0-dim": base[3], "empty": torch.empty(0, 4)}
    tree |= {"parameter": torch.nn.Parameter(base), "shared": base}
    for content in (save_with_torch(tree), save_with_torch(tree, zipped=False), dump(tree, 2), dump(tree)):
        assert_bit_equal(read_published(content, "x"), {name: value.detach() for name, value in tree.items()})


def test_arrays_in_joblib_files():
    tree = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": [np.asfortranarray(np.eye(3)[:2])],
        "c": np.empty(0),
        "d": 1,
    }
    read = read_published(save_with_joblib(tree), "x")
    for ours, theirs in ((read["a"], tree["a"]), (read["b"][0], tree["b"][0]), (read["c"], tree["c"])):
        assert np.array_equal(to_array(ours), theirs) and to_array(ours).dtype == theirs.dtype
    assert read["d"] == 1


# What does not fit


def test_snapshot_of_other_data(importer, bounds):
    low, high = bounds
    shifted = low - [0, 0.01, 0, 0, 0, 0]
    with pytest.raises(DydiffError, match=r"'x.pkl'.*no limits that equal.*in column 1, whose minimum in the dataset is"):
        importer.read(dump(make_snapshot(shifted.astype(np.float32), high)), "x.pkl")
    with pytest.raises(DydiffError, match="7 columns; dataset '.*' has 4, or 6 with actions"):
        importer.read(dump(make_snapshot(np.append(low, 0), np.append(high, 1))), "x.pkl")


def test_horizon_of_a_snapshot(importer, bounds):
    silent = make_snapshot(*bounds)
    del silent["ema"]._init_kwargs["horizon"]
    silent["ema"].dataset.horizon = None
    with pytest.raises(DydiffError, match="does not say its horizon.*--horizon H"):
        importer.read(dump(silent), "x.pkl")
    importer.horizon = 16
    assert importer.read(dump(silent), "x.pkl").manifest["network"]["horizon"] == 16
    with pytest.raises(DydiffError, match=r"says its horizon is \[8\], not 16"):
        importer.read(dump(make_snapshot(*bounds)), "x.pkl")
    for senseless in (0, -4, 1 << 40):
        silent["ema"].dataset.horizon = senseless
        importer.horizon = None
        with pytest.raises(DydiffError, match=f"horizon of {senseless} is not"):
            importer.read(dump(silent), "x.pkl")
    silent["ema"].dataset.horizon = None
    importer.horizon = 7
    with pytest.raises(DydiffError, match="divisible by 2"):
        importer.read(dump(silent), "x.pkl")


def change_snapshot(bounds, change) -> bytes:
    snapshot = make_snapshot(*bounds)
    change(snapshot["ema"])
    return dump(snapshot)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda ema: setattr(ema, "sigma_data", 1.0), "sigma_data = 1.0"),
        (lambda ema: setattr(ema, "model", torch.nn.Linear(2, 2)), "not a UNet_RL"),
        (lambda ema: ema.register_buffer("more", torch.ones(2)), "more: .2,., not there"),
        (lambda ema: ema.model.final_conv[1].weight.fill_(float("nan")), "final_conv.weight.*finite"),
        (lambda ema: delattr(ema.model, "mid_block2"), "middle.1.*missing"),
    ],
)
def test_networks_that_are_not_ours(importer, bounds, change, words):
    with pytest.raises(DydiffError, match=words):
        importer.read(change_snapshot(bounds, change), "x.pkl")


def test_one_step_models_that_do_not_fit(importer):
    for dims, num_nets, words in (
        ([9, 7, 1], 0, r"layers.0.weight.*\(7, 9\).*width 6.*dataset"),
        ([OBS + ACT, 7, 2], 0, "gives 2 numbers; a reward model gives one"),
        ([OBS + ACT, 7, OBS], 3, "gives 4 numbers; a dynamics model"),
    ):
        with pytest.raises(DydiffError, match=words):
            importer.read(save_with_torch(make_layers(dims, num_nets)), "x.pkl")
    weights = make_layers([OBS + ACT, 7, 2 * OBS], num_nets=3)
    for elites in ([0, 3], [-1], [], [1, 1]):
        with pytest.raises(DydiffError, match="elites"):
            importer.read(dump({**weights, "elites": elites}), "x.pkl")
    del weights["layers.1.bias"]
    with pytest.raises(DydiffError, match="biases of shape None"):
        importer.read(save_with_torch(weights), "x.pkl")


def test_policies_that_do_not_fit(importer):
    with pytest.raises(DydiffError, match="input of width 4"):
        importer.read(save_with_joblib(make_policy(OBS + 1, ACT)), "x.pkl")
    with pytest.raises(DydiffError, match="not those of a tanh-Gaussian policy"):
        importer.read(save_with_joblib(make_policy(OBS, ACT + 1)["policy"]), "x.pkl")
    with pytest.raises(DydiffError, match="no policy.*'qf1'"):
        importer.read(save_with_joblib({"qf1": make_policy(OBS, ACT)["qf1"]}), "x.pkl")
    networks = make_diffusion_policy(OBS, ACT)
    networks["policy"].betas.mul_(2)
    with pytest.raises(DydiffError, match="noise schedule of 5 steps is none of vp, linear, cosine"):
        importer.read(save_with_joblib(networks), "x.pkl")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "not a published checkpoint or is damaged"),
        (b"\x1f\x8b\x08rest", "format of gzip"),
        (b"\x89HDF\r\n", "format of HDF5"),
        (b"ZF0x10 ", "joblib before 0.10"),
        (b"version https://git-lfs.github.com/spec/v1\n", "damaged"),
        (pickle.dumps([1, "two"]), "neither a network nor tensors"),
        (pickle.dumps({"ema": 1, "dataset_kwargs": {}}), "'ema' is not a network"),
    ],
)
def test_other_files(importer, content, words):
    with pytest.raises(DydiffError, match=words):
        importer.read(content, "x.pkl")


# The command, and experiments


def test_command(command, dataset, importer, bounds, tmp_path):
    file = tmp_path / "network-snapshot-000001.pkl"
    file.write_bytes(dump(make_snapshot(*bounds)))
    outcome = command("import", file, "--dataset", dataset)
    assert outcome.status == 0 and outcome.output == f"Diffusion model: {file.with_suffix('.safetensors')}\n"
    _, manifest = load_checkpoint(file.with_suffix(".safetensors"), "diffusion model")
    assert manifest["dataset"] == dataset and manifest["fingerprint"] == importer.dataset.fingerprint
    for arguments, words in (
        ([file], "exists. Remove it, or name another file with --out"),
        ([tmp_path / "none.pkl"], "Cannot read '"),
        ([file, "--out", tmp_path / "x.safetensors", "--horizon", 16], "not 16"),
        ([file, "--out", file / "x.safetensors"], "Cannot write"),
    ):
        refusal = command("import", *arguments, "--dataset", dataset)
        assert refusal.status == 1 and not refusal.output and words in refusal.errors
        assert words in refusal.errors
    assert sorted(tmp_path.iterdir()) == [file, file.with_suffix(".safetensors")]


def test_experiment_files_that_name_published_files(command, dataset, bounds, tmp_path):
    files = {
        "network-snapshot-000002.pkl": dump(make_snapshot(*bounds)),
        "dynamics.pkl": save_with_torch({name: 0.1 * value for name, value in make_layers([OBS + ACT, 7, 2 * OBS], 5).items()}),
        "reward.pkl": save_with_torch(make_layers([OBS + ACT, 7, 1]), zipped=False),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    experiment = tiny.write_experiment(tmp_path / "experiment.yaml", "td3_bc", dataset)
    settings = [
        f"--set=diff_model_params.model_paths=[{tmp_path}/network-snapshot-000002.pkl]",
        f"--set=dyn_model_params.load_path={tmp_path}/dynamics.pkl",
        f"--set=model_params.load_path={tmp_path}/reward.pkl",
        "--set=rl_trainer_params.num_epochs=1",
    ]
    run = ["run", "-e", experiment, "--device=cpu", f"--outdir={tmp_path / 'runs'}"]
    outcome = command(*run, *settings)
    assert outcome.status == 0, outcome.errors
    assert "dynamics.pkl: The file names no elites" in outcome.output
    converted = sorted((tmp_path / "runs" / "imported").iterdir())
    assert [path.stem.rpartition("-")[0] for path in converted] == ["dynamics", "network-snapshot-000002", "reward"]
    times = [path.stat().st_mtime_ns for path in converted]
    assert command(*run, *settings).status == 0 and [path.stat().st_mtime_ns for path in converted] == times
    swapped = f"--set=dyn_model_params.load_path={tmp_path}/reward.pkl"
    (tmp_path / "reward.pkl").write_bytes(save_with_torch(make_layers([OBS + ACT, 5, 1])))
    refusal = command(*run, *settings, swapped)
    assert refusal.status == 1 and "holds a reward model, but a dynamics model is needed" in refusal.errors


def test_archives_are_torchs(tmp_path):
    content = tmp_path / "x.zip"
    for compression, words in (
        (zipfile.ZIP_DEFLATED, "compressed archive"),
        (zipfile.ZIP_STORED, "not a published checkpoint"),
    ):
        with zipfile.ZipFile(content, "w", compression) as archive:
            archive.writestr("archive/other", bytes(1000))
        with pytest.raises(DydiffError, match=words):
            read_published(content.read_bytes(), "x.pkl")
