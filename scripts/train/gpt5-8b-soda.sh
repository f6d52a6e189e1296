#!/usr/bin/env bash
# SODA, beside stages 2 and 3 and cheaper: DPO, the teacher's answers preferred to the student's own.
#
#   bash scripts/train/gpt5-8b-soda.sh --model .../global_step_200/actor --exp_name NAME --nnodes 1 [KEY=VALUE ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run_stage soda no "$@"
