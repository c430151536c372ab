"""python -m autoenc.evaluate CHECKPOINT: every figure of a trained model, the baselines beside them."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autoenc.checkpoint import check_splats, data_shapes, load_model, read_checkpoint
from autoenc.config import Config, flatten, make_config
from autoenc.data import SPLITS, Dataset, prepare
from autoenc.errors import InputError, command
from autoenc.evaluation.baselines import fit_baselines, measure_baselines
from autoenc.evaluation.cost import flops, speed
from autoenc.evaluation.interpolation import interpolate
from autoenc.evaluation.pictures import interpolations, reconstructions, write_picture
from autoenc.evaluation.splits import batch_size, latent_figures, latent_shape, measure_split, shape_in_words
from autoenc.files import write_atomic
from autoenc.latents import latent_statistics
from autoenc.model import Autoencoder, count_parameters
from autoenc.options import device_of, with_data_settings

HELD_OUT = ("val", "test")


def evaluate(model: Autoencoder, dataset: Dataset, config: Config, *, timing: bool = True,
             pictures: Path | None = None) -> dict[str, Any]:
    """Every figure of a model on the val and test splits, as plain values; undefined ones are NaN.

    ``data`` {fingerprint, images by split}; ``model`` {latent [C, h, w], latent_size, parameters, heads}; ``baselines``
    {pca_dimensions, pca_images}; ``val`` and ``test`` (None without images): the figures by name as training reports
    them, ``palette_iou`` and ``segmentation_iou`` {class: IoU}, ``latent`` {mean, std, … by channel, covariance},
    ``interpolation``, and ``baselines`` {name: its figures}; ``cost`` {flops, with ``timing`` also speed}: ``speed`` is
    all that changes from run to run. The model is measured where it is, in float32. ``pictures``: a folder, made where
    there is none, for PNG files of reconstructions and interpolations of each split. Raises OSError.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        channels, *sides = latent_shape(model, dataset)
        dimensions = channels * math.prod(sides)
        baselines = fit_baselines(model, dataset, dimensions, device)
        if pictures is not None:
            pictures.mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = {
            "data": {"fingerprint": dataset.fingerprint,
                     "images": {split: len(dataset.splits[split]) for split in SPLITS}},
            "model": {"latent": [channels, *sides], "latent_size": dimensions, "parameters": count_parameters(model),
                      "heads": list(config.heads)},
            "baselines": {"pca_dimensions": len(baselines.components), "pca_images": baselines.fitted_on}}
        for split in HELD_OUT:
            found[split] = None
            if len(dataset.splits[split]):
                result = measure_split(model, dataset, split, config)
                latents = latent_statistics(model, dataset.inputs, batch_size(config), device,
                                            indices=dataset.splits[split])
                between = interpolate(model, dataset, split, latents.std.to(device), batch_size(config))
                measured = measure_baselines(model, baselines, dataset, split, config)
                found[split] = {**result.figures, "latent": latent_figures(latents), "interpolation": between.figures,
                                "baselines": {**measured, "shuffled_latents": result.shuffled}}
                if pictures is not None:
                    write_picture(pictures / f"reconstructions_{split}.png",
                                  reconstructions(model, dataset, split, result.errors))
                    if len(between.decoded):
                        write_picture(pictures / f"interpolations_{split}.png", interpolations(between))
        size = dataset.images.shape[1]
        found["cost"] = {"flops": flops(model, size)}
        if timing:
            found["cost"]["speed"] = speed(model, size, (1, config.train.batch_size))
        return found
    finally:
        model.train(was_training)


def json_text(found: Mapping[str, Any]) -> str:
    """An evaluation as JSON; null for what is not finite, which JSON has no word for."""
    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(found), indent=1, allow_nan=False) + "\n"


def check_shapes(path: Path, config: Config, shapes: Mapping[str, Any], dataset: Dataset) -> None:
    """Raise :class:`InputError` where the data's classes or labels are not those that a head was trained for. Data
    without any is accepted: the head's figures are left out."""
    present = data_shapes(dataset)
    for head, names, key in (("segmentation", "classes", "data.palette"),
                             ("classification", "labels", "data.label_column")):
        if head in config.heads and present[names] and present[names] != shapes[names]:
            raise InputError(f"{path}: the {head} head knows the {names} {_listed(shapes[names])}, and the data has "
                             f"{_listed(present[names])} ({key})")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:12])
    return shown if len(names) <= 12 else f"{shown}, … ({len(names)})"


def main(arguments: list[str]) -> int:
    """Print the tables, write JSON and pictures where asked for. Raises :class:`InputError`."""
    parser = argparse.ArgumentParser(
        prog="python -m autoenc.evaluate",
        description="Every figure of a trained model on val and test, the baselines beside them.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a .pt file that a training or sweep wrote")
    parser.add_argument("--json", metavar="FILE", help="write everything there, too")
    parser.add_argument("--pictures", metavar="DIR", help="write reconstructions and interpolations there as PNG "
                        "(default: beside the JSON file, as FILE_pictures; without --json none)")
    parser.add_argument("--set", dest="settings", metavar="data.KEY=VALUE", action="append", default=[],
                        help="evaluate on other data than it was trained with; repeatable")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    options = parser.parse_args(arguments)
    path = Path(options.checkpoint)
    output = None if options.json is None else _json_path(options.json)
    pictures = _pictures_path(options.pictures, output)
    device = device_of(options.device)
    content = read_checkpoint(path)
    config = with_data_settings(make_config(flatten(content["config"], f"{path}: config"), f"{path}: config"),
                        options.settings)
    model = load_model(path, device)
    try:
        dataset = prepare(config.data)
    except InputError as error:
        if options.settings:
            raise
        raise InputError(f"{path}: the data that it was trained with:\n{error}\n"
                         "other data, or where it is now: --set data.manifest=PATH") from None
    check_splats(path, model.config, dataset)
    check_shapes(path, config, content["shapes"], dataset)
    if not any(len(dataset.splits[split]) for split in HELD_OUT):
        raise InputError(f"data.split: {list(config.data.split)} leaves no image in val and test")
    found = {"checkpoint": {"path": str(path.resolve()), "epoch": content["epoch"]},
             **evaluate(model, dataset, config, pictures=pictures)}
    if output is not None:
        write_atomic(output, json_text(found))
    _print(found, path, config)
    for what, written in (("figures", output), ("pictures", pictures)):
        if written is not None:
            print(f"{what}: {written}")
    return 0


def _print(found: Mapping[str, Any], path: Path, config: Config) -> None:
    from autoenc.evaluation.table import print_tables

    data = config.data
    print(f"{path}, epoch {found['checkpoint']['epoch']}: {_input_in_words(config)} to "
          f"{shape_in_words(found['model']['latent'])}{' (VAE)' if config.model.variational else ''}; "
          f"{data.source if data.manifest is None else f'{data.source} {data.manifest}'}")
    print_tables(found)


def _input_in_words(config: Config) -> str:
    size = config.data.image_size
    return f"{config.data.splats} splats" if config.takes_splats else f"{size}×{size}×3"


def _json_path(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise InputError(f"--json: {path}: is a folder")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--json: {path}: there is no folder {path.absolute().parent}")
    return path


def _pictures_path(text: str | None, output: Path | None) -> Path | None:
    if text is None:
        return None if output is None else output.with_name(f"{output.stem}_pictures")
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise InputError(f"--pictures: {path}: is no folder")
    return path


if __name__ == "__main__":
    command(main)
