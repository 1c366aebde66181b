#!/usr/bin/env bash
# Submits the run to a Ray cluster, from any machine, under the recipe's variables; further words are settings:
#
#   RAY_ADDRESS=http://HEAD:8265 examples/dapo_qwen2.5_32b/run.sh [key=value ...]
#
# Paths are those of the nodes, on a file system that they share.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export RAY_ADDRESS=${RAY_ADDRESS:-http://localhost:8265}
export WORKING_DIR=${WORKING_DIR:-$ROOT}
export RUNTIME_ENV=${RUNTIME_ENV:-$WORKING_DIR/launch/runtime_env.yaml}
NNODES=${NNODES:-16}
RAY_DATA_HOME=${RAY_DATA_HOME:-$ROOT}
MODEL_PATH=${MODEL_PATH:-$RAY_DATA_HOME/models/Qwen2.5-32B}
CKPTS_DIR=${CKPTS_DIR:-$RAY_DATA_HOME/ckpts/DAPO/DAPO-Qwen2.5-32B}
TRAIN_FILE=${TRAIN_FILE:-$RAY_DATA_HOME/data/dapo-math-17k.parquet}
TEST_FILE=${TEST_FILE:-$RAY_DATA_HOME/data/aime-2024.parquet}

exec "$ROOT/launch/submit.sh" examples/dapo_qwen2.5_32b/config.yaml \
  "actor_rollout_ref.model.path=$MODEL_PATH" \
  "data.train_files=[$TRAIN_FILE]" \
  "data.val_files=[$TEST_FILE]" \
  "trainer.default_local_dir=$CKPTS_DIR" \
  "trainer.nnodes=$NNODES" \
  "$@"
