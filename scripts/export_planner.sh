#!/usr/bin/env bash
# A trained planner as an ordinary Hugging Face folder: of a run its newest checkpoint, or a checkpoint of either engine.
# scripts/export_planner.sh RUN|CHECKPOINT FOLDER, such as runs/stage2 planner or runs/stage2/checkpoints/global_step_35
set -euo pipefail
exec replan train export "$@"
