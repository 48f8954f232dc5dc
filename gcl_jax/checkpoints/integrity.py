"""What tells a damaged checkpoint: a digest of every array, and a seal on what is kept as JSON.

orbax stores no checksum of arrays, and restores flipped bits without a word.
"""

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32


class Damaged(Exception):
    """Part of a checkpoint is missing or not as it was written; the message says which."""


def digests(arrays: Mapping[str, jax.Array]) -> UInt32[Array, " n"]:
    """One digest per array, in the order of `arrays`; the same for the same bits on any devices.

    It is the sum modulo 2^32 of a mixture of every element's bits and index, so that one changed
    element is always noticed, and others but for one case in 2^32. The arrays are read where they
    lie, and the call returns before that is done. Any dtype of 1, 2, 4 or 8 bytes, or keys.
    """
    placements = (getattr(x, "sharding", None) for x in arrays.values())
    meshes = [p.mesh for p in placements if isinstance(p, NamedSharding)]
    everywhere = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
    return _digests(list(arrays.values()), everywhere)


@functools.partial(jax.jit, static_argnums=1)
def _digests(arrays: list[jax.Array], everywhere: NamedSharding | None) -> UInt32[Array, " n"]:
    found = jnp.stack([_digest(x) for x in arrays])
    return found if everywhere is None else lax.with_sharding_constraint(found, everywhere)


@jax.jit
def _digest(x: jax.Array) -> UInt32[Array, ""]:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    narrow = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    words = lax.bitcast_convert_type(x, narrow).astype(jnp.uint32)
    index = jnp.uint32(0)
    for axis in range(words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        index += lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
    # Distinct for distinct indices, as the factor is odd.
    return jnp.sum(_mix(words ^ (index * jnp.uint32(0x9E3779B1))), dtype=jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The bijection that ends MurmurHash3 (32 bit): a bit of `x` changes half of the result's."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def sealed(values: dict) -> dict:
    """`values` as JSON gives them back, with a checksum."""
    values = json.loads(json.dumps(values))
    return values | {"sha256": _checksum(values)}


def unsealed(path: Path) -> dict:
    """The values of `sealed` in the file `path`. Raises `Damaged`."""
    try:
        values = json.loads(path.read_text("utf-8"))
        checksum = values.pop("sha256")
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{path.name} is missing in {path.parent.name}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged(f"{path.parent.name}/{path.name} is not what was written") from None
    if checksum != _checksum(values):
        raise Damaged(f"{path.parent.name}/{path.name} is not what was written")
    return values


def _checksum(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
