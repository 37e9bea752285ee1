# shellcheck shell=bash
# Shared by the launchers: stop with a message, show a command or run it.

dry_run=false # set by --dry-run

# Print one line on standard error and stop with code 2.
fail() {
  printf '%s: error: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

# Print words as one line, quoted for a shell.
show() {
  local word line=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Run a command, or only show it under --dry-run.
run() {
  if $dry_run; then show "$@"; else "$@"; fi
}

# Run a command and return its exit code. SIGTERM and Ctrl-C to this script are passed on to it as
# SIGTERM, once pass_signals was called.
child="" interrupted=false stopped=false
pass_signals() {
  trap 'stopped=true interrupted=true; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' \
    TERM INT
}
wait_for() {
  local code
  "$@" &
  child=$!
  ! $stopped || kill -TERM "$child" 2>/dev/null || true # it came before child was set
  while true; do
    interrupted=false code=0
    wait "$child" || code=$?
    if ! $interrupted; then # else the signal ended wait, not the command
      child=""
      return "$code"
    fi
  done
}

plan=true        # set to false by --no-plan
planner=python   # set by --planner

# Print the topology of an accelerator type such as v5litepod-8; nothing if its name does not tell.
topology_of() {
  local chip=${1%-*}
  [[ $chip != v5litepod ]] || chip=v5e
  [[ $chip == v5e || $chip == v6e ]] || return 0
  case ${1##*-} in
    1) echo "$chip:1x1" ;;
    4) echo "$chip:2x2" ;;
    8) echo "$chip:2x4" ;;
    16) echo "$chip:4x4" ;;
    32) echo "$chip:4x8" ;;
    64) echo "$chip:8x8" ;;
    128) echo "$chip:8x16" ;;
    256) echo "$chip:16x16" ;;
  esac
}

# Run mmljax plan for a topology, with the config that is among the arguments of mmljax train. Its
# exit code, such as 2 where the run does not fit, stops the launch. Under --dry-run its command is
# shown as a comment. Nothing happens without a topology or a config, or after --no-plan.
plan_first() { # topology, arguments of mmljax train
  local command=("$planner" -m mmljax plan --topology "$1") shown
  local length=${#command[@]}
  shift
  while (($#)); do
    case $1 in
      --config) command+=("${@:1:2}") ;;
      --config=* | --config.*) command+=("$1") ;;
    esac
    shift
  done
  if ! $plan || [[ -z ${command[5]} ]] || ((${#command[@]} == length)); then return 0; fi
  if $dry_run; then
    shown=$(show "${command[@]}")
    printf '# %s\n' "${shown//$'\n'/$'\n'# }"
  else
    "${command[@]}"
  fi
}

# Stop unless the option $1 has a value; call as: needs "$@"
needs() {
  [[ $# -ge 2 && $2 != --* ]] || fail "$1 needs a value; see --help"
}

# Print the opening comment of a script $1.
help_of() {
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$1"
}
