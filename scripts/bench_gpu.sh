#!/usr/bin/env bash
# The benchmark at full size, random weights, on one CUDA GPU: nothing is downloaded.
# FLUX.1 Kontext's shape needs about 40 GB, Qwen-Image-Edit-2511's about 60 GB. Writes JSON and Markdown to FOLDER.
# usage: scripts/bench_gpu.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-runs/bench-gpu}
mkdir -p "$folder"

python -m pytest -q -m gpu tests/bench tests/test_attention.py tests/test_runtime.py

for size in tiny kontext qwen-2511; do
    replan bench --size "$size" --device cuda --regions 2 --area 0.2 --repeats 9 \
        --json "$folder/$size.json" --markdown "$folder/$size.md"
done
for regions in 1 4; do  # how much the number of regions costs; the whole edits need not be repeated
    replan bench --size kontext --device cuda --regions "$regions" --parts steps,plans --repeats 9 \
        --json "$folder/kontext-$regions.json" --markdown "$folder/kontext-$regions.md"
done
