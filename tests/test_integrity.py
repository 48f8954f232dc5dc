"""Digests are those of a loop in numpy, on any mesh, and notice every kind of change."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gcl_jax.checkpoints.saved import Damaged, digests, sealed, unsealed


def reference(words):
    """Of a flat sequence of words, one by one."""

    def mixed(x):
        for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
            x = (x ^ (x >> shift)) * factor % 2**32
        return x ^ (x >> 16)

    return sum(mixed(int(word) ^ (i * 0x9E3779B1 % 2**32)) for i, word in enumerate(words)) % 2**32


def digest(x):
    return int(digests({"x": x})[0])


BITS = {
    np.dtype(np.float32): np.uint32,
    np.dtype(jnp.bfloat16): np.uint16,
    np.dtype(np.int32): np.uint32,
    np.dtype(np.int8): np.uint8,
    np.dtype(bool): np.uint8,
}


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_the_digest_is_that_of_a_loop(dtype):
    x = (100 * np.random.default_rng(0).normal(size=(3, 4, 5))).astype(dtype)
    assert digest(x) == reference(x.view(BITS[dtype]).ravel())


def test_keys_scalars_and_empty_arrays_have_digests():
    key = jax.random.key(7)
    assert digest(key) == reference(np.asarray(jax.random.key_data(key)).ravel())
    assert digest(np.int32(5)) == reference([5])
    assert digest(np.zeros((0, 4), np.float32)) == 0


def test_the_digest_is_the_same_on_any_mesh(mesh):
    x = np.random.default_rng(1).normal(size=(16, 24)).astype(np.float32)
    expected = reference(x.view(np.uint32).ravel())
    for spec in (PartitionSpec("data"), PartitionSpec(None, ("data", "fsdp")), PartitionSpec()):
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        found = digests({"a": placed, "b": placed})
        assert found.tolist() == [expected] * 2
        assert found.is_fully_replicated


def test_changed_and_swapped_elements_are_noticed():
    x = np.random.default_rng(2).normal(size=64).astype(np.float32)
    seen = {digest(x)}
    for bit in range(32):
        changed = x.copy()
        changed.view(np.uint32)[17] ^= np.uint32(1 << bit)
        seen.add(digest(changed))
    swapped = x.copy()
    swapped[[3, 40]] = x[[40, 3]]
    seen |= {digest(swapped), digest(x[::-1]), digest(np.roll(x, 1)), digest(-x)}
    assert len(seen) == 1 + 32 + 4


def test_a_seal_notices_what_is_changed(tmp_path):
    values = {"b": [1, 2.5, float("inf")], "a": {"10": "ä", "9": None}, 7: (1,)}
    path = tmp_path / "about" / "metadata"
    path.parent.mkdir()
    path.write_text(json.dumps(sealed(values)))
    assert unsealed(tmp_path) == json.loads(json.dumps(values))
    text = path.read_text()
    for damaged in ("", "[]", "3", "\0", text[:-9], text.replace("2.5", "2.4")):
        path.write_text(damaged)
        with pytest.raises(Damaged, match="about/metadata is not what was written"):
            unsealed(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(Damaged, match="about/metadata is not what was written"):
        unsealed(tmp_path)
    path.unlink()
    with pytest.raises(Damaged, match="metadata is missing in about"):
        unsealed(tmp_path)
