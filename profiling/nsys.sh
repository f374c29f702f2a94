#!/usr/bin/env bash
# Timeline of one command with dydiff's ranges: profiling/nsys.sh "python benchmarks/rollout_speed.py --quick"
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 'COMMAND'" >&2; exit 2; }
command -v nsys >/dev/null || { echo "nsys is not installed; use: python profiling/torch_profile.py" >&2; exit 1; }
DYDIFF_RANGES=1 nsys profile --trace=cuda,nvtx,osrt --cuda-graph-trace=node --force-overwrite=true \
    --output=nsys-report bash -c "$1"
nsys stats --report nvtx_sum,cuda_gpu_kern_sum nsys-report.nsys-rep
