"""The matrix of bad inputs and what is answered to each: run by test_bad_inputs.py, shown in docs/faults.md.

`python tests/bad_inputs.py` writes the tables into the page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from dydiff.data.dataset import REQUIRED

PAGE = Path(__file__).parents[1] / "docs/faults.md"
BEGIN, END = "<!-- tables of tests/bad_inputs.py: begin -->\n", "<!-- end -->\n"
TRAINS = ""  # the answer where nothing is refused


@dataclass
class BadDataset:
    """A damage to a whole maze2d file; what the training of a diffusion model and that of a dynamics model answer to it."""

    what: str
    damage: Callable[[Path], None]
    to_diffusion: str
    to_dynamics: str


def edit(change: Callable[[h5py.File], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with h5py.File(path, "a") as file:
            change(file)

    return damage


def put(key: str, row: object, value: float) -> Callable[[Path], None]:
    return edit(lambda file: file[key].__setitem__(row, value))


def replace(key: str, make: Callable[[np.ndarray], object]) -> Callable[[Path], None]:
    def change(file: h5py.File) -> None:
        values = make(file[key][:])
        del file[key]
        file[key] = values

    return edit(change)


def remove(*keys: str) -> Callable[[Path], None]:
    def change(file: h5py.File) -> None:
        for key in keys:
            del file[key]

    return edit(change)


def flags(terminals: bool, timeouts: bool) -> Callable[[Path], None]:
    def change(file: h5py.File) -> None:
        file["terminals"][:], file["timeouts"][:] = terminals, timeouts

    return edit(change)


def widen(dtype: type) -> Callable[[Path], None]:
    def change(file: h5py.File) -> None:
        for key in ("observations", "actions", "rewards"):
            values = file[key][:].astype(dtype)
            del file[key]
            file[key] = values

    return edit(change)


def claim(file: h5py.File) -> None:
    """A dataset that says it has 10^12 rows and stores none: reading it would make them up."""
    del file["observations"]
    file.create_dataset("observations", shape=(10**12, 4), dtype="f4", chunks=(1000, 4))


def make_group(file: h5py.File) -> None:
    del file["observations"]
    file.create_group("observations/part")


def link_elsewhere(file: h5py.File) -> None:
    del file["observations"]
    file["observations"] = h5py.ExternalLink("/etc/hostname", "/observations")


def cut(keep: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def both(what: str, damage: Callable[[Path], None], answer: str) -> BadDataset:
    return BadDataset(what, damage, answer, answer)


OUTSIDE = "holds 1 actions outside the range of maze2d-umaze, first in row 5, column 0: 40 is not in [-1, 1]"
OF_ANOTHER = "has 3 observation and 2 action columns, but maze2d-umaze has 4 and 2"
DATASETS = [
    both("cut off in the middle", cut(0.5), "it is truncated or damaged"),
    both("cut off behind the signature", cut(0.001), "it is truncated or damaged"),
    both("a web page", lambda path: path.write_text("<html>moved</html>"), "is not an HDF5 file"),
    both("empty", lambda path: path.write_bytes(b""), "is not an HDF5 file"),
    both("not there", Path.unlink, "There is no dataset file"),
    *(both(f"without {key}", remove(key), f"lacks {key}") for key in REQUIRED),
    both("observations are a group", edit(make_group), "lacks observations"),
    both("observations are a link to another file", edit(link_elsewhere), "lacks observations"),
    both("claims 10^12 rows that are not stored", edit(claim), "observations claims 16,000,000,000,000 bytes in a file of"),
    both("observations of rank 1", replace("observations", lambda v: v[:, 0]), "observations has shape (3000,), but must be"),
    both("observations of rank 3", replace("observations", lambda v: v[:, None]), "observations has shape (3000, 1, 4), but"),
    both("actions without columns", replace("actions", lambda v: v[:, :0]), "actions has shape (3000, 0)"),
    both("rewards of rank 2", replace("rewards", lambda v: np.stack([v, v], 1)), "rewards has shape (3000, 2)"),
    both("actions of fewer rows", replace("actions", lambda v: v[:100]), "actions has 100 rows but observations has 3000"),
    both("text for rewards", replace("rewards", lambda v: np.full(len(v), b"x")), "rewards holds |S1 values"),
    both("complex observations", replace("observations", lambda v: v.astype(complex)), "observations holds complex128 values"),
    both("NaN in an observation", put("observations", (7, 1), np.nan), "observations holds NaN or infinite numbers in 1 of"),
    both("infinity in a reward", put("rewards", 9, np.inf), "in 1 of 3000 rows, first in row 9"),
    both("NaN in an action", put("actions", (0, 0), np.nan), "actions holds NaN"),
    both("numbers beyond float32", replace("rewards", lambda v: v.astype("f8") + 1e300), "rewards holds NaN or infinite"),
    both("flags that are none", replace("terminals", lambda v: v + 0.5), "terminals must hold flags"),
    both("an action outside the box", put("actions", (5, 0), 40.0), OUTSIDE),
    both("a column too few for the environment", replace("observations", lambda v: v[:, :3]), OF_ANOTHER),
    BadDataset("every episode of one row, by time", flags(False, True), TRAINS, "has no transition left"),
    BadDataset("every episode of one row, by terminals", flags(True, False), TRAINS, TRAINS),
    BadDataset("no terminal and no timeout at all", flags(False, False), "marks no end of an episode", TRAINS),
    both("no timeouts stored (the environment's limit counts)", remove("timeouts"), TRAINS),
    both("a constant column", put("observations", (slice(None), 2), 0.5), TRAINS),
    both("all observations constant", put("observations", ..., 0.5), TRAINS),
    both("all actions constant", put("actions", ..., 0.5), TRAINS),
    both("constant rewards", put("rewards", slice(None), 0.0), TRAINS),
    both("float64", widen(np.float64), TRAINS),
    both("float16", widen(np.float16), TRAINS),
]

HEAD = "constants: {dataset_name: x, td3_bc_params: {}}\n"
CONSTANTS = "constants: {{dataset_name: x, td3_bc_params: {{}}, {}}}"
DOUBLED = "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(20))
MERGED = "".join(f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{', '.join(['*' + chr(97 + i)] * 9)}]}}\n" for i in range(20))
OPERATIONS = ", ".join(f"td3_bc_params.k{i}: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]" for i in range(6))
# What an experiment file says, and what is answered within a second or two.
YAML = [
    ("empty", "", "must be a YAML mapping, not NoneType"),
    ("a list", "[1, 2]", "must be a YAML mapping, not list"),
    ("torn", "constants: [1", "is not plain YAML: expected ',' or ']', but got"),
    ("constructs an object", "constants: !!python/object/apply:os.system [touch made]", "could not determine a constructor"),
    ("bytes that are no text", "constants: \x00", "is not plain YAML"),
    ("a date that is none", "constants: {dataset_name: 2001-99-99}", "is not plain YAML: month must be in 1..12"),
    ("a number of 5,000 digits", "seed: " + "9" * 5000, "is not plain YAML: Exceeds the limit"),
    ("50,000 levels of nesting", "[" * 50_000, "is not plain YAML: maximum recursion depth exceeded"),
    ("30 levels of nesting", HEAD + "variables: " + "{a: " * 30 + "1" + "}" * 30, "is nested deeper than 20"),
    ("20 lines of aliases that stand for 9^20 values", "a: &a [1]\n" + DOUBLED, "it stands for more than 100,000 values"),
    ("a list that holds itself", "constants: &a {dataset_name: [*a]}", "it stands for more than 100,000 values"),
    # From 6.0.4 on PyYAML merges a key once, and what is wrong with this file is its keys.
    ("20 lines of merges that stand for 9^20 keys", "a: &a {x: 1}\n" + MERGED, "bad.yaml"),
    ("a key twice", "constants: {seed: 1, seed: 2}", "the key 'seed' stands twice"),
    ("an unknown part", "constnts: {}", "constnts': did you mean 'constants'?"),
    ("an unknown section", CONSTANTS.format("td3_params: {}"), "td3_params': did you mean 'td3_bc_params'?"),
    ("a misspelt setting", CONSTANTS.format("model_params: {lrr: 1}"), "model_params.lrr': did you mean 'lr'?"),
    ("a setting outside of its section", CONSTANTS.format("alpha: 1"), "constants.alpha': did you mean 'td3_bc_params.alpha'?"),
    ("a misspelt one outside of its section", CONSTANTS.format("alpa: 1"), "alpa': did you mean 'td3_bc_params.alpha'?"),
    ("a setting of another section", CONSTANTS.format("sampler_kwargs: {gpu: [1]}"), "did you mean 'meta_data.gpu'?"),
    ("tabs", "constants:\n\tseed: 1", "(line 2, column 1). Indent with spaces: YAML takes no tabs there"),
    ("a word for a number", CONSTANTS.format("model_params: {lr: fast}"), "model_params.lr' must be of type float, not 'fast'"),
    ("a fraction for a whole number", CONSTANTS.format("seed: 1.5"), "constants.seed' must be of type int, not 1.5"),
    ("a number for a list", CONSTANTS.format("model_params: {hidden_dims: 8}"), "hidden_dims' must be a list, not 8"),
    ("a list for a section", CONSTANTS.format("model_params: [1]"), "model_params' must be a mapping of settings, not [1]"),
    ("a number out of range", CONSTANTS.format("seed: -1"), "constants.seed' must be at least 0 and"),
    ("NaN", CONSTANTS.format("model_params: {lr: .nan}"), "model_params.lr' must be above 0 and finite, not nan"),
    (
        "a misspelt filter",
        CONSTANTS.format("rl_trainer_params: {keep_condition: {filter_type: hardmx}}"),
        "filter_type' must be one of softmax, hardmax, not 'hardmx' (did you mean 'hardmax'?)",
    ),
    ("nothing to train", "constants: {dataset_name: x}", "cannot tell what to train"),
    ("two things to train", CONSTANTS.format("cql_params: {}"), "it asks for td3_bc and cql"),
    ("no dataset", "constants: {td3_bc_params: {}}", "constants.dataset_name is missing"),
    ("variables that vary nothing", HEAD + "variables: {seed: []}", "variable 'seed' must be a non-empty list"),
    ("a variable that is no list", HEAD + "variables: {seed: 3}", "variable 'seed' must be a non-empty list of values, not 3"),
    ("a variable that names a value twice", HEAD + "variables: {seed: [0, 1, 0]}", "variable 'seed' names 0 more than once"),
    ("a variable that does not exist", HEAD + "variables: {sed: [1]}", "constants.sed': did you mean 'seed'?"),
    ("10^6 variants", HEAD + f"variables: {{{OPERATIONS}}}", "expands to 1,000,000 variants; the limit is 10,000"),
    ("20,000 seeds", CONSTANTS.format(f"seeds: {list(range(20_000))}"), "expands to 20,000 variants; the limit is 10,000"),
    ("10^6 variants spelled out", HEAD + f"variables: {{seed: {list(range(10**6))}}}", "is larger than 200,000 bytes"),
    ("a dataset of an impossible name", 'constants: {dataset_name: "a\\0b", td3_bc_params: {}}', "Unknown dataset 'a\\x00b'"),
    ("a dataset of an endless name", HEAD.replace("x", f"{'a' * 5000}.hdf5"), "There is no dataset file"),
]

# A command, its exit status (2: by argparse, with the usage above) and what it says.
COMMANDS = [
    ("trian", 2, "invalid choice: 'trian'"),
    ("", 2, "the following arguments are required: COMMAND"),
    ("train", 2, "the following arguments are required: -m/--dataset"),
    ("train -m x --durtion=4", 2, "unrecognized arguments: --durtion=4 (did you mean --duration?)"),
    ("train -m x --dur=4", 2, "unrecognized arguments: --dur=4"),
    ("train -m x --batch=0", 2, "argument --batch: 0 is not above 0 and finite"),
    ("train -m x --duration=nan", 2, "argument --duration: nan is not above 0 and finite"),
    ("train -m x --dim_mults=1,x", 2, "'1,x' is not a list of whole numbers above 0"),
    ("train -m x --use_cond=maybe", 2, "'maybe' is neither True nor False"),
    ("train -m x --precision=fp8", 2, "argument --precision: invalid choice: 'fp8'"),
    ("train -m x --cond_on_action=False --foreign_actions=0.5", 1, "--foreign_actions needs --cond_on_action=True"),
    ("train -m x --max_length_of_trajectory=1 --foreign_actions=0.5", 1, "needs --max_length_of_trajectory of at least 2"),
    ("train -m x --foreign_actions=1.5", 2, "argument --foreign_actions: 1.5 is not between 0 and 1"),
    ("train -m x --include_action=False", 1, "--cond_on_action=True needs --include_action=True"),
    ("train -m x --rl_model_type=MLP_RL --dim_mults=1,2", 1, "--dim_mults goes with --rl_model_type=UNet_RL, not with MLP_RL"),
    ("train -m hoper-medium-v2 --device=cpu", 1, "Unknown dataset 'hoper-medium-v2'"),
    ("train -m hopper-medum-local --device=cpu", 1, "has no recipe for it; the nearest names are hopper-medium-local"),
    ("train -m pen-human-v1 --device=cpu", 1, "needs the legacy package d4rl, which does not import here"),
    ("train -m hopper-medium-v2 --device=cpu", 1, "Get it with `dydiff data download hopper-medium-v2`"),
    ("train -m x --device=gpu", 1, "'gpu' is not a device"),
    ("train -m x --device=cpu --resume=/nowhere", 1, "'/nowhere' is not a run folder"),
    ("run -e /nowhere.yaml", 1, "Cannot read '/nowhere.yaml': No such file or directory"),
    ("run -e /dev/zero", 1, "'/dev/zero' is larger than 200,000 bytes"),
    ("run", 2, "the following arguments are required: -e/--experiment"),
    ("run -e x.yaml --shard=3/2", 2, "argument --shard: '3/2' is not a part of a whole, from 1/N to N/N"),
    ("train -m x --snap=-1", 2, "argument --snap: -1 is below 0"),
    ("collect hopper-medum-local", 1, "choose one of those that exist, such as hopper-medium-local"),
    ("collect maze2d-umaze-local --steps=0", 2, "argument --steps: 0 is not above 0 and finite"),
    ("import /nowhere.pkl --dataset x", 1, "Cannot read '/nowhere.pkl'"),
    ("report --dataset nowhere-local", 1, "nowhere-local"),
]


def render() -> str:
    """The tables as they stand in the page."""

    def shown(text: str) -> str:
        return f"``{text}``" if "`" in text else f"`{text}`" if text else "trains"

    rows = ["| dataset | training a diffusion model answers | training a dynamics model answers |", "| --- | --- | --- |"]
    rows += [f"| {case.what} | {shown(case.to_diffusion)} | {shown(case.to_dynamics)} |" for case in DATASETS]
    rows += ["", "| experiment file | answer |", "| --- | --- |"]
    rows += [f"| {what} | {shown(answer)} |" for what, _, answer in YAML]
    rows += ["", "| command | exit status | answer |", "| --- | --- | --- |"]
    rows += [f"| `{f'dydiff {command}'.strip()}` | {status} | {shown(answer)} |" for command, status, answer in COMMANDS]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    text = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(before + BEGIN + render() + END + after)
