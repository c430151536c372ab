"""A model or a loss of one's own, named as ``package.module:Name``: where its source is, what it holds, loading it.

Finding and reading a source imports nothing: plans and identities need no torch. A process reads a source once, and its
workers import that text, so that everything that a command trains is of one text, whatever is written meanwhile.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoenc.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from autoenc.config import Config
    from autoenc.losses import Loss, Tensors

ANYTHING = "*"                   # a name that a source may hold by means that cannot be read off it
KINDS = {"class": "a class", "function": "a function"}


@dataclass(frozen=True)
class Source:
    """The file that holds a module."""

    path: Path
    root: str
    """the folder on Python's path that it was found in"""
    text: bytes

    @property
    def digest(self) -> str:
        """sha256 of the text, hexadecimal."""
        return hashlib.sha256(self.text).hexdigest()


_sources: dict[str, Source] = {}         # that this process has read, by module
_arrived: dict[str, Source] = {}         # that it was given by the process that it works for


def find_source(target: str) -> Path:
    """The file that holds a target. Raises :class:`InputError` where there is none on Python's module path, which the
    working directory is added to."""
    return _source(target).path


def source_digest(target: str) -> str:
    """sha256 of the text of the file that holds a target, hexadecimal, as this process first read it. Raises
    :class:`InputError`."""
    return _source(target).digest


def for_workers() -> dict[str, tuple[str, str, bytes]]:
    """What a worker needs to import what this process has read: module -> (file, folder, text)."""
    return {module: (str(source.path), source.root, source.text) for module, source in _sources.items()}


def arrive(modules: Mapping[str, tuple[str, str, bytes]]) -> None:
    """Take over, in a worker, what :func:`for_workers` gave: these modules are imported from their texts, and what they
    import from their folders, which go to the end of Python's path."""
    for module, (path, root, text) in modules.items():
        _arrived[module] = Source(Path(path), root, text)
        if root not in sys.path:
            sys.path.append(root)
    if modules and _Arrived not in sys.meta_path:
        sys.meta_path.insert(0, _Arrived)


class Caller:
    """Calls functions in a process of its own, where what :func:`for_workers` gave has arrived."""

    def call(self, modules: Mapping[str, tuple[str, str, bytes]], function: Callable[..., Any], *task: Any) -> Any:
        arrive(modules)
        return function(*task)


class _Arrived:
    """Finds the modules that have arrived, before those on Python's path."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        source = _arrived.get(name)
        return source and spec_from_file_location(name, source.path, loader=_Loader(name, str(source.path)))


class _Loader(SourceFileLoader):
    def path_stats(self, path: str) -> Any:
        raise OSError                        # no bytecode of the file, which may be another by now

    def get_data(self, path: str) -> bytes:
        return _arrived[self.name].text if path == self.path else super().get_data(path)


def check_target(target: str, kind: str) -> None:
    """Raise :class:`InputError` unless there is a source for the target that holds its name, as ``kind``: class or
    function. What is imported or assigned there counts as either; nothing is run."""
    name, source = target.partition(":")[2], _source(target)
    try:
        held = dict(_names(ast.parse(source.text)))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        said = error.msg if isinstance(error, SyntaxError) else str(error)
        raise InputError(f"{target!r}: {source.path}{line}: {said}") from None
    if name not in held and ANYTHING not in held:
        wanted = [each for each, what in held.items() if what in (kind, "")]
        raise InputError(f"{target!r}: there is no {name} in {source.path}{did_you_mean(name, wanted)}")
    if held.get(name, "") not in (kind, ""):
        raise InputError(f"{target!r}: {name} in {source.path} is {KINDS[held[name]]}, and should be {KINDS[kind]}")


def load_target(target: str) -> Any:
    """What a target names, its module imported. Raises :class:`InputError` where it cannot be, or is not what this
    process has read."""
    module, _, name = target.partition(":")
    source, loaded = _source(target), sys.modules.get(module)
    if loaded is None:
        if module not in _arrived and _read(target).text != source.text:
            raise InputError(f"{target!r}: {source.path} has changed since this process read it: start it again")
        try:
            loaded = importlib.import_module(module)
        except (Exception, SystemExit) as error:
            raise InputError(f"{target!r}: cannot be imported: {in_words(error, source.path)}") from error
    there = getattr(loaded, "__file__", None)
    if there is None or os.path.realpath(there) != os.path.realpath(source.path):
        raise InputError(f"{target!r}: another module {module} is loaded already ({there}); name yours otherwise")
    if not hasattr(loaded, name):
        raise InputError(f"{target!r}: there is no {name} in {source.path}")
    return getattr(loaded, name)


@contextmanager
def said_of(key: str) -> Iterator[None]:
    """Puts the setting before what is wrong with it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{key}: {error}") from error


def in_words(error: BaseException, source: Path | None = None) -> str:
    """An exception in a line, with the line of the source that it came from."""
    said = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(source)]
    return f"{said} ({source.name}, line {lines[-1]})" if lines else said


def load_terms(config: Config) -> dict[str, Loss]:
    """The loss terms of one's own that weigh something, by name. Raises :class:`InputError` for one that cannot be
    loaded; a term raises it when it returns anything but a scalar tensor."""
    return {term.name: _term(term.target) for term in config.loss.custom if term.weight}


@functools.cache
def _term(target: str) -> Loss:
    with said_of("loss.custom"):
        found = load_target(target)
    if not callable(found) or isinstance(found, type):
        raise InputError(f"loss.custom: {target!r}: is no function but {_kind(found)}")
    return _checked(target, found)


def _checked(target: str, function: Callable[..., Any]) -> Loss:
    import torch

    @functools.wraps(function)
    def term(outputs: Tensors, batch: Tensors) -> torch.Tensor:
        try:
            value = function(outputs, batch)
        except KeyError as error:
            raise InputError(f"loss.custom: {target!r}: {in_words(error, find_source(target))}; outputs has "
                             f"{', '.join(outputs)}, batch has {', '.join(batch)}") from error
        if not isinstance(value, torch.Tensor):
            raise InputError(f"loss.custom: {target!r}: returns {_kind(value)}, and should return a scalar tensor")
        if value.dim() or not value.is_floating_point():
            raise InputError(f"loss.custom: {target!r}: returns a tensor of shape {tuple(value.shape)} and "
                             f"{value.dtype}, and should return a scalar of floating point, as .mean() gives it")
        return value

    return term


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _module_of(target: str) -> str:
    module, _, name = target.partition(":")
    if not (name.isidentifier() and module and all(part.isidentifier() for part in module.split("."))):
        raise InputError(f"{target!r}: should be package.module:Name")
    return module


def _source(target: str) -> Source:
    module = _module_of(target)
    if module not in _arrived and module not in _sources:
        _sources[module] = _read(target)
    return _arrived.get(module) or _sources[module]


def _read(target: str) -> Source:
    """The source of a target as it is now. Raises :class:`InputError`."""
    module = _module_of(target)
    with suppress(OSError):                 # of a folder that was removed
        if (here := str(Path.cwd())) not in sys.path and "" not in sys.path:
            sys.path.append(here)           # as `python -m` has it from the start
    importlib.invalidate_caches()
    spec, root, places = None, "", None
    parts = module.split(".")
    for end, part in enumerate(parts, start=1):
        if end > 1 and places is None:
            raise InputError(f"{target!r}: {'.'.join(parts[:end - 1])} is no package: there is nothing in it to import")
        spec = _find(part, places)
        if spec is None:
            where = "" if end == 1 else f" {part} in {'.'.join(parts[:end - 1])}"
            raise InputError(f"{target!r}: there is no module{where or f' {module}'} on Python's path "
                             f"({', '.join(_told(sys.path))}): start from its folder, or add that to PYTHONPATH")
        places = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
        if end == 1:
            found = places[0] if places else spec.origin or ""
            root = str(Path(found).absolute().parent)
    path = Path(spec.origin).absolute() if spec.has_location or spec.origin else None
    if path is None or path.suffix != ".py" or not path.is_file():
        raise InputError(f"{target!r}: {module} has no source text, which is part of a training's identity")
    try:
        return Source(path, root, path.read_bytes())
    except OSError as error:
        raise InputError(f"{target!r}: {path}: {error.strerror or error}") from None


def _find(name: str, places: list[str] | None) -> ModuleSpec | None:
    """Of a module at the top (``places``: None), or in a package's folders. A full name would have its parents looked
    up among what is imported."""
    finders = sys.meta_path if places is None else [PathFinder]
    return next((spec for finder in finders if (spec := finder.find_spec(name, places)) is not None), None)


def _told(places: list[str]) -> Iterator[str]:
    return (place for place in places
            if "site-packages" not in place and "/lib/python" not in place and Path(place).is_dir())


def _names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """The names that a module binds: class, function, or "" for what cannot be told without running it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield node.name, "class"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (ANYTHING, "") if node.name == "__getattr__" else (node.name, "function")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((ANYTHING if alias.name == "*" else (alias.asname or alias.name).partition(".")[0], "")
                        for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, ""
        elif not isinstance(node, ast.Lambda):
            yield from _names(node)
