#!/usr/bin/env bash
# FLUX.1 Kontext [dev] with the bare instruction.
# scripts/gen_kontext.sh [CONFIG] [key=value ...]; one editor per GPU with processes=8. Run it again to resume.
set -euo pipefail
config=eval/kontext
case "${1:-}" in *.yaml | eval/*) config=$1 && shift ;; esac
exec replan eval generate "$config" "$@"
