"""Exact search against a stable sort of the whole score matrix."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from conftest import make_cpu_mesh
from hypothesis import given, settings
from hypothesis import strategies as st

from gcl_jax.errors import DataError, UserError
from gcl_jax.search import index as retrieval
from gcl_jax.search import mesh_search
from gcl_jax.search.index import Index, RunningTopK, exact_top_k

ALL_MESHES = ((1, 1), (2, 1), (4, 1), (8, 1), (4, 2))


def brute_force(queries, documents, k):
    """Best first, equal scores in document order."""
    scores = queries.astype(np.float64) @ documents.astype(np.float64).T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, 1), rows


def assert_equals_brute_force(found, queries, documents, k):
    """For data whose scores are exact."""
    scores, rows = brute_force(queries, documents, k)
    np.testing.assert_array_equal(found[0], scores)
    np.testing.assert_array_equal(found[1], rows)
    assert (found[0].dtype, found[1].dtype) == (np.float32, np.int32)


def integers(rng, *shape):
    """Scores of small integers are exact, and many are equal."""
    return rng.integers(-2, 3, shape).astype(np.float32)


def unit(rng, *shape):
    x = rng.standard_normal(shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture
def small_blocks(monkeypatch):
    """Many blocks and chunks for few documents, lanes that keep few of them."""
    programs = mesh_search._stored, mesh_search._merge_chunk, mesh_search._sorted
    monkeypatch.setattr(mesh_search, "LANES", (2, 16))
    monkeypatch.setattr(mesh_search, "KEPT", 8)
    monkeypatch.setattr(mesh_search, "EXPECTED", 4)
    monkeypatch.setattr(mesh_search, "FEW", 8)
    monkeypatch.setattr(mesh_search, "BLOCK", 16)
    monkeypatch.setattr(mesh_search, "CHUNK", 48)
    monkeypatch.setattr(retrieval, "BLOCK", 32)
    monkeypatch.setattr(retrieval, "TILE", 16)
    for program in programs:
        program.clear_cache()
    yield
    for program in programs:
        program.clear_cache()


@pytest.mark.parametrize("mesh", ALL_MESHES, indirect=True, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize(("documents", "k"), [(1, 3), (7, 7), (1003, 40)])
def test_equals_brute_force_on_all_meshes(mesh, small_blocks, documents, k):
    """Duplicates and ties within and across blocks, devices and chunks; more asked for than there
    are; numbers of documents that the devices do not divide."""
    rng = np.random.default_rng(0)
    queries, corpus = integers(rng, 21, 5), integers(rng, documents, 5)
    assert_equals_brute_force(exact_top_k(queries, corpus, k, mesh), queries, corpus, k)
    for dtype in ("float32", "bfloat16"):
        found = Index(corpus, mesh=mesh, dtype=dtype).search(queries, k)
        assert_equals_brute_force(found, queries, corpus, k)


@pytest.mark.parametrize("mesh", [(1, 1), (4, 2)], indirect=True)
def test_bfloat16_gives_what_float32_gives(small_blocks, mesh):
    """Near-ties far below the resolution of bfloat16, and many more of them than candidates."""
    rng = np.random.default_rng(0)
    queries = integers(rng, 9, 8)
    corpus = integers(rng, 700, 8) + rng.integers(0, 4, (700, 8)).astype(np.float32) / 2**12
    index = Index(corpus, mesh=mesh, dtype="bfloat16")
    for k in (3, 700):
        assert_equals_brute_force(index.search(queries, k), queries, corpus, k)


def test_bfloat16_candidates_suffice_for_random_embeddings(monkeypatch):
    """Without a second search; the scores are those of float32."""
    monkeypatch.setattr(retrieval, "exact_top_k", None)
    rng = np.random.default_rng(0)
    queries, corpus = unit(rng, 20, 64), unit(rng, 3000, 64)
    index = Index(corpus, mesh=make_cpu_mesh(8, 1), dtype="bfloat16")
    scores, rows = index.search(queries, 100)
    expected_scores, expected_rows = brute_force(queries, corpus, 100)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
    np.testing.assert_array_equal(rows, expected_rows)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_bfloat16_error_bound_holds(scale):
    rng = np.random.default_rng(0)
    queries, corpus = unit(rng, 20, 64), unit(rng, 500, 64) * np.float32(scale)
    corpus[0] = 0
    index = Index(corpus, mesh=make_cpu_mesh(8, 1), dtype="bfloat16")
    rounded = [x.astype(jnp.bfloat16).astype(np.float64) for x in (queries, corpus)]
    off = np.abs(rounded[0] @ rounded[1].T - queries.astype(np.float64) @ corpus.T).max(axis=1)
    bound = index._error(queries)
    assert (off < bound).all()
    assert (bound < 20 * off).all()


def test_random_embeddings_on_devices_and_processor():
    """In float32, at the sizes in use: groups of columns that need merging, and that do not."""
    rng = np.random.default_rng(0)
    queries, corpus = unit(rng, 30, 16), unit(rng, 20_000, 16)
    corpus[11_111] = corpus[7]
    expected_scores, expected_rows = brute_force(queries, corpus, 50)
    for mesh in (None, make_cpu_mesh(4, 2)):
        scores, rows = exact_top_k(queries, corpus, 50, mesh)
        np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
        distinct = np.diff(expected_scores, append=-2) < -1e-6
        distinct[:, 1:] &= distinct[:, :-1]
        np.testing.assert_array_equal(rows[distinct], expected_rows[distinct])
        # Copies of a document have one score, wherever they are.
        scores, rows = exact_top_k(corpus[7:8], corpus, 2, mesh)
        np.testing.assert_array_equal(rows, [[7, 11_111]])
        assert scores[0, 0] == scores[0, 1]


@pytest.mark.parametrize("order", ["ascending", "descending", "equal", "zero"])
def test_adversarial_orders(mesh, small_blocks, order):
    """Every block has better documents than all before, or none has."""
    corpus = np.arange(300, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)
    corpus = {
        "ascending": corpus,
        "descending": corpus[::-1].copy(),
        "equal": np.ones_like(corpus),
        "zero": np.zeros_like(corpus),
    }[order]
    queries = np.array([[1, 0, 0], [-1, -1, 0], [0, 0, 0]], np.float32)
    found = exact_top_k(queries, corpus, 30, mesh)
    assert_equals_brute_force(found, queries, corpus, 30)


def test_mesh_of_one_device_that_is_no_cpu(small_blocks, monkeypatch):
    monkeypatch.setattr(retrieval, "_is_one_cpu", lambda mesh: False)
    rng = np.random.default_rng(0)
    queries, corpus = integers(rng, 21, 5), integers(rng, 331, 5)
    for dtype in ("float32", "bfloat16"):
        found = Index(corpus, mesh=make_cpu_mesh(1, 1), dtype=dtype).search(queries, 40)
        assert_equals_brute_force(found, queries, corpus, 40)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_queries_in_doubt_are_searched_again(small_blocks, monkeypatch, dtype):
    """Lanes that have room for the best of ordinary queries, and not for a hundred copies."""
    rng, again = np.random.default_rng(0), []
    queries, corpus = unit(rng, 20, 64), unit(rng, 1200, 64)
    corpus[300:400] = queries[7]
    search = retrieval._search_on_host

    def searched(queries, *args, **kwargs):
        again.append(queries)
        return search(queries, *args, **kwargs)

    monkeypatch.setattr(retrieval, "_search_on_host", searched)
    index = Index(corpus, mesh=make_cpu_mesh(2, 1), dtype=dtype)
    scores, rows = index.search(queries, 5)
    expected = brute_force(queries, corpus, 5)
    np.testing.assert_allclose(scores, expected[0], atol=1e-6)
    np.testing.assert_array_equal(rows, expected[1])
    assert [len(x) < 4 for x in again] == [True]
    np.testing.assert_array_equal(rows[7], np.arange(300, 305))


@pytest.mark.parametrize("devices", [1, 8])
def test_memory_mapped_corpus_is_read_in_parts(tmp_path, small_blocks, devices):
    rng = np.random.default_rng(0)
    corpus = rng.integers(-40, 41, (1000, 4)).astype(np.float16)  # else ties are looked up in it
    queries = integers(rng, 5, 4)
    np.save(tmp_path / "corpus.npy", corpus)
    read = []

    class Watched:
        shape, ndim = corpus.shape, 2
        _file = np.load(tmp_path / "corpus.npy", mmap_mode="r")

        def __len__(self):
            return len(self._file)

        def __getitem__(self, rows):
            read.append(len(self._file[rows]))
            return self._file[rows]

    found = exact_top_k(queries, Watched(), 7, make_cpu_mesh(devices, 1))
    assert_equals_brute_force(found, queries, corpus, 7)
    assert sum(read) == len(corpus)
    assert max(read) <= 48


SEARCH_TOGETHER = """
import sys
import jax, numpy as np
from gcl_jax import distributed
from gcl_jax.search import mesh_search
from gcl_jax.config import MeshConfig
from gcl_jax.search.index import Index, exact_top_k
from gcl_jax.sharding import make_mesh

mesh_search.BLOCK, mesh_search.CHUNK = 32, 64
with distributed.joined():
    mesh, read = make_mesh(MeshConfig(), 8), []

    class Watched(np.memmap):
        def __getitem__(self, rows):
            read.append(len(np.asarray(self)[rows]))
            return np.asarray(self)[rows]

    documents = np.load(sys.argv[1], mmap_mode="r").view(Watched)
    queries = np.asarray(documents[:11])
    read.clear()
    found = exact_top_k(queries, documents, 20, mesh)
    rows_read = sum(read)
    for dtype in ("float32", "bfloat16"):
        again = Index(documents, mesh=mesh, dtype=dtype).search(queries, 20)
        assert all(map(np.array_equal, found, again))
    np.savez(f"{sys.argv[1]}.{jax.process_index()}.npz", *found, rows_read)
"""


def test_two_processes_search_one_corpus_and_each_reads_its_rows(tmp_path):
    corpus = integers(np.random.default_rng(0), 700, 4)
    path, script = tmp_path / "corpus.npy", tmp_path / "search_together.py"
    np.save(path, corpus)
    script.write_text(SEARCH_TOGETHER)
    run = processes.start_local(2, 2, sys.executable, str(script), str(path))
    assert run.wait(processes.PATIENCE_SECONDS) == 0
    results = [np.load(f"{path}.{process}.npz") for process in range(2)]
    for result in results:
        found = result["arr_0"], result["arr_1"]
        assert_equals_brute_force(found, corpus[:11], corpus, 20)
    assert sum(int(result["arr_2"]) for result in results) == len(corpus)
    assert all(int(result["arr_2"]) < 0.6 * len(corpus) for result in results)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_running_top_k_equals_a_stable_sort(data):
    """Blocks of any widths, k beyond a block, many equal scores."""
    values = st.sampled_from([-2.5, -1.0, -0.0, 0.0, 1e-45, 1.0, 3e38])
    k, widths = data.draw(st.integers(1, 9)), data.draw(st.lists(st.integers(1, 12), min_size=1))
    total = sum(widths)
    k = min(k, total)
    drawn = data.draw(st.lists(values, min_size=2 * total, max_size=2 * total))
    scores = np.array(drawn, np.float32).reshape(2, total)
    best, first = RunningTopK(2, k, max(widths)), 0
    for width in widths:
        best.add(scores[:, first : first + width], first)
        first += width
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    found = best.sorted()
    np.testing.assert_array_equal(found[1], expected)
    np.testing.assert_array_equal(found[0], np.take_along_axis(scores, expected, 1))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_refuses_what_has_no_score(devices, bad):
    documents = np.ones((40, 4), np.float32)
    queries = documents[:2].copy()
    queries[1, 0] = documents[33, 2] = bad
    mesh = make_cpu_mesh(devices, 1)
    for search in (
        lambda: exact_top_k(documents[:1], documents, 3, mesh),
        lambda: Index(documents, mesh=mesh),
    ):
        with pytest.raises(DataError, match="document embedding 33 is not finite"):
            search()
    with pytest.raises(DataError, match="query embedding 1 is not finite"):
        exact_top_k(queries, documents[:9], 3, mesh)


def test_refuses_what_does_not_fit():
    x = np.ones((3, 4), np.float32)
    with pytest.raises(UserError, match=r"one dimension .* \(3, 2\) and \(3, 4\)"):
        Index(x).search(x[:, :2], 1)
    with pytest.raises(UserError, match="float16"):
        Index(x, dtype="float16")


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(("queries", "documents", "k"), [(0, 5, 3), (4, 0, 3), (4, 5, 0)])
def test_nothing_to_find(devices, queries, documents, k):
    corpus, mesh = np.ones((documents, 4), np.float32), make_cpu_mesh(devices, 1)
    asked = np.ones((queries, 4), np.float32)
    for scores, rows in (
        exact_top_k(asked, corpus, k, mesh),
        Index(corpus, mesh=mesh).search(asked, k),
    ):
        assert scores.shape == rows.shape == (queries, min(k, documents))


def test_query_counts_and_depths_share_programs():
    index = Index(np.ones((64, 4), np.float32), mesh=make_cpu_mesh(8, 1))
    before = mesh_search._merge_chunk._cache_size()
    for queries in (9, 12, 16):
        for k in (1, 3, 64):
            index.search(np.ones((queries, 4), np.float32), k)
    assert mesh_search._merge_chunk._cache_size() == before + 1


def program(rows, queries, dtype):
    """`_merge_chunk`, compiled for one device and one chunk."""
    of = jax.ShapeDtypeStruct
    shape = queries, mesh_search.LANES[0], mesh_search.KEPT
    best = of(shape, jnp.float32), of(shape, jnp.int32)
    numbers = of((), jnp.int32), of((), jnp.int32)
    arguments = best, of((queries, 512), dtype), of((rows, 512), dtype), *numbers
    return mesh_search._merge_chunk.lower(*arguments, make_cpu_mesh(1, 1))


def test_memory_is_that_of_a_block_whatever_the_corpus():
    blocks = [program(n * mesh_search.BLOCK, 1024, jnp.float32) for n in (2, 8)]
    temporary = [x.compile().memory_analysis().temp_size_in_bytes for x in blocks]
    assert temporary[1] < 1.01 * temporary[0]
    assert temporary[1] < 2**30


def test_scores_are_full_float32_on_any_accelerator():
    """Left to its default, a TPU multiplies in bfloat16 and a GPU in TF32."""
    assert "precision = [HIGHEST, HIGHEST]" in program(256, 8, jnp.float32).as_text()
    products = jax.make_jaxpr(retrieval._products)(np.zeros((2, 4)), np.zeros((2, 4)))
    assert "Precision.HIGHEST" in str(products)
