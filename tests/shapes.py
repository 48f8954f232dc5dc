"""Checks jaxtyping's shapes: `pytest --jaxtyping-packages=gcl_jax,shapes.checked`.

Shapes alone: what a user may pass by mistake is answered by the package itself, and tested so.
"""

import typing

from beartype import beartype
from jaxtyping import AbstractArray


def has_shape(annotation) -> bool:
    """Whether an array with a shape stands in `annotation`."""
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(map(has_shape, typing.get_args(annotation)))


def checked(thing):
    """`thing` with its annotated shapes checked at every call; a class as it is."""
    if not isinstance(thing, type):
        annotations = thing.__annotations__.items()
        thing.__annotations__ = {name: x for name, x in annotations if has_shape(x)}
        thing = beartype(thing)
    return thing
