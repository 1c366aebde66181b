#!/usr/bin/env bash
# Submit a run to a Ray cluster that is there: launch/submit.sh CONFIG key=value ... (docs/launch.md). Follows the run
# and ends with its success or failure; Ctrl-C stops the following alone.
#
# From the environment, as in the DAPO recipe:
#   RAY_ADDRESS  of the cluster's dashboard (http://localhost:8265)
#   WORKING_DIR  copied to every node (the current folder)
#   RUNTIME_ENV  what the run's processes get (WORKING_DIR/launch/runtime_env.yaml)
set -euo pipefail

if (($# == 0)); then
  echo "usage: launch/submit.sh CONFIG key=value ... (the words after megatron-dapo train)" >&2
  exit 2
fi
RAY_ADDRESS=${RAY_ADDRESS:-http://localhost:8265}
WORKING_DIR=${WORKING_DIR:-$PWD}
RUNTIME_ENV=${RUNTIME_ENV:-$WORKING_DIR/launch/runtime_env.yaml}

# Ray's own answer would be a traceback.
if [[ $RAY_ADDRESS =~ ^http://([A-Za-z0-9.-]+):([0-9]+)/?$ ]] &&
  ! timeout 10 bash -c "exec 3<>/dev/tcp/${BASH_REMATCH[1]}/${BASH_REMATCH[2]}" 2>/dev/null; then
  echo "megatron-dapo: no Ray dashboard answers at $RAY_ADDRESS: set RAY_ADDRESS to the one of the cluster's head," \
    "http://HOST:8265, or start a head with one (DASHBOARD_PORT of launch/ray_cluster.sh)" >&2
  exit 1
fi

exec ray job submit --address "$RAY_ADDRESS" --working-dir "$WORKING_DIR" --runtime-env "$RUNTIME_ENV" -- \
  python -m megatron_dapo train "$@" runtime=ray
