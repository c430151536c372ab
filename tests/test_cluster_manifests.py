"""The manifests under cluster/kuberay and cluster/cloud: valid by the schemas of who reads them, and right among
themselves. Neither a Kubernetes nor a cloud is at hand here; what they would reject shows anyway."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

import tune_runner
from autoenc.sweep.inherit import parse_override

ROOT = Path(__file__).parents[1]
KUBERAY = ROOT / "cluster" / "kuberay"
AWS = ROOT / "cluster" / "cloud" / "aws.yaml"
SCHEMA = Draft202012Validator(json.loads((ROOT / "tests" / "schemas" / "kuberay.json").read_text(encoding="utf-8")))
RAY = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
FREE = {"rayStartParams", "nodeSelector", "limits", "requests", "labels", "annotations"}      # any key is theirs


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


JOB, CLUSTER, STORAGE = (load(KUBERAY / name) for name in ("rayjob.yaml", "raycluster.yaml", "storage.yaml"))
MANIFESTS = pytest.mark.parametrize("manifest", [JOB, CLUSTER, STORAGE], ids=["rayjob", "raycluster", "storage"])


def keys(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every key in a tree."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        if isinstance(content, dict):
            yield (*path, key)
        if isinstance(value, dict | list):
            yield from keys(value, (*path, key))


def changed(content: dict[str, Any], path: tuple, **change: Any) -> dict[str, Any]:
    """A copy with the key at this path renamed (``name``) or given another ``value``."""
    content = copy.deepcopy(content)
    place = content
    for step in path[:-1]:
        place = place[step]
    value = place.pop(path[-1])
    place[change.get("name", path[-1])] = change.get("value", value)
    return content


# KubeRay --------------------------------------------------------------------------------------------------------------

@MANIFESTS
def test_a_manifest_is_valid_by_its_schema(manifest):
    assert not [error.message for error in SCHEMA.iter_errors(manifest)]


@MANIFESTS
def test_every_misspelt_key_is_found(manifest):
    tried = 0
    for path in keys(manifest):
        if not FREE & set(path[:-1]):
            assert not SCHEMA.is_valid(changed(manifest, path, name=f"{path[-1]}s")), path
            tried += 1
    assert tried >= 8


@pytest.mark.parametrize(("path", "value"), [
    (("spec", "workerGroupSpecs", 0, "minReplicas"), "0"),
    (("spec", "workerGroupSpecs", 0, "groupName"), None),
    (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),               # Ray's words are strings
    (("spec", "headGroupSpec", "template", "spec", "containers", 0, "env", 0, "value"), 60),
    (("spec", "headGroupSpec", "template", "spec", "containers", 0, "resources", "limits", "memory"), "16GB"),
    (("spec", "authOptions", "mode"), "tokens"),
    (("spec", "autoscalerOptions", "idleTimeoutSeconds"), "5m"),
    (("metadata", "name"), "Phase_1"),
    (("kind",), "RayClusters"),
    (("apiVersion",), "ray.io/v1alpha1"),
])
def test_a_wrong_value_is_found(path, value):
    assert not SCHEMA.is_valid(changed(CLUSTER, path, value=value))


def groups(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_job_and_service_run_on_the_same_cluster():
    assert JOB["spec"]["rayClusterSpec"] == CLUSTER["spec"]


def test_what_the_operator_asks_for_beyond_its_schema():
    """KubeRay 1.7.0, ray-operator/controllers/ray/utils/validation.go."""
    spec = CLUSTER["spec"]
    assert spec["rayVersion"] == RAY and spec["authOptions"]["mode"] == "token"
    assert spec["enableInTreeAutoscaling"]
    for group in spec["workerGroupSpecs"]:
        assert 0 == group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert len({group["groupName"] for group in spec["workerGroupSpecs"]}) == len(spec["workerGroupSpecs"]) > 1
    for group in groups(spec):
        assert len(group["template"]["spec"]["containers"]) == 1 and "resources" not in group


def test_pods_fit_together():
    images, shared = set(), set()
    for group in groups(CLUSTER["spec"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        images.add(container["image"])
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        shared |= {(mounts[volume["name"]], volume["persistentVolumeClaim"]["claimName"])
                   for volume in pod["volumes"] if "persistentVolumeClaim" in volume}
        cache = next(entry["value"] for entry in container["env"] if entry["name"] == "AUTOENC_CACHE")
        assert cache in mounts.values()
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert group.get("groupName") is None or container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert len(images) == 1 and shared == {("/shared", STORAGE["metadata"]["name"])}
    assert STORAGE["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_jobs_command_is_one_that_the_runner_takes(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")              # as Ray sets it for a job
    python, runner, *words = shlex.split(JOB["spec"]["entrypoint"])
    options = tune_runner.parse(words)
    dockerfile = (ROOT / "cluster" / "Dockerfile").read_text()
    home = re.search(r"^WORKDIR (\S+)$", dockerfile, re.MULTILINE)[1]
    copied = {path for line in re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE) for path in line.split()}
    assert all((ROOT / path).exists() for path in copied)
    for path in (runner, *options.sweeps):
        inside = Path(path).relative_to(home)
        assert (ROOT / inside).is_file() and inside.parts[0] in copied
    assert python == "python" and options.output.startswith("/shared/") and options.grow
    assert options.slots <= sum(group["maxReplicas"] for group in CLUSTER["spec"]["workerGroupSpecs"])
    assert [parse_override(text).layer(ROOT) for text in options.set]


# ray up ---------------------------------------------------------------------------------------------------------------

VALIDATE = """
import json, sys
from ray.autoscaler._private.util import prepare_config, validate_config
said = []
for config in json.load(sys.stdin):
    try:
        validate_config(prepare_config(config))
        said.append("")
    except Exception as error:
        said.append(str(error) or type(error).__name__)
print(json.dumps(said))
"""


def said_of(*configs: dict[str, Any]) -> list[str]:
    """What `ray up` would reject each of these configurations with, before it asks the cloud; empty if with nothing."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", VALIDATE], input=json.dumps(configs), capture_output=True, text=True,
                          timeout=60, env=env, check=True)
    return json.loads(done.stdout)


def test_ray_takes_the_cloud_configuration_and_finds_what_is_misspelt():
    config = load(AWS)
    free = {"node_config", "resources", "file_mounts", "provider", "available_node_types"}    # any key is theirs
    wrong = [path for path in keys(config) if not free & set(path[:-1])]
    wrong += [("available_node_types", "l40s", key) for key in config["available_node_types"]["l40s"]]
    assert len(wrong) >= 20
    kept, *rejected = said_of(config, *(changed(config, path, name=f"{path[-1]}s") for path in wrong),
                              changed(config, ("max_workers",), value="8"),
                              changed(config, ("head_node_type",), value="heads"),
                              changed(config, ("available_node_types", "l40s", "resources"), value={"GPU": -1}))
    assert kept == "" and all(rejected), [path for path, said in zip(wrong, rejected, strict=False) if not said]


def test_workers_are_spot_machines_with_a_gpu_and_the_head_is_not():
    config = load(AWS)
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert "InstanceMarketOptions" not in head["node_config"] and head["resources"] == {"CPU": 0}
    for kind in types.values():
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert kind["resources"]["GPU"] == 1 and kind["min_workers"] == 0 < kind["max_workers"] <= config["max_workers"]


def test_every_node_holds_the_token_and_demands_it():
    config = load(AWS)
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    starts = [config[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker")]
    assert all(re.search(r" RAY_AUTH_MODE=token .*\bray start --", line) for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    for name, lines in config.items():
        for line in lines if name.endswith("_commands") else ():
            subprocess.run(["bash", "-n", "-c", line], check=True)
