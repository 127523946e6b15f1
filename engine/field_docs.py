"""What the docstrings below a struct's fields say, for those who explain the struct: flags and the OpenAPI document."""

import ast
import inspect
import textwrap

import msgspec


def field_docs(struct: type[msgspec.Struct]) -> dict[str, str]:
    """The string below each field of a struct's class body, on one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(struct))).body
    docs: dict[str, str] = {}
    name = ""
    for statement in definition.body if isinstance(definition, ast.ClassDef) else ():
        match statement:
            case ast.AnnAssign(target=ast.Name(id=field)):
                name = field
            case ast.Expr(value=ast.Constant(value=str(text))) if name:
                docs[name] = " ".join(text.split())
            case _:
                name = ""
    return docs
