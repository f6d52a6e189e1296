#!/usr/bin/env bash
# Stage 3, GAD: student and discriminator train against each other. TensorBoard runs beside it.
#
#   bash scripts/train/gpt5-8b-gad-gspo.sh --model .../actor --reward_model .../critic --exp_name NAME --nnodes 1 [KEY=VALUE ...]
#
# From the environment: TENSORBOARD_HOST (127.0.0.1), TENSORBOARD_PORT (6006), TENSORBOARD_LOGDIR (where the run's
# settings say, or checkpoints), TENSORBOARD=off.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/tensorboard.sh"

before_training() { start_tensorboard "$@"; }
run_stage gad yes "$@"
