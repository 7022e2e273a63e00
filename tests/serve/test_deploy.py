"""The recipes of docs/deploy: what can be known of them without a cluster."""

import math
import re

import pytest
import yaml

from hunyuan_jax.flags import parse
from hunyuan_jax.infer.command import mesh_config
from hunyuan_jax.serve.command import serve
from support import paths

DEPLOY = paths.ROOT / "docs" / "deploy"
DOCUMENTS = list(yaml.safe_load_all((DEPLOY / "gke.yaml").read_text()))
# Fields of leaderworkerset.x-k8s.io/v1, by its documentation.
SPEC = {"replicas", "leaderWorkerTemplate", "rolloutStrategy", "startupPolicy", "networkConfig"}
GROUP = {"size", "restartPolicy", "leaderTemplate", "workerTemplate", "subGroupPolicy"}
RESTARTS = {"RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"}


@pytest.fixture
def leader_worker_set():
    return next(d for d in DOCUMENTS if d["kind"] == "LeaderWorkerSet")


@pytest.fixture
def group(leader_worker_set):
    return leader_worker_set["spec"]["leaderWorkerTemplate"]


@pytest.fixture
def pod(group):
    """That of the process that answers."""
    return group["leaderTemplate"]


def test_the_manifest_keeps_the_schema_of_kubernetes(leader_worker_set, group):
    validate = pytest.importorskip("kubernetes_validate")
    version = validate.latest_version()
    others = [d for d in DOCUMENTS if d is not leader_worker_set]
    assert [d["kind"] for d in others] == ["Service"]
    for name in ("leaderTemplate", "workerTemplate"):
        template = {
            "apiVersion": "v1",
            "kind": "PodTemplate",
            "metadata": {"name": "a"},
            "template": group[name],
        }
        for document in (template, *others):
            validate.validate(document, version, strict=True)
        group[name]["spec"]["terminationGrace"] = 3
        with pytest.raises(validate.ValidationError):
            validate.validate(template, version, strict=True)
        del group[name]["spec"]["terminationGrace"]


def test_the_hosts_of_a_group_start_one_server(leader_worker_set, group):
    leader, worker = (group[name]["spec"] for name in ("leaderTemplate", "workerTemplate"))
    (answers,), (computes,) = leader["containers"], worker["containers"]
    asked = {"ports", "startupProbe", "readinessProbe", "livenessProbe"}
    assert computes == {name: value for name, value in answers.items() if name not in asked}
    assert leader | {"containers": []} == worker | {"containers": []}
    # With LeaderReady each would wait for the other.
    assert leader_worker_set["spec"]["startupPolicy"] == "LeaderCreated"
    values = parse.parse(serve.options, "serve", computes["args"])
    chips = group["size"] * computes["resources"]["limits"]["google.com/tpu"]
    topology = worker["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    sizes = mesh_config(values.mesh).axis_sizes.values()
    assert math.prod(sizes) == math.prod(map(int, topology.split("x"))) == chips


def test_the_set_has_the_fields_of_its_kind(leader_worker_set, pod):
    assert leader_worker_set["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    assert leader_worker_set.keys() == {"apiVersion", "kind", "metadata", "spec"}
    spec = leader_worker_set["spec"]
    assert spec.keys() <= SPEC
    assert spec["leaderWorkerTemplate"].keys() <= GROUP
    assert spec["leaderWorkerTemplate"]["restartPolicy"] in RESTARTS
    selector = next(d for d in DOCUMENTS if d["kind"] == "Service")["spec"]["selector"]
    assert selector.items() <= pod["metadata"]["labels"].items()
    worker = spec["leaderWorkerTemplate"]["workerTemplate"]
    assert not selector.items() <= worker["metadata"]["labels"].items()


def test_the_options_are_those_of_serve(pod):
    (container,) = pod["spec"]["containers"]
    given = (DEPLOY / "Dockerfile").read_text()
    fixed = re.findall(r'"(--[^"]+)"', given.rpartition("ENTRYPOINT")[2])
    values = parse.parse(serve.options, "serve", [*fixed, *container["args"]])
    assert values.host == "0.0.0.0" and values.api_key_file
    assert values.drain_seconds < pod["spec"]["terminationGracePeriodSeconds"]
    (port,) = container["ports"]
    assert port["containerPort"] == values.port
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["spec"]["volumes"]} == mounts.keys()
    assert values.checkpoint.startswith(mounts["models"])
    assert values.api_key_file.startswith(mounts["key"])
    assert f"JAX_COMPILATION_CACHE_DIR={mounts['cache']}" in given


def test_the_probes_ask_what_is_there(shared, pod):
    (container,) = pod["spec"]["containers"]
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert shared.get(container[name]["httpGet"]["path"])[0] == 200
    assert shared.get(pod["metadata"]["annotations"]["prometheus.io/path"])[0] == 200


def test_the_image_copies_what_is_there():
    for line in (DEPLOY / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            for name in line.split()[1:-1]:
                assert (paths.ROOT / name).exists()
