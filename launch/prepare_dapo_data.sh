#!/usr/bin/env bash
# The recipe's training and evaluation files, under the recipe's variables:
#
#   [TRAIN_FILE=...] [TEST_FILE=...] [OVERWRITE=1] launch/prepare_dapo_data.sh [options of tools/prepare_dapo_data.py]
#
# Both files are as they are published, repetitions included. A file that is there is left alone unless OVERWRITE=1.
# HF_ENDPOINT names a mirror, HF_HOME the cache, HF_HUB_OFFLINE=1 takes the cache alone.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
RAY_DATA_HOME=${RAY_DATA_HOME:-$ROOT}
TRAIN_FILE=${TRAIN_FILE:-"${RAY_DATA_HOME}/data/dapo-math-17k.parquet"}
TEST_FILE=${TEST_FILE:-"${RAY_DATA_HOME}/data/aime-2024.parquet"}
OVERWRITE=${OVERWRITE:-0}

prepare() { # NAME FILE [option...]: the data set NAME of the recipe as FILE
  local name=$1 file=$2
  shift 2
  if [[ -e ${file} && ${OVERWRITE} != 1 ]]; then
    echo "${file} is there; OVERWRITE=1 makes it again" >&2
    return
  fi
  python "${ROOT}/tools/prepare_dapo_data.py" "${name}" --train "${file}" --overwrite "$@"
}

prepare dapo-math-17k "${TRAIN_FILE}" "$@"
prepare aime-2024 "${TEST_FILE}" "$@"
