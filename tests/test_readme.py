"""The README's example is run as it stands, and its commands exist."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import tiny

from dydiff.cli import COMMANDS

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()


def test_library_example(trained, dataset, command, tmp_path, monkeypatch, capsys):
    """Runs of the four kinds stand where the example looks for them; its code is not touched."""
    root = shutil.copytree(trained, tmp_path / "trained")
    file = tiny.write_experiment(tmp_path / "policy.yaml", "td3_bc", dataset)
    assert command("run", "-e", file, "--device=cpu", f"--outdir={root}").status == 0
    places = {"diffusion model": "diffusion", "dynamics model": "dynamics", "reward model": "reward", "policy": "policy"}
    (tmp_path / "runs").mkdir()
    for record in root.glob("*/run.json"):
        (tmp_path / "runs" / places[json.loads(record.read_text())["kind"]]).symlink_to(record.parent)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    capsys.readouterr()
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["trajectory"].observation.shape == (16, names["diffusion"].horizon, 4)
    assert len(names["start"]) == 16 and capsys.readouterr().out.startswith("tensor(")


def test_commands_and_files_that_the_readme_names_exist():
    code = "\n".join(re.findall(r"```\w*\n(.*?)```", README, re.S) + re.findall(r"`([^`\n]+)`", README))
    commands = set(re.findall(r"^dydiff ([a-z][a-z-]*)", code, re.M))
    assert commands and commands <= set(COMMANDS)
    files = re.findall(r"\b(?:exp_specs|tests|dydiff|benchmarks|profiling|docs)/[\w./-]+\w", code)
    assert files and all((REPOSITORY / file).exists() for file in files)
