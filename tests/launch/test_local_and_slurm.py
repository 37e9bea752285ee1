"""What launch/local.sh and launch/slurm.sh run."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import time

import pytest

from launchers import HARD, ROOT, launch, program, recorded, recorder

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


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
