"""Checks jaxtyping's shapes in every test: see `addopts` in pyproject.toml.

Shapes alone, of arrays of jax and numpy alike: what else a user may pass by mistake is answered by
the package itself, and tested so.
"""

import functools
import operator
import types
import typing

import jaxtyping
from beartype import beartype


def has_shape(annotation) -> bool:
    """Whether an array with a shape stands in `annotation`."""
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(has_shape, typing.get_args(annotation)))


def of_any_library(annotation):
    """`annotation`, whose arrays may be numpy's where it says jax's: jax takes both."""
    if not has_shape(annotation):
        return annotation
    if isinstance(annotation, type):
        kind = getattr(jaxtyping, annotation.__name__.partition("[")[0])
        return kind[typing.Any, annotation.dim_str]
    args = tuple(map(of_any_library, typing.get_args(annotation)))
    if isinstance(annotation, types.UnionType):
        return functools.reduce(operator.or_, args)
    return typing.get_origin(annotation)[args]


def checked(thing):
    """`thing` with its annotated shapes checked at every call; a class as it is."""
    if not isinstance(thing, type):
        annotations = thing.__annotations__.items()
        found = {name: of_any_library(x) for name, x in annotations if has_shape(x)}
        thing.__annotations__ = found
        thing = beartype(thing)
    return thing
