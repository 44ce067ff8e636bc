#!/usr/bin/env bash
# The editor service of stage 2 and of evaluations: one replica for each GPU, on Ray Serve.
#   scripts/serve_editor.sh                                       Flux Kontext on all GPUs of this machine, port 8001
#   REPLICAS=16 HOST=0.0.0.0 RAY_ADDRESS=auto scripts/serve_editor.sh   over the nodes of a running Ray cluster
#   BACKBONE=mini REPLICAS=2 scripts/serve_editor.sh              two mini editors on the CPU
# Requests bring their own plans. Further arguments go to `replan serve editor`, such as steps=20 or --queue 64.
set -euo pipefail
: "${BACKBONE:=flux-kontext}" "${HOST:=127.0.0.1}" "${PORT:=8001}"
: "${REPLICAS:=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}"
exec replan serve editor --backbone "$BACKBONE" --planner none --replicas "$((REPLICAS > 0 ? REPLICAS : 1))" \
  --host "$HOST" --port "$PORT" "$@"
