"""The benchmarks by name, their figures and marks. What each measures stands with its function."""

from __future__ import annotations

from measure import Benchmark, Mark, Row


def _rate(what: str, other: str, mark: Mark | None, unit: str = "images/s", ours: str = "autoenc.train") -> Row:
    return Row(what, ours, other, unit, "ours/other", mark)


def _share(what: str, ours: str, other: str, unit: str, mark: Mark | None) -> Row:
    return Row(what, ours, other, unit, "ours/other", mark)


BENCHMARKS = {benchmark.name: benchmark for benchmark in (
    Benchmark("sweep-time", "commands", "sweep_time", {
        "tune": Row("time per sweep", "the command", "plain Ray Tune", "s", "other/ours", Mark("at least", 3)),
        "optuna": Row("time per sweep, beside plain Optuna", "the command", "plain Optuna", "s", "other/ours")}),
    Benchmark("slots-busy", "slots", "slots_busy", {
        "slots": _share("slots busy", "training", "slots × wall", "s", Mark("at least", 0.95)),
        "tune": _share("slots busy, plain Ray Tune", "its training", "slots × wall", "s", None)}, repeats=3),
    Benchmark("training-step", "training", "training_step", {
        f"{size} px": _rate(f"training step, {size} px", "bare loop", Mark("at least", 0.97))
        for size in (32, 64)}, repeats=7),
    Benchmark("data", "training", "data", {
        "512 px files": _rate("data, files of 512 px", "decoding DataLoader", Mark("at least", 1.3)),
        "64 px files": _rate("data, files of 64 px", "decoding DataLoader", None)}),
    Benchmark("memory", "memory", "memory", {
        "memory": _share("memory", "growth a trial, data alone", "data set", "MB", Mark("at most", 0.05)),
        "worker included": _share("memory, worker included", "growth a trial", "data set", "MB", None)}, repeats=3,
        clocked=False),
    Benchmark("scale", "scale", "scale", {
        "rate": _rate("scale: trials a second", "plain Ray Tune", Mark("at least", 3), "trials/s", "the command"),
        "memory": Row("scale: driver memory a trial", "the command", "plain Ray Tune", "KB", "ours/other",
                      Mark("at most", 100, of="ours"))}, repeats=3),
    Benchmark("many-slots", "slots", "many_slots", {
        "many slots": _share("many slots", "busy", "64 slots × wall", "s", Mark("at least", 0.95))}, repeats=3),
    Benchmark("replay", "replay", "replay", {
        "replay": Row("replay of 1,000 epochs", "opening the sweep", "reading the files alone", "s", "ours/other",
                      Mark("at most", 2, of="ours"))}, repeats=7),
    Benchmark("start", "commands", "start", {
        "start": Row("start", "to the first epoch", "import torch, ray; ray.init(); one empty task", "s", "ours/other",
                     Mark("at most", 1.3))}, repeats=7),
    Benchmark("epochs", "epochs", "epochs", {
        "epochs": _share("epochs of first seeds", "trained", "without stopping and store", "epochs",
                         Mark("at most", 0.65)),
        "winners": _share("winners as with full training", "the same", "phases", "phases", Mark("at least", 1))},
        repeats=3, clocked=False),
    Benchmark("gpu-large", "gpu", "gpu_large", {
        "512 px": _rate("GPU, 512 px", "float32 eager loop", Mark("at least", 3))}),
    Benchmark("gpu-many", "gpu", "gpu_many", {
        "64 px": _rate("GPU, 64 px: trials an hour", "one at a time", Mark("at least", 4), "trials/h", "8 at a time")},
        repeats=3),
    Benchmark("encode", "bench_encode", "rounds", {
        "encode": _rate("encoding", "bare model", Mark("at least", 0.9), ours="autoenc.encode")}),
    Benchmark("evaluate", "bench_evaluate", "rounds", {
        "evaluate": Row("a whole evaluation", "autoenc.evaluate", "one plain pass", "s", "ours/other")}),
)}
