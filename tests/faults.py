"""What faults cost: real sweeps by the real command, killed, cut off and filled up. Linux only.

    python tests/faults.py driver --kills 20 --seed 1     SIGKILL to the command, or to all of it with its Ray
    python tests/faults.py worker --kills 9 --seed 1      SIGKILL to workers; and to every worker of one trial
    python tests/faults.py node                           the second node of a cluster goes, and its trials with it
    python tests/faults.py together                       two sweeps at the same time on one store
    python tests/faults.py diverging                      a learning rate of 1e12 among sound ones
    python tests/faults.py full-disk                      a disk of 64 MB that fills up; an output folder that goes

The promise: run the same command again, and no stored epoch is trained again, at most the running epoch of each
running trial is. Prints figures; exit code 1 where the promise is broken, 2 where the machine lacks something.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import harmed
from harmed import ARMS, DECISION, LIMIT, SLOTS, USUAL, Project, Size, kill, projects, undisturbed, until
from promises import Findings, check_epochs, check_equal, check_events, check_kept, stops, unreadable

# A head and a second node of one CPU each. A line on stdin kills all processes of the second; the end of stdin, all.
CLUSTER = '''
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
second = cluster.add_node(num_cpus=1)
print(cluster.address, second.all_processes["raylet"][0].process.pid, flush=True)
if sys.stdin.readline():
    cluster.remove_node(second, allow_graceful=False)
    sys.stdin.readline()
cluster.shutdown()
'''


def driver(folder: Path, kills: int = 20, seed: int = 1, size: Size = USUAL, whole: Project | None = None) -> Findings:
    """SIGKILL at random moments spread over the whole course of the command; one in three to all of its processes.
    Sweeps without and with ASHA in turn, as many as it takes. The next command follows at once. ``whole``: a sweep that
    ran undisturbed, to compare with; none: one is run."""
    findings, draw = Findings(), random.Random(seed)
    delays = [(number + draw.random()) / kills for number in range(kills)]       # as shares of an uninterrupted sweep
    draw.shuffle(delays)
    moments = {"starting": 0, "training": 0, "ending": 0}
    gone: dict[str, list[float]] = {"workers": [], "processes": []}
    threads: list[threading.Thread] = []
    honoured = temporaries = 0
    with projects(folder) as new:
        whole = whole or undisturbed(new, size)
        swept: list[Project] = []
        while delays:
            asha = len(swept) % 2 == 1
            project = new(str(len(swept)), size).sampled(asha=asha)
            swept.append(project)
            before: list[tuple[dict[str, list[str]], dict[str, int]]] = []
            while True:
                begun, process = len(project.epochs()), project.start()
                try:
                    code = process.wait(delays[-1] * whole.seconds if delays else LIMIT)
                    if delays:
                        delays[-1] = draw.random()                   # it was through before: another moment
                    break
                except subprocess.TimeoutExpired:
                    delays.pop()
                    running = project.processes()
                    alone = draw.random() < 2 / 3
                    kill(process.pid, *(() if alone else (pid for pid, _ in running)))
                    process.wait()
                moments[_moment(project, begun)] += 1
                before.append((project.rows(), stops(project)))
                if alone:
                    threads.append(threading.Thread(target=_see_out, args=(project, running, gone)))
                    threads[-1].start()
            findings.promise(code == 0, f"the last command's exit code is {code}: {project.said()[-2000:]}")
            if code != 0:
                break
            temporaries += sum(path.name not in (".lock", ".tune") for path in project.output.rglob(".*"))
            for rows, stopped in before:
                check_kept(findings, rows, project)
                check_events(findings, stopped, project)
                honoured += len(stopped)
            check_equal(findings, project, whole)
            expected = (whole.output / whole.name / DECISION).read_bytes()
            findings.promise(asha or expected == (project.output / project.name / DECISION).read_bytes(),
                             "another decision than the uninterrupted run's")
        for thread in threads:
            thread.join()
        findings.promise(len(gone["processes"]) == len(threads), "processes of a killed command did not end")
        check_epochs(findings, *swept, running=SLOTS * kills)
    findings.figures = {
        "kills": sum(moments.values()), "of these while it was": moments, "sweeps": len(swept),
        "seconds of an uninterrupted one": whole.seconds, **findings.figures,
        "stops found again after a kill": honoured, "temporary files left": temporaries,
        "of these, kills of the command's own process alone": len(threads),
        **{f"seconds until its {what} were gone": spread(times) for what, times in gone.items()}}
    return findings


def _moment(project: Project, begun: int) -> str:
    """What a command was at when it was killed; ``begun``: epochs that were begun before it."""
    ended = {event["key"] for event in project.events("completed")} | set(stops(project))
    if len(ended) == project.size.trials:
        return "ending"
    return "training" if len(project.epochs()) > begun else "starting"


def _see_out(project: Project, running: Mapping[tuple[int, str], str], gone: Mapping[str, list[float]]) -> None:
    """How long the command's workers, and all of its processes but Ray's agents, live on without it."""
    began = time.monotonic()
    workers = {process for process, words in running.items() if words.startswith(harmed.WORKERS)}
    with suppress(TimeoutError):
        others = {process for process, words in running.items() if not words.startswith(harmed.AGENTS)}
        for what, those in (("workers", workers), ("processes", others)):
            until(lambda those=those: not those & project.processes().keys(), f"the end of its {what}")
            gone[what].append(time.monotonic() - began)


def worker(folder: Path, kills: int = 9, seed: int = 1, size: Size = USUAL, whole: Project | None = None) -> Findings:
    """SIGKILL to workers at random moments, at most three a sweep: so many restarts a trial has."""
    findings, draw = Findings(), random.Random(seed)
    resumed: list[float] = []
    done = 0
    with projects(folder) as new:
        whole = whole or undisturbed(new, size)
        swept: list[Project] = []
        while done < kills:
            project = new(str(len(swept)), size).sampled(asha=False)
            swept.append(project)
            process = project.start()
            until(lambda project=project, process=process: project.workers() or process.poll() is not None, "a worker")
            killed: list[tuple[int, float]] = []
            while len(killed) < 3 and done + len(killed) < kills:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(draw.uniform(0.2, whole.seconds / 4))
                    break
                if workers := project.workers():
                    killed.append((draw.choice(workers), time.time()))
                    kill(killed[-1][0])
            code = process.wait(LIMIT)
            findings.promise(killed, "the sweep was over before a worker was killed")
            findings.promise(code == 0, f"exit code {code}: {project.said()[-2000:]}")
            if code != 0 or not killed:
                break
            done += len(killed)
            resumed += [pause for pid, when in killed if (pause := _pause(project, pid, when)) is not None]
            check_equal(findings, project, whole)
            expected = (whole.output / whole.name / DECISION).read_bytes()
            findings.promise(expected == (project.output / project.name / DECISION).read_bytes(), "another decision")
        check_epochs(findings, *swept, running=done)
    findings.figures = {"kills": done, "sweeps": len(swept), **findings.figures,
                        "seconds until a killed trial trained again": spread(resumed)}
    return findings


def _pause(project: Project, pid: int, when: float) -> float | None:
    """Seconds from the death of a worker to the next epoch of what it trained; None where it was done with that."""
    epochs = project.epochs()
    key = next((epoch.key for epoch in reversed(epochs) if epoch.pid == pid and epoch.began < when), None)
    return next((epoch.began - when for epoch in epochs if epoch.key == key and epoch.began > when), None)


def doomed(folder: Path, size: Size = USUAL) -> Findings:
    """Every worker of one trial is killed as it trains: the trial fails in the end, the sweep goes on without it."""
    findings, deaths = Findings(), 0
    with projects(folder) as new:
        project = new("doomed", size).sweep()
        process = project.start()
        target = until(project.epochs, "an epoch")[0].key
        while process.poll() is None:
            latest = {epoch.pid: epoch for epoch in project.epochs()}
            for pid in project.workers():
                if pid in latest and latest[pid].key == target and latest[pid].ended is None:
                    kill(pid)
                    deaths += 1
                    until(lambda pid=pid: pid not in project.workers(), "a killed worker's end")
            time.sleep(0.02)
        findings.figures["restarts of a trial whose workers all die"] = deaths - 1
        findings.promise(deaths == 4, f"{deaths - 1} restarts instead of 3")
        findings.promise(process.returncode == 0, f"exit code {process.returncode}: {project.said()[-2000:]}")
        findings.promise({event["key"] for event in project.events("failed")} == {target}, "not it alone failed")
        findings.promise(len(project.events("completed")) == len(ARMS) - 1, "the others did not complete")
        check_epochs(findings, project, running=deaths)
    return findings


def node(folder: Path, size: Size = USUAL, whole: Project | None = None) -> Findings:
    """The second of two nodes of one CPU each is killed, all of its processes at once, while it trains."""
    findings = Findings()
    with projects(folder) as new:
        whole = whole or undisturbed(new, size)
        project = new("lost", size).sampled(asha=False, resources={"cpus": 1, "gpus": 0})
        token = project.folder / ".ray" / "auth_token"
        token.parent.mkdir()
        token.write_text("0123456789abcdef" * 4)
        token.chmod(0o600)
        with (project.folder / "cluster.log").open("w") as log:
            cluster = subprocess.Popen(
                [sys.executable, "-c", CLUSTER], cwd=project.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, env=project.environment | {"RAY_AUTH_MODE": "token"}, text=True)
        address, raylet = cluster.stdout.readline().split()
        process = project.start("--address", address)
        lost = until(lambda: _training(project, int(raylet)), "an epoch on the second node")
        cluster.stdin.write("\n")
        cluster.stdin.flush()
        until(lambda: lost not in project.workers(), "the end of the worker whose node is gone")
        when = time.time()
        code = process.wait(LIMIT)
        cluster.stdin.close()
        cluster.wait(60)
        findings.promise(code == 0, f"exit code {code}: {project.said()[-2000:]}")
        pause = _pause(project, lost, when)
        findings.figures |= {"seconds of an undisturbed sweep on one machine": whole.seconds,
                             "seconds until the lost trial trained again": pause}
        findings.promise(pause is not None, "the lost trial never trained again")
        check_epochs(findings, project, running=1)
        check_equal(findings, project, whole)
    return findings


def _training(project: Project, raylet: int) -> int | None:
    """A worker of this node that has trained two epochs."""
    for pid in project.workers():
        with suppress(OSError):
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            if parent == raylet and sum(epoch.pid == pid for epoch in project.epochs()) > 2:
                return pid
    return None


def together(folder: Path, size: Size = USUAL) -> Findings:
    """Two sweeps started at the same time with one output folder, each with a Ray of its own; three of their four arms
    are the same trainings."""
    findings = Findings()
    others = {f"{name}2": settings for name, settings in ARMS.items() if name != "A"} | {"E": {"loss.l1": 0.5}}
    names = ("left", "right")

    def both(project: Project) -> Project:
        return project.sweep(ARMS, name=names[0]).sweep(others, name=names[1])

    with projects(folder) as new:
        apart, project = both(new("apart", size)), both(new("together", size))
        one_by_one = apart.complete(f"{names[1]}.yaml", name=names[0])
        began = time.monotonic()
        started = [project.start(name=name) for name in names]
        codes = [process.wait(LIMIT) for process in started]
        at_once = time.monotonic() - began
        findings.promise(codes == [0, 0], f"exit codes {codes}: {project.said('left')}{project.said('right')}")
        if codes == [0, 0]:
            for name in names:
                findings.promise(project.decision(name) == apart.decision(name), f"another decision of {name}")
        check_epochs(findings, project, running=0)
        check_equal(findings, project, apart)
        seen = [(epoch.key, epoch.number) for epoch in project.epochs()]
        findings.figures |= {"epochs trained twice": len(seen) - len(set(seen)), "seconds at once": at_once,
                             "seconds one after the other, in one command": one_by_one}
    return findings


def diverging(folder: Path, size: Size = USUAL) -> Findings:
    """Two arms with a learning rate of 1e12 among sound ones, which they do not hold up."""
    findings = Findings()
    arms = {"X": {"train.learning_rate": 1e12}, "A": ARMS["A"],
            "Y": {"train.learning_rate": 1e12, "model.latent_channels": 4}, "B": ARMS["B"]}
    with projects(folder) as new:
        project = new("diverging", size).sweep(arms, asha=True)
        code = project.start().wait(LIMIT)
        findings.promise(code == 0, f"exit code {code}: {project.said()[-2000:]}")
        steps, pauses, epochs = {}, [], project.epochs()
        for arm in ("X", "Y"):
            key = project.key_of(arm)
            diverged = json.loads((project.output / "store" / key / "status.json").read_text()).get("diverged") or {}
            steps[arm] = (diverged.get("epoch"), diverged.get("step"))
            first = next(epoch for epoch in epochs if epoch.key == key)
            pauses += [epoch.began - first.began for epoch in epochs
                       if epoch.pid == first.pid and epoch.began > first.began and epoch.key != key][:1]
            findings.promise(sum(epoch.key == key for epoch in epochs) == 1, f"{arm} was tried again")
        decision = project.decision()
        verdicts = {row["arm"]: row["verdict"] for row in decision["candidates"]}
        findings.figures |= {
            "epoch and step at which they ended": steps, "steps of an epoch": -(-size.images * 8 // 10 // 16),
            "seconds from their start to the next trial's on the same worker": [round(pause, 2) for pause in pauses],
            "verdicts": verdicts, "winner": decision["winner"]}
        findings.promise(all(epoch == 1 and step <= 3 for epoch, step in steps.values()), f"late: {steps}")
        findings.promise(pauses and max(pauses) < 5, f"their slots were not taken: {pauses}")
        findings.promise(decision["winner"] in ("A", "B"), f"the winner is {decision['winner']}")
    return findings


def full_disk(folder: Path, size: Size = USUAL) -> Findings:
    """A tmpfs of 64 MB as output folder and some 100 MB of checkpoints: refused. So it gets 1 GB, which shrink to 64 MB
    once the sweep trains; then there is room again."""
    findings = Findings()
    with projects(folder) as new:
        arms = {f"L{number}": {"model.latent_channels": number} for number in range(1, 7)}
        project = new("full", size, **{"model.base_channels": 64, "data.limit": 40}).sweep(arms)
        project.output.mkdir()
        with tmpfs(project.output) as resize:
            code, said = _ended(findings, project, project.start(), code=2)
            findings.figures |= {"exit code where the plan does not fit": code, "what it said": said}
            findings.promise(project.stored() == 0, "it began although the plan does not fit")
            resize("1g")
            process = project.start()
            until(lambda: project.stored() or process.poll() is not None, "an epoch")
            resize("64m")
            code, said = _ended(findings, project, process)
            broken, rows = unreadable(project.output), project.rows()
            findings.figures |= {"exit code on the full disk": code, "what it said there": said,
                                 "epochs stored on the full disk": project.stored(),
                                 "files that cannot be read, temporary files": len(broken)}
            findings.promise("full" in said and str(project.output) in said, f"no word of which disk is full: {said}")
            findings.promise(not project.events("failed"), "the disk's fault is put down to trials, as failed")
            findings.promise(not broken, "\n".join(broken))
            resize("1g")
            code = project.start().wait(LIMIT)
            findings.promise(code == 0, f"with more room, exit code {code}: {project.said()[-2000:]}")
            check_kept(findings, rows, project)
            check_epochs(findings, project, running=SLOTS)
            findings.promise(not (left := unreadable(project.output)), "\n".join(left))
    return findings


def vanished(folder: Path, size: Size = USUAL) -> Findings:
    """The output folder is removed while the sweep runs."""
    findings = Findings()
    with projects(folder) as new:
        project = new("vanished", size).sweep()
        process = project.start()
        until(lambda: project.stored() > 5 or process.poll() is not None, "some epochs")
        began = time.monotonic()
        subprocess.run(["rm", "-rf", str(project.output)], check=False)
        code, said = _ended(findings, project, process)
        findings.figures |= {"exit code without output folder": code, "what it said then": said,
                             "seconds until it ended": time.monotonic() - began}
    return findings


def _ended(findings: Findings, project: Project, process: subprocess.Popen, code: int = 1) -> tuple[int | None, str]:
    """The exit code of a command that cannot go on, which should be ``code``, and its one message."""
    before = len(project.said())
    try:
        found = process.wait(120)
    except subprocess.TimeoutExpired:
        found = None
    text = project.said()[before:]
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    findings.promise(found == code, f"exit code {found} instead of {code}: {text[-2000:]}")
    findings.promise(len(errors) == 1 and "Traceback" not in text, f"not one clear message: {text[-3000:]}")
    with suppress(TimeoutError):
        until(lambda: not project.processes(), "the end of Ray's processes", 30)
    findings.promise(not project.processes(), f"still there: {project.processes()}")
    return found, " / ".join(errors)


class Unavailable(Exception):
    """The machine lacks what a fault takes."""


@contextmanager
def tmpfs(folder: Path) -> Iterator[Callable[[str], Any]]:
    """A file system of 64 MB, and what changes its size. Raises :class:`Unavailable` where nothing may be mounted."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        raise Unavailable("a small file system takes root and mount")
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if (done := subprocess.run(mount, capture_output=True, text=True)).returncode != 0:
        raise Unavailable(done.stderr.strip())
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"median": round(ordered[len(ordered) // 2], 1), "longest": round(ordered[-1], 1)} if ordered else {}


FAULTS: dict[str, list[Callable[..., Findings]]] = {
    "driver": [driver], "worker": [worker, doomed], "node": [node], "together": [together], "diverging": [diverging],
    "full-disk": [full_disk, vanished]}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fault", choices=FAULTS)
    parser.add_argument("--kills", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", metavar="DIR", help="a folder that does not exist yet, for all that the sweeps leave")
    options = parser.parse_args(arguments)
    folder = Path(options.keep or tempfile.mkdtemp(prefix="faults"))
    broken = False
    try:
        for fault in FAULTS[options.fault]:
            more = {"seed": options.seed} | ({"kills": options.kills} if options.kills else {})
            findings = fault(folder / fault.__name__, **(more if fault in (driver, worker) else {}))
            findings.show()
            broken = broken or bool(findings.broken)
    except Unavailable as error:
        print(f"cannot be done here: {error}", file=sys.stderr)
        return 2
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
