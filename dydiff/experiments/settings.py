"""Settings from what YAML gives, strictly: an unknown key, a wrong type or a value out of range is an error that names it."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import re
import reprlib
import types
import typing
from typing import Any, Literal

from dydiff.config import LARGEST, PATHS, RANGES, SINGLES, SMALLEST, Constants, MetaData
from dydiff.errors import DydiffError


def show(value: Any) -> str:
    """A value as messages show it: cut, however large or deep it is."""
    shorten = reprlib.Repr()
    shorten.maxstring = shorten.maxother = shorten.maxlong = 80
    try:
        return shorten.repr(value)
    except ValueError:  # a whole number of more digits than Python prints
        return "a number of thousands of digits"


def from_mapping(cls: type, mapping: Any, where: str) -> Any:
    """Fill the dataclass `cls` from a mapping as YAML gives it; `where` names the place in messages.

    Raises:
        DydiffError: not a mapping, an unknown key (named with the nearest valid one), or a value of the wrong type or range.
    """
    mapping = {} if mapping is None else mapping
    if not isinstance(mapping, dict):
        raise DydiffError(f"'{where}' must be a mapping of settings, not {show(mapping)}.")
    hints = typing.get_type_hints(cls)
    for key in mapping:
        if key not in hints:
            raise unknown_key(f"{where}.{key}", str(key), hints, _names_by_last_part())
    # A text with nothing behind its key is not given.
    given = {key: value for key, value in mapping.items() if value is not None or not _is_text(hints[key])}
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in given.items()})


def _is_text(hint: Any) -> bool:
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return str in kinds and type(None) not in kinds


def _names_by_last_part() -> dict[str, list[str]]:
    """Every setting's dotted names, as overrides take them, by what they end in: one of no section has none."""
    names: dict[str, list[str]] = {}

    def add(cls: type, prefix: str) -> None:
        for name, hint in typing.get_type_hints(cls).items():
            if prefix:
                names.setdefault(name, []).append(f"{prefix}{name}")
            for kind in filter(dataclasses.is_dataclass, (hint, *typing.get_args(hint))):
                add(kind, f"{prefix}{name}.")

    add(MetaData, "meta_data.")
    add(Constants, "")
    return names


def unknown_key(
    where: str, key: str, valid: typing.Iterable[str], elsewhere: typing.Mapping[str, list[str]] = types.MappingProxyType({})
) -> DydiffError:
    """The error for a key that does not exist: where it does (`elsewhere`), the nearest valid one, or all that are valid."""
    nearest = elsewhere.get(key) or difflib.get_close_matches(key, list(valid), n=1, cutoff=0.5)
    nearest = nearest or [name for near in difflib.get_close_matches(key, list(elsewhere), n=1) for name in elsewhere[near]]
    hint = f"did you mean {' or '.join(map(repr, nearest))}?" if nearest else f"valid keys are {', '.join(valid)}."
    return DydiffError(f"Unknown setting '{where}': {hint}")


def _convert(kind: Any, value: Any, where: str) -> Any:
    name = _name_of(where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        options = [argument for argument in arguments if argument is not type(None)]
        # A section that may be absent counts as asked for when its key is there, even with nothing under it.
        if value is None and len(options) < len(arguments) and not dataclasses.is_dataclass(options[0]):
            return None
        if len(options) == 2:  # a list, or one word that stands for it
            options = [option for option in options if (typing.get_origin(option) is list) == isinstance(value, list)]
        return _convert(options[0], value, where)
    if dataclasses.is_dataclass(kind):
        return from_mapping(kind, value, where)
    if origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
        nearest = difflib.get_close_matches(str(value)[:80], arguments, n=1)
        hint = f" (did you mean '{nearest[0]}'?)" if nearest else ""
        raise DydiffError(f"Setting '{where}' must be one of {', '.join(arguments)}, not {show(value)}{hint}.")
    if origin is list:
        if name in SINGLES and value is not None and not isinstance(value, (list, dict)):
            value = [value]
        if not isinstance(value, list):
            raise DydiffError(f"Setting '{where}' must be a list, not {show(value)}.")
        return [_convert(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict:  # of somebody's own: names and kinds are not known here
        if not isinstance(value, dict):
            raise DydiffError(f"Setting '{where}' must be a mapping, not {show(value)}.")
        return {str(key): _to_number(item) for key, item in value.items()}
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return _check_range(float(value), where)  # YAML reads 3e-4 as text
        except (ValueError, OverflowError):
            pass
    if kind is int:
        value = _to_whole(value)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return _check_range(value, where)
    if isinstance(value, kind) and kind is not int:
        return _expand_home(value) if name in PATHS else value
    raise DydiffError(f"Setting '{where}' must be of type {kind.__name__}, not {show(value)}.")


def _to_number(value: Any) -> Any:
    """A number that is written as 3e-4, which is text to YAML; anything else as it is."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?e[+-]?\d+", value, re.IGNORECASE) else value


def _to_whole(value: Any) -> Any:
    """A whole number that is written as 2e6 (text to YAML), 2000000.0 or "256" as an int; anything else as it is."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return int(value)
    if isinstance(value, (str, float)):
        with contextlib.suppress(ValueError):
            if float(value).is_integer():
                return int(float(value))
    return value


def _expand_home(path: str) -> str:
    try:
        return os.path.expanduser(path)
    except ValueError:  # no name of a user
        return path


def _name_of(where: str) -> str:
    return where.rsplit(".", 1)[-1].partition("[")[0]


def _check_range(value: float, where: str) -> float:
    low, high = RANGES.get(_name_of(where), (SMALLEST, LARGEST))
    if not low <= value <= high:
        least = "above 0" if low == SMALLEST else f"at least {low:g}"
        most = f"at most {high:g}" if high < LARGEST else "finite"
        raise DydiffError(f"Setting '{where}' must be {least} and {most}, not {show(value)}.")
    return value
