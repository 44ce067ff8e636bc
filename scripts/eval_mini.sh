#!/usr/bin/env bash
# The benchmark in small, end to end: the base editor against RePlan on the mini world's test split, with the exact judge.
# scripts/eval_mini.sh [FOLDER] [key=value of `replan eval generate` ...]; run it again to resume.
set -euo pipefail
runs=${1:-runs} && shift || true
for name in base replan; do
  replan eval generate "eval/mini_$name" output="$runs/mini-$name" "$@" > /dev/null
done
replan eval score "$runs/mini-replan" --judge mini > /dev/null
replan eval score "$runs/mini-base" --judge mini --plans "$runs/mini-replan" > /dev/null
replan eval browse "$runs/mini-base" "$runs/mini-replan" -o "$runs/compare.html"
replan eval report "$runs/mini-base" "$runs/mini-replan" --json "$runs/report.json" --picture "$runs/report.png"
