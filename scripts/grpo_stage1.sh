#!/usr/bin/env bash
# Stage 1, format and plausible regions: no services needed.
# scripts/grpo_stage1.sh [key=value ...], such as nodes=2 or steps=10; run it again to go on. Engine verl starts Ray, or
# joins RAY_ADDRESS; engine=trl runs under accelerate with scripts/fsdp2.yaml, or the file that ACCELERATE names.
set -euo pipefail
run=(replan)
case " $* " in *" engine=trl "*)
  run=(accelerate launch --config_file "${ACCELERATE:-$(dirname "$0")/fsdp2.yaml}" -m replan) ;;
esac
exec "${run[@]}" train grpo grpo/stage1 "$@"
