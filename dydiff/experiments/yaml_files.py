"""YAML that people write, read strictly: plain values, no key twice, and nothing that a few lines blow up to millions of values."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from dydiff.errors import DydiffError

MAX_BYTES = 200_000  # of a file; parsing takes some ten microseconds a byte
MAX_VALUES, MAX_DEPTH = 100_000, 20  # of a file, aliases followed
MAX_MERGED = 20  # mappings in one


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file.

    Raises:
        DydiffError: it cannot be read, is too large, is not plain YAML, or no mapping.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DydiffError(f"Cannot read '{path}': {error.strerror or error}.") from error
    if len(text) > MAX_BYTES:
        raise DydiffError(f"'{path}' is larger than {MAX_BYTES:,} bytes. Shorten it; what varies much is best varied from outside.")
    content = parse_yaml(text, f"'{path}' is not plain YAML")
    if not isinstance(content, dict):
        raise DydiffError(f"'{path}' must be a YAML mapping, not {type(content).__name__}.")
    return content


def parse_yaml(text: str | bytes, complaint: str) -> Any:
    """YAML's plain values.

    Raises:
        DydiffError: whatever goes wrong is the text's fault; `complaint` begins the message.
    """
    try:
        content = yaml.load(text, _Loader)
    except Exception as error:  # beside its own errors PyYAML raises those of what it calls: of a date, of a number, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            reason = f"{error.problem} (line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"
        remedy = " Indent with spaces: YAML takes no tabs there." if "found character '\\t'" in reason else ""
        raise DydiffError(f"{complaint}: {reason[:400]}.{remedy}") from error
    remaining, level, depth = MAX_VALUES, [content], 0
    while level:  # level by level, so that aliases, of which a few lines stand for 2^60 values, are counted and not followed
        remaining, depth = remaining - len(level), depth + 1
        if remaining < 0 or depth > MAX_DEPTH:
            raise DydiffError(f"{complaint}: it stands for more than {MAX_VALUES:,} values, or is nested deeper than {MAX_DEPTH}.")
        level = list(itertools.islice(itertools.chain.from_iterable(map(_children, level)), MAX_VALUES + 1))
    return content


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, less keys that stand twice, and less merges (`<<: *name`) that multiply to millions of keys."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        counts = collections.Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = [key for key, count in counts.items() if count > 1]
        if twice:
            raise yaml.constructor.ConstructorError(problem=f"the key '{twice[0]}' stands twice", problem_mark=node.start_mark)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
        count = sum(len(value.value) if isinstance(value, yaml.SequenceNode) else 1 for value in merged)
        if count <= MAX_MERGED:
            super().flatten_mapping(node)
        if count > MAX_MERGED or len(node.value) > MAX_VALUES:
            raise yaml.constructor.ConstructorError(problem="it merges too many mappings", problem_mark=node.start_mark)


def _children(node: Any) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple, set)) else ()
