"""``own_snapshot``: a dataclass that is its own snapshot.

Guarantee: of an actor, exactly the fields are saved that its ``__init__`` takes and that were not called
runtime; a field added later takes its default from then on. Pickle is no part of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, overload

from fbcache.actors.actor import PersistentActor
from fbcache.actors.arguments import Args
from fbcache.codec import register

T = TypeVar("T")


@overload
def own_snapshot(cls: type[T]) -> type[T]: ...
@overload
def own_snapshot(
    *, name: str | None = None, runtime: Iterable[str] = ()
) -> Callable[[type[T]], type[T]]: ...
def own_snapshot(
    cls: type[Any] | None = None, *, name: str | None = None, runtime: Iterable[str] = ()
) -> Any:
    """Make a dataclass its own snapshot. Stands above ``@dataclass``.

    A dataclass that is a :class:`PersistentActor` is saved by its fields: ``save_snapshot()`` needs no
    arguments, and ``respawn`` starts it from the fields' values. Any other dataclass is registered
    with the codec, so that an actor may have it as its snapshot type, or as part of its state.

    Parameters
    ----------
    cls : type
        The class; without it, a decorator is returned.
    name : str, optional
        What a class that is no actor is called in snapshots; see :func:`fbcache.register`.
    runtime : iterable of str
        Fields of an actor that are not saved: connections, references. They are given anew as
        ``runtime_args``, a dict by their names.

    Raises
    ------
    TypeError
        It is no dataclass, or an actor that is frozen; or a runtime field is none of its fields.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> @own_snapshot
    ... @dataclass
    ... class Counter(PersistentActor):
    ...     count: int = 0
    """
    if cls is None:
        return functools.partial(own_snapshot, name=name, runtime=runtime)
    if not isinstance(cls, type) or "__dataclass_fields__" not in cls.__dict__:
        raise TypeError(f"own_snapshot stands above @dataclass, and {cls!r} is none")
    left_out = frozenset([runtime] if isinstance(runtime, str) else runtime)
    if not issubclass(cls, PersistentActor):
        if left_out:
            raise TypeError(f"{cls.__qualname__} is no PersistentActor: it has no runtime arguments")
        return register(cls, name=name)
    return _make_actor(cls, left_out)


def _make_actor(cls: type[PersistentActor[Any]], left_out: frozenset[str]) -> type[PersistentActor[Any]]:
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    if unknown := left_out - fields.keys():
        raise TypeError(f"{cls.__qualname__} has no field {sorted(unknown)} to be given at run time")
    if cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise TypeError(f"{cls.__qualname__} is frozen, but pykka sets fields of an actor; leave frozen out")
    saved = [name for name in fields if name not in left_out]
    needed = {
        name for name in saved if dataclasses.MISSING is fields[name].default is fields[name].default_factory
    }
    from_fields = cls.__init__

    @functools.wraps(from_fields)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        PersistentActor.__init__(self)
        from_fields(self, *args, **kwargs)

    def take_snapshot(self: Any) -> dict[str, Any]:
        """Return the fields that are saved."""
        return {name: getattr(self, name) for name in saved}

    def persistent_args(owner: type, snapshot: dict[str, Any], runtime_args: Any) -> Args:
        """Return the fields' values, saved and given."""
        missing, unknown = needed - snapshot.keys(), snapshot.keys() - set(saved)
        if missing or unknown:
            raise ValueError(
                f"{owner.__qualname__} has other fields now than its snapshot (missing there:"
                f" {sorted(missing)}, unknown here: {sorted(unknown)}). Give new fields a default, and"
                " override persistent_args to read what was there before"
            )
        return Args(**snapshot, **({} if runtime_args is None else runtime_args))

    made: dict[str, Any] = {"__init__": init}
    if "take_snapshot" not in cls.__dict__:  # what the class says itself counts
        made |= {"take_snapshot": take_snapshot, "snapshot_type": dict}
    if "persistent_args" not in cls.__dict__:
        made["persistent_args"] = classmethod(persistent_args)
    for attribute, value in made.items():
        setattr(cls, attribute, value)
    return cls
