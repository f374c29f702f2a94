"""The extension's build with nvcc, without it, with a broken one and without any compiler: installed and honest."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dydiff.kernels import native

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "kernels", "dydiff"]
ARCHITECTURES = ["sm_80", "sm_90"]

# Prints what an installation has, and takes a step with it. An editable install's finder would lend it its extension.
PROBE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
import torch
from dydiff.kernels import edm, native
x = torch.ones(2, 3, 4)
backend = edm.available_backend("cpu", torch.float32)
x_hat, _ = edm.churn_step(x, x, 1.0, 1.25, 1.0, backend=backend)
print(edm.__file__, backend, hasattr(native.extension, "cuda"), x_hat.sum().item())
print(edm.why_unavailable("cpu"), edm.why_unavailable("cuda"))
"""

# Whether it is built is asked here, not how well: optimising takes most of a build's time. The last -O counts. An object that
# another build of this session made of the same sources by the same arguments is not compiled again, only linked.
HASTY = """#!/bin/sh
for word; do
    [ "$before" = -o ] && output=$word
    before=$word
done
case " $* " in *" -c "*) kept={objects}/$( (echo "$*"; cat csrc/*) | cksum | tr " " -) ;; esac
[ -e "$kept" ] && exec cp "$kept" "$output"
c++ "$@" -O0 && if [ "$kept" ]; then cp "$output" "$kept"; fi
"""


class Installation:
    """The package built from a copy of the sources in an environment of its own, and unpacked."""

    def __init__(self, folder: Path, **environment: str):
        source, wheels, self.site = folder / "source", folder / "wheels", folder / "site"
        source.mkdir()
        for name in SOURCES:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("_native*", "__pycache__"))
            elif (ROOT / name).exists():
                shutil.copy(ROOT / name, source / name)
        hidden = folder / "hidden"
        hidden.mkdir()
        (hidden / "torch.py").write_text("raise ImportError('the build must not need torch')\n")
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-v",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            wheels,
            source,
        ]
        hasty, objects = folder / "hasty-c++", folder.parent / "objects"
        objects.mkdir(exist_ok=True)
        hasty.write_text(HASTY.format(objects=objects))
        hasty.chmod(0o755)
        compilers = {"CC": str(hasty), "CXX": str(hasty), "NVCC_APPEND_FLAGS": "-Xcompiler -O0"}
        build = {"PYTHONPATH": str(hidden), **compilers, **environment}
        self.log = run(command, folder, **build)
        (wheel,) = wheels.glob("dydiff-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(self.site)

    @property
    def binaries(self) -> list[Path]:
        return list(self.site.glob("dydiff/kernels/_native*.so"))

    def probe(self) -> str:
        output = run([sys.executable, "-W", "ignore", "-c", PROBE], self.site, PYTHONPATH=str(self.site))
        assert output.startswith(str(self.site)), output
        return output


def run(command: list[str | Path], folder: Path, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH", "PYTHONPATH")}
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env={**inherited, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_with_nvcc_both_units_are_built(tmp_path):
    """By the installation that runs here: another one would take a minute to say the same."""
    root = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which(str(Path(root, "bin", "nvcc")) if root else "nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH or in CUDA_HOME")
    binary = Path(native.extension.__file__)
    report = binary.with_name("_native_build.txt").read_text()
    assert f"built the CPU and the CUDA unit with {nvcc}" in report, "install again, with the nvcc that is here now"
    assert hasattr(native.extension, "cuda")
    triton = pytest.importorskip("triton", reason="cuobjdump comes with triton")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    images = run([cuobjdump, "--list-elf", "--list-ptx", binary], tmp_path)
    for wanted in [f"{architecture}.cubin" for architecture in ARCHITECTURES] + ["sm_90.ptx"]:
        assert wanted in images, images


def test_without_nvcc_the_cpu_unit_is_built(tmp_path):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler on PATH")
    nowhere = tmp_path / "nowhere"
    installation = Installation(tmp_path, CUDA_HOME=str(nowhere))
    assert f"built the CPU unit only: there is no {nowhere}" in installation.log
    assert (installation.site / "dydiff" / "collecting" / "policies" / "hopper-medium.safetensors").is_file()
    output = installation.probe()
    assert "extension False 42.0" in output  # 24 * (1 + 0.75)
    assert "has no CUDA unit: the installation built the CPU unit only" in output and "nvcc on PATH" in output


def test_a_broken_nvcc_falls_back_to_the_cpu_unit(tmp_path):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler on PATH")
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal   : Unsupported gpu architecture' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    installation = Installation(tmp_path, CUDA_HOME=str(tmp_path / "cuda"))
    assert f"built the CPU unit only: {nvcc} failed (nvcc fatal   : Unsupported gpu architecture)" in installation.log
    assert len(installation.binaries) == 1


def test_without_a_compiler_the_package_explains_itself(tmp_path):
    compilers = {"CC": "false", "CXX": "false", "CUDA_HOME": str(tmp_path / "nowhere")}
    installation = Installation(tmp_path, **compilers)
    reason = r"built nothing: the C\+\+ compiler is missing or failed \(\S*false ended with exit status 1\)"
    assert re.search(reason, installation.log)
    assert installation.binaries == []
    output = installation.probe()
    assert "reference False 42.0" in output
    assert "is missing: the installation built nothing" in output and "`pip install -e .`" in output


def test_a_checkout_that_went_on_after_its_build_is_told(tmp_path, monkeypatch):
    for folder in ("kernels", "csrc"):
        (tmp_path / folder).mkdir()
    built = Path(native.__file__).with_name("_native_build.txt")
    if not built.exists():
        pytest.skip("the extension is not built in the checkout that runs here")
    shutil.copy(built, tmp_path / "kernels")
    for source in (ROOT / "csrc").iterdir():
        shutil.copy(source, tmp_path / "csrc")
    assert native._find_obstacle() == ""
    monkeypatch.setattr(native, "__file__", str(tmp_path / "kernels" / "native.py"))
    (tmp_path / "csrc" / ".notes.swp").write_text("an editor's")
    assert native._find_obstacle() == ""
    (tmp_path / "csrc" / "threads.h").write_text("// another version\n")
    assert native._find_obstacle().startswith("csrc/ has changed since the installation built")
