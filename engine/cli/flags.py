"""Command-line flags made from config structs: a field's name, type, default and docstring become its flag.

A flag that is not given leaves no trace in the parsed arguments, so the struct's own default holds, and the struct
checks the values that are given. Nothing about a parameter is written down twice.
"""

import argparse
import types
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import msgspec

from triode.engine.field_docs import field_docs

Config = TypeVar("Config", bound=msgspec.Struct)


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, in the words of every other error."""

    # argparse's own signature; `Any` because a namespace may be of any class.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what no flag knows here, where `prog` names the subcommand whose help lists the flags."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"triode: error: {message} (see {self.prog} --help)\n")


def add_flags(parser: argparse._ActionsContainer, struct: type[msgspec.Struct], omit: Collection[str] = ()) -> None:
    """Give `parser` a flag for every field of `struct` but those in `omit`; a field that is a struct gives its own."""
    docs = field_docs(struct)
    for field in msgspec.structs.fields(struct):
        if field.name in omit:
            continue
        if part := _struct(field.type):
            add_flags(parser, part, omit)
            continue
        _add_flag(parser, field, docs.get(field.name, ""))


def _add_flag(parser: argparse._ActionsContainer, field: msgspec.structs.FieldInfo, doc: str) -> None:
    kind = _without_none(field.type)
    add = partial(
        parser.add_argument,
        f"--{field.name.replace('_', '-')}",
        dest=field.name,
        help=f"{doc} {_default(field.default)}".replace("%", "%%"),
        default=argparse.SUPPRESS,
    )
    if kind is bool:
        add(action=argparse.BooleanOptionalAction)
    elif get_origin(kind) is tuple and get_args(kind)[0] is str:
        # A text may hold any separator, so each comes with a flag of its own.
        add(action="append", metavar="TEXT", help=f"{doc} The flag may come several times.".replace("%", "%%"))
    else:
        add(type=_reader(kind, field.type), metavar=_metavar(kind))


def given(arguments: argparse.Namespace, struct: type[msgspec.Struct], omit: Collection[str] = ()) -> dict[str, object]:
    """The fields of `struct`, and of the structs in it, that were set by flags; not those in `omit`, which have none."""
    values = vars(arguments)
    found: dict[str, object] = {}
    for field in msgspec.structs.fields(struct):
        if part := _struct(field.type):
            found |= given(arguments, part, omit)
        elif field.name in values and field.name not in omit:
            found[field.name] = values[field.name]
    return found


def with_flags(arguments: argparse.Namespace, defaults: Config) -> Config:
    """`defaults`, but for what was set on the command line.

    Raises:
        ValueError: if the struct refuses a value.
    """
    return msgspec.structs.replace(defaults, **given(arguments, type(defaults)))


def words(values: Mapping[str, object]) -> list[str]:
    """The command line that gives these values."""
    line = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, Mapping):
            line.append(f"--{flag}=" + ",".join(f"{key}={item}" for key, item in value.items()))
        else:
            line.append(f"--{flag}={value}")
    return line


def _struct(annotation: object) -> type[msgspec.Struct] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct) else None


def _default(default: object) -> str:
    if default is None or default is msgspec.NODEFAULT or default == ():
        return ""
    return f"[{','.join(map(str, default))}]" if isinstance(default, tuple) else f"[{default}]"


def _without_none(annotation: object) -> object:
    if get_origin(annotation) in (Union, types.UnionType):
        (kind,) = (member for member in get_args(annotation) if member is not type(None))
        return kind
    return annotation


def _metavar(kind: object) -> str:
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if get_origin(kind) is tuple:
        return "N,N,..."
    if _is_mapping(kind):
        return "TEXT=TEXT,..." if get_args(kind)[0] is str else "ID=X,..."
    return {int: "N", float: "X"}.get(kind, "TEXT") if isinstance(kind, type) else "TEXT"


def _reader(kind: object, annotation: object) -> Callable[[str], object]:
    """A function from a flag's text to the field's value."""

    def read(text: str) -> object:
        value: object = text
        if get_origin(kind) is tuple:
            value = text.split(",")
        elif _is_mapping(kind):
            value = dict(item.partition("=")[::2] for item in text.split(","))
        try:
            return msgspec.convert(value, annotation, strict=False)
        except msgspec.ValidationError:
            raise argparse.ArgumentTypeError(f"must be {_expected(kind)}, got {text!r}") from None

    return read


def _expected(kind: object) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return "integers with commas between"
    if _is_mapping(kind):
        return "texts, as in a=b,c=d" if get_args(kind)[0] is str else "token ids and numbers, as in 12=-5,7=2.5"
    return "an integer" if kind is int else "a number"


def _is_mapping(kind: object) -> bool:
    origin = get_origin(kind)
    return isinstance(origin, type) and issubclass(origin, Mapping)
