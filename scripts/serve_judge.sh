#!/usr/bin/env bash
# The judge of stage 2 as a service: an open vision-language model behind vLLM, as `services.judge` names it.
# scripts/serve_judge.sh [option of `vllm serve` ...]; MODEL, GPUS (8), PORT (8000) and SHARE (0.35 of each GPU, so that
# the editor fits beside it) come from the environment. Two pictures, the templates and an answer fit into 8,192 tokens.
set -euo pipefail
exec vllm serve "${MODEL:-Qwen/Qwen2.5-VL-72B-Instruct}" --served-model-name judge --port "${PORT:-8000}" \
  --tensor-parallel-size "${GPUS:-8}" --gpu-memory-utilization "${SHARE:-0.35}" --max-model-len 8192 \
  --limit-mm-per-prompt '{"image": 2}' --enforce-eager "$@"
