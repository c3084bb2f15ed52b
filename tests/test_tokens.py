"""Tokens are those of the official package where it leaves no choice, lie in its range where it draws, and depend on
nothing but the cell."""

import json

import anndata
import numpy as np
import pytest
import scanpy
import torch
from scgpt_oracle import scgpt
from scipy.sparse import csr_matrix

from perturbret.data.prepared import Cells
from perturbret.networks.inputs import like_batches
from perturbret.scgpt import tokens as module
from perturbret.scgpt.tokens import Tokens, bin_values, tokenize
from perturbret.scgpt.vocabulary import SPECIALS, Vocabulary

N_GENES = 400
# Sizes at which quantiles meet values (1 + a multiple of 7 or 49), and those around them. A lone value is tied with
# every quantile.
SIZES = (0, 2, 3, 7, 8, 15, 49, 50, 51, 98, 99, 148, 197, 250, 344, 399)


def make_cells(rows, *, names=None, totals=None):
    """Cells from rows of counts."""
    counts = csr_matrix(np.asarray(rows, np.float32))
    n, g = counts.shape
    return Cells(
        counts,
        np.asarray(counts.sum(axis=1)).ravel().astype(float) if totals is None else np.asarray(totals, float),
        np.array([f"gene{i}" for i in range(g)]),
        np.array([f"cell{i}" for i in range(n)]) if names is None else np.asarray(names),
    )


@pytest.fixture(scope="module")
def vocabulary():
    """Genes of the panel in another order, others, and the special tokens last."""
    names = [f"gene{i}" for i in np.random.default_rng(5).permutation(N_GENES)]
    return Vocabulary((*names, "OTHER1", "OTHER2", *SPECIALS), "test")


@pytest.fixture(scope="module")
def token_ids(vocabulary):
    return np.array([vocabulary.ids[f"gene{i}"] for i in range(N_GENES)])


@pytest.fixture(scope="module")
def untied():
    """Cells without equal counts, one per entry of SIZES and three times over."""
    rng = np.random.default_rng(0)
    rows = np.zeros((3 * len(SIZES), N_GENES))
    for row, size in zip(rows, SIZES * 3, strict=True):
        row[rng.choice(N_GENES, size, replace=False)] = rng.choice(np.arange(1, 1000), size, replace=False)
    return make_cells(rows)


@pytest.fixture(scope="module")
def tied():
    """Shallow cells: most counts are 1; the first is all ones."""
    rng = np.random.default_rng(1)
    rows = (rng.random((60, N_GENES)) < rng.uniform(0.01, 0.8, (60, 1))) * rng.geometric(0.7, (60, N_GENES))
    rows[0] = rows[0] > 0
    return make_cells(rows)


def official_bins(cells, *, seed=0):
    """Bins of scgpt's Preprocessor, dense."""
    filled = np.flatnonzero(cells.counts.getnnz(axis=1))
    data = anndata.AnnData(cells.counts[filled].copy())
    preprocess = scgpt.preprocess.Preprocessor(
        use_key="X", normalize_total=1e4, log1p=True, binning=51, result_binned_key="X_binned"
    )
    np.random.seed(seed)  # noqa: NPY002 - the official package draws from it
    preprocess(data)
    bins = np.zeros(cells.counts.shape, int)
    bins[filled] = data.layers["X_binned"]
    return bins


def log1p_rows(cells):
    """What scgpt bins, dense."""
    data = anndata.AnnData(cells.counts.copy())
    return np.log1p(scanpy.pp.normalize_total(data, target_sum=1e4, inplace=False)["X"]).toarray()


def possible_bins(values):
    """Lowest and highest bin that scgpt may draw for each of one cell's values."""
    edges = np.quantile(values, np.linspace(0, 1, 50))
    passed, entered = np.digitize(values, edges), np.digitize(values, edges, right=True)
    return np.minimum(entered + 1, passed), passed


def dense(tokens, cells, token_ids):
    """Values at the columns of the panel, from the tokens after the first of each cell."""
    column = {token: i for i, token in enumerate(token_ids)}
    found = np.zeros(cells.counts.shape)
    for i in range(len(tokens)):
        part = np.s_[tokens.indptr[i] + 1 : tokens.indptr[i + 1]]
        found[i, [column[token] for token in tokens.genes[part]]] = tokens.values[part]
    return found


def sequence(tokens, i):
    part = np.s_[tokens.indptr[i] : tokens.indptr[i + 1]]
    return tokens.genes[part].tolist(), tokens.values[part].tolist()


def equal(a, b):
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("genes", "values", "indptr"))


def test_untied_bins_equal_the_official_ones(untied, token_ids, vocabulary):
    found = dense(tokenize(untied, token_ids, vocabulary), untied, token_ids)
    np.testing.assert_array_equal(found, official_bins(untied))
    assert found.max() == 50


def test_untied_sequences_equal_the_official_ones(untied, token_ids, vocabulary):
    tokens = tokenize(untied, token_ids, vocabulary)
    chosen = np.flatnonzero(untied.counts.getnnz(axis=1))  # scgpt has no sequence for an empty cell
    examples = []
    for row in log1p_rows(untied.take(chosen)):
        at = np.flatnonzero(row)
        genes = np.insert(token_ids[at], 0, vocabulary.ids["<cls>"])
        values = np.insert(row[at], 0, -2)
        examples.append({"genes": torch.from_numpy(genes), "expressions": torch.from_numpy(values).float()})
    collate = scgpt.DataCollator(
        pad_token_id=vocabulary.ids["<pad>"],
        pad_value=-2,
        do_mlm=False,
        max_length=1200,
        keep_first_n_tokens=1,
    )
    expected = collate(examples)
    genes, values, padding = tokens.padded(chosen)
    np.testing.assert_array_equal(genes, expected["gene"].numpy())
    np.testing.assert_array_equal(values, expected["expr"].numpy())
    np.testing.assert_array_equal(padding, expected["gene"].numpy() == vocabulary.ids["<pad>"])
    assert genes.dtype == np.int64 and values.dtype == np.float32


def test_tied_bins_lie_in_the_official_range(tied, token_ids, vocabulary):
    found = dense(tokenize(tied, token_ids, vocabulary), tied, token_ids)
    draws = np.array([official_bins(tied, seed=seed) for seed in range(30)])
    spans = []
    for row, bins, drawn in zip(log1p_rows(tied), found, draws.swapaxes(0, 1), strict=True):
        at = np.flatnonzero(row)
        low, high = possible_bins(row[at])
        assert (low <= drawn[:, at]).all() and (drawn[:, at] <= high).all()
        assert (low <= bins[at]).all() and (bins[at] <= high).all()
        np.testing.assert_array_equal(bins[at], (low + high) // 2)
        spans.extend(high - low)
    assert (draws.min(axis=0) < draws.max(axis=0)).any() and max(spans) == 49


def test_bins_of_a_shallow_cell_follow_its_counts(vocabulary, token_ids):
    row = np.zeros(N_GENES)
    row[:15] = [1] * 11 + [2] * 3 + [5]
    bins = tokenize(make_cells([row]), token_ids, vocabulary).values[1:]
    # Of 50 edges 36 lie on the ones, 3 between, 7 on the twos: bins 1 to 36 and 40 to 46 are possible.
    assert bins.tolist() == [18] * 11 + [43] * 3 + [50]
    ones = tokenize(make_cells([row > 0]), token_ids, vocabulary).values[1:]
    assert ones.tolist() == [25] * 15
    assert tokenize(make_cells([row * (row == 5)]), token_ids, vocabulary).values[1:].tolist() == [25]


@pytest.mark.parametrize("n_bins", [3, 5, 51, 128])
def test_binning_equals_a_plain_one(n_bins):
    rng = np.random.default_rng(2)
    # Of 50 values the quantiles meet each, up to rounding.
    sizes = np.concatenate([rng.integers(0, 120, 50), [50] * 40])
    indptr = np.concatenate([[0], np.cumsum(sizes)])
    values = np.log1p(rng.geometric(0.05, indptr[-1]) / rng.uniform(0.1, 9)).astype(np.float32)
    # The last cell: neighbours in float32, with edges between them.
    values[-50:] = np.float32(1) + rng.permutation(50).astype(np.float32) * np.float32(2**-23)
    found = bin_values(values, indptr, n_bins)
    for first, last in zip(indptr[:-1], indptr[1:], strict=True):
        if last > first:
            cell = values[first:last]
            edges = np.quantile(cell, np.linspace(0, 1, n_bins - 1))
            middle = (np.digitize(cell, edges) + np.digitize(cell, edges, right=True) + 1) // 2
            np.testing.assert_array_equal(found[first:last], middle)
    assert found.min() >= 1 and found.max() == n_bins - 1


def test_a_cell_without_counts_is_cls_alone(vocabulary, token_ids):
    tokens = tokenize(make_cells(np.zeros((2, N_GENES))), token_ids, vocabulary)
    assert sequence(tokens, 1) == ([vocabulary.ids["<cls>"]], [-2])
    assert tokens.padded(np.array([0, 1]))[2] is None
    assert len(tokenize(make_cells(np.zeros((0, N_GENES))), token_ids, vocabulary)) == 0


def test_genes_without_token_and_zeros_are_left_out(tied, vocabulary, token_ids):
    known = token_ids.copy()
    known[::3] = -1
    tokens = tokenize(tied, known, vocabulary)
    assert not np.isin(token_ids[::3], tokens.genes).any()
    # They take no part in the quantiles: as if they had never been counted.
    without = tied.counts.toarray()
    without[:, ::3] = 0
    assert equal(tokens, tokenize(make_cells(without, totals=tied.totals), known, vocabulary))
    stored = csr_matrix(tied.counts.toarray())
    stored.data[::2] = 0
    written = make_cells(stored.toarray(), totals=tied.totals)
    explicit = Cells(stored, tied.totals, tied.genes, tied.names)
    assert stored.nnz > written.counts.nnz
    assert equal(tokenize(explicit, token_ids, vocabulary), tokenize(written, token_ids, vocabulary))


def test_order_of_stored_counts_does_not_matter(tied, vocabulary, token_ids):
    counts = tied.counts.copy()
    for first, last in zip(counts.indptr[:-1], counts.indptr[1:], strict=True):
        counts.indices[first:last] = counts.indices[first:last][::-1]
        counts.data[first:last] = counts.data[first:last][::-1]
    counts.has_sorted_indices = False
    turned = Cells(counts, tied.totals, tied.genes, tied.names)
    assert equal(tokenize(turned, token_ids, vocabulary), tokenize(tied, token_ids, vocabulary))
    assert not counts.has_sorted_indices


def test_log1p_values(tied, vocabulary, token_ids):
    totals = tied.totals * 3
    tokens = tokenize(
        make_cells(tied.counts.toarray(), totals=totals),
        token_ids,
        vocabulary,
        values="log1p",
        target_sum=1e3,
    )
    expected = np.log1p(tied.counts.toarray() / totals[:, None] * 1e3)
    np.testing.assert_allclose(dense(tokens, tied, token_ids), expected, rtol=1e-6)
    assert tokens.values.dtype == np.float32 and tokens.values[0] == -2


@pytest.mark.parametrize("settings", [{}, {"max_seq_len": 40}, {"values": "log1p"}])
def test_a_cell_does_not_depend_on_others_or_on_random_state(
    tied, vocabulary, token_ids, settings, monkeypatch
):
    expected = tokenize(tied, token_ids, vocabulary, **settings)
    order = np.random.default_rng(6).permutation(60)[:25]
    np.random.seed(9)  # noqa: NPY002 - the global generator must not matter
    found = tokenize(tied.take(order), token_ids, vocabulary, **settings)
    assert [sequence(found, k) for k in range(25)] == [sequence(expected, i) for i in order]
    for chunk in (1, 700):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        assert equal(tokenize(tied, token_ids, vocabulary, **settings), expected)


def test_too_many_genes_are_drawn_by_name(vocabulary, token_ids):
    rng = np.random.default_rng(7)
    rows = rng.permuted(np.tile(np.arange(1, N_GENES + 1), (300, 1)), axis=1)
    rows[0, :301] = 0  # 99 genes are left: nothing to choose
    cells = make_cells(rows)
    whole = dense(tokenize(cells, token_ids, vocabulary), cells, token_ids)
    tokens = tokenize(cells, token_ids, vocabulary, max_seq_len=100)
    assert (tokens.lengths == 100).all()
    cut = dense(tokens, cells, token_ids)
    # Bins are those of the whole cell, and the genes stay in the order of columns.
    assert (cut[cut > 0] == whole[cut > 0]).all() and ((cut > 0).sum(axis=1) == 99).all()
    column = np.argsort(token_ids)[tokens.genes[1:100]]
    assert (np.diff(column) > 0).all()
    # Drawn evenly, whatever the gene and its count: 299 cells keep each with chance 99 / 400, 74 ± 7.5 times.
    kept = (cut[1:] > 0).sum(axis=0)
    assert 40 < kept.min() and kept.max() < 115
    assert abs(rows[1:][cut[1:] > 0].mean() - 200.5) < 5
    assert len({row.tobytes() for row in cut[1:] > 0}) == 299
    # The same name, the same choice, also where the columns come in another order; another name, another choice.
    turned = Cells(cells.counts[:, ::-1].tocsr(), cells.totals, cells.genes[::-1], cells.names)
    again = tokenize(turned, token_ids[::-1], vocabulary, max_seq_len=100)
    np.testing.assert_array_equal(dense(again, turned, token_ids[::-1])[:, ::-1], cut)
    renamed = make_cells(rows, names=[f"x{i}" for i in range(300)])
    assert not equal(tokenize(renamed, token_ids, vocabulary, max_seq_len=100), tokens)


def test_blocks_and_batches(tied, vocabulary, token_ids):
    tokens = tokenize(tied, token_ids, vocabulary)
    for size in (1, 500, 10**6):
        batches = list(like_batches(tokens.lengths, size))
        assert sorted(np.concatenate(batches)) == list(range(60))
        assert all(len(b) == 1 or len(b) * tokens.lengths[b].max() <= size for b in batches)
    batches = list(like_batches(tokens.lengths, 2000))
    padded = sum(len(b) * tokens.lengths[b].max() for b in batches)
    assert padded < 1.2 * tokens.lengths.sum() < 0.7 * 60 * tokens.lengths.max()
    genes, values, padding = tokens.padded(np.array([5, 2]))
    for row, i in enumerate((5, 2)):
        n = tokens.lengths[i]
        assert (genes[row, :n].tolist(), values[row, :n].tolist()) == sequence(tokens, i)
        assert (genes[row, n:] == vocabulary.ids["<pad>"]).all() and (values[row, n:] == -2).all()
        assert padding[row].tolist() == [False] * n + [True] * (genes.shape[1] - n)


def test_cells_without_cls_are_their_genes(tied, vocabulary, token_ids):
    empty = np.vstack([tied.counts.toarray()[:3], np.zeros((1, N_GENES)), tied.counts.toarray()[3:5]])
    tokens = tokenize(make_cells(empty), token_ids, vocabulary)
    genes, values, indptr = tokens.without_cls()
    assert indptr[0] == 0 and indptr[-1] == len(genes) == len(values)
    for cell in range(6):
        of_cell = slice(indptr[cell], indptr[cell + 1])
        ids, levels = sequence(tokens, cell)
        assert (genes[of_cell].tolist(), values[of_cell].tolist()) == (ids[1:], levels[1:])


def test_stored_tokens_are_made_once_and_mapped(tied, vocabulary, token_ids, tmp_path, monkeypatch):
    expected = tokenize(tied, token_ids, vocabulary)
    first = tokenize(tied, token_ids, vocabulary, directory=tmp_path)
    (folder,) = tmp_path.iterdir()
    key = json.loads((folder / "record.json").read_text())["key"]
    assert key["n_bins"] == 51 and {"code", "cells", "vocabulary"} < set(key)
    assert folder.name.startswith("tokens-")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_tokenize", None)  # making them again would fail
        second = tokenize(tied, token_ids, vocabulary, directory=tmp_path)
    for found in (first, second):
        assert equal(found, expected) and isinstance(found.genes, np.memmap)
        assert isinstance(found.values, np.memmap) and not found.genes.flags.writeable
        assert (found.n_tokens, found.pad_id, found.pad_value) == (405, 402, -2)


def test_each_thing_that_tokens_depend_on_makes_new_ones(tied, vocabulary, token_ids, tmp_path):
    tokenize(tied, token_ids, vocabulary, directory=tmp_path)
    counts = tied.counts.copy()
    counts.data[0] += 1
    for number, (cells, ids, words, settings) in enumerate(
        [
            (Cells(counts, tied.totals, tied.genes, tied.names), token_ids, vocabulary, {}),
            (
                make_cells(tied.counts.toarray(), names=[f"x{i}" for i in range(60)]),
                token_ids,
                vocabulary,
                {},
            ),
            (make_cells(tied.counts.toarray(), totals=tied.totals * 2), token_ids, vocabulary, {}),
            (tied, np.where(token_ids == 3, -1, token_ids), vocabulary, {}),
            (tied, token_ids, Vocabulary((*vocabulary.tokens, "MORE"), "test"), {}),
            (tied, token_ids, vocabulary, {"n_bins": 50}),
            (tied, token_ids, vocabulary, {"values": "log1p"}),
            (tied, token_ids, vocabulary, {"max_seq_len": 30}),
            (tied, token_ids, vocabulary, {"pad_value": -1}),
        ]
    ):
        made = tokenize(cells, ids, words, directory=tmp_path, **settings)
        assert equal(made, tokenize(cells, ids, words, **settings))
        assert len(list(tmp_path.iterdir())) == number + 2


def test_an_interrupted_store_leaves_nothing(tied, vocabulary, token_ids, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_fill", stop)
        with pytest.raises(KeyboardInterrupt):
            tokenize(tied, token_ids, vocabulary, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"values": "raw"}, "values: expected one of bins, log1p, got 'raw'"),
        ({"n_bins": 2}, "n_bins: expected 3 to 128, got 2"),
        ({"n_bins": 129}, "n_bins"),
        ({"max_seq_len": 1}, "max_seq_len: expected 2 or more, got 1"),
        ({"pad_value": 1}, "pad_value: expected -128 to 0, got 1"),
        ({"target_sum": 0}, "target_sum: expected a positive number, got 0"),
    ],
)
def test_impossible_settings_are_refused(tied, vocabulary, token_ids, settings, said):
    with pytest.raises(ValueError, match=said):
        tokenize(tied, token_ids, vocabulary, **settings)


def test_impossible_token_ids_are_refused(tied, vocabulary, token_ids):
    def with_first(value):
        return np.concatenate([[value], token_ids[1:]])

    for ids, said in (
        (token_ids[:-1], "expected an integer for each of 400 genes"),
        (token_ids.astype(float), "float64"),
        (with_first(405), "expected -1 to 404, got .* to 405"),
        (with_first(-2), "expected -1 to 404, got -2"),
        (with_first(vocabulary.ids["<cls>"]), "expected tokens of genes, got that of <pad> or <cls>"),
        (with_first(token_ids[1]), f"expected each token once, token {token_ids[1]} belongs to several"),
    ):
        with pytest.raises(ValueError, match=said):
            tokenize(tied, ids, vocabulary)
    totals = tied.totals.copy()
    totals[3] = 0
    with pytest.raises(ValueError, match="totals: expected more than 0"):
        tokenize(make_cells(tied.counts.toarray(), totals=totals), token_ids, vocabulary)


def test_tokens_refuse_arrays_that_do_not_fit():
    with pytest.raises(ValueError, match="expected 3 genes and values"):
        Tokens(np.zeros(3, np.int32), np.zeros(2, np.int8), np.array([0, 3]), 5, 3, -2)


def test_real_shallow_cells_lie_in_the_official_range(real_data):
    screen = anndata.read_h5ad(real_data / "papalexi2021_thp1_303genes.h5ad", backed="r")
    counts = csr_matrix(screen[:200].to_memory().X)
    names = [f"gene{i}" for i in range(counts.shape[1])]
    cells = make_cells(counts.toarray())
    tokens = tokenize(cells, np.arange(len(names)), Vocabulary((*names, *SPECIALS), "test"))
    ties = 0
    for i in range(200):
        row = counts[i].toarray().ravel()
        at = np.flatnonzero(row)
        assert (tokens.genes[tokens.indptr[i] + 1 : tokens.indptr[i + 1]] == at).all()
        low, high = possible_bins(np.log1p(row[at] / np.float32(row.sum() / 1e4)))
        bins = tokens.values[tokens.indptr[i] + 1 : tokens.indptr[i + 1]]
        assert (low <= bins).all() and (bins <= high).all()
        ties += (high > low).sum()
    assert ties > tokens.lengths.sum() / 2


def test_hash_is_of_the_content():
    def make(genes=(5, 1, 2, 5, 3), values=(-2, 7, 8, -2, 9), indptr=(0, 3, 5), dtype=np.int8, **other):
        rest = {"n_tokens": 10, "pad_id": 4, "pad_value": -2, **other}
        return Tokens(np.array(genes, np.int32), np.array(values, dtype), np.array(indptr), **rest)

    assert make().hash == make().hash
    others = [
        make(genes=(5, 1, 2, 5, 4)),
        make(values=(-2, 7, 8, -2, 8)),
        make(values=(-2, 7, 8, -2, 9), dtype=np.float32),
        make(indptr=(0, 2, 5)),
        make(n_tokens=11),
        make(pad_id=6),
        make(pad_value=-3),
    ]
    assert len({tokens.hash for tokens in [make(), *others]}) == 1 + len(others)


def test_cells_of_unlike_length_share_no_batch_unless_they_are_few():
    lengths = np.concatenate([np.full(30, 100), np.full(30, 91), np.full(30, 60), [5, 4, 3]])
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    zeros = np.zeros(indptr[-1], np.int32)
    tokens = Tokens(zeros, zeros, indptr, 10, 4, -2)
    found = [lengths[index].tolist() for index in like_batches(tokens.lengths, 16384)]
    assert found == [[100] * 30 + [91] * 30, [60] * 30, [5, 4, 3]]
    few = Tokens(zeros[:800], zeros[:800], np.array([0, 400, 700, 800]), 10, 4, -2)
    assert [index.tolist() for index in like_batches(few.lengths, 16384)] == [[0, 1], [2]]
