"""Typed access to the values that a file declares, so that a wrong one is reported by file and name."""

import math
from collections.abc import Mapping

from triode.errors import CorruptModel


class Fields:
    """The keys and values of one file. A value of None counts as absent; an absent one needs a default.

    Every method raises CorruptModel for a value that is missing or of another kind.
    """

    def __init__(self, source: str, values: Mapping[str, object], prefix: str = "") -> None:
        """`source` names the file in messages; `prefix` is what the keys have in common."""
        self.source = source
        self.values = values
        self._prefix = prefix

    def get(self, key: str) -> object:
        """The value as it is; None if there is none."""
        return self.values.get(self._prefix + key)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number."""
        value = self._or_default(key, default)
        if type(value) is not int:
            raise self._wrong(key, "an integer", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._or_default(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._wrong(key, "a finite number", value)
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A finite number, or None if there is none."""
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._or_default(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def string(self, key: str, default: str | None = None) -> str:
        """Text."""
        value = self._or_default(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        values = self.get(key)
        if not isinstance(values, list) or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
            raise self._wrong(key, "a list of finite numbers", values)
        return tuple(float(value) for value in values)

    def _or_default(self, key: str, default: object) -> object:
        value = self.get(key)
        return default if value is None else value

    def _wrong(self, key: str, kind: str, value: object) -> CorruptModel:
        name = f"{self.source}: {self._prefix}{key}"
        return CorruptModel(f"{name} is missing" if value is None else f"{name} must be {kind}, got {value!r:.80}")
