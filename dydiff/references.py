"""Code of one's own that settings name as "module:name"."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from dydiff.errors import DydiffError


def import_reference(reference: str, setting: str) -> Any:
    """What "module:name" names; the module may lie in the working folder.

    Only for references that somebody wrote into settings: an import runs code, so none is taken out of a file of data or weights.

    Raises:
        DydiffError: it is no reference, or does not import; names `setting`, whose value it was.
    """
    module, _, name = reference.partition(":")
    if not module or not name:
        raise DydiffError(f"{setting} must have the form module:name, and is {reference!r}.")
    see_working_folder()
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # an import runs whatever the module does
        what = f"{type(error).__name__}: {str(error).rstrip('.')}"
        raise DydiffError(
            f"{setting} is {reference!r}, which cannot be imported: {what}. Python's path and {os.getcwd()!r} were searched."
        ) from error


def see_working_folder() -> None:
    """Scripts see their own folder and not the one that they were started in; processes that they start inherit the path."""
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
