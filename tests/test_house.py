"""The rules of the house, enforced on the code: who may import whom, no catch-all arguments, docstrings, no machine's paths."""

from __future__ import annotations

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = {"dydiff": REPOSITORY / "dydiff", "dydiff.kernels": REPOSITORY / "kernels"}


def module_name(file: Path) -> str:
    package, root = next((name, root) for name, root in PACKAGES.items() if root in file.parents)
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join([package, *(part for part in parts if part != "__init__")])


FILES = {module_name(file): file for root in PACKAGES.values() for file in sorted(root.glob("**/*.py"))}
every_module = pytest.mark.parametrize("module", FILES)


@cache
def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


@cache
def imports(module: str) -> frozenset[str]:
    """Every module that a module names in an import, wherever in it; `from a import b` names a.b where that is a module."""
    found = set()
    for node in ast.walk(parse(FILES[module])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            modules = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            found |= modules or {node.module}
            if len(modules) < len(node.names):
                found.add(node.module)
    return frozenset(found)


def inside(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


# What a part may import of dydiff, besides itself. Parts that are not listed are the upper storeys, checked below.
FOUNDATION = ["dydiff.errors", "dydiff.references"]
LEAVES = [*FOUNDATION, "dydiff.data", "dydiff.environments", "dydiff.checkpoint"]
MAY_IMPORT = {
    "dydiff.errors": [],
    "dydiff.references": ["dydiff.errors"],
    "dydiff.kernels": FOUNDATION,
    "dydiff.checkpoint": [*FOUNDATION, "dydiff"],  # its version
    "dydiff.config": FOUNDATION,
    "dydiff.device": FOUNDATION,
    "dydiff.options": FOUNDATION,
    "dydiff.arguments": FOUNDATION,
    "dydiff.progress": [],
    "dydiff.finite": [],
    "dydiff.memory": [*FOUNDATION, "dydiff.progress"],
    "dydiff.ranges": [],
    "dydiff.reports.tables": [],
    "dydiff.reports.uncertainty": [],
    "dydiff.environments": FOUNDATION,
    "dydiff.data": [*FOUNDATION, "dydiff.environments"],
    "dydiff.evaluate": [*FOUNDATION, "dydiff.environments"],
    "dydiff.collecting": LEAVES,
    "dydiff.networks": [*FOUNDATION, "dydiff.kernels"],
    "dydiff.diffusion": [
        *FOUNDATION,
        "dydiff.kernels",
        "dydiff.networks",
        "dydiff.data",
        "dydiff.capture",
        "dydiff.device",
        "dydiff.finite",
    ],
    "dydiff.fit": [*FOUNDATION, "dydiff.capture", "dydiff.data", "dydiff.finite"],
    "dydiff.dynamics": [*FOUNDATION, "dydiff.data", "dydiff.networks"],
    "dydiff.reward": [*FOUNDATION, "dydiff.data", "dydiff.networks"],
    "dydiff.agents": [*FOUNDATION, "dydiff.data", "dydiff.networks", "dydiff.kernels"],
    "dydiff.filters": FOUNDATION,
    "dydiff.replay": [*FOUNDATION, "dydiff.data"],
    "dydiff.capture": FOUNDATION,
    "dydiff.child": [],
    "dydiff.versions": ["dydiff", "dydiff.device", "dydiff.kernels"],
}
# From the bottom up: a module here may import any part above it in this list, and everything in MAY_IMPORT.
STOREYS = [
    "dydiff.backends",
    "dydiff.rollout_checks",
    "dydiff.rollout",
    "dydiff.models",
    "dydiff.importing",
    "dydiff.updates",
    "dydiff.evaluation_worker",
    "dydiff.trainer",
    "dydiff.runs",
    "dydiff.problem",
    "dydiff.experiments",
    "dydiff.data_tools",
    "dydiff.reports",
    "dydiff.cli",
]
KNOW_THE_SETTINGS = ["dydiff.experiments", "dydiff.reports.policy_runs", "dydiff.cli"]


@every_module
def test_who_may_import_whom(module):
    part = max((name for name in [*MAY_IMPORT, *STOREYS] if inside(module, name)), key=len, default=None)
    assert part or module == "dydiff", f"{module} has no place: add it to MAY_IMPORT or STOREYS, and to DESIGN section 1"
    ours = {name for name in imports(module) if inside(name, "dydiff") and not (part and inside(name, part))}
    if module == "dydiff":
        assert not ours, "importing dydiff must import nothing of it"
    elif part in MAY_IMPORT:
        allowed = MAY_IMPORT[part]
        wrong = {
            name for name in ours if not inside(name, *(each for each in allowed if each != "dydiff")) and name not in allowed
        }
        assert not wrong, f"{module} may import {allowed}, not {sorted(wrong)}"
    else:
        below = STOREYS[: STOREYS.index(part)]
        wrong = {name for name in ours if not inside(name, *MAY_IMPORT, *below) and name != "dydiff"}
        assert not wrong, f"{module} may not import {sorted(wrong)}, which stand above it"


@every_module
def test_only_the_upper_storeys_know_the_settings(module):
    if module != "dydiff.config" and not inside(module, *KNOW_THE_SETTINGS):
        assert not imports(module) & {"dydiff.config", "dydiff.experiments.experiment"}


@every_module
def test_nothing_imports_tests_benchmarks_or_profiling(module):
    assert not [
        name for name in imports(module) if inside(name, "tests", "conftest", "tiny", "benchmarks", "profiling", "pytest")
    ]


def test_the_rules_that_the_design_spells_out_hold_transitively():
    """Agents never reach rollout, trainer or diffusion; networks and diffusion not rollout; kernels errors only."""

    def reach(module: str) -> set[str]:
        found, pending = set(), [module]
        while pending:
            for name in imports(pending.pop()):
                if name in FILES and name not in found:
                    found.add(name)
                    pending.append(name)
        return found

    forbidden = {
        "dydiff.agents": ["dydiff.rollout", "dydiff.trainer", "dydiff.diffusion"],
        "dydiff.networks": ["dydiff.rollout", "dydiff.trainer", "dydiff.agents", "dydiff.diffusion"],
        "dydiff.diffusion": ["dydiff.rollout", "dydiff.trainer", "dydiff.agents"],
        "dydiff.rollout": ["dydiff.trainer", "dydiff.agents", "dydiff.experiments"],
        "dydiff.trainer": ["dydiff.experiments", "dydiff.cli", "dydiff.config"],
    }
    for part, parts in forbidden.items():
        for module in FILES:
            if inside(module, part):
                assert not [name for name in reach(module) if inside(name, *parts)], module
    for module in FILES:
        if inside(module, "dydiff.kernels"):
            outside = {name for name in reach(module) if not inside(name, "dydiff.kernels")}
            assert outside <= {"dydiff.errors"}, module


def test_torch_compile_and_graphs_live_in_capture_alone():
    users = set()
    for module, file in FILES.items():
        for node in ast.walk(parse(file)):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "torch.compile",
                "torch.cuda.CUDAGraph",
                "torch.cuda.graph",
            ):
                users.add(module)
    assert users <= {"dydiff.capture"}


@every_module
def test_no_function_swallows_misspelt_arguments(module):
    for node in ast.walk(parse(FILES[module])):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            assert node.args.kwarg is None, f"{module}:{node.lineno} takes **{node.args.kwarg.arg}"


@every_module
def test_public_names_are_documented(module):
    tree = parse(FILES[module])
    assert ast.get_docstring(tree), f"{module} has no docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            if any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list):
                continue  # its module's docstring has the formula
            assert ast.get_docstring(node), f"{module}.{node.name} has no docstring"


@every_module
def test_the_global_generators_are_left_alone(module):
    """Randomness comes from a generator that is handed in; the stages alone seed torch's, which initialises networks."""
    drawing = re.compile(r"\b(np\.random\.(?!default_rng|Generator|SeedSequence)\w+|random\.(random|choice|shuffle|seed))\(")
    found = [match.group() for match in drawing.finditer(FILES[module].read_text())]
    assert not found, f"{module} draws from a global generator: {found}"
    for node in ast.walk(parse(FILES[module])):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "torch.rand",
            "torch.randn",
            "torch.randint",
            "torch.randperm",
        ):
            initialises = inside(module, "dydiff.networks")
            assert initialises or "generator" in {word.arg for word in node.keywords}, f"{module}:{node.lineno}"


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [file for name in listing.stdout.split("\0") if name and (file := REPOSITORY / name).is_file()]


def test_no_tracked_file_holds_a_path_of_some_machine():
    machine = re.compile(r"(?<![\w.~])/(home|root|Users|work|mnt|scratch)/\w+")
    for file in tracked_files():
        try:
            text = file.read_text()
        except UnicodeDecodeError:
            continue
        if file != Path(__file__):
            assert not machine.search(text), f"{file}: {machine.search(text).group()}"
