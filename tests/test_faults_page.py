"""docs/faults.md against the tests: it names none that does not exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from bad_inputs import PAGE

TESTS = Path(__file__).parent


def find_tests(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_test_that_the_page_names_exists():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|") and "`test_" in line]
    assert len(lines) > 30
    for line in lines:
        files = [TESTS / name for name in re.findall(r"`(test_\w+\.py)`", line)]
        assert files and all(file.is_file() for file in files), line
        tests = set().union(*(find_tests(file) for file in files))
        for name in re.findall(r"`(test_\w+)…?`", line):
            assert any(test.startswith(name) for test in tests), f"{name} is in none of the files of: {line}"
