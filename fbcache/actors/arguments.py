"""``Args``: what an actor's ``__init__`` takes."""

from __future__ import annotations

from typing import Any


class Args:
    """Arguments by position and by name: ``Args(5, step=2)``."""

    __slots__ = ("args", "kwargs")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs

    def __repr__(self) -> str:
        parts = [repr(value) for value in self.args]
        parts += [f"{name}={value!r}" for name, value in self.kwargs.items()]
        return f"Args({', '.join(parts)})"

    @classmethod
    def of(cls, value: Any) -> Args:
        """Return ``value`` as arguments: a tuple is spread, anything else is the one argument."""
        if isinstance(value, Args):
            return value
        return cls(*value) if type(value) is tuple else cls(value)

    def after(self, first: Any) -> Args:
        """Return these arguments with another one before them."""
        return Args(first, *self.args, **self.kwargs)
