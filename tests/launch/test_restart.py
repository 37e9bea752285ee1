"""The loop of launch/restart.sh."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from launchers import ROOT, launch, program

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


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
