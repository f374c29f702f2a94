"""Published checkpoints, which are pickles, turned into ours without running anything that is in them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from dydiff import __version__
from dydiff.checkpoint import save_checkpoint
from dydiff.data import Dataset, Spaces, Transitions
from dydiff.errors import DydiffError
from dydiff.importing.diffusion import convert_diffusion
from dydiff.importing.files import read_file, read_published
from dydiff.importing.one_step import convert_dynamics, convert_reward, is_dynamics
from dydiff.importing.policy import convert_policy, is_policy
from dydiff.importing.product import Product
from dydiff.importing.records import Record, named_tensors, walk

SUFFIXES = (".pkl", ".pt", ".pth", ".joblib")  # of published files


@dataclass
class Importer:
    """Turns published files into checkpoints that are tied to one dataset (and its environment and spaces)."""

    dataset: Dataset
    spaces: Spaces
    transitions: Transitions  # raw
    environment: str
    horizon: int | None = None  # of diffusion models whose file does not say it

    def read(self, content: bytes, source: str) -> Product:
        """Convert the content of a file; `source` is its name.

        Raises:
            DydiffError: it is refused or damaged, holds no model that dydiff knows, or does not fit the dataset.
        """
        tree = read_published(content, source)
        try:
            product = self._convert(tree)
        except DydiffError as error:
            raise DydiffError(f"Cannot import '{source}'. {error}") from error
        except Exception as error:  # the file decides what is found where
            raise DydiffError(
                f"'{source}' does not hold what a published checkpoint holds ({type(error).__name__}: {str(error)[:200]})."
            ) from error
        sources = {value.arguments[0] for _, value in walk(tree) if isinstance(value, Record) and is_embedded(value)}
        product.manifest["imported"] = {
            "file": source,
            "sha256": hashlib.sha256(content).hexdigest(),
            "source_sha256": sorted(sources),
            "notes": product.notes,
        }
        return product

    def _convert(self, tree: object) -> Product:
        if isinstance(tree, dict) and "ema" in tree and "dataset_kwargs" in tree:
            return convert_diffusion(tree, self.dataset, self.horizon)
        if is_policy(tree):
            return convert_policy(tree, self.spaces, self.environment)
        if not named_tensors(tree):
            raise DydiffError("It holds neither a network nor tensors.")
        if is_dynamics(tree):
            return convert_dynamics(tree, self.dataset, self.spaces, self.transitions)
        return convert_reward(tree, self.dataset)

    def save(self, product: Product, path: Path) -> None:
        """Write a product as a checkpoint; raises DydiffError where that cannot be done."""
        manifest = {"dataset": self.dataset.name, "fingerprint": self.dataset.fingerprint, **product.manifest}
        save_checkpoint(path, product.kind, product.tree, manifest)

    def find(self, path: Path, kind: str, folder: Path) -> tuple[Path, list[str]]:
        """The checkpoint of `kind` for a published file, converted into `folder` unless it already was, and the notes on it.

        Raises:
            DydiffError: as `read` and `save`; the file cannot be read, or holds a model of another kind.
        """
        path = Path(path)
        content = read_file(path)
        digest = hashlib.sha256(f"{__version__} {self.dataset.fingerprint} ".encode() + content).hexdigest()
        checkpoint = folder / f"{path.stem}-{digest[:12]}.safetensors"
        if checkpoint.is_file():
            return checkpoint, []
        product = self.read(content, path.name)
        if product.kind != kind:
            raise DydiffError(f"'{path}' holds a {product.kind}, but a {kind} is needed here. Correct the path.")
        self.save(product, checkpoint)
        return checkpoint, product.notes


def is_published(path: Path) -> bool:
    """Whether a file's name says that it is a published checkpoint, not one of ours."""
    return path.suffix in SUFFIXES


def is_embedded(record: Record) -> bool:
    """Whether an object was pickled with the source of its module."""
    return record.name.startswith("persistent.")
