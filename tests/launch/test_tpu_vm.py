"""What launch/tpu_vm.sh has a worker do, and its sessions."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time

import pytest

from launchers import HARD, ROOT, TPU, launch, program, recorded, recorder

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


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
