import re
from pathlib import Path

import pytest

from inl_jax.failures import EXIT_DIVERGED, EXIT_INTERRUPTED, EXIT_MISTAKE
from inl_jax.parallel.launch import Launch, find_launch
from inl_jax.parallel.launchers import LAUNCHERS

PAGE = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()


@pytest.fixture
def job():
    """The Kubernetes Job of the page."""
    yaml = pytest.importorskip("yaml")
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    service, job = yaml.safe_load_all(block)
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    return job["spec"]


def test_kubernetes_job_retries_what_may_succeed_and_nothing_else(job):
    fail, stopped, evicted = job["podFailurePolicy"]["rules"]
    assert fail["action"] == "FailJob"
    assert fail["onExitCodes"]["values"] == [EXIT_MISTAKE, EXIT_DIVERGED]
    assert stopped["action"] == evicted["action"] == "Ignore"
    assert stopped["onExitCodes"]["values"] == [EXIT_INTERRUPTED]
    assert evicted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


def test_pods_of_the_kubernetes_job_join_each_other(job):
    (container,) = job["template"]["spec"]["containers"]
    given = {variable["name"]: variable.get("value", "3") for variable in container["env"]}
    assert find_launch(given) == Launch("inl-0.inl:8476", job["completions"], 3)
    assert isinstance(container["command"], list), "no shell, which would keep SIGTERM to itself"


def test_page_names_every_launcher_that_is_known():
    named = {"torchrun", "Kubeflow", "Open MPI", "MPICH", "Slurm", "Vertex AI", "SageMaker"}
    for launcher in LAUNCHERS:
        name = launcher.name.split(",")[0]
        if name[0].isupper() and name not in ("Cloud TPU", "TensorFlow's variable"):
            named.add(name.removesuffix(" JAXJob"))
    assert not [name for name in named if name not in PAGE]
