#!/usr/bin/env bash
# One node of a Ray cluster, or the run on it. dapo_32b.slurm calls this on every node; it works by hand, too:
#
#   HEAD_ADDRESS=10.0.0.1 launch/ray_cluster.sh head         on the first node
#   HEAD_ADDRESS=10.0.0.1 launch/ray_cluster.sh worker       on each other one
#   HEAD_ADDRESS=10.0.0.1 NODE_NAMES="node1 node2" launch/ray_cluster.sh drive CONFIG key=value ...    on the first node
#
# A node stays until SIGINT (Ctrl-C) or SIGUSR2 ends it, and leaves nothing behind but its logs in LOGS. SIGTERM does
# not end it: Slurm sends that to everything before a preemption, and the run needs its nodes to save its state.
#
# From the environment:
#   HEAD_ADDRESS       of the first node
#   RAY_PORT           where the head listens, and at the next one (6379)
#   DASHBOARD_PORT     the head has a dashboard there, which takes jobs (launch/submit.sh); absent: none
#   RAY_TMP            Ray's folder for sockets and logs, short (/tmp/ray-PORT)
#   LOGS               where Ray's logs go when the node ends (logs)
#   VENV               the virtual environment (.venv); not in a container
#   NODE_NAMES         the nodes that `drive` waits for
#   NODE_WAIT_SECONDS  for which a node waits for the head, and `drive` for all nodes (600)
set -euo pipefail

ROOT=${ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
HEAD_ADDRESS=${HEAD_ADDRESS:?is not set: the address of the first node}
RAY_PORT=${RAY_PORT:-6379}
RAY_TMP=${RAY_TMP:-/tmp/ray-$RAY_PORT}
LOGS=${LOGS:-$ROOT/logs}
NODE_WAIT_SECONDS=${NODE_WAIT_SECONDS:-600}
NODE=${SLURMD_NODENAME:-$(hostname -s)}

main() {
  cd "$ROOT"
  if [[ -z ${CONTAINER_IMAGE:-} ]]; then PATH=${VENV:-$ROOT/.venv}/bin:$PATH; fi
  if ! command -v ray >/dev/null; then
    echo "no ray on the PATH: set VENV to an environment that has it (pip install 'megatron_dapo[ray]')" >&2
    exit 2
  fi
  # The checkout is what runs, whatever is installed; logs are written as they come.
  export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
  export_runtime_env
  local role=${1:-}
  if [[ $role == node ]]; then
    role=worker
    RAY_TMP+=.${SLURM_NODEID:?}
    if [[ $NODE == "${HEAD_NODE:?}" ]]; then role="head"; fi
  fi
  mkdir -p "$LOGS"
  case $role in
    head)
      rm -f "$LOGS/head_ended"
      trap 'touch "$LOGS/head_ended"' EXIT
      run_node "${head_flags[@]}"
      ;;
    worker)
      await_head
      run_node --address="$HEAD_ADDRESS:$RAY_PORT"
      ;;
    drive) drive "${@:2}" ;;
    *)
      echo "usage: launch/ray_cluster.sh head|worker|node|drive CONFIG key=value ... (see its first lines)" >&2
      exit 2
      ;;
  esac
}

head_flags=(--head --port="$RAY_PORT" --node-ip-address="$HEAD_ADDRESS"
  --ray-client-server-port=$((RAY_PORT + 1)))
if [[ -n ${DASHBOARD_PORT:-} ]]; then
  head_flags+=(--include-dashboard=true --dashboard-port="$DASHBOARD_PORT")
else
  head_flags+=(--include-dashboard=false)
fi

# What a submitted job's processes get from runtime_env.yaml, those started here get, too.
export_runtime_env() {
  local variables
  variables=$(python -c 'import shlex, yaml
for name, value in yaml.safe_load(open("launch/runtime_env.yaml"))["env_vars"].items():
    print(f"export {name}={shlex.quote(value)}")')
  eval "$variables"
}

await_head() {
  local waited=0
  until (exec 3<>"/dev/tcp/$HEAD_ADDRESS/$RAY_PORT") 2>/dev/null; do
    refuse_ended_head
    if ((waited++ >= NODE_WAIT_SECONDS)); then
      echo "$NODE: no Ray head answers at $HEAD_ADDRESS:$RAY_PORT after $NODE_WAIT_SECONDS s: see the first node's" \
        "log, and set HEAD_ADDRESS if the nodes reach it by another address" >&2
      return 1
    fi
    sleep 1
  done
}

refuse_ended_head() {
  if [[ -e $LOGS/head_ended ]]; then
    echo "$NODE: the Ray head has ended: see the first node's log" >&2
    exit 1
  fi
}

# Start Ray and stay. On a busy machine Ray's agents may miss the 15 s that its raylet gives each: then once more. The
# time is fixed in Ray (https://github.com/ray-project/ray/issues/65983).
run_node() {
  local tries=2 code started
  ray=
  stopping=
  mkdir -p "$RAY_TMP"
  trap : TERM
  trap 'stopping=1; if [[ -n $ray ]]; then kill -s TERM "$ray" 2>/dev/null || true; fi' INT USR2
  while [[ -z $stopping ]] && ((tries-- > 0)); do
    started=$SECONDS code=0
    start_ray "$@"
    while kill -0 "$ray" 2>/dev/null; do wait "$ray" || true; done # a signal ends a wait
    wait "$ray" || code=$?
    if ((SECONDS - started > 120)); then break; fi # it had started
  done
  cp -rL "$RAY_TMP/session_latest/logs" "$LOGS/$NODE" 2>/dev/null || echo "$NODE: Ray left no logs in $RAY_TMP" >&2
  rm -rf "$RAY_TMP"
  return "${code:-0}"
}

# Ports but the head's are the system's choice (0), so that two clusters on one host do not meet.
start_ray() {
  local resources=()
  if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then resources+=(--num-gpus="$SLURM_GPUS_ON_NODE"); fi
  if [[ -n ${SLURM_CPUS_ON_NODE:-} ]]; then resources+=(--num-cpus="$SLURM_CPUS_ON_NODE"); fi
  ray start "$@" "${resources[@]}" --block --disable-usage-stats --node-name="$NODE" --temp-dir="$RAY_TMP" \
    --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 &
  ray=$!
}

drive() {
  waiting=
  trap 'if [[ -n $waiting ]]; then kill "$waiting" 2>/dev/null || true; fi' EXIT
  trap 'exit 75' TERM USR1 # nothing has begun: start again (megatron_dapo/exit_codes.py)
  await_head
  read -ra names <<<"${NODE_NAMES:-$NODE}"
  python launch/wait_for_nodes.py "$HEAD_ADDRESS:$RAY_PORT" "$NODE_WAIT_SECONDS" "${names[@]}" &
  waiting=$!
  while kill -0 "$waiting" 2>/dev/null; do
    refuse_ended_head
    sleep 1 & # in the background: a signal is acted on at once
    wait $! || true
  done
  wait "$waiting"
  trap - TERM USR1
  RAY_ADDRESS=$HEAD_ADDRESS:$RAY_PORT exec python -m megatron_dapo train "$@"
}

main "$@"
