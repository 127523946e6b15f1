"""Grammars that let a model write nothing but calls of given functions, or calls and something else beside them."""

import json
from collections.abc import Mapping, Sequence

from triode.engine.server.tools.formats import ToolFormat
from triode.engine.server.tools.requests import Function
from triode.models.guide import check_optional

# As json.dumps writes, and models with it; without it a model may fill its output with white space.
_WHITE_SPACE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANY_OBJECT: Mapping[str, object] = {"type": "object"}


def calls_only(form: ToolFormat, functions: Sequence[Function], *, parallel: bool) -> str:
    """One call, or several. The arguments validate against the functions' schemas."""
    return _lark("calls", form, functions, parallel=parallel, checked=True)


def calls_or_answer(
    form: ToolFormat, functions: Sequence[Function], schema: Mapping[str, object], *, parallel: bool
) -> str:
    """Either calls, or an answer in JSON. Where a function is strict its arguments validate."""
    return _lark("calls | answer", form, functions, f"answer: {_json(schema)}", parallel=parallel)


def calls_and_text(form: ToolFormat, functions: Sequence[Function], *, parallel: bool) -> str:
    """Text with calls in it, where the format lets calls be in a text; else either. Strict arguments validate."""
    if not form.before:
        # A reply that does not begin as a call is a text.
        return _lark("calls | TEXT", form, functions, r"TEXT: /[^\s{<](.|\n)*/", parallel=parallel)
    mark = json.dumps(form.before.strip())[1:-1]
    text = rf"TEXT: /(.|\n)+/ & ~/(.|\n)*{mark}(.|\n)*/"
    return _lark("TEXT? (calls TEXT?)?", form, functions, text, parallel=parallel)


def _lark(
    start: str,
    form: ToolFormat,
    functions: Sequence[Function],
    *rules: str,
    parallel: bool,
    checked: bool = False,
) -> str:
    more = f" ({json.dumps(form.between)} call)*" if parallel else ""
    names = " | ".join(f"call_{index}" for index in range(len(functions)))
    calls = [
        f"call_{index}: {json.dumps(form.opening(function.name))} {_arguments(function, checked)} "
        f"{json.dumps(form.closing)}"
        for index, function in enumerate(functions)
    ]
    return "\n".join([f"start: {start}", f"calls: call{more}", f"call: {names}", *calls, *rules])


def _arguments(function: Function, checked: bool) -> str:
    if not (checked or function.strict):
        return _json(_ANY_OBJECT)
    schema = function.parameters
    return _json({**_ANY_OBJECT, "additionalProperties": False} if schema is None else {**_ANY_OBJECT, **schema})


def _json(schema: Mapping[str, object]) -> str:
    check_optional(schema)
    return f"%json {json.dumps({**schema, 'x-guidance': _WHITE_SPACE})}"
