"""Fields of frozen configuration dataclasses: ranges, presets and their checks.

A field's default, type, range, unit and help stand in one place, the dataclass; the command line,
the checkpoint header and these checks are all made from it.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """A valid range, carried by a field's annotation: `Annotated[float, Range(0, 1)]`."""

    low: int | float
    high: int | float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: int | float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        within = self.high_open or self.high == math.inf  # (inf itself is no setting)
        below = value < self.high if within else value <= self.high
        return above and below

    def __str__(self) -> str:
        left = "(" if self.low_open else "["
        right = ")" if self.high_open or self.high == math.inf else "]"
        high = "inf" if self.high == math.inf else f"{self.high:g}"
        return f"{left}{self.low:g}, {high}{right}"


class _FromPreset:
    def __repr__(self) -> str:
        return "<from preset>"


_FROM_PRESET = _FromPreset()


def preset_field() -> Any:
    """A dataclass field whose default is the preset's; a value that is given always wins."""
    return dataclasses.field(default=_FROM_PRESET)


def resolve_preset(config: Any, presets: dict[str, dict[str, Any]]) -> None:
    """Fill, in `__post_init__`, the fields that were not given from `presets[config.preset]`."""
    if config.preset not in presets:
        known = ", ".join(repr(name) for name in presets)
        raise ValueError(f"`preset` must be one of {known}; got {config.preset!r}.")
    for name, value in presets[config.preset].items():
        if getattr(config, name) is _FROM_PRESET:
            object.__setattr__(config, name, value)  # the dataclass is frozen; this is its birth


def validate(config: Any) -> None:
    """Check every field of a dataclass against its annotation: its type, choices and `Range`.

    Raises `ValueError` that names the field, shows the value and states the rule.
    """
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        base = _check(field.name, value, hints[field.name])
        if base is float and type(value) is int:
            # equal configurations must make the same arrays: 1 == 1.0
            object.__setattr__(config, field.name, float(value))


def _check(name: str, value: Any, hint: Any) -> Any:
    """The type of a field, without None, once its value is one of it and in its range."""
    extras = getattr(hint, "__metadata__", ())
    ranges = [extra for extra in extras if isinstance(extra, Range)]
    base = hint.__origin__ if extras else hint
    if get_origin(base) is Literal:
        if value not in get_args(base):
            choices = ", ".join(repr(choice) for choice in get_args(base))
            raise ValueError(f"`{name}` must be one of {choices}; got {value!r}.")
        return base
    if type(None) in get_args(base):
        if value is None:
            return None
        base = next(arg for arg in get_args(base) if arg is not type(None))
    if get_origin(base) is tuple:
        if not isinstance(value, tuple) or not value:
            raise ValueError(f"`{name}` must be a non-empty tuple, got {value!r}.")
        values, kind = value, get_args(base)[0]
    else:
        values, kind = (value,), base
    for item in values:
        allowed = (int, float) if kind is float else kind
        if not isinstance(item, allowed) or (isinstance(item, bool) and kind is not bool):
            raise ValueError(f"`{name}` must be of type {kind.__name__}, got {value!r}.")
        for bounds in ranges:
            if item not in bounds:
                raise ValueError(f"`{name}` must lie in {bounds}, got {value!r}.")
        if kind is float and not _finite(item):
            raise ValueError(f"`{name}` must be finite, got {value!r}.")
    return base


def _finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float reaches
        return False
