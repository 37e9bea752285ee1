"""The launchers print the expected commands, and pass arguments on unchanged."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

from mmljax.errors import Preempted

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = ("local.sh", "slurm.sh", "tpu_vm.sh", "jobset.sh", "restart.sh")
HARD = ["--config", "configs/quickstart.py", "--workdir", 'a b/it\'s $HOME; `x` "*"', "", "\\\n"]
TPU = ["--name", "my-tpu", "--zone", "us-west4-a"]
JOBSET = json.loads((ROOT / "tests" / "jobset.schema.json").read_text())

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def launch(script, *arguments, **environment):
    return subprocess.run(
        [f"launch/{script}", *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": "/tmp", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def dry(script, *arguments):
    done = launch(script, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def program(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(body)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def recorder(path, record):
    """A program that appends its arguments, and what launchers set, to a file as a JSON line."""
    return program(
        path,
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        "names = [k for k in sorted(os.environ) if k.startswith('MMLJAX_')]\n"
        f"with open({str(record)!r}, 'a') as file:\n"
        "    file.write(json.dumps([sys.argv[1:], {k: os.environ[k] for k in names}]) + '\\n')\n",
    )


def recorded(record):
    return [json.loads(line) for line in record.read_text().splitlines()]


# What --dry-run prints.

ON = "--name my-tpu --zone us-west4-a"
PODS = "--name my-run --image registry/mmljax:1 --hosts 4 --claim images"
DRY_RUNS = {  # by the name of the golden file
    "local": "local.sh --processes 2 --dry-run -- --config configs/quickstart.py",
    "local_gpu": "local.sh --dry-run --processes 1 --devices gpu --port 99 --python 'my env/python'"
    " -- --help",
    "local_hard": ["local.sh", "--processes", "1", "--dry-run", "--", *HARD],
    "slurm": "slurm.sh --nodes 2 --gpus-per-node 8 --dry-run -- --config configs/inshop.py",
    "slurm_options": "slurm.sh --nodes 1 --gpus-per-node 4 --cpus-per-gpu 12 --time 1:00:00"
    " --notice 60 --job-name cub --partition a100 --account 'the lab' --logs logs"
    " --python env/bin/python --dry-run -- --workdir '/s/a b'",
    "slurm_hard": ["slurm.sh", "--nodes", "1", "--gpus-per-node", "1", "--dry-run", "--", *HARD],
    "tpu_create": f"tpu_vm.sh create {ON} --project shop --type v5litepod-16"
    " --version v2-alpha-tpuv5-lite --dry-run",
    "tpu_create_direct": f"tpu_vm.sh create {ON} --type v5litepod-8 --version v2-alpha-tpuv5-lite"
    " --spot --direct --dry-run",
    "tpu_create_planned": f"tpu_vm.sh create {ON} --type v6e-16 --version v2-alpha-tpuv6e"
    " --planner 'my env/python' --dry-run -- --config configs/inshop.py --workdir /mnt/run"
    " --config.model.remat=blocks",
    "tpu_status": f"tpu_vm.sh status {ON} --dry-run",
    "tpu_install": f"tpu_vm.sh install {ON} --dry-run",
    "tpu_run": f"tpu_vm.sh run {ON} --dry-run -- --config configs/inshop.py",
    "tpu_run_hard": ["tpu_vm.sh", "run", *TPU, "--dry-run", "--", *HARD],
    "tpu_session": f"tpu_vm.sh session {ON} --type v5litepod-8 --version v2-alpha-tpuv5-lite --spot"
    " --no-plan --dry-run -- --config configs/inshop.py --workdir gs://bucket/run",
    "restart": ["restart.sh", "--dry-run", "--", "mmljax", "train", *HARD],
    "tpu_logs": f"tpu_vm.sh logs {ON} --worker 3 --dry-run",
    "tpu_stop": f"tpu_vm.sh stop {ON} --dry-run",
    "tpu_kill": f"tpu_vm.sh kill {ON} --dry-run",
    "tpu_fetch": f"tpu_vm.sh fetch {ON} --from mmljax/runs --to 'my runs' --dry-run",
    "tpu_delete": f"tpu_vm.sh delete {ON} --project shop --dry-run",
    "tpu_delete_direct": f"tpu_vm.sh delete {ON} --direct --dry-run",
    "jobset_gpu": f"jobset.sh {PODS} --gpus 8 --dry-run -- --config configs/inshop.py"
    " --workdir /shared/run",
    "jobset_tpu": f"jobset.sh {PODS} --tpus 4 --mount '/the data' --directory /src --grace 25"
    " --restarts 0 --python python3.12 --namespace vision"
    " --select cloud.google.com/gke-tpu-accelerator=tpu-v5-lite-podslice"
    " --select cloud.google.com/gke-tpu-topology=4x4 --dry-run -- --config configs/inshop.py",
    "jobset_hard": ["jobset.sh", *PODS.split(), "--gpus", "1", "--dry-run", "--", *HARD],
}


def dry_run(case):
    words = DRY_RUNS[case]
    return dry(*(shlex.split(words) if isinstance(words, str) else words))


@pytest.mark.parametrize("case", DRY_RUNS)
def test_dry_run_prints_what_the_golden_file_has(case):
    """After a change on purpose: REFRESH_GOLDEN=1 pytest -n 0 tests/test_launch.py; git diff."""
    golden, printed = ROOT / "tests" / "golden" / f"{case}.txt", dry_run(case)
    if os.environ.get("REFRESH_GOLDEN"):
        golden.write_text(printed)
    assert printed == golden.read_text()


def test_every_golden_file_is_compared():
    assert {path.stem for path in (ROOT / "tests" / "golden").iterdir()} == DRY_RUNS.keys()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("local.sh -- --config c.py", "--processes"),
        ("local.sh --processes 0 -- --config c.py", "found '0'"),
        ("local.sh --processes 2", "after a --"),
        ("local.sh --processes 2 --devices tpu -- x", "found 'tpu'"),
        ("local.sh --processes 2 --port x -- x", "found 'x'"),
        ("local.sh --processes", "needs a value"),
        ("local.sh --config c.py", "'--config'"),
        ("slurm.sh --nodes 2 -- --config c.py", "--gpus-per-node"),
        ("slurm.sh --nodes 2 --gpus-per-node 8", "after a --"),
        ("slurm.sh --nodes 2 --gpus 8 -- x", "'--gpus'"),
        ("slurm.sh --nodes 2 --gpus-per-node 8 --notice soon -- x", "found 'soon'"),
        ("jobset.sh --image i --hosts 1 --claim c --gpus 8 -- x", "--name"),
        ("jobset.sh --name a --hosts 1 --claim c --gpus 8 -- x", "--image"),
        ("jobset.sh --name a --image i --hosts 1 --gpus 8 -- x", "--claim"),
        ("jobset.sh --name a --image i --hosts 1 --claim c -- x", "--gpus or --tpus"),
        ("jobset.sh --name a --image i --hosts 0 --claim c --gpus 8 -- x", "found '0'"),
        ("jobset.sh --name a --image i --hosts 1 --claim c --gpus 8 --tpus 4 -- x", "one of"),
        ("jobset.sh --name a --image i --hosts 1 --claim c --gpus 8 --select x -- x", "'x'"),
        ("jobset.sh --name a --image i --hosts 1 --claim c --gpus 8 -- \a", "control character"),
        ("jobset.sh --name a --image i --hosts 1 --claim c --gpus 8", "after a --"),
        ("tpu_vm.sh", "first argument"),
        ("tpu_vm.sh destroy --name a --zone b", "'destroy'"),
        ("tpu_vm.sh delete --zone us-west4-a", "--name"),
        ("tpu_vm.sh delete --name my-tpu", "--zone"),
        ("tpu_vm.sh delete --name --zone us-west4-a", "--name needs a value"),
        (
            "tpu_vm.sh delete --name my-tpu --zone us-west4-a -- other",
            "only create, run and session take",
        ),
        ("tpu_vm.sh create --name my-tpu --zone us-west4-a", "--type and --version"),
        (
            "tpu_vm.sh create --name a --zone b --type v5p-8 --version c -- --config d",
            "give --topology, such as v5p:2x2x1",
        ),
        ("tpu_vm.sh run --name my-tpu --zone us-west4-a", "after a --"),
        ("tpu_vm.sh session --name my-tpu --zone us-west4-a", "after a --"),
        ("tpu_vm.sh session --name my-tpu --zone us-west4-a --poll soon -- x", "found 'soon'"),
        ("restart.sh", "after a --"),
        ("restart.sh --failures 0 -- x", "found '0'"),
        ("restart.sh --pause x -- x", "found '600' and 'x'"),
        ("tpu_vm.sh fetch --name my-tpu --zone us-west4-a --from x", "--from and --to"),
    ],
)
def test_mistakes_are_one_line_and_run_nothing(tmp_path, line, words):
    record = tmp_path / "record"
    for tool in ("gcloud", "kubectl", "sbatch", "python"):
        recorder(tmp_path / "bin" / tool, record)
    done = launch(*shlex.split(line), PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
    assert not record.exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_comment_that_a_script_opens_with(script):
    shown = dry(script, "--help")
    opening = (LAUNCH / script).read_text().partition("\n\nset -euo")[0].splitlines()[1:]
    assert shown.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in opening]
    assert "--dry-run" in shown


SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(SHELLCHECK is None, reason="needs shellcheck")
@pytest.mark.parametrize("script", [*SCRIPTS, "command.sh"])
def test_shellcheck(script):
    done = subprocess.run([SHELLCHECK, "-x", str(LAUNCH / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# What they run.


def test_local_hands_every_process_its_place_and_the_arguments(tmp_path):
    record = tmp_path / "record"
    python = recorder(tmp_path / "python", record)
    options = ["--processes", "3", "--port", "77", "--logs", str(tmp_path / "my logs")]
    done = launch("local.sh", *options, "--python", str(python), "--", *HARD)
    assert (done.returncode, done.stderr) == (0, "")
    calls = sorted(recorded(record), key=lambda call: call[1]["MMLJAX_PROCESS_ID"])
    for i, (arguments, variables) in enumerate(calls):
        assert arguments == ["-m", "mmljax.main", *HARD]
        assert variables == {
            "MMLJAX_COORDINATOR": "localhost:77",
            "MMLJAX_NUM_PROCESSES": "3",
            "MMLJAX_PROCESS_ID": str(i),
        }
    assert len(calls) == 3
    logs = sorted(path.name for path in (tmp_path / "my logs").iterdir())
    assert logs == ["process_1.log", "process_2.log"]


def test_local_stops_the_others_when_one_fails(tmp_path):
    place = shlex.quote(str(tmp_path))
    python = program(
        tmp_path / "python",
        "#!/usr/bin/env bash\n"
        "trap '' TERM\n"  # as jax.distributed does
        f"cd {place}\n"
        "if [[ $MMLJAX_PROCESS_ID == 1 ]]; then\n"
        "  until [[ -s 0 && -s 2 ]]; do sleep 0.05; done\n"
        '  echo "lost" >&2; exit 7\n'
        "fi\n"
        "echo $$ >$MMLJAX_PROCESS_ID\n"
        "while :; do sleep 0.1; done\n",
    )
    options = ["--processes", "3", "--logs", str(tmp_path / "logs"), "--python", str(python)]
    done = launch("local.sh", *options, "--", "x")
    assert done.returncode == 7
    assert "code 7" in done.stderr
    assert (tmp_path / "logs" / "process_1.log").read_text() == "lost\n"
    for i in (0, 2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / str(i)).read_text()), 0)


def test_local_processes_find_each_other(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    python = program(
        tmp_path / "python",
        f"#!{sys.executable}\n"
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from mmljax.mesh import initialize_distributed\n"
        "initialize_distributed()\n"
        "import jax\n"
        "print(jax.process_index(), jax.process_count(), jax.device_count())\n"
        "jax.distributed.shutdown()\n",
    )
    options = ["--processes", "2", "--port", str(port), "--logs", str(tmp_path / "logs")]
    done = launch("local.sh", *options, "--python", str(python), "--", "x", XLA_FLAGS="")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0 2 2\n"
    assert (tmp_path / "logs" / "process_1.log").read_text().endswith("1 2 2\n")


def test_local_passes_sigterm_on_and_waits_for_all(tmp_path):
    place = shlex.quote(str(tmp_path))
    python = program(
        tmp_path / "python",
        "#!/usr/bin/env bash\n"
        f"cd {place}\n"
        "trap 'sleep 0.$MMLJAX_PROCESS_ID; echo saved >$MMLJAX_PROCESS_ID; exit 75' TERM\n"
        "echo >up$MMLJAX_PROCESS_ID\n"
        "while :; do sleep 0.02; done\n",
    )
    options = ["--processes", "3", "--logs", str(tmp_path / "logs"), "--python", str(python)]
    command = ["launch/local.sh", *options, "--", "x"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as running:
        while not all((tmp_path / f"up{i}").exists() for i in range(3)):
            assert running.poll() is None
            time.sleep(0.02)
        running.terminate()
        assert running.stderr.read() == ""
    assert running.returncode == 75
    assert [(tmp_path / str(i)).read_text() for i in range(3)] == ["saved\n"] * 3


@pytest.fixture
def cluster(tmp_path):
    """Slurm's programs: a job runs here, its processes end by ``python``, requests are recorded."""
    program(
        tmp_path / "bin" / "srun",
        '#!/bin/sh\nwhile case $1 in -*) ;; *) false; esac; do shift; done; exec "$@"\n',
    )
    program(
        tmp_path / "bin" / "sbatch",
        '#!/bin/sh\nwhile [ "$1" != --wrap ]; do shift; done\nexec sh -c "$2"\n',
    )
    recorder(tmp_path / "bin" / "scontrol", tmp_path / "requests")

    def submit(python, *arguments, state="RUNNING"):
        program(tmp_path / "bin" / "python", python)
        program(
            tmp_path / "bin" / "squeue",
            f'#!/bin/sh\ncase "$*" in *--states={state}*--jobs=7*) echo 7 batch;; esac\n',
        )
        options = ["--nodes", "1", "--gpus-per-node", "1", "--logs", str(tmp_path / "my logs")]
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        return launch("slurm.sh", *options, "--", *arguments, PATH=path, SLURM_JOB_ID="7")

    return submit


def test_slurm_hands_the_arguments_through_sbatch_and_srun(cluster, tmp_path):
    record = tmp_path / "record"
    done = cluster(recorder(tmp_path / "python", record).read_text(), *HARD)
    assert (done.returncode, done.stderr) == (0, "")
    assert recorded(record) == [[["-m", "mmljax.main", *HARD], {"MMLJAX_DISTRIBUTED": "1"}]]
    assert (tmp_path / "my logs").is_dir()


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [(75, "RUNNING", True), (75, "CANCELLED", False), (1, "RUNNING", False), (0, "RUNNING", False)],
)
def test_slurm_queues_a_job_again_that_saved_and_was_not_cancelled(
    cluster, tmp_path, code, state, requeued
):
    # The signal reaches the shell of the job too, and what that has started must not ignore it.
    asked = "kill -TERM $PPID\nsh -c 'kill -TERM $$; echo ignored >&2'\n"
    done = cluster(f"#!/bin/sh\n{asked}exit {code}\n", "x", state=state)
    assert done.returncode == code
    assert "ignored" not in done.stderr
    requests = tmp_path / "requests"
    assert (recorded(requests) if requests.exists() else []) == [[["requeue", "7"], {}]] * requeued


# The manifest.

MANIFESTS = [case for case in DRY_RUNS if case.startswith("jobset")]


def manifest(case):
    return yaml.safe_load(dry_run(case))


def pods(found):
    return found["spec"]["replicatedJobs"][0]["template"]["spec"]


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifest_is_of_the_schema(case):
    jsonschema.validate(manifest(case), JOBSET)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("kind",), "Job"),
        (("spec", "failurePolicy", "rules", 0, "action"), "Restart"),
        (("spec", "replicatedJobs", 0, "template", "spec", "completions"), "4"),
        (("spec", "replicatedJobs", 0, "template", "spec", "retries"), 4),
    ],
)
def test_the_schema_can_tell(path, value):
    broken = manifest("jobset_gpu")
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, JOBSET)


def expanded(text):
    """What a container gets: Kubernetes reads ``$$`` as ``$``, and ``$(X)`` as a variable."""
    assert "$(" not in text.replace("$$", "")
    return text.replace("$$", "$")


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifest_hands_on_the_arguments(case):
    (container,) = pods(manifest(case))["template"]["spec"]["containers"]
    words = DRY_RUNS[case]
    words = shlex.split(words) if isinstance(words, str) else words
    arguments = words[words.index("--") + 1 :]
    assert [expanded(word) for word in container["command"][1:]] == [
        "-m",
        "mmljax.main",
        *arguments,
    ]


def test_manifest_tells_every_pod_its_place():
    found = manifest("jobset_gpu")
    job, name = pods(found), found["metadata"]["name"]
    (container,) = job["template"]["spec"]["containers"]
    place, count, index = container["env"]
    # <jobset>-<replicated job>-<job>-<pod>.<network>, which has the JobSet's name
    (replicated,) = found["spec"]["replicatedJobs"]
    port = container["ports"][0]["containerPort"]
    host = f"{name}-{replicated['name']}-0-0.{name}"
    assert place == {"name": "MMLJAX_COORDINATOR", "value": f"{host}:{port}"}
    assert found["spec"]["network"] == {"enableDNSHostnames": True}
    assert count == {"name": "MMLJAX_NUM_PROCESSES", "value": str(job["completions"])}
    assert index["name"] == "MMLJAX_PROCESS_ID"
    assert "job-completion-index" in index["valueFrom"]["fieldRef"]["fieldPath"]
    assert (job["completionMode"], job["parallelism"]) == ("Indexed", job["completions"])
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}


def test_manifest_tries_again_what_can_succeed():
    found = manifest("jobset_gpu")
    job = pods(found)
    rules = {
        code: rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        for code in rule["onExitCodes"]["values"]
    }
    assert rules == {Preempted.EXIT_CODE: "Ignore", 2: "FailJob"}
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # as a podFailurePolicy demands
    assert job["backoffLimit"] == 0  # any other failure restarts all pods
    (rule,) = found["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_jobset_hands_the_manifest_to_kubectl(tmp_path):
    record = tmp_path / "record"
    program(
        tmp_path / "bin" / "kubectl",
        f'#!/bin/sh\n{{ echo "# kubectl $*"; cat; }} >{shlex.quote(str(record))}\n',
    )
    words = [word for word in DRY_RUNS["jobset_hard"] if word != "--dry-run"]
    done = launch(*words, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert record.read_text() == dry_run("jobset_hard")


CREATE = f"tpu_vm.sh create {ON} --type v5p-8 --topology v5p:2x2x1 --version v"
LAUNCHES = {  # the tool that would be called: the launch
    "gcloud": f"{CREATE} -- --config c.py --workdir runs/a --config.seed=3",
    "kubectl": f"jobset.sh {PODS} --tpus 4 --select cloud.google.com/gke-tpu-topology=2x2x1"
    " --select cloud.google.com/gke-tpu-accelerator=tpu-v5p-slice -- --workdir a --config c.py"
    " --config.seed=3",
}


@pytest.mark.parametrize("tool", LAUNCHES)
def test_a_plan_that_fails_stops_the_launch(tool, tmp_path):
    record, planned = tmp_path / "record", tmp_path / "planned"
    recorder(tmp_path / "bin" / tool, record)
    planner = recorder(tmp_path / "planner", planned)
    planner.write_text(planner.read_text() + "sys.exit(2 if len(sys.argv) > 8 else 0)\n")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    def started(line, *options):
        script, *words = shlex.split(line)
        place = words.index("--")
        words[place:place] = ["--planner", str(planner), *options]
        return launch(script, *words, PATH=path).returncode

    line = LAUNCHES[tool]
    assert started(line) == 2
    assert not record.exists()
    plan = ["-m", "mmljax", "plan", "--topology", "v5p:2x2x1", "--config", "c.py"]
    assert [call[0] for call in recorded(planned)] == [[*plan, "--config.seed=3"]]
    assert started(line, "--no-plan") == 0
    assert started(line.replace(" --config.seed=3", "")) == 0  # the planner finds that it fits
    assert len(recorded(record)) == 2
    assert [call[0] for call in recorded(planned)][1:] == [plan]


@pytest.fixture
def worker(tmp_path):
    """A stand-in for gcloud whose one worker is a folder here: ssh and scp do what they say."""
    home = tmp_path / "home"
    home.mkdir()
    program(
        tmp_path / "bin" / "gcloud",
        f"#!{sys.executable}\n"
        "import shutil, subprocess, sys\n"
        f"home = {str(home)!r}\n"
        "action, words = sys.argv[4], sys.argv[5:]\n"
        "if action == 'scp':\n"
        "    source, target = [w for w in words if not w.startswith('--')]\n"
        "    place = lambda w: w.replace('my-tpu:', home + '/')\n"
        "    copy = shutil.copytree if '--recurse' in words else shutil.copy\n"
        "    copy(place(source), place(target))\n"
        "if action == 'ssh':\n"
        "    (command,) = [w[10:] for w in words if w.startswith('--command=')]\n"
        "    sys.exit(subprocess.run(['bash', '-c', command], cwd=home).returncode)\n",
    )

    def act(action, *arguments):
        return launch(
            "tpu_vm.sh",
            action,
            *TPU,
            *arguments,
            PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            TMPDIR=str(tmp_path),
        )

    act.home = home
    return act


@pytest.mark.parametrize("action", ["stop", "kill"])
def test_tpu_run_hands_the_arguments_to_the_worker_once_until_it_ends(worker, tmp_path, action):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    program(
        worker.home / "mmljax/.venv/bin/python",
        f"#!{sys.executable}\n"
        "import json, os, signal, sys, time\n"
        "def save(*_):\n"
        "    time.sleep(0.2)\n"
        "    print('saved', file=file)\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"with open({str(fifo)!r}, 'w') as file:\n"
        "    print(json.dumps([sys.argv[1:], os.environ['MMLJAX_DISTRIBUTED']]), file=file)\n"
        "    file.flush()\n"
        "    time.sleep(60)\n"
        "    print('never stopped', file=file)\n",
    )
    done = worker("run", "--", *HARD)
    assert (done.returncode, done.stderr) == (0, "")
    with fifo.open() as file:  # waits for the worker
        assert json.loads(file.readline()) == [["-m", "mmljax.main", *HARD], "1"]
        second = worker("run", "--", *HARD)
        assert second.returncode == 1
        assert "stop it first" in second.stderr
        assert worker(action).returncode == 0
        assert file.read() == ("saved\n" if action == "stop" else "")  # ends when the worker does
    assert worker("stop").returncode == 0  # of one that is gone


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_tpu_install_brings_the_revision_and_can_be_repeated(worker, tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    record = tmp_path / "record"
    recorder(tmp_path / "bin" / "python3", record)
    for _ in range(2):
        done = worker("install")
        assert (done.returncode, done.stderr) == (0, "")

    def head(folder):
        command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert head(worker.home / "mmljax") == head(ROOT)
    assert (worker.home / "mmljax" / "pyproject.toml").exists()
    assert [arguments[1] for arguments, _ in recorded(record)] == ["pip", "uv", "uv"] * 2
    assert recorded(record)[2][0][-1] == ".[data,plot,tpu,gcs]"


def test_tpu_fetch_copies_a_folder(worker, tmp_path):
    (worker.home / "runs").mkdir()
    (worker.home / "runs" / "results.json").write_text("{}")
    done = worker("fetch", "--from", "runs", "--to", str(tmp_path / "my runs"))
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "my runs" / "results.json").read_text() == "{}"


# restart.sh, and the session of a TPU VM that it starts again.


def restarted(tmp_path, codes, *options, seconds=0):
    """Exit code, number of starts and messages of a command that ends with these codes in turn."""
    command = program(
        tmp_path / "command",
        f"#!{sys.executable}\n"
        "import sys, time\n"
        f"with open({str(tmp_path / 'starts')!r}, 'a+') as file:\n"
        "    file.seek(0)\n"
        "    start = len(file.read())\n"
        "    file.write('.')\n"
        f"time.sleep({seconds})\n"
        f"sys.exit({codes}[start])\n",
    )
    done = launch("restart.sh", "--pause", "0", *options, "--", str(command))
    return done.returncode, len((tmp_path / "starts").read_text()), done.stderr


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0], 0),
        ([75, 75, 75, 75, 0], 0),
        ([1, 137, 75, 1, 255, 0], 0),  # never three failures in a row
        ([2], 2),
        ([1, 1, 75, 1, 1, 2], 2),
        ([75, 130], 130),
        ([1, 75, 1, 1, 7], 7),
    ],
)
def test_a_run_is_started_again_until_it_is_finished_or_fails_thrice(tmp_path, codes, code):
    found, starts, _ = restarted(tmp_path, codes, "--failures", "3")
    assert (found, starts) == (code, len(codes))


def test_a_failure_after_a_long_time_is_none_in_a_row(tmp_path):
    code, starts, said = restarted(
        tmp_path, [1, 1, 1, 0], "--failures", "2", "--quick", "1", seconds=1.1
    )
    assert (code, starts) == (0, 4)
    assert said.startswith("restart.sh: code 1 after ")


def test_a_run_whose_bucket_is_away_is_started_again_and_one_that_lost_its_lock_is_not(tmp_path):
    """The exit codes of the command line itself."""
    starts = tmp_path / "starts"
    command = program(
        tmp_path / "command",
        f"#!{sys.executable}\n"
        "import pathlib, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import mmljax.cli.train\n"
        "from mmljax.errors import Unreachable\n"
        "from mmljax.runs.remote import LockLost\n"
        f"starts = pathlib.Path({str(starts)!r})\n"
        "starts.write_text((starts.read_text() if starts.exists() else '') + '.')\n"
        "def run(options):\n"
        "    raise (Unreachable if len(starts.read_text()) < 3 else LockLost)('away')\n"
        "mmljax.cli.train.run = run\n"
        "sys.exit(mmljax.cli.main(['train']))\n",
    )
    done = launch("restart.sh", "--pause", "0", "--", str(command))
    assert (done.returncode, len(starts.read_text())) == (2, 3), done.stderr
    assert done.stderr.count("restart.sh: code 1 after") == 2


def test_quick_failures_end_with_one_line(tmp_path):
    _, _, said = restarted(tmp_path, [3, 3], "--failures", "2")
    line = "restart.sh: 2 failures in a row within 600 s of their start; the last has code 3"
    assert said.splitlines()[-1] == line


def test_sigterm_to_the_loop_saves_the_run_and_ends_it(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    command = program(
        tmp_path / "command",
        f"#!{sys.executable}\n"
        "import signal, sys, time\n"
        "def save(*_):\n"
        "    time.sleep(0.3)\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"print(file=open({str(fifo)!r}, 'w'))\n"
        "time.sleep(60)\n",
    )
    loop = subprocess.Popen(["launch/restart.sh", "--", str(command)], cwd=ROOT)
    fifo.read_text()  # waits for the command
    loop.terminate()
    assert loop.wait(timeout=20) == 75


def test_a_session_outlives_a_preempted_tpu_vm(tmp_path):
    """A stand-in for gcloud: the first VM is lost in the run; the second finishes it."""
    record, home = tmp_path / "record", tmp_path / "home"
    home.mkdir()
    program(
        tmp_path / "bin" / "gcloud",
        f"#!{sys.executable}\n"
        "import pathlib, sys\n"
        f"home, record = pathlib.Path({str(home)!r}), pathlib.Path({str(record)!r})\n"
        "action, words = sys.argv[4], ' '.join(sys.argv[5:])\n"
        "with record.open('a') as file:\n"
        "    file.write(action + (' run' if 'mmljax.main' in words else '') + '\\n')\n"
        "state = home / 'state'\n"
        "if action == 'create':\n"
        "    state.write_text('WAITING_FOR_RESOURCES')\n"
        "if action == 'delete':\n"
        "    assert '--quiet' in words\n"
        "    state.unlink()\n"
        "if action == 'describe':\n"
        "    print(state.read_text())\n"
        "    if state.read_text().startswith('WAIT'):\n"
        "        state.write_text('ACTIVE')\n"
        "looks = home / 'looks'\n"
        "if action == 'ssh' and 'run.code; fi' in words:\n"
        "    count = len(looks.read_text()) if looks.exists() else 0\n"
        "    looks.write_text('.' * (count + 1))\n"
        "    if count == 1:\n"
        "        state.write_text('SUSPENDED')\n"
        "        sys.exit(255)\n"
        "    print(['runs', '', 'runs', '0'][count])\n",
    )
    recorder(tmp_path / "bin" / "git", tmp_path / "git")
    done = launch(
        *("restart.sh", "--pause", "0", "--", "launch/tpu_vm.sh", "session", *TPU, "--spot"),
        *("--type", "v5litepod-8", "--version", "v", "--poll", "0", "--no-plan", "--", "--config"),
        *("c.py", "--workdir", "gs://bucket/run"),
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        TMPDIR=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert "my-tpu is gone" in done.stderr
    begin = ["create", "describe", "describe", "scp", "ssh", "ssh run"]
    assert record.read_text().splitlines() == [
        *("describe", *begin, "ssh", "ssh"),
        *("describe", "delete", *begin, "ssh", "ssh"),
    ]


@pytest.mark.parametrize("state", ["SUSPENDING", "FAILED", "PREEMPTED", "TERMINATED", "STOPPED"])
def test_a_session_deletes_what_a_preemption_left_and_nothing_else(tmp_path, state):
    """Each state is one that a TPU VM can also come to while a session waits for it."""
    record = tmp_path / "record"
    program(
        tmp_path / "bin" / "gcloud",
        "#!/bin/bash\n"
        f"echo $4 >>{shlex.quote(str(record))}\n"
        f"if [[ $4 == describe ]]; then echo {state}; fi\n",
    )
    done = launch(
        *("tpu_vm.sh", "session", *TPU, "--type", "v5litepod-8", "--version", "v", "--poll", "0"),
        *("--no-plan", "--", "--config", "c.py"),
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    )
    lines = done.stderr.splitlines()
    if state == "STOPPED":
        assert (done.returncode, record.read_text().split()) == (2, ["describe"])
        start = "start it (gcloud compute tpus tpu-vm start my-tpu --zone=us-west4-a) or delete it"
        assert lines == [f"tpu_vm.sh: error: my-tpu is STOPPED; {start}"]
    else:
        assert (done.returncode, lines[-1]) == (1, f"my-tpu is {state}")
        assert record.read_text().split() == ["describe", "delete", "create", "describe"]


def test_a_worker_keeps_the_exit_code_of_its_run(worker):
    program(worker.home / "mmljax/.venv/bin/python", f"#!{sys.executable}\nraise SystemExit(7)\n")
    assert worker("run", "--", "x").returncode == 0
    code = worker.home / "mmljax/run.code"
    for _ in range(200):
        if code.exists() and code.read_text():
            break
        time.sleep(0.05)
    assert code.read_text() == "7\n"
