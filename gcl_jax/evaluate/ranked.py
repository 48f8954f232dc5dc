"""Ranked evaluation of a model on the splits of a store; the protocol is in `gcl_jax.evaluate`."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from gcl_jax.config import TrainConfig
from gcl_jax.data.pipeline import Side
from gcl_jax.data.store import RankedStore
from gcl_jax.embed.cache import EmbeddingCache
from gcl_jax.embed.embedder import Corpus, Embedder, FieldEmbeddings
from gcl_jax.evaluate import metrics
from gcl_jax.evaluate.groups import query_groups
from gcl_jax.evaluate.judgements import (
    KS,
    Judgements,
    as_ranking,
    id_ranks,
    judged_metrics,
    load_judgements,
    ranked_grades,
)
from gcl_jax.evaluate.results import SplitResult, summary
from gcl_jax.search.index import exact_top_k


def evaluate_splits(
    cfg: TrainConfig,
    store: RankedStore,
    embedder: Embedder,
    max_queries: int,
    quiet: bool = False,
    rankings: bool = False,
    group_by: Sequence[str] | None = None,
    cache: EmbeddingCache | None = None,
) -> dict[str, SplitResult]:
    """The results of every split of `cfg.eval.splits`, on at most `max_queries` queries each.

    With `rankings` they have what was found, with `group_by` the groups of the queries, these
    fields among them. The documents' embeddings are those of `cache`, if it is given.
    """
    corpora = {split: store.corpus(split) for split in cfg.eval.splits}
    judged = {s: load_judgements(cfg, store, s, max_queries) for s in cfg.eval.splits}
    groups = {}
    if group_by is not None:
        groups = {s: query_groups(cfg, store, judged[s].queries, group_by) for s in judged}
    query_fields = dict.fromkeys([*cfg.data.query_fields, *cfg.eval.query_fields])

    def embed(side: Side, fields: Iterable[str], rows: np.ndarray) -> FieldEmbeddings:
        records = store.queries if side == "query" else store.documents
        name = "queries" if side == "query" else "documents"
        return embedder.embed(side, records, list(fields), rows, description=name, quiet=quiet)

    rows = np.unique(np.concatenate(list(corpora.values())))
    fields = cfg.data.document_fields
    if cache:
        documents = cache.documents(cfg, store, embedder, rows)
    else:
        documents = Corpus(rows, embed("document", fields, rows).searched(fields))
    query_rows = np.unique(np.concatenate([j.queries for j in judged.values()]))
    queries = embed("query", query_fields, query_rows)
    document_rank = id_ranks(store.documents)
    return {
        split: evaluate_split(
            cfg,
            judged[split],
            queries.take(np.searchsorted(query_rows, judged[split].queries)),
            documents.of(corpus),
            document_rank[corpus],
            [store.queries.ids[row] for row in judged[split].queries],
            [store.documents.ids[row] for row in corpus] if rankings else None,
            groups.get(split, {}),
        )
        for split, corpus in corpora.items()
    }


def evaluate_split(
    cfg: TrainConfig,
    judgements: Judgements,
    queries: FieldEmbeddings,
    searched: Mapping[str, np.ndarray],
    document_rank: np.ndarray,
    query_ids: list[str],
    document_ids: list[str] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> SplitResult:
    """The results of one split: merged queries and documents, every document field alone, and every
    query field of `cfg.eval.query_fields` alone, on the queries that have it.

    Args:
        queries: of the (q,) test queries, in the order of `judgements` and `query_ids`.
        searched: the split's (n,) documents, {"merged" or a field: (n, e) embeddings};
            `document_rank` is that of `judged_metrics`.
        document_ids: of the corpus, if the result is to have the ranking.
        groups: {grouping: the group of each query}.
    """
    several = len({*cfg.data.query_fields, *cfg.eval.query_fields}) > 1
    having = {
        field: rows
        for field in (cfg.eval.query_fields if several else ())
        if (rows := np.flatnonzero(queries.present[field])).size
    }
    asked = queries.merged(cfg.data.query_fields)
    alone = [queries.take(rows).merged({field: 1.0}) for field, rows in having.items()]
    first, *others = _search([asked, *alone], searched["merged"], cfg.eval.top_k)
    hits = {"merged": first} | {
        field: exact_top_k(asked, x, cfg.eval.top_k)
        for field, x in searched.items()
        if field != "merged"
    }
    by_documents = {
        name: judged_metrics(judgements, *found, document_rank) for name, found in hits.items()
    }
    ranking = None
    if document_ids is not None:
        ranking = as_ranking(judgements, *first, document_rank, query_ids, document_ids)
    by_query_field = {}
    ranks = np.full((len(query_ids), len(having)), np.nan)
    for column, (field, rows) in enumerate(having.items()):
        judged = judgements.take(rows)
        grades = ranked_grades(judged, *others[column], document_rank)
        by_query_field[field] = metrics.evaluate_rankings(grades, judged.grades, KS)
        ranks[rows, column] = metrics.first_relevant_rank(grades)
    variance = metrics.mean_rank_variance(ranks)
    return SplitResult(query_ids, by_documents, by_query_field, variance, ranking, groups or {})


def _search(
    queries: Sequence[np.ndarray], documents: np.ndarray, k: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """`exact_top_k` of several sets of queries, for which the documents go to the devices once."""
    scores, found = exact_top_k(np.concatenate(queries), documents, k)
    ends = np.cumsum([len(x) for x in queries])[:-1]
    return list(zip(np.split(scores, ends), np.split(found, ends), strict=True))


def evaluate_in_training(
    cfg: TrainConfig, store: RankedStore, embedder: Embedder
) -> dict[str, float]:
    """{"SPLIT/METRIC": value} of the merged documents on a sample of the queries."""
    results = evaluate_splits(cfg, store, embedder, cfg.eval.max_queries_in_training, quiet=True)
    return {
        f"{split}/{name}": value
        for split, result in results.items()
        for name, value in summary(result.merged).items()
    }
