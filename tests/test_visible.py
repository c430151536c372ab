"""Nodes that do not see what the others see: in mount namespaces, where that is really so."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import heads
import hosts
import pytest
import yaml

from autoenc.errors import InputError
from autoenc.settings import DataConfig
from autoenc.sweep import visible

ROOT = Path(__file__).resolve().parents[1]
LOOK = """
import dataclasses, json, sys
from autoenc.sweep import visible
visible.LATE_SECONDS = 0.3
print(json.dumps(dataclasses.asdict(visible.look(*json.loads(sys.argv[1])))))
"""


def namespace(script: str, *words: str | Path) -> list[str]:
    """The beginning of a command that runs on a host called n2, after a shell script with these words; the test is
    skipped where there can be none."""
    script = f'hostname n2\n{script}\nshift {len(words)}\nexec "$@"'
    command = ["unshare", "--mount", "--uts", "sh", "-ec", script, "sh", *map(str, words)]
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a node with other mounts needs root and util-linux")
    tried = subprocess.run([*command, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no such mounts here: {tried.stderr.strip()}")
    return command


def nodes(*places: list[str]) -> Callable[..., list[tuple[str, Any]]]:
    """The function is called in a process at each place, as Ray would call it on each node."""
    def everywhere(function: Callable, *task: Any, seconds: float) -> list[tuple[str, Any]]:
        assert function is visible.look
        answers = []
        for place in places:
            done = subprocess.run([*place, sys.executable, "-c", LOOK, json.dumps(task)], cwd=ROOT, timeout=seconds,
                                  capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            answers.append(("a node", visible.Seen(**json.loads(done.stdout))))
        return answers

    return everywhere


def refused(output: Path, data: list[DataConfig], everywhere: Callable) -> str:
    """What is said, in one line; the folder is left as it was."""
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(InputError) as error:
        visible.check(output, data, everywhere)
    assert "\n" not in str(error.value) and sorted(output.parent.rglob("*")) == before
    return str(error.value)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(visible, "LATE_SECONDS", 0.3)


@pytest.fixture
def manifest(tmp_path) -> Path:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "layouts.csv"
    path.write_text("layout_path\n")
    return path


def data_of(manifest: Path) -> list[DataConfig]:
    return [DataConfig(), DataConfig(source="manifest", manifest=str(manifest)),
            DataConfig(source="manifest", manifest=str(manifest), image_size=32)]


def test_nodes_that_see_everything(tmp_path, manifest):
    """The folder is made where it is not there yet, and nothing stays in it."""
    output = tmp_path / "new" / "out"
    for _ in range(2):
        visible.check(output, data_of(manifest), nodes([], []))
        assert list(output.iterdir()) == []


def test_a_folder_that_is_another_one_elsewhere(tmp_path, manifest):
    output = tmp_path / "shared" / "out"
    (tmp_path / "shared").mkdir()
    elsewhere = namespace('mount -t tmpfs tmpfs "$1"', tmp_path / "shared")
    said = refused(output, data_of(manifest), nodes([], elsewhere))
    assert said == (f"--output {output}: n2 does not see it. Every node must see this folder under this path: name one "
                    "on storage that all nodes mount, or take the node out of the cluster")
    output.mkdir()
    (output / "kept").write_text("of before")
    assert refused(output, [], nodes(elsewhere)) == said


def test_a_folder_that_cannot_be_written_elsewhere(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    elsewhere = namespace('mount --bind "$1" "$1"\nmount -o remount,bind,ro "$1"', output)
    said = refused(output, [], nodes(elsewhere))
    assert said.startswith(f"--output {output}: n2 cannot write there (Read-only file system). ")


def test_what_is_written_elsewhere_must_show_here(tmp_path):
    """A copy of the folder, such as a layer over it."""
    output, layer = tmp_path / "out", tmp_path / "layer"
    output.mkdir()
    layer.mkdir()
    elsewhere = namespace('mount -t tmpfs tmpfs "$2"\nmkdir "$2/upper" "$2/work"\nmount -t overlay overlay '
                          '-o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$1"', output, layer)
    assert "n2 writes there, and it does not show here" in refused(output, [], nodes(elsewhere))


def test_data_that_is_not_everywhere(tmp_path, manifest):
    elsewhere = namespace('mount -t tmpfs tmpfs "$1"', manifest.parent)
    assert refused(tmp_path / "out", data_of(manifest), nodes([], elsewhere)) == (
        f"data.manifest: {manifest} is not there on n2: put the data on storage that all nodes mount, under the same "
        "path")
    palette = DataConfig(source="manifest", manifest=str(manifest), palette=str(manifest.parent / "palette.yaml"))
    assert "data.palette: " in (said := refused(tmp_path / "out", [palette], nodes(elsewhere))) and "manifest" in said


def test_a_node_where_nothing_can_be_asked(tmp_path):
    missing = ModuleNotFoundError("No module named 'autoenc'")
    said = refused(tmp_path / "out", [], lambda *task, seconds: [
        ("n3", missing), ("n2", missing), ("n4", TimeoutError("no answer within 60 s"))])
    assert "n2, n3 cannot look (ModuleNotFoundError: No module named 'autoenc')" in said
    assert "n4 cannot look (TimeoutError: no answer within 60 s)" in said


def test_an_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused(tmp_path / "file" / "out", [], nodes())


def test_a_worker_on_a_node_that_came_later_looks_for_itself(tmp_path):
    assert visible.not_seen(str(tmp_path)) == ""
    said = visible.not_seen(str(tmp_path / "sweep"))
    assert said.startswith(f"{tmp_path / 'sweep'}: ") and "does not see it" in said


# With Ray -------------------------------------------------------------------------------------------------------------

ASK = """
import sys
from pathlib import Path
import pytest
from racing import KNOB, Lab
from autoenc.errors import InputError
from autoenc.settings import DataConfig
from autoenc.sweep import doors
from autoenc.sweep.parts import Resources
address, hidden, shared = doors.knock(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
from autoenc.sweep import ray_cluster, run_ray
with ray_cluster.cluster(address) as here:
    assert [(node.host, node.cpus) for node in here.nodes] in ([("n1", 0), ("n2", 1)], [("n2", 1), ("n1", 0)])
    run_ray.check_visible(here, [Resources()], shared, [DataConfig()])
    listed = DataConfig(source="manifest", manifest=str(hidden / "layouts.csv"))
    with pytest.raises(InputError, match=r"data\\.manifest: .*layouts\\.csv is not there on n2"):
        run_ray.check_visible(here, [Resources()], shared, [listed])
    lab = Lab(hidden, arms={"A": {KNOB: 0.1}})                          # as if n2 had come later
    with pytest.raises(OSError, match="n2 does not see it"):
        run_ray.run(lab.race(), here, folder=lab.folder.path, output=hidden)
    assert not (hidden / "store").exists() and not lab.events("failed", "completed")
print("as it should be")
"""


@pytest.mark.slow
@pytest.mark.cluster
def test_a_node_without_the_folder_is_told_before_the_first_trial(manifest):
    """A head that runs no trials, and a node that does, on hosts of their own."""
    with hosts.site(["n1", "n2"]) as site, ExitStack() as stack:
        hidden = site.folder / "hidden"
        (hidden / "out").mkdir(parents=True)
        shutil.move(manifest, hidden / "layouts.csv")
        subprocess.run([*site.on("n2"), "mount", "-t", "tmpfs", "tmpfs", str(hidden)], check=True)
        address, on_head = two_hosts(stack, site, cpus=(0, 1), mode="token",
                                     RAY_AUTH_TOKEN="0123456789abcdef" * 4)
        done = on_head(ROOT / "tune_runner.py", "first.yaml", "--output", "hidden/out", "--address", address)
        assert (done.returncode, done.stderr) == (2, (
            f"error: --output {hidden / 'out'}: n2 does not see it. Every node must see this folder under this path: "
            "name one on storage that all nodes mount, or take the node out of the cluster\n")), done.stdout
        assert list((hidden / "out").iterdir()) == []
        done = on_head("-c", ASK, address, hidden, site.folder / "shared")
        assert (done.returncode, done.stdout) == (0, "as it should be\n"), done.stderr


@pytest.mark.slow
@pytest.mark.cluster
def test_a_sweep_over_two_hosts_whose_ray_demands_no_token():
    """Only where that is asked for, and then on both of them. Nobody outside reaches these hosts."""
    with hosts.site(["n1", "n2"]) as site, ExitStack() as stack:
        address, on_head = two_hosts(stack, site, cpus=(1, 1), mode="disabled")
        command = (ROOT / "tune_runner.py", "first.yaml", "--output", "shared/out", "--address", address)
        done = on_head(*command)
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
        assert address in done.stderr and "CVE-2023-48022" in done.stderr and "--insecure" in done.stderr
        assert not (site.folder / "shared").exists()
        done = on_head(*command, "--insecure")
        assert done.returncode == 0, done.stdout + done.stderr
        out = site.folder / "shared" / "out"
        states = [json.loads(path.read_text()) for path in (out / "store").glob("*/status.json")]
        assert sorted(state["state"] for state in states) == ["completed"] * 4
        assert {state["host"] for state in states} == {"n1", "n2"}
        assert yaml.safe_load((out / "first" / "best_config.yaml").read_text())
        assert not (site.home / ".ray" / "auth_token").exists()


def two_hosts(stack: ExitStack, site: hosts.Site, cpus: tuple[int, int], mode: str, **variables: str
              ) -> tuple[str, Callable]:
    """Ray on n1, its head, and on n2, with so many CPUs and this RAY_AUTH_MODE; its address, and what runs Python on n1
    beside a sweep of four arms, first.yaml. ``variables`` are set everywhere."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"HOME": str(site.home), "AUTOENC_CACHE": str(site.folder / "cache"),
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **variables}
    address = f"{hosts.NETWORK}.1:6379"
    head = ["--head", "--port=6379", "--include-dashboard=false", "--disable-usage-stats"]
    for number, options in enumerate((head, [f"--address={address}"]), start=1):
        start_ray(stack, site, f"n{number}", [*options, f"--num-cpus={cpus[number - 1]}",
                                              f"--node-ip-address={hosts.NETWORK}.{number}"],
                  env | {"RAY_AUTH_MODE": mode})
    base = {"config": {"data": {"image_size": 16, "limit": 40}, "train": {"epochs": 3},
                       "model": {"latent_channels": 2, "downsampling_steps": 2}}, "asha": False}
    sweep = {"name": "first", "arms": {name: {"model.base_channels": channels}
                                       for name, channels in zip("ABCD", (8, 12, 16, 20), strict=True)}}
    for name, content in (("base", base), ("first", sweep)):
        (site.folder / f"{name}.yaml").write_text(yaml.safe_dump(content))

    def on_head(*words: str | Path) -> subprocess.CompletedProcess:
        return subprocess.run([*site.on("n1"), "env", "-C", site.folder, sys.executable, *words], env=env,
                              capture_output=True, text=True, timeout=200)

    return address, on_head


def start_ray(stack: ExitStack, site: hosts.Site, name: str, options: list[str], env: dict[str, str]) -> None:
    """Ray on a host, until the stack is unwound; the site takes what is left of it along."""
    log = site.folder / f"{name}.log"
    with log.open("w") as sink:
        process = subprocess.Popen([*site.on(name), *heads.RAY, "start", "--block", f"--temp-dir={site.local / 'ray'}",
                                    *options], env=env, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
    stack.callback(site.kill, name)
    limit = time.monotonic() + 90
    while "Ray runtime started" not in log.read_text():
        assert process.poll() is None and time.monotonic() < limit, log.read_text()
        time.sleep(0.2)


OTHER_VERSION = "import ray; ray.__version__ = '2.9.3'; from ray.scripts.scripts import main; main()"


@pytest.mark.slow
@pytest.mark.cluster
def test_a_cluster_of_another_version(ray_token):
    """Its own word for it is another version's: by that Ray compares."""
    with heads.head(ray_token, "--num-cpus=1", ray=(sys.executable, "-c", OTHER_VERSION)) as address:
        from autoenc.sweep import ray_cluster

        with pytest.raises(InputError) as error, ray_cluster.cluster(address):
            pass
        ours = platform.python_version()
        assert str(error.value).startswith(
            f"--address {address}: cannot join: it runs Ray 2.9.3 on Python {ours}, this command Ray {version('ray')} "
            f"on Python {ours}, and both must be the same: ")
        from ray.experimental.internal_kv import _internal_kv_initialized

        assert not _internal_kv_initialized()        # Tune asks that client at exit, for a minute, and dies of it
