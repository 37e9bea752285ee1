"""Running the scripts of launch/, with programs that stand in for the tools that they call."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = ("local.sh", "slurm.sh", "tpu_vm.sh", "jobset.sh", "restart.sh")
HARD = ["--config", "configs/quickstart.py", "--workdir", 'a b/it\'s $HOME; `x` "*"', "", "\\\n"]
TPU = ["--name", "my-tpu", "--zone", "us-west4-a"]
JOBSET = json.loads((ROOT / "tests" / "jobset.schema.json").read_text())


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
