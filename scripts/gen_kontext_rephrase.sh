#!/usr/bin/env bash
# Global rephrase, then FLUX.1 Kontext [dev].
# scripts/gen_kontext_rephrase.sh [CONFIG] [key=value ...]; one editor per GPU with processes=8. Run it again to resume.
set -euo pipefail
config=eval/kontext_rephrase
case "${1:-}" in *.yaml | eval/*) config=$1 && shift ;; esac
exec replan eval generate "$config" "$@"
