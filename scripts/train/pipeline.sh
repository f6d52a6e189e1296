#!/usr/bin/env bash
# All stages by one command, from the base model to a judged student (docs/pipeline.md).
#
#   bash scripts/train/pipeline.sh --model BASE --data TRAIN --val VAL --exp_name NAME [--stages seqkd,warmup,gad] [KEY=VALUE ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

find_python
# In this process' place, so that who ends the script ends the pipeline, and has its exit code.
exec "${PYTHON:-python3}" -m verl.pipeline "$@"
