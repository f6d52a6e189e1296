#!/usr/bin/env bash
# Stage 1, SeqKD: SFT on the teacher's answers.
#
#   bash scripts/train/gpt5-8b-SeqKD-gspo.sh --model PATH --exp_name NAME --nnodes 1 [KEY=VALUE ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run_stage seqkd no "$@"
