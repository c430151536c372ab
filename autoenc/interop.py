"""Experiment files of other projects in and out: read as settings, and a configuration written as one.

``python -m autoenc.interop FILE`` turns an experiment file into a configuration, and a configuration into an
experiment. What either form cannot say is an error that names it. This module knows neither torch nor ray.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoenc import gaussvae_config, imginav_config
from autoenc.config import SPLAT_KINDS, load_config, make_config
from autoenc.errors import InputError, command
from autoenc.experiment import Experiment, as_arm, check_counts
from autoenc.files import write_atomic
from autoenc.imginav_config import PALETTE
from autoenc.imginav_config import write as write_experiment
from autoenc.yamlfile import dump_yaml, read_yaml

__all__ = ["FORMS", "PALETTE", "Experiment", "as_arm", "check_counts", "form_of", "is_experiment", "load_experiment",
           "read_experiment", "write_experiment"]

FORMS = {"imginav": imginav_config, "gaussvae": gaussvae_config}        # each with holds, read and write


def form_of(content: Any) -> str | None:
    """The form of a YAML file's content, sound or not, a key of FORMS; None where it is no experiment."""
    return next((form for form, module in FORMS.items() if module.holds(content)), None)


def is_experiment(content: Any) -> bool:
    """Whether a YAML file's content is in one of the forms, sound or not."""
    return form_of(content) is not None


def read_experiment(content: Mapping[str, Any], path: Path) -> Experiment:
    """The experiment in a file's content. Paths in it are relative to ``path``, the file.

    Raises :class:`InputError` that names every key and value which is unknown, impossible, or nothing that can be
    done here.
    """
    return FORMS[form_of(content) or "imginav"].read(content, path)


def load_experiment(path: str | Path) -> Experiment | None:
    """The experiment in a file; None where the file is in another form. Raises :class:`InputError`."""
    content = read_yaml(path)
    return read_experiment(content, Path(path)) if is_experiment(content) else None


def main(arguments: list[str]) -> int:
    """``python -m autoenc.interop FILE``: an experiment file as a configuration, or the other way."""
    names = " or ".join(form.NAME for form in FORMS.values())
    parser = argparse.ArgumentParser(prog="python -m autoenc.interop", description=f"Turn an experiment file of {names}"
                                     " into a configuration, or a configuration into an experiment file.")
    parser.add_argument("file", metavar="FILE", help="an experiment file, a best_config.yaml, or any configuration")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--to", choices=FORMS, help="write an experiment file (default for a configuration: gaussvae for "
                     "models of splats, else imginav)")
    way.add_argument("--from", dest="source", choices=FORMS, help="read an experiment file")
    parser.add_argument("--output", metavar="FILE", help="where to write (default: standard output)")
    options = parser.parse_args(arguments)
    path, content = Path(options.file), read_yaml(options.file)
    form = form_of(content)
    if options.to is not None and options.to == form:
        raise InputError(f"--to {form}: {path}: is an experiment file already")
    if options.source not in (None, form):
        told = FORMS[options.source]
        raise InputError(f"--from {options.source}: {path}: is no experiment file of {told.NAME} ({told.TOLD_BY})")
    text = dump_yaml(_read(content, path) if form and not options.to else _written(content, path, options.to))
    if options.output is None:
        print(text, end="")
        return 0
    try:
        write_atomic(options.output, text)
    except OSError as error:
        raise InputError(f"--output: {options.output}: cannot be written: {error.strerror}") from None
    return 0


def _read(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    experiment = read_experiment(content, path)
    for notice in experiment.notices:
        print(f"note: {notice}", file=sys.stderr)
    return {"config": make_config(experiment.settings, str(path)).nested()}


def _written(content: Any, path: Path, form: str | None) -> dict[str, Any]:
    config = load_config(path)
    provenance = content.get("provenance")
    name = provenance.get("sweep") if isinstance(provenance, Mapping) else None
    form = form or ("gaussvae" if config.model.kind in SPLAT_KINDS else "imginav")
    try:
        return FORMS[form].write(config, name if isinstance(name, str) and name else path.stem)
    except InputError as error:
        raise InputError("\n".join(f"{path}: {line}" for line in str(error).split("\n"))) from None


if __name__ == "__main__":
    command(main)
