#!/usr/bin/env bash
# RePlan: replan_flux, replan_qwen, replan_qwen_plus, paper_flux, paper_qwen, mini_replan.
# scripts/gen_replan.sh [CONFIG] [key=value ...]; one editor per GPU with processes=8. Run it again to resume.
set -euo pipefail
config=eval/replan_flux
case "${1:-}" in *.yaml | eval/*) config=$1 && shift ;; esac
exec replan eval generate "$config" "$@"
