#!/usr/bin/env bash
# DyDiff from data to scores at a small size, by the same commands as any other run. `make quickstart` calls this.
# Everything goes into one fresh folder, the dataset too: nobody's dataset cache is touched, and no older run is mistaken for one
# of these.
set -euo pipefail
cd "$(dirname "$0")/../.."

run=${1:-training-runs/quickstart-$(date +%Y%m%d-%H%M%S)}
dataset=$run/maze2d-umaze-local.hdf5

step() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }
experiment() { python run_experiment.py -e "exp_specs/quickstart/$1.yaml" --dataset "$dataset" --outdir "$run" --device auto; }

step "Collect 200,000 rows in maze2d-umaze"
dydiff collect maze2d-umaze-local --steps 200000 --path "$dataset"

step "Train the diffusion model; beside it the dynamics ensemble and the reward model ($run/one-step.log)"
(experiment dyn_model && experiment rew_model) > "$run/one-step.log" 2>&1 &
one_step=$!
# So short a training cannot wait 10 million windows for its full step size, as --ramp does by default.
python train.py -m "$dataset" --outdir "$run" --max_length_of_trajectory 64 --dim 32 --dim_mults 1,4 \
    --batch 16 --duration 0.13 --tick 2 --lr 0.002 --ramp 0.01 --device auto
wait "$one_step" || { cat "$run/one-step.log" >&2; exit 1; }

step "Train TD3+BC, with DyDiff and without"
experiment policy

step "Report"
dydiff report --outdir "$run" --dataset "$dataset" --starts 256

cat <<NOTE

This was a small demonstration, not a benchmark: models of minutes, trained far from their end, and few seeds. Whichever line is
above the other here says little about the method. Everything is in $run ($SECONDS s).
NOTE
