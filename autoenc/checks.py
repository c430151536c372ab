"""What is wrong with a typed section, in words for the person who wrote it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ValidationError

from autoenc.errors import InputError, did_you_mean

KINDS = {"tuple_type": "should be a list", "list_type": "should be a list", "dict_type": "should be a mapping",
         "model_type": "should be a mapping"}


class Conflict(ValueError):
    """Settings of one section that do not go together. The message names them."""


def _check_scalar(value: Any) -> Any:
    finite = not isinstance(value, float) or math.isfinite(value)
    if not (value is None or isinstance(value, str | bool | int | float)) or not finite:
        raise ValueError("should be a word, a finite number, true, false or null")
    return value


Scalar = Annotated[Any, AfterValidator(_check_scalar)]


class Faults:
    """Problems that are found one after the other and told together."""

    def __init__(self) -> None:
        self.said: list[str] = []

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keeps the :class:`InputError` that ends the block."""
        try:
            yield
        except InputError as error:
            self.said += [line for line in str(error).split("\n") if line not in self.said]

    def tell(self) -> None:
        """Raises one :class:`InputError` with a line a problem, if there were any."""
        if self.said:
            raise InputError("\n".join(self.said))


def shown(value: Any) -> str:
    """A value as a message shows it: its repr, shortened."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}…{text[-15:]}"


def describe(error: ValidationError, where: str, model: type[BaseModel], *, alone: bool = False) -> str:
    """A pydantic error as one message a line: where, key, value, what is wrong with it.

    ``alone``: without conflicts, which settings from elsewhere may yet resolve; empty where there is nothing else.
    """
    lines: list[str] = []
    for item in error.errors(include_url=False):
        place, kind = item["loc"], item["type"]
        cause = item.get("ctx", {}).get("error")
        if alone and isinstance(cause, Conflict) and len(place) < 2:
            continue
        key, value = ".".join(str(part) for part in place), shown(item["input"])
        if kind == "extra_forbidden":
            said = f"unknown key {shown(key)}{did_you_mean(place[-1], _fields(model, place[:-1]))}"
        elif kind == "missing":
            said = f"{key} is missing"
        elif kind != "value_error":
            said = f"{key}: {value}: {KINDS.get(kind) or item['msg'][0].lower() + item['msg'][1:]}"
        elif isinstance(cause, Conflict):
            said = str(cause) if str(cause).startswith(key) else f"{key}: {cause}"
        else:
            said = f"{key}: {value}: {cause}"
        if said not in lines:
            lines.append(said)
    return "\n".join(f"{where}: {line}" for line in lines)


def _fields(model: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """The keys that a model takes at this place in it."""
    for part in place:
        if part in model.model_fields:
            model = next(_models(model.model_fields[part].annotation), BaseModel)
    return list(model.model_fields)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)
