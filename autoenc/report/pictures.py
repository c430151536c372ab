"""The pictures of a sweep's report, embedded: reconstructions side by side, sample pictures, latent histograms."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from autoenc.report.candidates import best_first, first_seeds
from autoenc.report.intervals import ticks
from autoenc.report.snapshot import Snapshot
from autoenc.sweep.standing import Run, Trial
from autoenc.table import read_text

PICTURE_BYTES = 5_000_000            # of all pictures together; base64 makes 6.7 MB of it, plotly.js adds 4.8 MB
MOST_PICTURES = 24
FIRST = 6                            # shown at once; the others when asked for
TONE = "#3a7bd5"                     # on a light page and on a dark one
KINDS = ("best", "typical", "worst")


def samples(race: Snapshot, decision: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The last sample picture of every arm's first seed, the best arms' where there are very many."""
    arms = best_first(race, decision)
    standings = {row["arm"]: row["standing"] for row in decision["candidates"]}
    found = [(trial, path) for trial in first_seeds(race.trials) if (path := _last_picture(trial.run))]
    found = sorted(found, key=lambda pair: arms.index(pair[0].candidate.name))[:MOST_PICTURES]
    told = []
    for trial, path in found:
        picture = embedded(path, PICTURE_BYTES // len(found))
        if picture is not None:
            arm = trial.candidate.name
            told.append({**picture, "arm": arm, "verdict": standings.get(arm, trial.run.state),
                         "epoch": _epoch(path), "epochs": len(trial.run.rows)})
    return told


def gallery(race: Snapshot, decision: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """What ``gallery.json`` in this folder shows of the arms as they stand: the inputs, the columns' kinds, a strip an
    arm, best first; None where it is not there, cut, or of another training."""
    content = _read(folder / "gallery.json")
    rows = {row["arm"]: row for row in decision["candidates"]}
    trials = {trial.candidate.name: trial for trial in first_seeds(race.trials) if trial.candidate.name in rows}
    arms = [arm for arm in best_first(race, decision)
            if arm in trials and _is_current(race, trials[arm], content.get("arms", {}).get(arm), content)]
    inputs = _inside(folder, content.get("inputs")) if arms else None
    if inputs is None:
        return None
    limit = PICTURE_BYTES // (1 + min(len(arms), MOST_PICTURES))
    shown = embedded(inputs, limit)
    strips = []
    for arm in arms[:MOST_PICTURES]:
        entry = content["arms"][arm]
        picture = _inside(folder, entry.get("picture"))
        strip = embedded(picture, limit) if picture else None
        if strip is not None:
            strips.append({**strip, "arm": arm, "standing": rows[arm]["standing"], "verdict": rows[arm]["verdict"],
                           "psnr": entry["psnr"], "latent": _heat(entry.get("latent"))})
    if shown is None or not strips:
        return None
    kinds = [column["kind"] for column in content["columns"]]
    return {"inputs": shown, "columns": len(kinds), "classes": content.get("rows") == ["image", "classes"],
            "kinds": [(kind, len(list(group))) for kind, group in groupby(kinds)], "strips": strips,
            "cell": shown["width"] / len(kinds),
            "without": [arm for arm in trials if arm not in {strip["arm"] for strip in strips}]}


def _read(path: Path) -> dict[str, Any]:
    """The gallery's mapping with whole columns; {} where it is broken."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError, OSError):
        return {}
    if not isinstance(content, dict) or content.get("format") != 1 or not isinstance(content.get("arms"), dict):
        return {}
    columns = content.get("columns")
    whole = isinstance(columns, list) and columns and all(
        isinstance(column, dict) and column.get("kind") in KINDS for column in columns)
    return content if whole else {}


def _is_current(race: Snapshot, trial: Trial, entry: Any, content: Mapping[str, Any]) -> bool:
    """Whether an arm's entry is whole and shows the weights that the sweep compares."""
    if not isinstance(entry, dict):
        return False
    psnr = entry.get("psnr")
    return (entry.get("key") == trial.run.key and entry.get("epoch") == race.figures_of(trial.run).get("epoch")
            and isinstance(psnr, list) and len(psnr) == len(content["columns"])
            and all(value is None or _is_number(value) for value in psnr))


def _inside(folder: Path, name: Any) -> Path | None:
    """A file of the folder by its bare name; None for anything that leads out of it."""
    if not isinstance(name, str) or not name or name != Path(name).name or "\0" in name:
        return None
    path = folder / name
    return path if path.is_file() and path.resolve().parent == folder.resolve() else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _heat(latent: Any) -> dict[str, Any] | None:
    """A latent's histograms as a picture: a line a channel, a column a bin, each channel's fullest bin at full tone."""
    from PIL import Image

    kinds = {"edges": 2, "counts": 1, "mean": 1, "std": 1}
    if not isinstance(latent, dict) or not all(
            isinstance(latent.get(key), list) and len(latent[key]) >= least for key, least in kinds.items()):
        return None
    edges, counts = latent["edges"], latent["counts"]
    fit = all(isinstance(row, list) and len(row) == len(edges) - 1
              and all(_is_number(count) and 0 <= count < math.inf for count in row) for row in counts)
    known = all(map(_is_number, [*edges, *latent["mean"], *latent["std"]]))
    if not fit or not known or not -math.inf < edges[0] < edges[-1] < math.inf:
        return None
    tones = bytes(round(255 * math.sqrt(count / (max(row) or 1))) for row in counts for count in row)
    alpha = Image.frombytes("L", (len(edges) - 1, len(counts)), tones)
    picture = Image.new("RGB", alpha.size, TONE)
    picture.putalpha(alpha)
    span = edges[-1] - edges[0]
    return {"src": _uri(picture), "channels": len(counts),
            "ticks": [(round(100 * (tick - edges[0]) / span, 2), f"{tick:.3g}") for tick in ticks(edges[0], edges[-1])],
            "means": (min(latent["mean"]), max(latent["mean"])), "stds": (min(latent["std"]), max(latent["std"]))}


def _uri(picture: Any) -> str:
    file = io.BytesIO()
    picture.save(file, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _last_picture(run: Run) -> Path | None:
    """The latest picture within this sweep's budget: the store may hold a longer training."""
    paths = (run.trajectory.folder / "samples").glob("epoch_*.png")
    return max((path for path in paths if 0 < _epoch(path) <= len(run.rows)), key=_epoch, default=None)


def _epoch(path: Path) -> int:
    digits = path.stem.removeprefix("epoch_")
    return int(digits) if digits.isdecimal() else 0


def embedded(path: Path, limit: int) -> dict[str, Any] | None:
    """A PNG as a data URI of at most ``limit`` bytes before base64, halved until it fits; None where it is broken."""
    from PIL import Image

    try:
        content = path.read_bytes()
        picture = Image.open(io.BytesIO(content))
        picture.load()
        width, height = picture.size
        while len(content) > limit and min(picture.size) > 1:
            picture = picture.convert("RGB").reduce(2)
            file = io.BytesIO()
            picture.save(file, format="png")
            content = file.getvalue()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return {"src": "data:image/png;base64," + base64.b64encode(content).decode(), "width": width, "height": height}
