#!/usr/bin/env bash
# The verl engine against verl itself, on the CPU: makes an environment (2 GB, a few minutes), then runs its tests, among
# them both stages in small under verl's own trainer.
# scripts/test_verl.sh [FOLDER of the environment] [argument of pytest ...]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-verl} && shift || true
if ! "$folder/bin/python" -c "import verl, replan" 2> /dev/null; then
  "${PYTHON:-python3}" -m venv "$folder"
  "$folder/bin/pip" install -q torch==2.13.0 verl==0.9.1 "TransferQueue>=0.1.11,<0.2" qwen-vl-utils==0.0.14 \
    cachetools fastapi msgspec nvtx openai pyzmq tensorboard uvicorn pytest hypothesis -e .
  # built for CUDA and for one torch: tests/train/verl_cpu.py makes it importable beside a torch without CUDA
  "$folder/bin/pip" install -q --no-deps torchvision==0.28.0
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE=1
exec "$folder/bin/python" -m pytest tests/train/test_verl*.py -m "slow or not slow" -rs -p no:cacheprovider "$@"
