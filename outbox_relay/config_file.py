"""Reads a TOML file into a strict type, and says of each mistake where it is, what was expected, and what may have been
meant: ``file:line: table.key: problem``.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from outbox_relay.errors import ConfigError
from outbox_relay.text import printable

M = TypeVar("M", bound=BaseModel)

#: Where something is in the file: ``("table", "key")``, deeper for tables in tables.
Place: TypeAlias = tuple[str, ...]

#: A file longer than this is no configuration of ours.
_MOST_LINES = 2_000


def load(path: Path, type_: type[M]) -> M:
    """Read ``path`` as a ``type_``; relative paths in it begin in its directory.

    Raises :class:`ConfigError` with one line for each mistake, in the order of the file.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror or error}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: must be UTF-8, and byte {error.start} isn't"]) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([_not_toml(path, error)]) from error
    except (ValueError, RecursionError) as error:
        # Of Python itself: a number of thousands of digits, or as many brackets in one another.
        raise ConfigError([f"{path}: can't be read: a number is too long, or tables are too deep"]) from error
    try:
        return type_.model_validate(values, context={"directory": path.absolute().parent})
    except ValidationError as error:
        mistakes = error.errors(include_input=False, include_url=False)
    lines = _lines(text)
    told = [(_line(lines, place), place, problem) for mistake in mistakes for place, problem in _told(mistake, type_)]
    # Outside of the handler, for pydantic's own message holds the values.
    raise ConfigError(
        [
            f"{path}{f':{line}' if line else ''}: {printable('.'.join(place))}: {printable(problem)}"
            for line, place, problem in _sorted(told)
        ]
    )


def _sorted(told: list[tuple[int, Place, str]]) -> list[tuple[int, Place, str]]:
    """In the order of the file; what isn't in it comes last."""
    return sorted(told, key=lambda one: one[0] or _MOST_LINES + 1)


# -- where


def _not_toml(path: Path, error: tomllib.TOMLDecodeError) -> str:
    problem, at, position = str(error).rpartition(" (at ")
    if match := re.fullmatch(r"line (\d+), column (\d+)\)", position):
        return f"{path}:{match[1]}: not TOML: {problem} (column {match[2]})"
    return f"{path}: not TOML: {problem + at + position}"


def _lines(text: str) -> dict[Place, int]:
    """The line of each key and table, by reading ever more of the file.

    tomllib tells no positions. A statement begins behind the line with which the one before it was whole.
    """
    lines = text.splitlines()[:_MOST_LINES]
    places: dict[Place, int] = {}
    begins: int | None = None
    for number, line in enumerate(lines, 1):
        if begins is None and (not line.strip() or line.lstrip().startswith("#")):
            continue
        begins = begins or number
        try:
            known = tomllib.loads("\n".join(lines[:number]))
        except tomllib.TOMLDecodeError:
            continue  # in the middle of a value of several lines
        for place in _places(known):
            places.setdefault(place, begins)
        begins = None
    return places


def _places(values: Mapping[str, Any], above: Place = ()) -> Iterator[Place]:
    for key, value in values.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from _places(value, (*above, key))


def _line(lines: Mapping[Place, int], place: Place) -> int:
    """Of the place, or what it would be in; 0 where that isn't in the file either."""
    while place:
        key = re.sub(r"\[\d+\]$", "", place[-1])
        if line := lines.get((*place[:-1], key)):
            return line
        place = place[:-1]
    return 0


# -- what


def _told(mistake: ErrorDetails, type_: type[BaseModel]) -> Iterator[tuple[Place, str]]:
    """Where, and the problem; more than one for a table that is missing."""
    *above, last = place = _place(mistake)
    if mistake["type"] == "missing" and (table := _table_at(place, type_)) is not None:
        for key, field in table.model_fields.items():
            if field.is_required():
                yield (*place, key), "missing, and there is no default"
    elif mistake["type"] == "missing":
        yield place, "missing, and there is no default"
    elif mistake["type"] == "extra_forbidden":
        yield place, f"unknown {_meant(tuple(above), last, type_)}"
    elif mistake["type"] == "model_type":
        shape = getattr(_table_at(place, type_), "shape", f"a table, [{'.'.join(place)}]")
        yield place, f"must be {shape}"
    elif mistake["type"] == "list_type":
        yield place, f"must be a list, such as {json.dumps(_example(place, type_))}"
    elif mistake["type"] == "dict_type":
        yield place, "must be a table, { name = value, … }"
    else:
        yield place, re.sub("^(Value error, |[A-Z][a-z]+ should )", _must, mistake["msg"])


def _place(mistake: ErrorDetails) -> Place:
    place: list[str] = []
    for part in mistake["loc"]:
        if isinstance(part, int):
            place[-1] += f"[{part}]"
        elif part != "[key]":  # of a key that is itself the mistake
            place.append(part)
    return tuple(place)


def _must(beginning: re.Match[str]) -> str:
    return "must " if beginning[0].endswith("should ") else ""


def tables(type_: type[BaseModel], above: Place = ()) -> Iterator[tuple[Place, type[BaseModel]]]:
    """Every table of the file with its type, those in other tables too."""
    for name, field in type_.model_fields.items():
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                place = (*above, field.alias or name)
                yield place, inner
                yield from tables(inner, place)


def _table_at(place: Place, type_: type[BaseModel]) -> type[BaseModel] | None:
    return dict(tables(type_)).get(place)


def _example(place: Place, type_: type[BaseModel]) -> Any:
    """What somebody may write there."""
    table = _table_at(place[:-1], type_)
    field = table.model_fields[place[-1]] if table is not None else None
    (example, *_) = (field.examples if field is not None else None) or ["…"]
    return example


def keys(type_: type[BaseModel]) -> list[str]:
    """What a table may hold, as it is written in the file."""
    return [field.alias or name for name, field in type_.model_fields.items()]


def _meant(above: Place, key: str, type_: type[BaseModel]) -> str:
    """What may have been meant by an unknown table, or key of a known one."""
    every = dict(tables(type_))
    known = keys(every.get(above, type_))
    what = "key" if above else "table or key"
    homes = [place for place, table in every.items() if place != above and key in keys(table)]
    if homes and key not in known:
        return f"{what}; it belongs into [{'.'.join(homes[0])}]"
    nearest = difflib.get_close_matches(key, known, n=1)
    return f"{what}; did you mean {nearest[0]}?" if nearest else f"{what}; known are {', '.join(known)}"
