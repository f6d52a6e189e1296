#!/usr/bin/env bash
# Stage 2, warmup: the discriminator learns to tell the student from the teacher; then the student joins in.
#
#   bash scripts/train/gpt5-8b-warmup-gspo.sh --model .../global_step_200/actor --reward_model PATH --exp_name NAME --nnodes 1 [KEY=VALUE ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run_stage warmup yes "$@"
