#!/usr/bin/env bash
# Train with several processes on this machine, joined by jax.distributed.
#
#   launch/local.sh --processes N [options] -- --config configs/quickstart.py ...
#
# The arguments after -- are those of mmljax train, for every process. Process 0 writes to the
# terminal, process i to LOGS/process_i.log. If one stops with an error, all are stopped, with its
# exit code. SIGTERM is passed on to all: they save and end, with exit code 75. Ctrl-C kills them.
# One process already uses all GPUs of a machine: this script is to test several processes.
#
#   --processes N        how many
#   --devices cpu|gpu    cpu: one CPU device each (default); gpu: GPU i for process i
#   --port PORT          of the coordinator on this machine (default 12421)
#   --logs DIR           default runs/local
#   --python PROGRAM     default python
#   --dry-run            print the commands and run nothing

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=command.sh
source "$(dirname "${BASH_SOURCE[0]}")/command.sh"

processes="" devices=cpu port=12421 logs=runs/local python=python
while (($#)); do
  case $1 in
    --processes) needs "$@"; processes=$2; shift 2 ;;
    --devices) needs "$@"; devices=$2; shift 2 ;;
    --port) needs "$@"; port=$2; shift 2 ;;
    --logs) needs "$@"; logs=$2; shift 2 ;;
    --python) needs "$@"; python=$2; shift 2 ;;
    --dry-run) dry_run=true; shift ;;
    --help | -h) help_of "${BASH_SOURCE[0]}"; exit ;;
    --) shift; break ;;
    *) fail "unknown argument '$1'; arguments of mmljax train follow a --" ;;
  esac
done
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "--processes must be a number from 1, found '$processes'"
[[ $port =~ ^[0-9]+$ ]] || fail "--port must be a number, found '$port'"
[[ $devices == cpu || $devices == gpu ]] || fail "--devices must be cpu or gpu, found '$devices'"
(($#)) || fail "nothing to run: give the arguments of mmljax train after a --"

children=()
stop_all() {
  # Not TERM: one process is gone, so the others cannot agree on a step to save.
  if ((${#children[@]})); then
    kill -KILL "${children[@]}" || true
    wait || true
  fi 2>/dev/null
}
trap stop_all EXIT
trap 'exit 130' INT
trap 'passed_on=true; kill -TERM "${children[@]}" 2>/dev/null || true' TERM

$dry_run || mkdir -p "$logs"
for ((i = 0; i < processes; i++)); do
  if [[ $devices == cpu ]]; then
    device=JAX_PLATFORMS=cpu
  else
    device=CUDA_VISIBLE_DEVICES=$i
  fi
  command=(env "MMLJAX_COORDINATOR=localhost:$port" "MMLJAX_NUM_PROCESSES=$processes"
    "MMLJAX_PROCESS_ID=$i" "$device" "$python" -m mmljax.main "$@")
  if $dry_run; then
    show "${command[@]}"
  elif ((i == 0)); then
    "${command[@]}" &
    children+=($!)
  else
    "${command[@]}" >"$logs/process_$i.log" 2>&1 &
    children+=($!)
  fi
done
if $dry_run; then exit; fi

left=$processes worst=0
while ((left)); do
  passed_on=false code=0
  wait -n || code=$?
  if $passed_on; then continue; fi # the signal interrupted wait; no process ended
  left=$((left - 1))
  if ((code && code != 75)); then
    echo "local.sh: a process stopped with code $code; see $logs/process_*.log" >&2
    exit "$code"
  fi
  ((code == 0)) || worst=$code
done
children=()
((worst == 0)) || exit "$worst"
