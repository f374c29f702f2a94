#!/usr/bin/env bash
# Hardware counters of the kernels whose name matches a pattern, over the kernel benchmark: profiling/ncu.sh 'conv|edm'
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 KERNEL_PATTERN" >&2; exit 2; }
command -v ncu >/dev/null || { echo "ncu is not installed; use: python profiling/torch_profile.py" >&2; exit 1; }
# The clocks are left alone: the card may be shared.
ncu --clock-control none --set full --kernel-name "regex:$1" --launch-count 20 --force-overwrite --export ncu-report \
    python -m pytest -q benchmarks/test_kernel_speed.py
ncu --import ncu-report.ncu-rep --page details | head -n 200
