"""The launchers print the commands that are expected, and hand arguments on unharmed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = ("local.sh", "slurm.sh", "tpu_vm.sh")
HARD = ["--config", "configs/quickstart.py", "--workdir", 'a b/it\'s $HOME; `x` "*"', "", "\\\n"]
TPU = ["--name", "my-tpu", "--zone", "us-west4-a"]

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def launch(script, *arguments, **environment):
    return subprocess.run(
        [str(LAUNCH / script), *arguments],
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

GOLDEN = {
    "local": (
        "local.sh --processes 2 --dry-run -- --config configs/quickstart.py --workdir 'runs/a b'",
        """\
env MMLJAX_COORDINATOR=localhost:12421 MMLJAX_NUM_PROCESSES=2 MMLJAX_PROCESS_ID=0 \
JAX_PLATFORMS=cpu python -m mmljax.main --config configs/quickstart.py --workdir 'runs/a b'
env MMLJAX_COORDINATOR=localhost:12421 MMLJAX_NUM_PROCESSES=2 MMLJAX_PROCESS_ID=1 \
JAX_PLATFORMS=cpu python -m mmljax.main --config configs/quickstart.py --workdir 'runs/a b'
""",
    ),
    "local on GPUs": (
        "local.sh --dry-run --processes 1 --devices gpu --port 99 --python python3.12 -- --help",
        """\
env MMLJAX_COORDINATOR=localhost:99 MMLJAX_NUM_PROCESSES=1 MMLJAX_PROCESS_ID=0 \
CUDA_VISIBLE_DEVICES=0 python3.12 -m mmljax.main --help
""",
    ),
    "slurm": (
        "slurm.sh --nodes 2 --gpus-per-node 8 --dry-run -- --config configs/inshop.py",
        """\
sbatch --job-name=mmljax --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 \
--time=24:00:00 --output=runs/slurm/%x-%j.log --open-mode=append --requeue \
--wrap 'srun --cpus-per-task=8 --kill-on-bad-exit=1 env MMLJAX_DISTRIBUTED=1 \
python -m mmljax.main --config configs/inshop.py'
""",
    ),
    "slurm with all options": (
        "slurm.sh --nodes 1 --gpus-per-node 4 --cpus-per-gpu 12 --time 1:00:00 --job-name cub"
        " --partition a100 --account 'the lab' --logs logs --python env/bin/python --dry-run"
        " -- --workdir '/s/a b'",
        """\
sbatch --job-name=cub --nodes=1 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=12 \
--time=1:00:00 --partition=a100 '--account=the lab' --output=logs/%x-%j.log --open-mode=append \
--requeue --wrap 'srun --cpus-per-task=12 --kill-on-bad-exit=1 env MMLJAX_DISTRIBUTED=1 \
env/bin/python -m mmljax.main --workdir '\\''/s/a b'\\'''
""",
    ),
    "create": (
        "tpu_vm.sh create --name my-tpu --zone us-west4-a --type v5litepod-16"
        " --version v2-alpha-tpuv5-lite --spot --dry-run",
        """\
gcloud compute tpus tpu-vm create my-tpu --zone=us-west4-a --accelerator-type=v5litepod-16 \
--version=v2-alpha-tpuv5-lite --spot
""",
    ),
    "create, queued": (
        "tpu_vm.sh create --name my-tpu --zone us-west4-a --project shop --type v5litepod-16"
        " --version v2-alpha-tpuv5-lite --queued --dry-run",
        """\
gcloud compute tpus queued-resources create my-tpu --node-id=my-tpu --zone=us-west4-a \
--project=shop --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite
""",
    ),
    "status": (
        "tpu_vm.sh status --name my-tpu --zone us-west4-a --dry-run",
        "gcloud compute tpus tpu-vm describe my-tpu --zone=us-west4-a\n",
    ),
    "install": (
        "tpu_vm.sh install --name my-tpu --zone us-west4-a --dry-run",
        f"""\
git -C {shlex.quote(str(LAUNCH))}/.. bundle create --quiet /tmp/mmljax-my-tpu.bundle HEAD
gcloud compute tpus tpu-vm scp /tmp/mmljax-my-tpu.bundle my-tpu:mmljax.bundle --zone=us-west4-a \
--worker=all
gcloud compute tpus tpu-vm ssh my-tpu --zone=us-west4-a --worker=all '--command=set -e; \
git init --quiet mmljax; cd mmljax; git fetch --quiet ../mmljax.bundle HEAD; \
git checkout --quiet --detach FETCH_HEAD; python3 -m pip install --quiet --user uv; \
python3 -m uv venv --quiet --allow-existing --python 3.12 .venv; \
python3 -m uv pip install --quiet --python .venv/bin/python -e '\\''.[data,plot,tpu]'\\'''
""",
    ),
    "run": (
        "tpu_vm.sh run --name my-tpu --zone us-west4-a --dry-run -- --config configs/inshop.py",
        """\
gcloud compute tpus tpu-vm ssh my-tpu --zone=us-west4-a --worker=all '--command=set -e; \
cd mmljax; if [ -f run.pid ] && kill -0 $(cat run.pid) 2>/dev/null; \
then echo '\\''a run is going on; stop it first'\\'' >&2; exit 1; fi; \
MMLJAX_DISTRIBUTED=1 nohup .venv/bin/python -m mmljax.main --config configs/inshop.py \
>>run.log 2>&1 </dev/null & echo $! >run.pid'
""",
    ),
    "logs": (
        "tpu_vm.sh logs --name my-tpu --zone us-west4-a --worker 3 --dry-run",
        "gcloud compute tpus tpu-vm ssh my-tpu --zone=us-west4-a --worker=3 "
        "'--command=tail -n 100 -F mmljax/run.log'\n",
    ),
    "stop": (
        "tpu_vm.sh stop --name my-tpu --zone us-west4-a --dry-run",
        "gcloud compute tpus tpu-vm ssh my-tpu --zone=us-west4-a --worker=all "
        "'--command=kill -KILL $(cat mmljax/run.pid)'\n",
    ),
    "fetch": (
        "tpu_vm.sh fetch --name my-tpu --zone us-west4-a --from mmljax/runs --to 'my runs'"
        " --dry-run",
        "gcloud compute tpus tpu-vm scp --recurse my-tpu:mmljax/runs 'my runs' --zone=us-west4-a "
        "--worker=0\n",
    ),
    "delete": (
        "tpu_vm.sh delete --name my-tpu --zone us-west4-a --dry-run",
        "gcloud compute tpus tpu-vm delete my-tpu --zone=us-west4-a\n",
    ),
    "delete, queued": (
        "tpu_vm.sh delete --name my-tpu --zone us-west4-a --queued --dry-run",
        "gcloud compute tpus queued-resources delete my-tpu --zone=us-west4-a --force\n",
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_dry_run_prints_the_commands(case):
    line, expected = GOLDEN[case]
    assert dry(*shlex.split(line)) == expected


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
        ("tpu_vm.sh", "first argument"),
        ("tpu_vm.sh destroy --name a --zone b", "'destroy'"),
        ("tpu_vm.sh delete --zone us-west4-a", "--name"),
        ("tpu_vm.sh delete --name my-tpu", "--zone"),
        ("tpu_vm.sh delete --name --zone us-west4-a", "--name needs a value"),
        ("tpu_vm.sh delete --name my-tpu --zone us-west4-a -- other", "only run takes"),
        ("tpu_vm.sh create --name my-tpu --zone us-west4-a", "--type and --version"),
        ("tpu_vm.sh run --name my-tpu --zone us-west4-a", "after a --"),
        ("tpu_vm.sh fetch --name my-tpu --zone us-west4-a --from x", "--from and --to"),
    ],
)
def test_mistakes_are_one_line_and_run_nothing(tmp_path, line, words):
    record = tmp_path / "record"
    for tool in ("gcloud", "sbatch", "python"):
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


def test_slurm_hands_the_arguments_through_sbatch_and_srun(tmp_path):
    record = tmp_path / "record"
    recorder(tmp_path / "bin" / "python", record)
    program(
        tmp_path / "bin" / "srun",
        '#!/bin/sh\nwhile case $1 in -*) ;; *) false; esac; do shift; done; exec "$@"\n',
    )
    program(
        tmp_path / "bin" / "sbatch",
        '#!/bin/sh\nwhile [ "$1" != --wrap ]; do shift; done\nexec sh -c "$2"\n',
    )
    options = ["--nodes", "1", "--gpus-per-node", "1", "--logs", str(tmp_path / "my logs")]
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = launch("slurm.sh", *options, "--", *HARD, PATH=path)
    assert (done.returncode, done.stderr) == (0, "")
    assert recorded(record) == [[["-m", "mmljax.main", *HARD], {"MMLJAX_DISTRIBUTED": "1"}]]
    assert (tmp_path / "my logs").is_dir()


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


def test_tpu_run_hands_the_arguments_to_the_worker_once_until_it_is_stopped(worker, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    program(
        worker.home / "mmljax/.venv/bin/python",
        f"#!{sys.executable}\n"
        "import json, os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"  # as jax.distributed does
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
        assert worker("stop").returncode == 0
        assert file.read() == ""  # its end comes when the worker is gone


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
    assert recorded(record)[2][0][-1] == ".[data,plot,tpu]"


def test_tpu_fetch_copies_a_folder(worker, tmp_path):
    (worker.home / "runs").mkdir()
    (worker.home / "runs" / "results.json").write_text("{}")
    done = worker("fetch", "--from", "runs", "--to", str(tmp_path / "my runs"))
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "my runs" / "results.json").read_text() == "{}"
