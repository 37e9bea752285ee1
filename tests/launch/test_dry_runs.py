"""What the launchers print, and refuse."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launchers import DRY_RUNS, LAUNCH, ROOT, SCRIPTS, dry, dry_run, launch, recorder

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.mark.parametrize("case", DRY_RUNS)
def test_dry_run_prints_what_the_golden_file_has(case):
    """After a change on purpose: REFRESH_GOLDEN=1 pytest -n 0 tests/launch; git diff."""
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
