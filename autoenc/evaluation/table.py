"""An evaluation as tables that fit into 120 columns."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from autoenc import figures

SPLITS = ("val", "test")
BASELINES = ("mean_image", "mean_splats", "majority", "pca", "shuffled_latents")
NARROW = 120
CHANNELS = 16                # of more the table shows the first ones
WORKS = ("encode", "decode")


def print_tables(found: Mapping[str, Any]) -> None:
    """Print an evaluation: figures beside the baselines, IoU by class, latents by channel, interpolation, cost."""
    console = Console(highlight=False, width=max(NARROW, shutil.get_terminal_size((NARROW, 40)).columns))
    splits = [split for split in SPLITS if found[split]]
    beside = splits[-1]
    baselines = _baselines(found[beside]["baselines"])
    pca = found["baselines"]
    titles = {"mean_image": "mean image", "mean_splats": "mean splats", "majority": "majority",
              "pca": f"PCA {pca['pca_dimensions']}", "shuffled_latents": "shuffled latents"}
    names = [name for name in BASELINES if name in baselines]
    counts = found["data"]["images"]

    console.print(f"baselines on {beside}, fitted on {counts['train']:,} training images (the PCA on "
                  f"{pca['pca_images']:,}, {pca['pca_dimensions']:,} dimensions; the latent has "
                  f"{found['model']['latent_size']:,})", markup=False)
    heads = [*(f"{split} ({counts[split]:,})" for split in splits), *(titles[name] for name in names)]
    columns = [*(found[split] for split in splits), *(baselines[name] for name in names)]
    told = {name for column in columns for name, value in column.items() if isinstance(value, int | float)}
    order = [*figures.PER_SPLIT, *figures.ALONE]
    names_told = sorted(told, key=lambda name: (order.index(name) if name in order else len(order), name))
    rows = [(name, [column.get(name) for column in columns]) for name in names_told]
    rows += [(name, [found["model"][name]] * len(splits)) for name in ("latent_size", "parameters")]
    _print(console, "figure", heads, rows)

    rows = []
    for kind in ("palette_iou", "segmentation_iou"):
        for name in found[beside].get(kind, {}):
            rows.append((f"{name}{' (head)' if kind == 'segmentation_iou' else ''}",
                         [column.get(kind, {}).get(name) for column in columns]))
    if rows:
        _print(console, "IoU by class", heads, rows)
    _print_latents(console, found, splits)
    _print_interpolation(console, found, splits)
    _print_cost(console, found["cost"])


def _baselines(found: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """With the majority class and the majority label, which have no figure in common, as one."""
    both = {**found.get("majority_class", {}), **found.get("majority_label", {})}
    return {**found, **({"majority": both} if both else {})}


def _print_latents(console: Console, found: Mapping[str, Any], splits: Sequence[str]) -> None:
    heads = [name for split in splits for name in (f"{split} mean", f"{split} std", "skewness", "kurtosis")]
    parts = [found[split]["latent"] for split in splits]
    channels = len(parts[0]["mean"])
    rows = [(str(channel), [text for part in parts for text in (
        *(f"{part[name][channel]:.3f} ±{part[f'{name}_error'][channel]:.3f}" for name in ("mean", "std")),
        *(f"{part[name][channel]:.2f}" for name in ("skewness", "kurtosis")))])
        for channel in range(min(channels, CHANNELS))]
    _print(console, "latent channel", heads, rows)
    if channels > CHANNELS:
        console.print(f"… and {channels - CHANNELS} channels more (see --json)")
    told = ", ".join(f"{split} {_shown(found[split]['latent']['largest_correlation'])}" for split in splits)
    console.print(f"±: standard error over images; kurtosis: the excess, 0 for a normal distribution.\n"
                  f"largest correlation between two channels (absolute): {told}", markup=False)


def _print_interpolation(console: Console, found: Mapping[str, Any], splits: Sequence[str]) -> None:
    parts = [found[split]["interpolation"] for split in splits]
    heads = [text for split in splits for text in (f"{split} mean", "q1", "median", "q3")]
    words = {"path": "path over endpoint distance", "largest_step": "largest step over mean step",
             "cycle_error": "cycle error, in latent spreads", "cycle_error_ends": "  of the ends alone"}
    rows = [(word, [part[name][value] for part in parts for value in ("mean", "q1", "median", "q3")])
            for name, word in words.items()]
    _print(console, f"{parts[0]['pairs']} interpolations", heads, rows)


def _print_cost(console: Console, cost: Mapping[str, Any]) -> None:
    rows = [("GFLOPs an image", [cost["flops"][work] / 1e9 for work in WORKS])]
    title = "cost"
    if "speed" in cost:
        speed = cost["speed"]
        title = f"cost on {speed['device']}" + (f", {speed['threads']} threads" if not speed["cuda"] else "")
        for size, works in speed["batches"].items():
            for name, unit in (("latency_ms", "ms"), ("images_per_second", "images/s")):
                rows.append((f"batch {size}, {unit}: median [quartiles]",
                             [_spread(works[work][name]) for work in WORKS]))
    _print(console, title, ["encode", "decode (rgb)"], rows)


def _print(console: Console, title: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[Any]]]) -> None:
    grid = Table(box=None, pad_edge=False)
    grid.add_column(Text(title))
    for head in heads:
        grid.add_column(Text(head), justify="right")
    for name, values in rows:
        grid.add_row(Text(name), *(Text(_shown(value)) for value in values))
    console.print()
    console.print(grid)


def _spread(part: Mapping[str, float]) -> str:
    return f"{_shown(part['median'])} [{_shown(part['q1'])}–{_shown(part['q3'])}]"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return "–" if math.isnan(value) else str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
