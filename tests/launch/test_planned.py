"""The plan that a launcher makes first."""

from __future__ import annotations

import os
import shlex
import shutil

import pytest

from launchers import ON, PODS, launch, recorded, recorder

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

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
