"""What a submission packs, refuses and asks of a cluster."""

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli.main import app
from orchestrator.errors import RunError
from orchestrator.job.job_file import load_job
from orchestrator.launch import submit as submitting
from orchestrator.launch.packing import pack
from orchestrator.launch.submit import (
    apply,
    follow,
    kuberay_manifest,
    make_submission,
    pod_warnings,
    upload,
)
from orchestrator.runs.record import code_record
from tests.unit.orchestrator.jobs import stage_job, write


def git(root: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "my project"
    (root / "jobs").mkdir(parents=True)
    cluster = {"workers": (1, 4), "gpus_per_worker": 1, "cpus_per_worker": 6}
    path = write(root / "jobs/tiny.yaml", stage_job(tmp_path, cluster=cluster))
    path.chmod(0o755)
    (root / "code.py").write_text("print('hello')\n")
    (root / ".gitignore").write_text("runs/\n")
    (root / "runs").mkdir()
    (root / "runs/weights.bin").write_bytes(b"0" * 1000)
    (root / "untracked.txt").write_text("mine")
    git(root, "init")
    git(root, "add", "jobs", "code.py", ".gitignore")
    git(root, "commit", "-m", "first")
    return root


def test_only_what_git_tracks_is_packed(project: Path, tmp_path: Path) -> None:
    package = pack(project, tmp_path / "a.zip")
    with zipfile.ZipFile(package.path) as archive:
        assert sorted(archive.namelist()) == [".gitignore", "code.py", "jobs/tiny.yaml"]
        assert archive.getinfo("jobs/tiny.yaml").external_attr >> 16 & 0o111  # still executable
    assert package.changed == ()
    assert pack(project, tmp_path / "b.zip").digest == package.digest
    (project / "code.py").write_text("print('changed')\n")
    changed = pack(project, tmp_path / "c.zip")
    assert changed.changed == ("code.py",)
    assert changed.digest != package.digest
    assert "with 1 changed files" in next(iter(changed.describe()))


def test_too_much_is_refused_with_the_largest_files(project: Path, tmp_path: Path) -> None:
    git(project, "add", "-f", "runs/weights.bin")
    with pytest.raises(RunError, match=r"The largest: runs/weights\.bin"):
        pack(project, tmp_path / "a.zip", limit=1000)
    assert not (tmp_path / "a.zip").exists()


@pytest.mark.parametrize(
    "name",
    [
        *(".env", ".env.prod", "keys/server.pem", ".aws/credentials", "id_rsa"),
        *(
            "me_accessKeys.csv",
            "gcp-credentials.json",
            "infra/secrets.yaml",
            ".git-credentials",
            "auth_token",
        ),
    ],
)
def test_credentials_are_refused(project: Path, tmp_path: Path, name: str) -> None:
    (project / name).parent.mkdir(exist_ok=True)
    (project / name).write_text("secret")
    git(project, "add", "-f", name)
    with pytest.raises(RunError, match="looks like a credential"):
        pack(project, tmp_path / "a.zip")


@pytest.mark.parametrize("name", [".env.example", "credentials.py", "secretary.yaml", "key.py"])
def test_what_only_sounds_like_a_credential_is_packed(
    project: Path, tmp_path: Path, name: str
) -> None:
    (project / name).write_text("none")
    git(project, "add", "-f", name)
    pack(project, tmp_path / "out.zip")
    assert name in zipfile.ZipFile(tmp_path / "out.zip").namelist()


def test_a_directory_without_git(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.yaml", stage_job(tmp_path))
    with pytest.raises(RunError, match="git init and commit"):
        make_submission(load_job(path), path, ())


def test_the_command_survives_spaces_and_overrides(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    path = project / "jobs/tiny.yaml"
    made = make_submission(load_job(path), path, ("optimizer.lr=0.1", "name=a b"))
    assert made.entrypoint == (
        "python -m orchestrator run jobs/tiny.yaml --set optimizer.lr=0.1 --set 'name=a b'"
    )
    assert made.environment["MLFLOW_TRACKING_URI"] == "http://tracking:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@tracking:5000")
    with pytest.raises(RunError, match="has a password in it"):
        make_submission(load_job(path), path, ())


def test_the_manifest_of_kuberay(project: Path) -> None:
    path = project / "jobs/tiny.yaml"
    made = make_submission(load_job(path), path, ())
    manifest = yaml.safe_load(kuberay_manifest(made, "s3://bucket/x.zip", "atrous:1"))
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    spec = manifest["spec"]
    assert yaml.safe_load(spec["runtimeEnvYAML"])["working_dir"] == "s3://bucket/x.zip"
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (0, 0, 4)
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": "6", "memory": "24Gi", "nvidia.com/gpu": "1"}


def test_the_manifest_is_for_readers(project: Path) -> None:
    path = project / "jobs/tiny.yaml"
    made = make_submission(load_job(path), path, ())
    lines = kuberay_manifest(made, "s3://bucket/x.zip", "atrous:1").splitlines()
    assert "  runtimeEnvYAML: |" in lines
    assert "    working_dir: s3://bucket/x.zip" in lines
    assert not [line for line in lines if "&id" in line or "*id" in line]


def test_what_pods_do_not_reach(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = project / "jobs/tiny.yaml"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://store.example.org")
    made = make_submission(load_job(path), path, ())
    storage, data, server = pod_warnings(made)
    assert storage.startswith(f"storage: {made.job.storage} is a directory of a pod")
    assert data.startswith("data_root: ")
    assert server.startswith("MLFLOW_TRACKING_URI: http://127.0.0.1:5000 is this machine's own")
    places = ("storage=s3://bucket/atrous", "data_root=s3://bucket/data")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.example.org")
    made = make_submission(load_job(path, places), path, places)
    assert list(pod_warnings(made)) == []


def test_a_package_on_this_machine_is_refused(project: Path, tmp_path: Path) -> None:
    command = ["submit", str(project / "jobs/tiny.yaml"), "--kuberay", "--package", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "pods fetch it" in result.output


@pytest.mark.parametrize(
    ("name", "label"),
    [("tiny", "tiny"), ("voc_2012.v2", "voc-2012-v2"), ("3d", "job-3d"), ("a" * 60, "a" * 47)],
)
def test_the_name_is_one_that_kuberay_takes(project: Path, name: str, label: str) -> None:
    path = project / "jobs/tiny.yaml"
    made = make_submission(load_job(path, (f"name={name}",)), path, ())
    manifest = yaml.safe_load(kuberay_manifest(made, "s3://bucket/x.zip", "atrous:1"))
    assert manifest["metadata"]["name"] == label


def test_the_manifest_says_which_code_runs(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = project / "jobs/tiny.yaml"
    (project / "code.py").write_text("print('changed')\n")
    (tmp_path / "packages").mkdir()
    made = make_submission(load_job(path), path, ())
    packed, uri = upload(made, str(tmp_path / "packages"), lambda _: None)
    spec = yaml.safe_load(kuberay_manifest(packed, uri, "atrous:1"))["spec"]
    environment = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    for field, value in environment.items():
        monkeypatch.setenv(field, value)
    code = code_record()
    assert f"{code['sha256']}.zip" == Path(uri).name
    assert code["dirty"] is True
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project, capture_output=True, text=True)
    assert code["commit"] == done.stdout.strip()


KUBECTL = """#!/bin/sh
[ "$*" = "apply -f -" ] || exit 2
while IFS= read -r line; do echo "$line"; done > "{out}"
[ {fails} = False ] || {{ echo "Error from server (Forbidden)" >&2; exit 1; }}
echo "rayjob.ray.io/tiny created"
"""


@pytest.mark.parametrize("fails", [False, True])
def test_a_manifest_is_applied_by_kubectl(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, out = tmp_path / "kubectl", tmp_path / "applied.yaml"
    program.write_text(KUBECTL.format(out=out, fails=fails))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    if fails:
        with pytest.raises(RunError, match=r"kubectl apply: Error from server \(Forbidden\)"):
            apply("kind: RayJob\n")
    else:
        assert apply("kind: RayJob\n") == "rayjob.ray.io/tiny created"
    assert out.read_text() == "kind: RayJob\n"


def test_without_kubectl_nothing_is_uploaded(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submitting, "make_submission", lambda *_: None)
    monkeypatch.setattr(submitting, "upload", lambda *_: pytest.fail("uploaded"))
    monkeypatch.setenv("PATH", str(tmp_path))
    command = ["submit", str(project / "jobs/tiny.yaml"), "--kuberay", "--apply"]
    result = CliRunner().invoke(app, [*command, "--package", "s3://bucket/packages"])
    assert isinstance(result.exception, RunError)
    assert "kubectl is not installed; leave out --apply" in str(result.exception)


class _Client:
    """A cluster's record of one job: states and logs as they come."""

    def __init__(self, *states: str, code: int | None = None) -> None:
        self._states = list(states)
        self._code = code

    def get_job_info(self, _: str) -> Any:
        from ray.job_submission import JobStatus

        status = JobStatus(self._states.pop(0))
        return type("Info", (), {"status": status, "message": "m", "driver_exit_code": self._code})

    def get_job_logs(self, _: str) -> str:
        return "line\n" * (3 - len(self._states))


@pytest.mark.parametrize(
    ("states", "code", "expected"),
    [(("RUNNING", "SUCCEEDED"), 0, 0), (("RUNNING", "FAILED"), 3, 3), (("STOPPED",), None, 1)],
)
def test_the_exit_status_is_the_jobs(
    states: tuple[str, ...], code: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.launch.submit._LOOK_EVERY", 0)
    told: list[str] = []
    assert follow(_Client(*states, code=code), "job", told.append) == expected  # type: ignore[arg-type]
    assert "line" in told[0]


class _Lost(_Client):
    """A head that does not answer for the first looks, or never."""

    def __init__(self, *states: str, silent: int) -> None:
        super().__init__(*states)
        self._silent = silent

    def get_job_info(self, job: str) -> Any:
        self._silent -= 1
        if self._silent >= 0:
            raise ConnectionError("Connection refused")
        return super().get_job_info(job)


def test_a_head_that_is_away_for_a_moment_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitting, "_LOOK_EVERY", 0)
    client: Any = _Lost("RUNNING", "SUCCEEDED", silent=3)
    assert follow(client, "job", lambda _: None) == 0


def test_a_head_that_died_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitting, "_LOOK_EVERY", 0)
    monkeypatch.setattr(submitting, "_PATIENCE", 0)
    client: Any = _Lost(silent=10**9)
    with pytest.raises(RunError, match=r"does not answer any more .*submitted again, it goes on"):
        follow(client, "job", lambda _: None)


def test_ctrl_c_leaves_the_job_running(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(submitting, "submit", lambda *_: (None, "raysubmit_x"))
    monkeypatch.setattr(submitting, "follow", interrupted)
    result = CliRunner().invoke(app, ["submit", str(project / "jobs/tiny.yaml"), "--follow"])
    assert result.exit_code == 130
    assert "raysubmit_x goes on without you; to stop it: ray job stop raysubmit_x" in result.output
