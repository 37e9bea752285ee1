#!/usr/bin/env bash
# Train on a Cloud TPU VM, of one host or of many, through gcloud.
#
#   launch/tpu_vm.sh ACTION --name NAME --zone ZONE [options] [-- --config configs/inshop.py ...]
#
# Actions, in their usual order:
#   create    request the TPU VM, which waits in a queue until there is capacity (it costs money from
#             its creation until it is deleted); with the arguments of a run after --, mmljax plan
#             runs here first, and nothing is requested if the run does not fit
#   status    describe the request: is the TPU VM active?
#   install   put this checkout's HEAD and its requirements on all workers; again after a commit
#   run       start mmljax train with the arguments after -- on all workers, in the background
#   logs      follow the output of one worker
#   session   all of it: create the TPU VM unless it is there (again, if it was preempted), wait until it
#             is active, install, start the run unless it runs, and wait for its exit code, which is that
#             of this command; SIGTERM and Ctrl-C stop the run first. For launch/restart.sh
#   stop      make the run save and end, on all workers, and wait for that
#   kill      end the run at once on all workers; the steps after its last checkpoint are lost
#   fetch     copy a file or folder of worker 0 to this machine
#   delete    delete the TPU VM with its disk, and the request for it; gcloud asks first
#
#   --name NAME, --zone ZONE   of the TPU VM; always needed
#   --project PROJECT          default: gcloud's own
#   --poll SECONDS             session: between two looks (default 30)
#   --direct                   create, status, delete: without a queued resource of the same name
#   --type TYPE                create: such as v5litepod-16; what a zone has:
#                              gcloud compute tpus accelerator-types list --zone ZONE
#   --version VERSION          create: runtime image, such as v2-alpha-tpuv5-lite
#   --spot                     create: cheaper, may be preempted; create it again to resume
#   --topology NAME            create, run: plan for it, such as v5p:2x2x1; create knows that of v5e
#                              and v6e by the type
#   --planner PROGRAM          Python here that has mmljax[tpu] (default python)
#   --no-plan                  create, run: without mmljax plan
#   --quiet                    delete: without being asked
#   --worker N                 logs: default 0
#   --from PATH, --to PATH     fetch: remote (relative to the home directory) and local
#   --dry-run                  print the commands and run nothing

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=command.sh
source "$(dirname "${BASH_SOURCE[0]}")/command.sh"

name="" zone="" type="" version="" worker=0 from="" to="" direct=false quiet=() spot=() project=()
topology="" poll=30 given=("$@")
action=${1:-}
case $action in
  create | status | install | run | session | logs | stop | kill | fetch | delete) shift ;;
  --help | -h) help_of "${BASH_SOURCE[0]}"; exit ;;
  *) fail "the first argument must be create, status, install, run, session, logs, stop, kill, fetch or \
delete, found '$action'; see --help" ;;
esac
while (($#)); do
  case $1 in
    --name) needs "$@"; name=$2; shift 2 ;;
    --zone) needs "$@"; zone=$2; shift 2 ;;
    --project) needs "$@"; project=("--project=$2"); shift 2 ;;
    --type) needs "$@"; type=$2; shift 2 ;;
    --version) needs "$@"; version=$2; shift 2 ;;
    --worker) needs "$@"; worker=$2; shift 2 ;;
    --from) needs "$@"; from=$2; shift 2 ;;
    --to) needs "$@"; to=$2; shift 2 ;;
    --topology) needs "$@"; topology=$2; shift 2 ;;
    --planner) needs "$@"; planner=$2; shift 2 ;;
    --no-plan) plan=false; shift ;;
    --poll) needs "$@"; poll=$2; shift 2 ;;
    --direct) direct=true; shift ;;
    --spot) spot=(--spot); shift ;;
    --quiet) quiet=(--quiet); shift ;;
    --dry-run) dry_run=true; shift ;;
    --help | -h) help_of "${BASH_SOURCE[0]}"; exit ;;
    --) shift; break ;;
    *) fail "unknown argument '$1'; arguments of mmljax train follow a --" ;;
  esac
done
[[ $name =~ ^[a-z][a-z0-9-]*$ ]] || fail "--name must be the TPU VM's name (a-z, 0-9, -), \
found '$name'"
[[ -n $zone ]] || fail "--zone is missing: the zone of the TPU VM, such as us-west4-a"
[[ $action =~ ^(run|create|session)$ ]] || ((!$#)) || fail "only create, run and session take \
arguments after a --, found '$1'"
[[ $poll =~ ^[0-9]+$ ]] || fail "--poll must be a number of seconds, found '$poll'"

where=("--zone=$zone" "${project[@]}")
tpu=(gcloud compute tpus tpu-vm)
queue=(gcloud compute tpus queued-resources)

on_workers() { # workers, command
  run "${tpu[@]}" ssh "$name" "${where[@]}" "--worker=$1" "--command=$2"
}

# Start the run in the background on all workers; $1 is the exit code where one is in progress. The
# run's own code is written to run.code.
start_run() { # code, arguments of mmljax train
  local busy=$1
  shift
  on_workers all "set -e; cd mmljax; \
if [ -f run.pid ] && kill -0 \$(cat run.pid) 2>/dev/null; \
then echo 'a run is in progress; stop it first' >&2; exit $busy; fi; rm -f run.code run.pid; \
MMLJAX_DISTRIBUTED=1 nohup sh -c '\"\$@\" & echo \$! >run.pid; wait \$!; echo \$? >run.code' run \
.venv/bin/python -m mmljax.main $(show "$@") >>run.log 2>&1 </dev/null & \
until [ -s run.code ] || kill -0 \$(cat run.pid 2>/dev/null) 2>/dev/null; do sleep 0.1; done"
}

# The state of the request, such as ACTIVE, or of the TPU VM, such as READY; NONE if it is not there.
state_of() {
  local describe=("${queue[@]}" describe "$name" "${where[@]}" "--format=value(state.state)")
  if $direct; then
    describe=("${tpu[@]}" describe "$name" "${where[@]}" "--format=value(state)")
  fi
  "${describe[@]}" 2>/dev/null || echo NONE
}

# Whether a state means that the TPU VM was preempted or failed, and only what is left can be deleted.
# One that was stopped has its disk, so it is refused.
gone() { # state
  case $1 in
    SUSPEND* | FAILED | PREEMPTED | TERMINATED) return 0 ;;
    STOPPED | STOPPING)
      fail "$name is $1; start it (gcloud compute tpus tpu-vm start $name ${where[*]}) or delete it"
      ;;
  esac
  return 1
}

case $action in
  create)
    [[ -n $type && -n $version ]] || fail "create needs --type and --version; see --help"
    topology=${topology:-$(topology_of "$type")}
    [[ -n $topology ]] || ! $plan || ((!$#)) || fail "the topology of --type $type is not known here: \
give --topology, such as v5p:2x2x1, or --no-plan"
    plan_first "$topology" "$@"
    if $direct; then
      run "${tpu[@]}" create "$name" "${where[@]}" \
        "--accelerator-type=$type" "--version=$version" "${spot[@]}"
    else
      run "${queue[@]}" create "$name" "--node-id=$name" "${where[@]}" \
        "--accelerator-type=$type" "--runtime-version=$version" "${spot[@]}"
    fi
    ;;
  status)
    if $direct; then
      run "${tpu[@]}" describe "$name" "${where[@]}"
    else
      run "${queue[@]}" describe "$name" "${where[@]}"
    fi
    ;;
  install)
    # A bundle carries the revision, which results.json records; uv installs a recent Python,
    # whatever the image has.
    bundle=${TMPDIR:-/tmp}/mmljax-$name.bundle
    run git -C "$(dirname "${BASH_SOURCE[0]}")/.." bundle create --quiet "$bundle" HEAD
    run "${tpu[@]}" scp "$bundle" "$name:mmljax.bundle" "${where[@]}" --worker=all
    on_workers all "set -e; git init --quiet mmljax; cd mmljax; \
git fetch --quiet ../mmljax.bundle HEAD; git checkout --quiet --detach FETCH_HEAD; \
python3 -m pip install --quiet --user uv; \
python3 -m uv venv --quiet --allow-existing --python 3.12 .venv; \
python3 -m uv pip install --quiet --python .venv/bin/python -e '.[data,plot,tpu,gcs]'"
    ;;
  run)
    (($#)) || fail "nothing to run: give the arguments of mmljax train after a --"
    plan_first "$topology" "$@"
    start_run 1 "$@"
    ;;
  session)
    (($#)) || fail "nothing to run: give the arguments of mmljax train after a --"
    # The same options for each action; only create is also given the run, to plan it.
    options=("${given[@]:1:$((${#given[@]} - $# - 2))}")
    script=${BASH_SOURCE[0]}
    if $dry_run; then
      "$script" create "${options[@]}" -- "$@"
      "$script" install "${options[@]}"
      start_run 0 "$@"
      exit
    fi
    pass_signals
    state=$(state_of)
    if [[ $state == NONE ]]; then
      "$script" create "${options[@]}" -- "$@"
    elif gone "$state"; then
      echo "$name was preempted; creating it again" >&2
      "$script" delete "${options[@]}" --quiet
      "$script" create "${options[@]}" --no-plan
    fi
    until state=$(state_of) && [[ $state == ACTIVE || $state == READY ]]; do
      ! $stopped || exit 75
      if [[ $state == NONE ]] || gone "$state"; then
        echo "$name is $state" >&2
        exit 1
      fi
      wait_for sleep "$poll" || true
    done
    "$script" install "${options[@]}"
    start_run 0 "$@"
    look="cd mmljax; if kill -0 \$(cat run.pid) 2>/dev/null; then echo runs; else cat run.code; fi"
    while code=$(on_workers 0 "$look" | tail -n 1) && [[ $code == runs ]]; do
      if $stopped; then "$script" stop "${options[@]}"; else wait_for sleep "$poll" || true; fi
    done
    [[ $code =~ ^[0-9]+$ ]] || { echo "$name is gone" >&2; exit 1; }
    exit "$code"
    ;;
  logs) on_workers "$worker" "tail -n 100 -F mmljax/run.log" ;;
  stop)
    # A worker may have been stopped by another one already.
    on_workers all "pid=\$(cat mmljax/run.pid); kill -TERM \$pid 2>/dev/null; \
for _ in \$(seq 600); do kill -0 \$pid 2>/dev/null || exit 0; sleep 1; done; \
echo 'still saving after 10 minutes; wait, or use kill' >&2; exit 1"
    ;;
  kill) on_workers all "kill -KILL \$(cat mmljax/run.pid)" ;;
  fetch)
    [[ -n $from && -n $to ]] || fail "fetch needs --from and --to; see --help"
    run "${tpu[@]}" scp --recurse "$name:$from" "$to" "${where[@]}" --worker=0
    ;;
  delete)
    what="the TPU VM $name with its disk, ${where[*]}"
    if $direct; then
      printf '# deletes %s\n' "$what"
      run "${tpu[@]}" delete "$name" "${where[@]}" "${quiet[@]}"
    else
      printf '# deletes the queued resource %s and %s\n' "$name" "$what"
      run "${queue[@]}" delete "$name" "${where[@]}" --force "${quiet[@]}"
    fi
    ;;
esac
