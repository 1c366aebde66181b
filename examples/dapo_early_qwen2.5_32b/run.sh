#!/usr/bin/env bash
# Submits the run to a Ray cluster, from any machine, under the variables of launch/submit_32b.sh; words are settings:
#
#   RAY_ADDRESS=http://HEAD:8265 examples/dapo_early_qwen2.5_32b/run.sh [key=value ...]
set -euo pipefail

exec "$(dirname "${BASH_SOURCE[0]}")/../../launch/submit_32b.sh" dapo_early_qwen2.5_32b DAPO-Early-Qwen2.5-32B "$@"
