"""The manifest of launch/jobset.sh."""

from __future__ import annotations

import os
import shlex
import shutil

import jsonschema
import pytest
import yaml

from launchers import DRY_RUNS, JOBSET, dry_run, launch, program
from mmljax.errors import Preempted

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

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
