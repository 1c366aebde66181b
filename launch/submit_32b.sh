#!/usr/bin/env bash
# What the run.sh of the three 32B examples share: launch/submit_32b.sh EXAMPLE EXPERIMENT [key=value ...]
#
# From the environment, as in the DAPO recipe; paths are those of the nodes, on a file system that they share:
#   RAY_ADDRESS, WORKING_DIR, RUNTIME_ENV   of launch/submit.sh; the working folder is the checkout if absent
#   NNODES                                  (16)
#   RAY_DATA_HOME                           the root of the paths below (the checkout)
#   MODEL_PATH, CKPTS_DIR, TRAIN_FILE, TEST_FILE
set -euo pipefail

EXAMPLE=${1:?the name of a folder in examples/} EXPERIMENT=${2:?the name of the folder for checkpoints}
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export RAY_ADDRESS=${RAY_ADDRESS:-http://localhost:8265}
export WORKING_DIR=${WORKING_DIR:-$ROOT}
export RUNTIME_ENV=${RUNTIME_ENV:-$WORKING_DIR/launch/runtime_env.yaml}
NNODES=${NNODES:-16}
RAY_DATA_HOME=${RAY_DATA_HOME:-$ROOT}
MODEL_PATH=${MODEL_PATH:-$RAY_DATA_HOME/models/Qwen2.5-32B}
CKPTS_DIR=${CKPTS_DIR:-$RAY_DATA_HOME/ckpts/DAPO/$EXPERIMENT}
TRAIN_FILE=${TRAIN_FILE:-$RAY_DATA_HOME/data/dapo-math-17k.parquet}
TEST_FILE=${TEST_FILE:-$RAY_DATA_HOME/data/aime-2024.parquet}

exec "$ROOT/launch/submit.sh" "examples/$EXAMPLE/config.yaml" \
  "actor_rollout_ref.model.path=$MODEL_PATH" \
  "data.train_files=[$TRAIN_FILE]" \
  "data.val_files=[$TEST_FILE]" \
  "trainer.default_local_dir=$CKPTS_DIR" \
  "trainer.nnodes=$NNODES" \
  "${@:3}"
