"""Builds dydiff.kernels._native from csrc/: the CPU and the CUDA unit with nvcc, the CPU unit without it.

No outcome fails the installation: dydiff.kernels.reference computes the same in plain PyTorch. What happened is printed
and kept in one line beside the extension, because pip shows a build's output only with -v; dydiff.kernels.native quotes
that line, and knows by the digest in the next one whether csrc/ has changed since. Neither torch nor a GPU is needed: the
extension takes raw pointers.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

CPU_SOURCES = sorted(path.as_posix() for path in Path("csrc").glob("*.cpp"))
CUDA_SOURCES = ["csrc/edm_step_cuda.cu"]
# Without the first two GCC calls sqrt and keeps branches around selections, and loops stay scalar. Results are the same. The
# third heeds `omp simd`, which lets a sum run in lanes.
VECTORISING = ["-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
HEADERS = sorted(path.as_posix() for path in Path("csrc").glob("*.h"))
# PTX of the newest architecture lets the driver compile for cards that come later.
CUDA_ARCHITECTURES = ["arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]"]
REPORT = "_native_build.txt"


def nvcc_name() -> str:
    root = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return str(Path(root, "bin", "nvcc")) if root else "nvcc"


class BuildExtension(build_ext):
    """Tries nvcc, then the C++ compiler, and reports which it was."""

    def build_extension(self, extension: Extension) -> None:
        self.remove_outdated(extension)
        nvcc = shutil.which(nvcc_name())
        try:
            if nvcc is None:
                report = f"built the CPU unit only: there is no {nvcc_name()}"
            else:
                try:
                    self.build_with_nvcc(extension, nvcc)
                    self.report(extension, f"built the CPU and the CUDA unit with {nvcc}")
                    return
                except (OSError, subprocess.CalledProcessError) as error:
                    report = f"built the CPU unit only: {nvcc} failed ({first_cause(error)})"
            super().build_extension(extension)
        except Exception as error:
            self.report(extension, f"built nothing: the C++ compiler is missing or failed ({first_cause(error)})")
            raise  # the extension is optional: setuptools warns and goes on
        self.report(extension, report)

    def build_with_nvcc(self, extension: Extension, nvcc: str) -> None:
        """One call compiles and links all: nvcc hands C++ to the host compiler and knows where its runtime lies."""
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [nvcc, "-shared", "-cudart", "static", "-std=c++17", "-O3", "--threads", "0"]
        command += ["-Xcompiler", ",".join(["-fPIC", *VECTORISING, "-fvisibility=hidden", "-g0"]), "-DDYDIFF_WITH_CUDA"]
        command += [f"-gencode={architecture}" for architecture in CUDA_ARCHITECTURES]
        command += [f"-I{folder}" for folder in [*extension.include_dirs, sysconfig.get_path("include")]]
        command += ["-o", str(target), *CPU_SOURCES, *CUDA_SOURCES]
        print(" ".join(command), flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout, flush=True)
        done.check_returncode()

    def remove_outdated(self, extension: Extension) -> None:
        """A binary of older sources must not outlive a build that fails: an editable install would go on loading it."""
        Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        if self.editable_mode:
            (self.source_folder() / self.get_ext_filename("_native")).unlink(missing_ok=True)

    def source_folder(self) -> Path:
        return Path(self.get_finalized_command("build_py").get_package_dir("dydiff.kernels"))

    def report(self, extension: Extension, text: str) -> None:
        print(f"dydiff: {text}", flush=True)
        folder = self.source_folder() if self.editable_mode else Path(self.get_ext_fullpath(extension.name)).parent
        folder.mkdir(parents=True, exist_ok=True)
        sources = sorted([*CPU_SOURCES, *CUDA_SOURCES, *HEADERS])
        digest = hashlib.sha256(b"".join(Path(source).read_bytes() for source in sources)).hexdigest()
        (folder / REPORT).write_text(f"{text}\n{digest}\n")


def first_cause(error: BaseException) -> str:
    """The error that setuptools wrapped, in one line: a compiler's own words where they were caught."""
    while error.__context__ is not None:
        error = error.__context__
    if not isinstance(error, subprocess.CalledProcessError):
        return (str(error) or repr(error)).splitlines()[0]
    lines = (error.stdout or "").strip().splitlines()
    telling = [line for line in lines if "error" in line.lower() or "fatal" in line.lower()] or lines[-1:]
    return telling[0].strip() if telling else f"{error.cmd[0]} ended with exit status {error.returncode}"


ParallelCompile().install()

setup(
    packages=["dydiff.kernels", *find_packages(include=["dydiff", "dydiff.*"])],
    package_dir={"dydiff.kernels": "kernels"},
    ext_modules=[
        Extension(
            "dydiff.kernels._native",
            CPU_SOURCES,
            depends=[*HEADERS, *CUDA_SOURCES],
            include_dirs=["csrc", pybind11.get_include()],
            extra_compile_args=["-std=c++17", "-O3", *VECTORISING, "-fvisibility=hidden", "-g0"],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
