"""The exception tree: complete, documented, and able to cross Ray's process boundaries."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from r1ray import errors


def classes():
    return [value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, Exception)]


def drawn():
    """(class, parent) for every line of the docstring's tree; a level is four columns."""
    stack, found = [], []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ([│├└─ ]*)([A-Z]\w+)(\s{2,}\S.*)?$", line)
        if match:
            stack[len(match[1]) // 4 :] = [match[2]]
            found.append((match[2], stack[-2] if len(stack) > 1 else None))
    return found


def test_all_names_every_class():
    assert sorted(errors.__all__) == sorted(error.__name__ for error in classes())


def test_the_docstring_draws_the_tree_as_it_is():
    true = {(error.__name__, None if error is errors.R1RayError else error.__base__.__name__) for error in classes()}
    assert set(drawn()) == true
    assert len(drawn()) == len(true)


@pytest.mark.parametrize("error", classes())
def test_an_error_survives_pickling_with_its_sentence(error):
    copy = pickle.loads(pickle.dumps(error("what, the value, the limit, what to do")))
    assert type(copy) is error
    assert str(copy) == "what, the value, the limit, what to do"
    assert isinstance(copy, errors.R1RayError)
