#!/usr/bin/env bash
# Train on a Kubernetes cluster that has JobSet: one pod, and one process, for each host.
#
#   launch/jobset.sh --name NAME --image IMAGE --hosts N --claim CLAIM [options] \
#     -- --config configs/inshop.py --workdir /shared/run ...
#
# The arguments after -- are those of mmljax train, in every pod. The image must hold mmljax, its
# configs and the accelerator's libraries; the claim is of a volume that all pods can write at once
# (ReadWriteMany), for the workdir and the images. kubectl refuses to create a JobSet that exists.
# Nothing is deleted here: launch/README.md has the command.
#
#   --name NAME          of the JobSet: a-z, 0-9 and -, at most 40
#   --image IMAGE        of the container
#   --hosts N            pods
#   --claim CLAIM        PersistentVolumeClaim that is mounted into all of them
#   --mount PATH         where (default /shared)
#   --gpus G             nvidia.com/gpu of each pod, all used by its one process; or
#   --tpus T             google.com/tpu of each pod: the chips of a host
#   --select KEY=VALUE   label that the nodes must have; may be given again. With those of a TPU slice
#                        (gke-tpu-accelerator, gke-tpu-topology), mmljax plan runs here first, and
#                        nothing is created if the run does not fit
#   --planner PROGRAM    Python here that has mmljax[tpu] (default python)
#   --no-plan            without mmljax plan
#   --directory PATH     working directory, the one with configs/ (default /mmljax)
#   --namespace NAME     default: kubectl's own
#   --grace SECONDS      time to save, from SIGTERM to SIGKILL (default 300)
#   --restarts N         after failures; preemption does not count (default 10)
#   --python PROGRAM     default python
#   --dry-run            print the manifest and create nothing

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=command.sh
source "$(dirname "${BASH_SOURCE[0]}")/command.sh"

name="" image="" hosts="" claim="" mount=/shared resource="" count="" directory=/mmljax
grace=300 restarts=10 python=python namespace=() selectors=()
while (($#)); do
  case $1 in
    --name) needs "$@"; name=$2; shift 2 ;;
    --image) needs "$@"; image=$2; shift 2 ;;
    --hosts) needs "$@"; hosts=$2; shift 2 ;;
    --claim) needs "$@"; claim=$2; shift 2 ;;
    --mount) needs "$@"; mount=$2; shift 2 ;;
    --gpus | --tpus)
      needs "$@"
      [[ -z $resource ]] || fail "give one of --gpus and --tpus, once"
      if [[ $1 == --gpus ]]; then resource=nvidia.com/gpu; else resource=google.com/tpu; fi
      count=$2
      shift 2
      ;;
    --select) needs "$@"; selectors+=("$2"); shift 2 ;;
    --planner) needs "$@"; planner=$2; shift 2 ;;
    --no-plan) plan=false; shift ;;
    --directory) needs "$@"; directory=$2; shift 2 ;;
    --namespace) needs "$@"; namespace=("--namespace=$2"); shift 2 ;;
    --grace) needs "$@"; grace=$2; shift 2 ;;
    --restarts) needs "$@"; restarts=$2; shift 2 ;;
    --python) needs "$@"; python=$2; shift 2 ;;
    --dry-run) dry_run=true; shift ;;
    --help | -h) help_of "${BASH_SOURCE[0]}"; exit ;;
    --) shift; break ;;
    *) fail "unknown argument '$1'; arguments of mmljax train follow a --" ;;
  esac
done
[[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || fail "--name must be of a-z, 0-9 and -, at most \
40, found '$name'"
[[ -n $image ]] || fail "--image is missing: a container image that holds mmljax"
[[ -n $claim ]] || fail "--claim is missing: a PersistentVolumeClaim that all pods can write"
[[ -n $resource ]] || fail "--gpus or --tpus is missing: the accelerators of each pod"
for option in hosts count grace; do
  [[ ${!option} =~ ^[1-9][0-9]*$ ]] || fail "--hosts, --gpus, --tpus and --grace must be numbers \
from 1, found '${!option}'"
done
[[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts must be a number, found '$restarts'"
for selector in "${selectors[@]}"; do
  [[ $selector == ?*=?* ]] || fail "--select must be KEY=VALUE, found '$selector'"
done
(($#)) || fail "nothing to run: give the arguments of mmljax train after a --"
for word in "$image" "$claim" "$mount" "$directory" "$python" "${selectors[@]}" "$@"; do
  [[ ${word//[$'\n\t\r']/} != *[[:cntrl:]]* ]] || fail "a control character in $(printf %q "$word")"
done

# Print a word in double quotes, for YAML and JSON.
quoted() {
  local word=${1//\\/\\\\}
  word=${word//\"/\\\"}
  word=${word//$'\n'/\\n}
  word=${word//$'\t'/\\t}
  word=${word//$'\r'/\\r}
  printf '"%s"' "$word"
}

# Print each word as an item of a list; Kubernetes reads $$ as $, and $(X) as a variable.
items() {
  local word
  for word in "$@"; do
    printf '                    - %s\n' "$(quoted "${word//\$/\$\$}")"
  done
}

node_selector() {
  local selector
  ((${#selectors[@]})) || return 0
  printf '\n              nodeSelector:'
  for selector in "${selectors[@]}"; do
    printf '\n                %s: %s' "$(quoted "${selector%%=*}")" "$(quoted "${selector#*=}")"
  done
}

# Exit code 75, saved after SIGTERM: the pod is created again, and no failure is counted. Exit code 2,
# a mistake of the user's: the JobSet fails. Any other code, such as of a host that died: all pods
# are created again, up to --restarts times. Each time the run resumes from its checkpoint.
manifest() {
  cat <<MANIFEST
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
spec:
  network:
    enableDNSHostnames: true
  failurePolicy:
    maxRestarts: $restarts
    rules:
      - name: mistake
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: hosts
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          completions: $hosts
          parallelism: $hosts
          backoffLimit: 0
          podReplacementPolicy: Failed
          podFailurePolicy:
            rules:
              - action: Ignore
                onExitCodes: {containerName: train, operator: In, values: [75]}
              - action: FailJob
                onExitCodes: {containerName: train, operator: In, values: [2]}
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: $grace$(node_selector)
              containers:
                - name: train
                  image: $(quoted "$image")
                  workingDir: $(quoted "$directory")
                  command:
$(items "$python" -m mmljax.main "$@")
                  env:
                    - name: MMLJAX_COORDINATOR
                      value: $name-hosts-0-0.$name:12421
                    - name: MMLJAX_NUM_PROCESSES
                      value: "$hosts"
                    - name: MMLJAX_PROCESS_ID
                      valueFrom:
                        fieldRef:
                          fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
                  ports:
                    - containerPort: 12421
                  resources:
                    limits:
                      $resource: $count
                  volumeMounts:
                    - name: shared
                      mountPath: $(quoted "$mount")
              volumes:
                - name: shared
                  persistentVolumeClaim:
                    claimName: $(quoted "$claim")
MANIFEST
}

chip="" shape="" topology=""
for selector in "${selectors[@]}"; do
  case $selector in
    */gke-tpu-accelerator=tpu-v5-lite-podslice) chip=v5e ;;
    */gke-tpu-accelerator=tpu-v6e-slice) chip=v6e ;;
    */gke-tpu-accelerator=tpu-v5p-slice) chip=v5p ;;
    */gke-tpu-accelerator=tpu-v4-podslice) chip=v4 ;;
    */gke-tpu-topology=*) shape=${selector#*=} ;;
  esac
done
[[ -z $chip || -z $shape ]] || topology=$chip:$shape
plan_first "$topology" "$@"
text=$(manifest "$@")
create=(kubectl create "${namespace[@]}" --filename=-)
if $dry_run; then
  printf '# %s\n%s\n' "$(show "${create[@]}")" "$text"
else
  "${create[@]}" <<<"$text"
fi
