"""Options from params.yaml against the section that knows them: what is wrong is said in one line."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import ValidationError

from genus.config import Section, section_at
from genus.errors import UserError, nearest

Kind = TypeVar("Kind", bound=Section)


def checked(kind: type[Kind], values: dict[str, Any], what: str) -> Kind:
    """``kind(**values)``. Raises UserError naming ``what``, the key and the nearest right one."""
    try:
        return kind(**values)
    except ValidationError as error:
        # A misspelt key first: that it also leaves the right one missing says less.
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        location = [str(part) for part in first["loc"]]
        key = ".".join(location)
        if first["type"] == "extra_forbidden":
            hint = nearest(location[-1], section_at(kind, location).model_fields)
            raise UserError(f"{what}: unknown key '{key}': {hint}") from error
        given = "" if first["type"] == "missing" else f", not {first['input']!r}"
        raise UserError(f"{what}: {key}: {first['msg']}{given}") from error
