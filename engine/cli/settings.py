"""Settings from a file and from the environment, by the names and types of config structs' fields."""

import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import get_origin

import msgspec

_PREFIX = "TRIODE_"


def field_types(structs: Collection[type[msgspec.Struct]], omit: Collection[str] = ()) -> dict[str, object]:
    """Each field's type by its name; a field that is a struct gives its own."""
    types: dict[str, object] = {}
    for struct in structs:
        for field in msgspec.structs.fields(struct):
            if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
                types |= field_types([field.type], omit)
            elif field.name not in omit:
                types[field.name] = field.type
    return types


def from_environment(environment: Mapping[str, str], types: Mapping[str, object]) -> dict[str, object]:
    """The settings among the environment's variables: TRIODE_PORT is `port`. Lists have commas between.

    Raises:
        ValueError: for a text that is not of the setting's type.
    """
    found: dict[str, object] = {}
    for name, kind in types.items():
        variable = _PREFIX + name.upper()
        if (text := environment.get(variable)) is None:
            continue
        value: object = text.split(",") if get_origin(kind) is tuple else text
        found[name] = _convert(variable, value, kind, strict=False)
    return found


def from_file(path: Path, types: Mapping[str, object]) -> dict[str, object]:
    """The settings in a TOML file.

    Raises:
        ValueError: if the file cannot be read, or says something that is no setting.
    """
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"--config must name a file that can be read, got {str(path)!r}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"--config must be a TOML file: {path}: {error}") from None
    if unknown := sorted(values.keys() - types.keys()):
        raise ValueError(f"{path}: settings must be among {', '.join(sorted(types))}, got {', '.join(unknown)}")
    return {name: _convert(f"{path}: {name}", value, types[name], strict=True) for name, value in values.items()}


def _convert(name: str, value: object, kind: object, *, strict: bool) -> object:
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as error:
        # The value may be a key, so it is not repeated.
        raise ValueError(f"{name} must be of the setting's type: {str(error)[0].lower()}{str(error)[1:]}") from None
