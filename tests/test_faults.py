"""The promise of tests/faults.py at a size for every day: see there, and run it for the figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import faults
import pytest
from harmed import Project, Size, projects, undisturbed
from promises import Findings

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")]

SMALL = Size(epochs=8, images=200, trials=5, dashboard=False)


def figures(fault: Callable[..., Findings], folder: Path, size: Size = SMALL, **more: Any) -> dict[str, Any]:
    findings = fault(folder / "fault", size=size, **more)
    assert not findings.broken, "\n".join(map(str, (*findings.figures.items(), *findings.broken)))
    return findings.figures


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Iterator[Project]:
    with projects(tmp_path_factory.mktemp("undisturbed")) as new:
        yield undisturbed(new, SMALL)


def test_a_killed_command_goes_on(tmp_path, whole):
    found = figures(faults.driver, tmp_path, replace(SMALL, dashboard=True), kills=2, whole=whole)
    assert found["kills"] == sum(found["of these while it was"].values()) == 2
    assert found["stored epochs trained again"] == 0 < found["epochs stored"]


def test_a_killed_worker_is_replaced(tmp_path, whole):
    assert figures(faults.worker, tmp_path, kills=2, whole=whole)["kills"] == 2


def test_a_trial_whose_workers_all_die_fails_alone(tmp_path):
    figures(faults.doomed, tmp_path)


def test_a_lost_node_gives_its_trials_back(tmp_path, whole):
    assert figures(faults.node, tmp_path, whole=whole)["seconds until the lost trial trained again"] < 60


def test_sweeps_at_the_same_time_train_nothing_twice(tmp_path):
    assert figures(faults.together, tmp_path, replace(SMALL, epochs=4, images=120))["epochs trained twice"] == 0


def test_a_diverging_trial_ends_at_once(tmp_path):
    assert figures(faults.diverging, tmp_path)["epoch and step at which they ended"].keys() == {"X", "Y"}


def test_a_full_disk_stops_the_sweep_and_breaks_nothing(tmp_path):
    try:
        found = figures(faults.full_disk, tmp_path)
    except faults.Unavailable as error:
        pytest.skip(str(error))
    assert found["exit code on the full disk"] == 1 and found["epochs stored on the full disk"] > 0


def test_an_output_folder_that_goes_stops_the_sweep(tmp_path):
    figures(faults.vanished, tmp_path)
