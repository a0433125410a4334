"""The workflows that run elsewhere: what can be known of them here."""

import os
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request):
    return yaml.safe_load(request.param.read_text())


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_every_job_has_a_runner_and_steps_and_needs_jobs_that_exist(workflow):
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])
        assert set(job.get("needs", [])) <= set(workflow["jobs"])


def test_every_action_is_pinned_to_a_version(workflow):
    for step in steps(workflow):
        assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+(\.\d+)*", step.get("uses", "a/b@v1")), step


def test_every_matrix_value_that_is_used_exists(workflow):
    for job in workflow["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        assert set(re.findall(r"\$\{\{ matrix\.(\w+) \}\}", str(job))) == set(matrix)


def test_the_scripts_that_run_are_here(workflow):
    for script in re.findall(r"(?:\.ci|tests)/[\w/.]+", " ".join(step.get("run", "") for step in steps(workflow))):
        assert (ROOT / script).exists(), script


def test_continuous_integration_is_what_runs_before_a_change_lands():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert ".ci/run" in [step.get("run") for step in steps(workflow)]
    assert os.access(ROOT / ".ci/run", os.X_OK)
