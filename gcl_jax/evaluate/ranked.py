"""Evaluation of a model on the splits of a store: ranked, or by Recall@k of captions and images.

The protocol of the ranked evaluation is in `gcl_jax.evaluate`. Recall@k (`--recall`) is that of
CLIP on COCO and Flickr30k (arXiv 2103.00020 and CLIP_benchmark): every pair of a split is a caption
of its image, and an image may have several.

    text to image   the share of captions whose image is among the best k images
    image to text   the share of images of whose captions any is among the best k captions
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from gcl_jax import distributed
from gcl_jax.config import TrainConfig
from gcl_jax.data.sampling import records_without_fields
from gcl_jax.data.store import RankedStore, Records
from gcl_jax.embed.cache import EmbeddingCache
from gcl_jax.embed.embedder import Corpus, Embedder, FieldEmbeddings, Tokens
from gcl_jax.errors import DataError
from gcl_jax.evaluate import metrics, results, tables, trec
from gcl_jax.evaluate.judgements import (
    Judgements,
    ground_truth_of,
    ids_in,
    load_judgements,
    query_groups,
)
from gcl_jax.evaluate.results import SplitResult
from gcl_jax.paths import write_json
from gcl_jax.runs import NEWEST, load_run
from gcl_jax.search import calibration
from gcl_jax.search.hybrid import Words, text_of
from gcl_jax.search.index import exact_top_k
from gcl_jax.search.maxsim import maxsim_top_k

RECALL_KS = (1, 5, 10)
DOCUMENTS_AT_ONCE = 4096


def evaluate_splits(
    cfg: TrainConfig,
    store: RankedStore,
    embedder: Embedder,
    max_queries: int,
    quiet: bool = False,
    rankings: bool = False,
    group_by: Sequence[str] | None = None,
    cache: EmbeddingCache | None = None,
    by_words: bool = False,
    by_tokens: bool = False,
) -> dict[str, SplitResult]:
    """The results of every split of `cfg.eval.splits`, on at most `max_queries` queries each.

    With `rankings` they have what was found, with `group_by` the groups of the queries, these
    fields among them. The documents' embeddings are those of `cache`, if it is given. `by_words`
    adds BM25, and BM25 with the embeddings; `by_tokens` and `cache` add MaxSim.
    """
    corpora = {split: store.corpus(split) for split in cfg.eval.splits}
    for line in () if quiet else records_without_fields(cfg, store):
        distributed.announce(line)
    judged = {split: load_judgements(cfg, store, split, max_queries) for split in corpora}
    groups = {}
    if group_by is not None:
        groups = {s: query_groups(cfg, store, judged[s].queries, group_by) for s in judged}
    rows = np.unique(np.concatenate(list(corpora.values())))
    if cache:
        documents = cache.documents(cfg, store, embedder, rows)
    else:
        documents = Corpus.embedded(cfg, store, embedder, rows, quiet)
    query_rows = np.unique(np.concatenate([j.queries for j in judged.values()]))
    asked = list(dict.fromkeys([*cfg.data.query_fields, *cfg.eval.query_fields]))
    queries = embedder.embed(
        "query", store.queries, asked, query_rows, description="queries", quiet=quiet
    )
    fields = [field for field, weight in cfg.data.query_fields.items() if weight > 0]
    embedded = np.any([queries.present[field] for field in fields], axis=0)
    for split, judgements in judged.items():
        kept = np.flatnonzero(embedded[np.searchsorted(query_rows, judgements.queries)])
        if left_out := len(judgements.queries) - len(kept):
            lacking = f"split {split!r}: {left_out} queries have no {' or '.join(fields)}"
            if not kept.size:
                raise DataError(f"{lacking}, so none is left; leave it out of config.eval.splits")
            if not quiet:
                distributed.announce(f"{lacking}; they are left out")
            judged[split] = judgements.take(kept)
            groups[split] = {
                name: [labels[row] for row in kept]
                for name, labels in groups.get(split, {}).items()
            }
    tokens = cache.tokens(cfg, store, embedder, rows) if cache and by_tokens else None
    weights = cfg.data.query_fields
    of_queries = lambda some: embedder.embed_tokens("query", store.queries, weights, some)
    document_rank = id_ranks(store.documents)
    return {
        split: evaluate_split(
            cfg,
            judged[split],
            queries.take(np.searchsorted(query_rows, judged[split].queries)),
            documents.of(corpus),
            document_rank[corpus],
            ids_in(store.queries, judged[split].queries, split),
            ids_in(store.documents, corpus, split) if rankings else None,
            groups.get(split, {}),
            words_of(cfg, store, judged[split].queries, corpus) if by_words else None,
            (of_queries(judged[split].queries), tokens.take(np.searchsorted(rows, corpus)))
            if tokens
            else None,
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
    words: tuple[Words, Sequence[str]] | None = None,
    tokens: tuple[Tokens, Tokens] | None = None,
) -> SplitResult:
    """The results of one split: merged queries and documents, every document field alone, and every
    query field of `cfg.eval.query_fields` alone, on the queries that have it.

    Args:
        queries: of the (q,) test queries, in the order of `judgements` and `query_ids`.
        searched: the split's (n,) documents, {"merged" or a field: (n, e) embeddings};
            `document_rank` is that of `in_trec_order`.
        document_ids: of the corpus, if the result is to have the ranking.
        groups: {grouping: the group of each query}.
        words: of the documents, and the texts of the queries, for results as "BM25" and "hybrid".
        tokens: of the queries, and of the documents, for results as "MaxSim".
    """
    several = len({*cfg.data.query_fields, *cfg.eval.query_fields}) > 1
    having = {
        field: rows
        for field in (cfg.eval.query_fields if several else ())
        if (rows := np.flatnonzero(queries.present[field])).size
    }
    merged = queries.merged(cfg.data.query_fields)
    alone = [queries.take(rows).merged({field: 1.0}) for field, rows in having.items()]
    # All at once, so that the documents go to the devices once.
    every = exact_top_k(np.concatenate([merged, *alone]), searched["merged"], cfg.eval.top_k)
    every = in_trec_order(*every, document_rank)
    ends = np.cumsum([len(merged), *map(len, alone)])[:-1]
    (scores, *_), (found, *found_alone) = (np.split(x, ends) for x in every)
    grades = judgements.of(found)
    by_documents = {"merged": judgements.metrics(found)}
    counts = calibration.count(scores, grades)
    for field, embeddings in searched.items():
        if field != "merged" and np.any(embeddings):  # the documents of one store may lack a field
            hits = exact_top_k(merged, embeddings, cfg.eval.top_k)
            by_documents[field] = judged_metrics(judgements, *hits, document_rank)
    if words is not None:
        index, texts = words
        by_both = {
            "BM25": index.search(texts, cfg.eval.top_k),
            "hybrid": index.joined(texts, found, cfg.eval.top_k),
        }
        for name, hits in by_both.items():
            by_documents[name] = judged_metrics(judgements, *hits, document_rank)
    if tokens is not None:
        hits = maxsim_top_k(*tokens, cfg.eval.top_k)
        by_documents["MaxSim"] = judged_metrics(judgements, *hits, document_rank)
    by_query_field = {}
    ranks = np.full((len(query_ids), len(having)), np.nan)
    of_documents = []
    for column, (field, rows) in enumerate(having.items()):
        judged = judgements.take(rows)
        by_query_field[field] = judged.metrics(found_alone[column])
        ranks[rows, column] = metrics.first_relevant_rank(judged.of(found_alone[column]))
        asked = judgements, rows, alone[column], searched["merged"]
        of_documents.append(ranks_of_documents(*asked))
    variance: dict = metrics.mean_rank_variance(ranks)
    if variance:
        ranks = np.stack(of_documents, 1)
        variance["documents"] = metrics.mean_rank_variance(ranks)
    ranking = None
    if document_ids is not None:
        ranking = as_ranking(judgements, scores, found, query_ids, document_ids)
    groups = groups or {}
    return SplitResult(query_ids, by_documents, by_query_field, variance, ranking, groups, counts)


def ranks_of_documents(
    judgements: Judgements,
    rows: Int[np.ndarray, " r"],
    queries: Float[np.ndarray, "r e"],
    documents: Float[np.ndarray, "n e"],
) -> Float[np.ndarray, " d"]:
    """Of every document that any query of the split has for relevant: the rank, from 1, of the
    first of its queries among the `queries`, which are `rows` of the judgements; NaN where it has
    none there. Queries of equal scores share the better rank."""
    query, column = np.nonzero((judgements.documents >= 0) & (judgements.grades > 0))
    relevant, place = np.unique(judgements.documents[query, column], return_inverse=True)
    among = np.full(len(judgements.queries), -1)
    among[rows] = np.arange(len(rows))
    ranks = np.full(len(relevant), np.nan)
    for start in range(0, len(relevant), DOCUMENTS_AT_ONCE):
        scores = documents[relevant[start : start + DOCUMENTS_AT_ONCE]] @ queries.T
        own = np.full(scores.shape, -np.inf)
        pairs = (place >= start) & (place < start + len(scores)) & (among[query] >= 0)
        at = place[pairs] - start, among[query[pairs]]
        own[at] = scores[at]
        best = own.max(1, keepdims=True, initial=-np.inf)
        found = 1 + (scores > best).sum(1)
        ranks[start : start + len(scores)] = np.where(np.isfinite(best[:, 0]), found, np.nan)
    return ranks


def words_of(
    cfg: TrainConfig, store: RankedStore, queries: np.ndarray, corpus: np.ndarray
) -> tuple[Words, list[str]]:
    """The words of a split's documents, and the texts of the fields by which queries are asked."""
    asked = [field for field, weight in cfg.data.query_fields.items() if weight > 0]
    records = (store.queries[row] for row in queries)
    texts = [text_of(store.queries, {f: record[f] for f in asked}) for record in records]
    return Words(store.documents, corpus), texts


def id_ranks(records: Records) -> np.ndarray:
    """int64 (n,): each record's place among the sorted ids, which breaks ties."""
    import pyarrow.compute as pc

    ranks = np.empty(len(records), np.int64)
    ranks[pc.sort_indices(records.id_column)] = np.arange(len(ranks))
    return ranks


def in_trec_order(
    scores: np.ndarray, found: np.ndarray, document_rank: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Retrieved documents as trec_eval ranks them.

    Args:
        scores, found: (q, k) scores and positions within the corpus of the retrieved documents.
        document_rank: (n,) `id_ranks` of the corpus.
    """
    order = trec.trec_order(scores, document_rank[found])
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(found, order, axis=1)


def judged_metrics(
    judgements: Judgements, scores: np.ndarray, found: np.ndarray, document_rank: np.ndarray
) -> dict[str, np.ndarray]:
    """Protocol steps 4 and 5: `metrics.evaluate_rankings` of retrieved documents, which are those
    of `in_trec_order`."""
    _, found = in_trec_order(scores, found, document_rank)
    return judgements.metrics(found)


def as_ranking(
    judgements: Judgements,
    scores: np.ndarray,
    found: np.ndarray,
    query_ids: Sequence[str],
    document_ids: Sequence[str],
) -> trec.Ranking:
    """Ranked documents (see `in_trec_order`) under the ids of the (q,) queries and of the (n,)
    documents of the corpus."""
    ids = np.array(document_ids, object)
    qrels, run = {}, {}
    for row, query in enumerate(query_ids):
        judged = judgements.documents[row] >= 0
        documents, grades = judgements.documents[row, judged], judgements.grades[row, judged]
        qrels[query] = dict(zip(ids[documents], grades.astype(int).tolist(), strict=True))
        run[query] = dict(zip(ids[found[row]], scores[row].tolist(), strict=True))
    return trec.Ranking(qrels, run)


def evaluate_in_training(
    cfg: TrainConfig, store: RankedStore, embedder: Embedder
) -> dict[str, float]:
    """{"SPLIT/METRIC": value} of the merged documents on a sample of the queries."""
    found = evaluate_splits(cfg, store, embedder, cfg.eval.max_queries_in_training, quiet=True)
    return {
        f"{split}/{name}": value
        for split, result in found.items()
        for name, value in results.summary(result.merged).items()
    }


def evaluate_workdir(
    workdir: Path,
    max_queries: int | None = None,
    embed_dim: int | None = None,
    write_runs: bool = False,
    group_by: Sequence[str] | None = None,
    checkpoint: str = NEWEST,
    by_words: bool = False,
    calibrate: str | None = None,
    by_tokens: bool = False,
) -> str:
    """Evaluates a checkpoint of a run, writes the files and returns the tables. `group_by`,
    `by_words` and `by_tokens` are those of `evaluate_splits`; the split `calibrate` says what
    cosines mean."""
    cfg, store, params, mesh, step = load_run(workdir, embed_dim, checkpoint=checkpoint)
    found = evaluate_splits(
        cfg,
        store,
        Embedder(cfg, params, mesh),
        max_queries or cfg.eval.max_queries,
        rankings=write_runs,
        group_by=group_by,
        cache=EmbeddingCache(workdir, step),
        by_words=by_words,
        by_tokens=by_tokens,
    )
    model = results.of_model(cfg, params, step)
    if not distributed.is_first():
        return ""
    reports = {}
    for split, result in found.items():
        reports[split] = results.as_report(split, step, result) | model
        reports[split]["ground_truth"] = ground_truth_of(cfg, store, split)
    text = tables.format_tables(found, reports)
    if group_by is not None:
        text += f"\n\n{tables.format_groups(reports)}"
    if calibrate:
        counts = {split: result.counts for split, result in found.items()}
        fitted, told = calibration.fit(counts, calibrate)
        text += f"\n\n{tables.format_calibration(fitted, told)}"
    with results.writing(text):
        for split, result in found.items():
            path = workdir / "eval" / (split if embed_dim is None else f"{split}@{embed_dim}")
            results.write(path, reports[split], result)
            if result.ranking is not None:
                trec.write_ranking(path, result.ranking)
        if calibrate:
            calibration.write(calibration.path_in(workdir, embed_dim), model | told, fitted)
    return text


def recall_at(
    texts: Float[np.ndarray, "t e"],
    images: Float[np.ndarray, "n e"],
    image_of: Int[np.ndarray, " t"],
) -> dict[str, dict[str, float]]:
    """{"text_to_image" or "image_to_text": {"R@1": share, ...}} over the texts, and over the images
    that have a text; the others are only in the way. `image_of`: each text's image."""
    _, best_images = exact_top_k(texts, images, max(RECALL_KS))
    described = np.unique(image_of)
    _, best_texts = exact_top_k(images[described], texts, max(RECALL_KS))
    hits = {
        "text_to_image": best_images == image_of[:, None],
        "image_to_text": image_of[best_texts] == described[:, None],
    }
    return {
        direction: {f"R@{k}": float(hit[:, :k].any(axis=1).mean()) for k in RECALL_KS}
        for direction, hit in hits.items()
    }


def recall_workdir(workdir: Path, embed_dim: int | None = None, checkpoint: str = NEWEST) -> str:
    """Writes WORKDIR/eval/recall/SPLIT.json, `results.of_model`, how many "captions" and "images"
    there are, and `recall_at`, for a checkpoint of a run and returns the table, a row per
    split."""
    cfg, store, params, mesh, step = load_run(workdir, embed_dim, checkpoint=checkpoint)
    embedder, weights = Embedder(cfg, params, mesh), cfg.data.query_fields
    corpora = {split: store.corpus(split) for split in cfg.eval.splits}
    rows = np.unique(np.concatenate(list(corpora.values())))
    documents = EmbeddingCache(workdir, step).documents(cfg, store, embedder, rows)
    table: list[list] = []
    reports, model = {}, results.of_model(cfg, params, step)
    for split, corpus in corpora.items():
        pairs = store.pairs(split)
        asked, text_of = np.unique(pairs.query, return_inverse=True)
        queries = embedder.embed("query", store.queries, list(weights), asked, description=split)
        texts = queries.merged(weights)[text_of]
        image_of = np.searchsorted(corpus, pairs.document)
        shares = recall_at(texts, documents.of(corpus)["merged"], image_of)
        reports[split] = model | {"captions": len(texts), "images": len(corpus), **shares}
        table.append([split, len(texts), len(corpus), *chain(*map(dict.values, shares.values()))])
    if not distributed.is_first():
        return ""
    first, *others = (f"R@{k}" for k in RECALL_KS)
    columns = [f"text to image {first}", *others, f"image to text {first}", *others]
    text = tables.text_table(["split", "captions", "images", *columns], table)
    with results.writing(text):
        for split, report in reports.items():
            name = split if embed_dim is None else f"{split}@{embed_dim}"
            write_json(workdir / "eval" / "recall" / f"{name}.json", report)
    return text
