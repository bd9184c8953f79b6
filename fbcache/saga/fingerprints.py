"""What a step's result depends on, as a short text: another text, and the step is run again.

What is seen
    The source of the function itself (the code where there is no source: names, constants, instructions,
    which another Python compiles otherwise); the values of the variables it closes over, and of functions
    among those the same again; and the arguments, defaults and inputs it is called with.

What is not seen
    Globals, and functions and modules called through them; the state of objects that have no
    encoder, of which the type's name counts only; files, clocks and the like. Whoever changes one
    of those calls ``run``, or changes the step, a comment in it is enough.
"""

from __future__ import annotations

import hashlib
import inspect
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from fbcache.errors import PickleRefusedError, UnsupportedTypeError
from fbcache.saga.encoding import encode


def of_function(function: FunctionType, *, defaults: bool = True) -> str:
    """Return what a function does, as a short text; without ``defaults``, given all of its arguments."""
    return _digest(*_function(function, frozenset(), defaults))


def of_value(value: Any) -> str:
    """Return a value, as a short text; the same in every process for the same value."""
    return _digest(*_value(value, frozenset()))


def combined(*parts: str) -> str:
    """Return several short texts as one."""
    return _digest(*(part.encode() for part in parts))


def _digest(*parts: bytes) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))  # so that "ab", "c" is not "a", "bc"
        state.update(part)
    return state.hexdigest()


def _function(function: FunctionType, above: frozenset[int], defaults: bool = True) -> Iterator[bytes]:
    if id(function) in above:  # it closes over itself
        yield b"itself"
        return
    above |= {id(function)}
    yield _source(function)
    if defaults:
        yield from _value(function.__defaults__, above)
        yield from _value(function.__kwdefaults__, above)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield name.encode()
        try:
            content = cell.cell_contents
        except ValueError:  # not bound yet
            yield b"nothing"
        else:
            yield from _value(content, above)


def _source(function: FunctionType) -> bytes:
    # Of the code object: of a function, `inspect` would give the one that a decorator has wrapped.
    try:
        return textwrap.dedent(inspect.getsource(function.__code__)).encode("utf-8", "surrogatepass")
    except (OSError, TypeError):
        return _digest(*_code(function.__code__)).encode()


def _code(code: CodeType) -> Iterator[bytes]:
    yield code.co_code
    yield repr((code.co_names, code.co_varnames)).encode("utf-8", "surrogatepass")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        else:
            yield from _value(constant, frozenset())


def _value(value: Any, above: frozenset[int]) -> Iterator[bytes]:
    kind = type(value)
    yield f"{kind.__module__}.{kind.__qualname__}".encode()
    if kind is FunctionType:
        yield from _function(value, above)
    elif isinstance(value, (type, ModuleType)):
        yield f"{getattr(value, '__module__', '')}.{value.__name__}".encode()
    elif kind in (list, tuple, dict, set, frozenset):
        yield from _container(value, above)
    else:
        try:
            yield encode(value)
        except (UnsupportedTypeError, PickleRefusedError):
            yield b"not seen"


def _container(value: Any, above: frozenset[int]) -> Iterator[bytes]:
    if id(value) in above:
        yield b"itself"
        return
    above |= {id(value)}
    if isinstance(value, dict):
        members = [_digest(*_value(key, above), *_value(item, above)) for key, item in value.items()]
    else:
        members = [_digest(*_value(item, above)) for item in value]
    if isinstance(value, (set, frozenset)):
        members.sort()  # their order differs from process to process
    yield from (member.encode() for member in members)
