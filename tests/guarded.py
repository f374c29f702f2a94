"""Runs tests where tensors lie between pages that must not be touched (guarded_memory.c), as compute-sanitizer watches a GPU.

    python tests/guarded.py tests/test_unet_cpu.py tests/test_convolution_cpu.py

What reads or writes a single element beyond a tensor's end ends with a segmentation fault, and so does, in a second run, what
does before its beginning. Linux only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("guarded_memory.c")
ENDS = "high", "low"


def guard_memory(folder: Path, end: str = "high") -> dict[str, str]:
    """The environment of a process whose tensors are guarded at this end; builds what it preloads into the folder.

    Empty on other systems than Linux and where there is no C compiler.
    """
    library, compiler = folder / "guarded_memory.so", os.environ.get("CC", "cc")
    if sys.platform != "linux" or shutil.which(compiler) is None:
        return {}
    if not library.exists():
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", SOURCE, "-o", library, "-ldl", "-lpthread"], check=True)
    return {"LD_PRELOAD": str(library), "GUARDED_END": end}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for end in ENDS:
            environment = os.environ | guard_memory(Path(folder), end)
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]
            if status := subprocess.run(command, env=environment).returncode:
                sys.exit(f"guarded at the {end} end: status {status}")
