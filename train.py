"""Train a trajectory-diffusion model: `python train.py -m hopper-medium-expert-v2 ...` (the same as `dydiff train`)."""

import sys

from dydiff.cli import main_of

if __name__ == "__main__":
    sys.exit(main_of("train", "train.py"))
