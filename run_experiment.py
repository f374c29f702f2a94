"""Run an experiment file: `python run_experiment.py -e exp_specs/....yaml` (the same as `dydiff run`)."""

import sys

from dydiff.cli import main_of

if __name__ == "__main__":
    sys.exit(main_of("run", "run_experiment.py"))
