#!/usr/bin/env bash
# InstructPix2Pix.
# scripts/gen_instructpix2pix.sh [CONFIG] [key=value ...]; one editor per GPU with processes=8. Run it again to resume.
set -euo pipefail
config=eval/instructpix2pix
case "${1:-}" in *.yaml | eval/*) config=$1 && shift ;; esac
exec replan eval generate "$config" "$@"
