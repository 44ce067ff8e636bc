#!/usr/bin/env bash
# Qwen-Image-Edit with the bare instruction; configs/eval/qwen_image_plus.yaml for 2511.
# scripts/gen_qwen_image.sh [CONFIG] [key=value ...]; one editor per GPU with processes=8. Run it again to resume.
set -euo pipefail
config=eval/qwen_image
case "${1:-}" in *.yaml | eval/*) config=$1 && shift ;; esac
exec replan eval generate "$config" "$@"
