"""Submit a job file to a Ray cluster, or write it as a RayJob of KubeRay."""

import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from data_pipeline.storage import is_local, open_storage
from orchestrator.errors import RunError
from orchestrator.job.config import Job
from orchestrator.launch.packing import Package, pack, project_root

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

# What a job may need to know of its surroundings; credentials are for the nodes' own roles.
_STOP_WAIT = "120"  # seconds for a checkpoint after `ray job stop`; Ray's 3 are too few
_FORWARDED = (
    "RAY_JOB_STOP_WAIT_TIME_S",
    "ATROUS_STORAGE",
    "ATROUS_RAW",
    "ATROUS_CACHE",
    "MLFLOW_TRACKING_URI",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)
_LOOK_EVERY = 2.0  # seconds
_PATIENCE = 60.0  # seconds without an answer
_LONGEST_NAME = 47  # of a RayJob
_LOOPBACK = re.compile(r"\w+://(localhost|127\.[\d.]+|\[::1\])(:|/|$)")


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job file with its overrides, as the cluster is asked to run it."""

    job: Job
    root: Path
    entrypoint: str
    environment: dict[str, str]


def make_submission(job: Job, job_file: Path, overrides: Sequence[str]) -> Submission:
    """The command that runs a job file from the packed project, and its environment.

    Raises:
        RunError: the job file is not in a git repository, or a forwarded address has a password.
    """
    root = project_root(job_file)
    relative = job_file.absolute().resolve().relative_to(root.resolve())
    parts = ["python", "-m", "orchestrator", "run", str(relative)]
    for override in overrides:
        parts += ["--set", override]
    environment = {name: os.environ[name] for name in _FORWARDED if os.environ.get(name)}
    for name, value in environment.items():
        if "@" in value.partition("://")[2].partition("/")[0]:
            raise RunError(
                f"{name}: the address has a password in it, which the cluster would show; give it "
                "to the nodes as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
    environment.setdefault("RAY_JOB_STOP_WAIT_TIME_S", _STOP_WAIT)
    return Submission(job=job, root=root, entrypoint=shlex.join(parts), environment=environment)


def submit(
    submission: Submission, address: str | None, tell: Callable[[str], None]
) -> tuple["JobSubmissionClient", str]:
    """Upload the project and start the job; the client, and the job's id.

    Raises:
        RunError: no cluster there, or the project cannot be packed.
    """
    from ray.job_submission import JobSubmissionClient

    with tempfile.TemporaryDirectory() as directory:
        package = pack(submission.root, Path(directory) / "project.zip")
        for line in package.describe():
            tell(line)
        try:
            client = JobSubmissionClient(address)
        except (ConnectionError, RuntimeError) as error:
            raise RunError(
                f"no Ray cluster at {address or 'RAY_ADDRESS or this machine'} ({error}); give "
                "--address http://HEAD:8265, and RAY_AUTH_MODE=token if the cluster has a token"
            ) from None
        job_id = client.submit_job(
            entrypoint=submission.entrypoint,
            runtime_env={
                "working_dir": str(package.path),
                "env_vars": submission.environment | _code(package),
            },
            metadata={"atrous_job": submission.job.name, "atrous_code": package.digest},
        )
    return client, job_id


def _code(package: Package) -> dict[str, str]:
    """The identity of the code, for `orchestrator.runs.record.code_record`."""
    return {
        "ATROUS_CODE_COMMIT": package.commit,
        "ATROUS_CODE_DIRTY": "1" if package.changed else "0",
        "ATROUS_CODE_SHA256": package.digest,
    }


def follow(client: "JobSubmissionClient", job_id: str, tell: Callable[[str], None]) -> int:
    """Show the log until the job ended; the exit status of its command.

    The status comes from the cluster's record of the job, not from the end of a log stream.

    Raises:
        RunError: the cluster does not answer any more.
    """
    shown, heard = 0, time.monotonic()
    while True:
        try:
            info, text = _look(client, job_id)
        except (OSError, RuntimeError) as error:
            if time.monotonic() - heard > _PATIENCE:
                raise RunError(
                    f"{job_id}: the cluster does not answer any more ({error}); what became of the "
                    "job is in its storage: atrous status STAGE; submitted again, it goes on"
                ) from None
            time.sleep(_LOOK_EVERY)
            continue
        heard = time.monotonic()
        if len(text) > shown:
            tell(text[shown:].rstrip("\n"))
            shown = len(text)
        if info.status.is_terminal():
            if info.status == "SUCCEEDED":
                return 0
            tell(f"{job_id}: {info.status}: {info.message}")
            return info.driver_exit_code or 1
        time.sleep(_LOOK_EVERY)


def _look(client: "JobSubmissionClient", job_id: str) -> tuple["JobDetails", str]:
    """The state of a job, and its log, which is complete where the state is final."""
    return client.get_job_info(job_id), client.get_job_logs(job_id)


def upload(
    submission: Submission, place: str, tell: Callable[[str], None]
) -> tuple[Submission, str]:
    """Put the packed project under `place` (s3://bucket/prefix), named by its digest.

    Returns the submission, which now knows its code, and the package's URI.
    """
    with tempfile.TemporaryDirectory() as directory:
        package = pack(submission.root, Path(directory) / "project.zip")
        for line in package.describe():
            tell(line)
        name = f"{package.digest}.zip"
        with open_storage(place).writing(name) as file:
            file.write(package.path.read_bytes())
    environment = submission.environment | _code(package)
    return replace(submission, environment=environment), f"{place.rstrip('/')}/{name}"


def kuberay_manifest(submission: Submission, package_uri: str, image: str) -> str:
    """A RayJob (ray.io/v1) that runs the job file from a package at s3:// or https://.

    Its cluster begins with the head, which checks the job, and grows as stages ask, up to what the
    largest one may have.
    """
    job = submission.job
    clusters = [stage.cluster for stage in job.stages]
    runtime = {"working_dir": package_uri, "env_vars": submission.environment}
    gpus = max(cluster.gpus_per_worker for cluster in clusters)
    cpus = max(cluster.cpus_per_worker for cluster in clusters)
    manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": _label(job.name)},
        "spec": {
            "entrypoint": submission.entrypoint,
            "runtimeEnvYAML": yaml.safe_dump(runtime, sort_keys=False),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "backoffLimit": 3,  # the command goes on from the last checkpoint
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                "enableInTreeAutoscaling": True,
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0"},
                    "template": _pod("ray-head", image, cpus=2, gpus=0),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "workers",
                        "replicas": 0,
                        "minReplicas": 0,
                        "maxReplicas": max(max(1, cluster.max_workers) for cluster in clusters),
                        "rayStartParams": {},
                        "template": _pod("ray-worker", image, cpus=cpus, gpus=gpus),
                    }
                ],
            },
        },
    }
    return yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=1000)


class _Dumper(yaml.SafeDumper):
    """YAML for readers: no references, and a text of several lines as such."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = "|" if "\n" in data else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


def pod_warnings(submission: Submission) -> Iterator[str]:
    """What pods of Kubernetes cannot reach of what a job names."""
    job = submission.job
    for field, place in (("storage", job.storage), ("data_root", job.data_directory)):
        if is_local(place):
            yield (
                f"{field}: {place} is a directory of a pod, which others do not see and which goes "
                "with it; give s3://bucket/prefix, or mount a shared volume there in all pods"
            )
    for name, value in submission.environment.items():
        if _LOOPBACK.match(value):
            yield f"{name}: {value} is this machine's own address, which pods do not reach"


def _label(name: str) -> str:
    """A name as KubeRay takes it: letters, digits and dashes, first a letter, not too long."""
    plain = re.sub(r"[^a-z0-9-]", "-", name)
    return (plain if plain[0].isalpha() else f"job-{plain}")[:_LONGEST_NAME].rstrip("-")


def kubectl() -> str:
    """The program that applies manifests.

    Raises:
        RunError: it is not installed.
    """
    program = shutil.which("kubectl")
    if program is None:
        raise RunError("kubectl is not installed; leave out --apply and apply what is printed")
    return program


def apply(manifest: str) -> str:
    """Apply a manifest to the Kubernetes cluster that kubectl is set to; what kubectl says.

    Raises:
        RunError: kubectl is not there, or fails.
    """
    command = [kubectl(), "apply", "-f", "-"]
    done = subprocess.run(command, input=manifest, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"kubectl apply: {done.stderr.strip() or f'status {done.returncode}'}")
    return done.stdout.strip()


def _pod(name: str, image: str, *, cpus: int, gpus: float) -> dict[str, Any]:
    resources: dict[str, Any] = {"cpu": str(cpus), "memory": f"{4 * cpus}Gi"}
    if gpus:
        resources["nvidia.com/gpu"] = str(max(1, int(gpus)))
    container = {
        "name": name,
        "image": image,
        # Keys and passwords, where the nodes have no role: a secret that the user makes.
        "envFrom": [{"secretRef": {"name": "atrous", "optional": True}}],
        "resources": {"limits": resources, "requests": resources},
        # Ray's objects and NCCL need more than the 64 MiB that a container has.
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    return {
        "spec": {
            "restartPolicy": "Never",  # the autoscaler replaces pods
            "containers": [container],
            "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}}],
        }
    }
