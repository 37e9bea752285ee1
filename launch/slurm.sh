#!/usr/bin/env bash
# Submit a training run to Slurm: one process per GPU, found and joined by jax.distributed.
#
#   launch/slurm.sh --nodes N --gpus-per-node G [options] -- --config configs/inshop.py ...
#
# The arguments after -- are those of mmljax train. Call it from the root of the repository with an
# environment active that has mmljax; the job inherits both. The workdir must be on a file system
# that all nodes share. NOTICE seconds before the time limit, or when Slurm preempts the job, the run
# gets SIGTERM: it saves, and the job is queued again and resumes. scancel ends it for good.
#
#   --nodes N            machines
#   --gpus-per-node G    of each; one process for each GPU
#   --cpus-per-gpu C     for reading images (default 8)
#   --time LIMIT         default 24:00:00
#   --notice SECONDS     time to save (default 300)
#   --job-name NAME      default mmljax
#   --partition NAME     as the cluster names it
#   --account NAME       to be charged
#   --logs DIR           of NAME-JOB.log (default runs/slurm)
#   --python PROGRAM     default python
#   --dry-run            print the command and submit nothing

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=command.sh
source "$(dirname "${BASH_SOURCE[0]}")/command.sh"

nodes="" gpus="" cpus=8 limit=24:00:00 notice=300 name=mmljax logs=runs/slurm python=python
site=()
while (($#)); do
  case $1 in
    --nodes) needs "$@"; nodes=$2; shift 2 ;;
    --gpus-per-node) needs "$@"; gpus=$2; shift 2 ;;
    --cpus-per-gpu) needs "$@"; cpus=$2; shift 2 ;;
    --time) needs "$@"; limit=$2; shift 2 ;;
    --notice) needs "$@"; notice=$2; shift 2 ;;
    --job-name) needs "$@"; name=$2; shift 2 ;;
    --partition | --account) needs "$@"; site+=("$1=$2"); shift 2 ;;
    --logs) needs "$@"; logs=$2; shift 2 ;;
    --python) needs "$@"; python=$2; shift 2 ;;
    --dry-run) dry_run=true; shift ;;
    --help | -h) help_of "${BASH_SOURCE[0]}"; exit ;;
    --) shift; break ;;
    *) fail "unknown argument '$1'; arguments of mmljax train follow a --" ;;
  esac
done
for option in nodes gpus cpus notice; do
  [[ ${!option} =~ ^[1-9][0-9]*$ ]] || fail "--nodes, --gpus-per-node, --cpus-per-gpu and --notice \
must be numbers from 1, found '${!option}'"
done
(($#)) || fail "nothing to run: give the arguments of mmljax train after a --"

# Every process sees all GPUs of its node and takes the one of its local rank, as jax does it.
command=(srun "--cpus-per-task=$cpus" --kill-on-bad-exit=1
  env MMLJAX_DISTRIBUTED=1 "$python" -m mmljax.main "$@")
# Exit code 75: saved after SIGTERM. The job is queued again, unless it was cancelled and so is not
# running. The job's shell must survive the signal, but the processes must not inherit its trap.
job="trap : TERM; $(show "${command[@]}"); code=\$?; \
if [ \$code = 75 ] && [ -n \"\$(squeue --noheader --states=RUNNING --jobs=\$SLURM_JOB_ID)\" ]; \
then scontrol requeue \$SLURM_JOB_ID; fi; exit \$code"
$dry_run || mkdir -p "$logs"
run sbatch \
  "--job-name=$name" \
  "--nodes=$nodes" \
  "--ntasks-per-node=$gpus" \
  "--gpus-per-node=$gpus" \
  "--cpus-per-task=$cpus" \
  "--time=$limit" \
  "--signal=TERM@$notice" \
  "${site[@]}" \
  "--output=$logs/%x-%j.log" \
  --open-mode=append \
  --requeue \
  --wrap "$job"
