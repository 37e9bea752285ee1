#!/usr/bin/env bash
# Start a run again until it is finished, on machines that may be preempted.
#
#   launch/restart.sh [options] -- COMMAND ...
#
# COMMAND is the whole command line of a run that resumes, such as mmljax train with a --workdir that
# outlives the machine, or a launcher that waits for the run (local.sh, tpu_vm.sh session). It is
# started again after exit code 75 (it was preempted and saved) and after a failure, such as that of
# a machine that is gone or of a bucket that cannot be reached (1). Exit codes 0 (finished), 2 (a
# mistake, which would repeat, or another run has taken over the bucket) and 130 (Ctrl-C) end the loop. SIGTERM and Ctrl-C are passed on as SIGTERM: the run saves and is not started again.
# The exit code is that of the last COMMAND.
#
#   --failures N         end after so many quick failures in a row (default 5)
#   --quick SECONDS      a failure within so many seconds from its start is quick (default 600)
#   --pause SECONDS      before it is started again (default 30)
#   --dry-run            print the command and run nothing

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=command.sh
source "$(dirname "${BASH_SOURCE[0]}")/command.sh"

failures=5 quick=600 pause=30
while (($#)); do
  case $1 in
    --failures) needs "$@"; failures=$2; shift 2 ;;
    --quick) needs "$@"; quick=$2; shift 2 ;;
    --pause) needs "$@"; pause=$2; shift 2 ;;
    --dry-run) dry_run=true; shift ;;
    --help | -h) help_of "${BASH_SOURCE[0]}"; exit ;;
    --) shift; break ;;
    *) fail "unknown argument '$1'; the command follows a --" ;;
  esac
done
[[ $failures =~ ^[1-9][0-9]*$ ]] || fail "--failures must be a number from 1, found '$failures'"
[[ $quick =~ ^[0-9]+$ && $pause =~ ^[0-9]+$ ]] || fail "--quick and --pause must be numbers of \
seconds, found '$quick' and '$pause'"
(($#)) || fail "nothing to run: give the command after a --"
if $dry_run; then
  show "$@"
  exit
fi

pass_signals
quick_failures=0 # in a row
while true; do
  started=$SECONDS code=0
  wait_for "$@" || code=$?
  case $code in 0 | 2 | 130) exit "$code" ;; esac
  if $stopped; then exit "$code"; fi
  if ((code == 75 || SECONDS - started >= quick)); then
    quick_failures=0
  else
    quick_failures=$((quick_failures + 1))
  fi
  if ((quick_failures == failures)); then
    echo "restart.sh: $quick_failures failures in a row within $quick s of their start; the last has code $code" >&2
    exit "$code"
  fi
  echo "restart.sh: code $code after $((SECONDS - started)) s; starting again in $pause s" >&2
  wait_for sleep "$pause" || true
  if $stopped; then exit "$code"; fi
done
