#!/usr/bin/env bash
# The run on this machine, under the recipe's variables; further words are settings:
#
#   MODEL_PATH=/models/Qwen3-1.7B-Base examples/dapo_qwen3_1.7b/run.sh [key=value ...]
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
RAY_DATA_HOME=${RAY_DATA_HOME:-$ROOT}
MODEL_PATH=${MODEL_PATH:-$RAY_DATA_HOME/models/Qwen3-1.7B-Base}
CKPTS_DIR=${CKPTS_DIR:-$RAY_DATA_HOME/ckpts/DAPO/DAPO-Qwen3-1.7B}
TRAIN_FILE=${TRAIN_FILE:-$RAY_DATA_HOME/data/dapo-math-17k.parquet}
TEST_FILE=${TEST_FILE:-$RAY_DATA_HOME/data/aime-2024.parquet}

exec megatron-dapo train "$ROOT/examples/dapo_qwen3_1.7b/config.yaml" \
  "actor_rollout_ref.model.path=$MODEL_PATH" \
  "data.train_files=[$TRAIN_FILE]" \
  "data.val_files=[$TEST_FILE]" \
  "trainer.default_local_dir=$CKPTS_DIR" \
  "$@"
