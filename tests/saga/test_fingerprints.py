"""Fingerprints: what changes one, what must not, also from process to process."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import numpy as np
import pytest

from fbcache.saga.fingerprints import combined, of_function, of_value


def made(text, name="f", **namespace):
    """A function without source."""
    exec(text, namespace)
    return namespace[name]


def closing_over(value):
    def function():
        return value

    return function


def with_keyword_default(value):
    def function(*, y=value):
        return y

    return function


def with_default(value):
    def function(x=value, *, y=value):
        return x, y

    return function


def wrapped_by(number, function):
    @functools.wraps(function)
    def wrapper():
        return function(), number

    return wrapper


def otherwise_wrapped_by(number, function):
    @functools.wraps(function)
    def wrapper():
        return number, function()

    return wrapper


def one():
    return 1


def two():
    return 2


VALUES = [
    None,
    0,
    False,
    0.0,
    "",
    b"",
    (),
    [],
    {},
    set(),
    frozenset(),
    1,
    "1",
    (1,),
    [1],
    {1: 1},
    {1},
    (1, 2),
    ((1,), 2),
    (1, (2,)),
    {"a": 1, "b": 2},
    {"b": 2, "a": 1},
    np.arange(3),
    np.arange(3.0),
    np.arange(4),
    np.arange(3).reshape(3, 1),
    one,
    two,
    len,
    int,
    str,
    os,
    sys,
]


@pytest.mark.parametrize(
    "make",
    [of_value, lambda each: of_function(closing_over(each)), lambda each: of_function(with_default(each))],
    ids=["value", "closure", "default"],
)
def test_different_values_have_different_fingerprints(make):
    seen = {}
    for value in VALUES:
        seen.setdefault(make(value), []).append(value)
    assert [values for values in seen.values() if len(values) > 1] == []


def test_the_same_function_has_the_same_fingerprint():
    assert of_function(closing_over({"a": {1, 2}})) == of_function(closing_over({"a": {2, 1}}))
    assert of_function(with_default(3)) == of_function(with_default(3))
    assert of_function(one) == of_function(one) != of_function(two)
    assert of_function(with_keyword_default(1)) != of_function(with_keyword_default(2))


def test_defaults_can_be_left_out_where_all_arguments_are_given():
    prints = {of_function(with_default(value), defaults=False) for value in (1, 2)}
    assert len(prints) == 1


def test_a_function_that_is_closed_over_counts_with_its_source():
    assert of_function(closing_over(one)) != of_function(closing_over(two))
    assert of_function(closing_over(closing_over(1))) != of_function(closing_over(closing_over(2)))


def test_a_decorator_counts_as_well_as_what_it_wraps():
    prints = {of_function(wrapped_by(*each)) for each in ((1, one), (2, one), (1, two))}
    prints.add(of_function(otherwise_wrapped_by(1, one)))
    assert len(prints) == 4


def test_without_source_the_code_counts():
    assert of_function(made("def f(): return 1")) == of_function(made("def f():\n\n  return 1"))
    texts = [
        "def f(): return 1",
        "def f(): return 2",
        "def f(): return x",
        "def f(): return y",
        "def f(): return lambda: 1",
        "def f(): return lambda: 2",
        "def f(): return {1, 2}",
        "def f(x): return 1",
    ]
    assert len({of_function(made(text)) for text in texts}) == len(texts)


def test_what_contains_itself_has_a_fingerprint():
    def recursive(n):
        return n and recursive(n - 1)

    looped = []
    looped.append(looped)
    assert of_function(recursive) == of_function(recursive)
    assert of_function(closing_over(looped)) != of_function(closing_over([]))


def test_a_variable_that_is_not_bound_yet_has_a_fingerprint():
    def function():
        return later

    before = of_function(function)
    later = 3
    assert of_function(function) != before


def test_what_has_no_encoder_counts_by_its_type_only():
    class Odd:
        def __init__(self, x):
            self.x = x

    assert of_value(Odd(1)) == of_value(Odd(2)) != of_value(object())


def test_parts_do_not_run_into_each_other():
    assert combined("ab", "c") != combined("a", "bc") != combined("abc")


def test_fingerprints_are_the_same_in_another_process():
    script = (
        "from fbcache.saga.fingerprints import of_value, of_function\n"
        "import statistics\n"
        "value = {'a': {'x', 'y', 'zz'}, 'b': frozenset(['q', 'r', ('s', 1)])}\n"
        "def f(x=frozenset('abcdef')): return x in {'k', 'l', 'm'}\n"
        "print(of_value(value), of_function(statistics.mean), of_function(f))\n"
    )
    seen = set()
    for seed in "123":
        env = {**os.environ, "PYTHONHASHSEED": seed}
        seen.add(subprocess.check_output([sys.executable, "-c", script], env=env))
    assert len(seen) == 1
