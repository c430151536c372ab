"""YAML in and out: plain values only, bounded, with errors that say where.

Differs from plain PyYAML where that surprises people. Words are read as in YAML 1.2's core schema: ``1e-4`` is a
number, ``no`` a word, ``010`` ten, ``1:30`` no number in base 60. A key given twice is an error (PyYAML keeps the
last), and so are tags and aliases (a few lines of aliases can fill the memory).
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any, ClassVar

import yaml

from autoenc.errors import InputError

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_VALUES = 30_000                     # a few seconds
MAX_DIGITS = 300                        # of an integer

UNWRITABLE = re.compile(r"[\x00\ud800-\udfff]")
_LINE_ENDS = re.compile(r"[\r\x85\u2028\u2029]")

# YAML 1.2's core schema, in plain decimal: tag -> the words that are no text, and their possible first characters.
_WORDS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
              "-+.0123456789"),
}


def _fault(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict] = {}
    depth = values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _fault(f"alias *{event.anchor} is not allowed", event.start_mark)
        if event.tag is not None:
            raise _fault(f"tag {event.tag!r} is not allowed", event.start_mark)
        self.values += 1
        if self.values > MAX_VALUES:
            raise _fault(f"more than {MAX_VALUES:,} values", event.start_mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _fault(f"nested deeper than {MAX_DEPTH} levels", event.start_mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MAX_DIGITS:
            raise _fault(f"a number of more than {MAX_DIGITS} digits", node.start_mark)
        return int(node.value)

    def construct_text(self, node: yaml.ScalarNode) -> str:
        if UNWRITABLE.search(node.value):
            raise _fault("a text with a character that no file name or UTF-8 text can hold", node.start_mark)
        return node.value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _fault("a key must be a plain word", key_node.start_mark)
            key = self.construct_object(key_node)
            if key in seen:
                raise _fault(f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that either schema, PyYAML's or the one here, would read as something else."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # PyYAML writes these ends of lines as they are, and reads them as "\n".
        style = '"' if _LINE_ENDS.search(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


for _tag, (_pattern, _first) in _WORDS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)
_Dumper.add_representer(str, _Dumper.represent_text)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. ``where`` names it in messages.

    Values are mappings, lists, texts, numbers, booleans and None. Raises :class:`InputError` for text that is no YAML,
    has a key twice, a tag, an alias or too many levels.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise InputError(f"{where}:{line} {said}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:     # "\\UFFFFFFFF" is a ValueError
        raise InputError(f"{where}: no readable YAML: {str(error).splitlines()[0]}") from None


def read_yaml(path: str | os.PathLike) -> Any:
    """The value in a YAML file; an empty file is None. Raises :class:`InputError`, also when it cannot be read."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):          # reading a pipe would wait for its writer
            raise InputError(f"{path}: not a regular file")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise InputError(f"{path}: larger than {MAX_BYTES:,} bytes")
    try:
        return parse_yaml(raw.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None


def dump_yaml(value: Any) -> str:
    """YAML text of plain values, keys in the order given."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
