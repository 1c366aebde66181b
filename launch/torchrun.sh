#!/usr/bin/env bash
# A run without Ray, over the GPUs of this machine or, started by srun on each, of several:
#
#   launch/torchrun.sh CONFIG key=value ...
#   srun --ntasks-per-node=1 launch/torchrun.sh CONFIG key=value ...
#
# Ends with the run's own exit code, which torchrun does not pass on: 75 says saved, please start again.
#
# From the environment:
#   RANKS_PER_NODE  one for each GPU if absent
#   VENV            the virtual environment (.venv); not in a container
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${CONTAINER_IMAGE:-} ]]; then PATH=${VENV:-$ROOT/.venv}/bin:$PATH; fi
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_DEVICE_MAX_CONNECTIONS=1 TOKENIZERS_PARALLELISM=false

# Where the run leaves its exit code.
directory=$(python - "$@" <<'PYTHON'
import sys

from megatron_dapo.config.load import load_config
from megatron_dapo.config.tree import ConfigError

files = [word for word in sys.argv[1:] if "=" not in word]
settings = [word for word in sys.argv[1:] if "=" in word]
try:
    print(load_config(files[0] if files else None, settings).config.trainer.default_local_dir)
except ConfigError as error:
    print(f"megatron-dapo: {error}", file=sys.stderr)
    sys.exit(2)
PYTHON
)
rm -f "$directory/exit_status"

meeting=(--standalone)
if ((${SLURM_JOB_NUM_NODES:-1} > 1)); then
  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  meeting=(--nnodes="$SLURM_JOB_NUM_NODES" --node-rank="$SLURM_NODEID" --master-addr="$head"
    --master-port=$((20000 + SLURM_JOB_ID % 10000)))
fi

# The ranks get the signals, and ten minutes to save their state.
torchrun "${meeting[@]}" --nproc-per-node="${RANKS_PER_NODE:-gpu}" --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 \
  --shutdown-timeout=600 -m megatron_dapo train "$@" &
torchrun=$!
for signal in INT TERM USR1; do
  # shellcheck disable=SC2064 # the signal's name of now
  trap "kill -s $signal $torchrun 2>/dev/null || true" "$signal"
done
code=0
while kill -0 "$torchrun" 2>/dev/null; do wait "$torchrun" || true; done # a signal ends a wait
wait "$torchrun" || code=$?
if ((code)) && [[ -f $directory/exit_status ]]; then code=$(<"$directory/exit_status"); fi
exit "$code"
