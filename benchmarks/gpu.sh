#!/usr/bin/env bash
# Are the expert backends right on this machine's GPU, and how fast are they?
#
#   benchmarks/gpu.sh [FOLDER]          FOLDER defaults to docs/internals/benchmarks
#   PYTHON=.venv/bin/python JOBS=8 benchmarks/gpu.sh
#
# Needs ezpz_moe installed with its test extra and a torch built for CUDA or ROCm. Writes
# contract_DEVICE.txt, verify_DEVICE.json, and experts_DEVICE and routed_DEVICE as .json and .png,
# with the device's name in each; commit them. Stops at the first thing that is wrong: figures of a
# backend that computes something else are worth nothing. The first run tunes the Triton kernels
# (minutes); the choice is kept in Triton's cache folder.
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
folder=$(realpath -m "${1:-$repository/docs/internals/benchmarks}")
cd "$repository"
python=${PYTHON:-python}

device=$("$python" - <<'PYTHON'
import re, sys, torch
if not torch.cuda.is_available():
    sys.exit("benchmarks/gpu.sh: torch sees no CUDA or ROCm device here (torch.cuda.is_available())")
print(re.sub(r"\W+", "_", torch.cuda.get_device_name()).strip("_").lower())
PYTHON
)
mkdir -p "$folder"

# The contract on the device, as in the tests: every backend, routing, dtype and option.
EZPZ_MOE_TEST_DEVICES=cuda "$python" -m pytest -q -n "${JOBS:-4}" -k "cuda or requested" \
    tests/test_contract*.py 2>&1 |
    tee "$folder/contract_$device.txt"

"$python" -m ezpz_moe.cli verify --device cuda --dtype bfloat16 float16 float32 --json \
    >"$folder/verify_$device.json"

"$python" -m ezpz_moe.cli bench --device cuda --shape olmoe qwen3_30b --dtype bfloat16 \
    --routing balanced zipf1 --out "$folder/experts_$device.json" \
    --plot "$folder/experts_$device.png"

# Whole routed layers: dispatch, experts and combination.
"$python" -m ezpz_moe.cli bench --layer routed --device cuda --shape olmoe qwen3_30b \
    --dtype bfloat16 --routing balanced zipf1 --out "$folder/routed_$device.json" \
    --plot "$folder/routed_$device.png"
