"""Reference cells as one body of tokens on disk, for pretraining on more than fits in memory."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..alignment.chunks import ChunkedCounts
from ..data.prepared import Cells
from ..files.cache import cached
from ..files.hashing import mix, name_seeds
from ..files.provenance import code_hash
from .tokens import tokenize
from .vocabulary import NO_TOKEN, SPECIALS, Vocabulary, map_genes

_WHOLE = 1_000_000  # no cell has as many genes
_HELD_OUT = 20  # one cell of so many
_SLICE = 1_000_000  # values in memory at a time


@dataclass(frozen=True)
class Part:
    """The cells of one dataset.

    Attributes
    ----------
    name : str
    genes : ndarray of int32, shape (n,)
        Token ids of detected genes, cell after cell; memory-mapped.
    values : ndarray of float32, shape (n,)
        log(1 + count / total x 10,000); memory-mapped.
    indptr : ndarray of int64, shape (n_cells + 1,)
    measured : ndarray of int64
        Token ids of all genes that the dataset measures.
    held_out : ndarray of bool, shape (n_cells,)
        Cells that no step of training sees; chosen by dataset and position.
    hash : str
        Of all that the tokens were made from.
    """

    name: str
    genes: np.ndarray
    values: np.ndarray
    indptr: np.ndarray
    measured: np.ndarray
    held_out: np.ndarray
    hash: str

    def cell(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and values of one cell."""
        at = slice(self.indptr[position], self.indptr[position + 1])
        return np.asarray(self.genes[at]), np.asarray(self.values[at])

    def gene_means(self, n_tokens: int) -> np.ndarray:
        """Mean value of each token over the training cells that have it, NaN for none; float64 (n_tokens,)."""
        sums, counts = np.zeros(n_tokens), np.zeros(n_tokens, np.int64)
        # A slice of whole cells at a time: the files may be larger than memory.
        edges = np.searchsorted(self.indptr, np.arange(0, self.indptr[-1], _SLICE))
        for first, last in pairwise([*edges, len(self.held_out)]):
            kept = np.repeat(~self.held_out[first:last], np.diff(self.indptr[first : last + 1]))
            at = slice(self.indptr[first], self.indptr[last])
            genes = np.asarray(self.genes[at])[kept]
            sums += np.bincount(genes, np.asarray(self.values[at])[kept], n_tokens)
            counts += np.bincount(genes, minlength=n_tokens)
        return np.divide(sums, counts, out=np.full(n_tokens, np.nan), where=counts > 0)


def choose_vocabulary(references: Sequence[ChunkedCounts], vocabulary: Vocabulary) -> Vocabulary:
    """The tokens that a small checkpoint needs: those that some dataset measures.

    Of genes measured and never detected, only those that go by an HGNC symbol stay: a screen may read them, and starts
    from random rows for them. Clone names are left out.

    Parameters
    ----------
    references : sequence of ChunkedCounts
    vocabulary : Vocabulary
        To choose from.
    """
    from ..data.genes import SymbolResolver

    resolver = SymbolResolver.from_package()
    chosen: set[int] = set()
    for reference in references:
        ids = map_genes(reference.genes, vocabulary, resolver=resolver).token_ids
        detected = np.zeros(len(ids), bool)
        for counts, _ in reference.chunks():
            detected |= np.asarray((counts > 0).sum(axis=0)).ravel() > 0
        for token_id, seen in zip(ids, detected, strict=True):
            if token_id != NO_TOKEN and (seen or resolver.approved(vocabulary.tokens[token_id])):
                chosen.add(int(token_id))
    tokens = tuple(vocabulary.tokens[i] for i in sorted(chosen))
    return Vocabulary((*tokens, *SPECIALS), f"{len(tokens)} genes that reference cells measure")


def make_corpus(
    references: Sequence[ChunkedCounts], vocabulary: Vocabulary, *, directory: str | os.PathLike
) -> list[Part]:
    """Tokenise references chunk by chunk into files below `directory`, or read what lies there.

    Parameters
    ----------
    references : sequence of ChunkedCounts
        Each needs genes of the vocabulary.
    vocabulary : Vocabulary
    directory : path

    Raises
    ------
    ValueError
        No reference is given, or one has no gene in the vocabulary, fewer than 2 cells, or no counts of the vocabulary
        in the cells to train on or in those held out.
    """
    if not references:
        raise ValueError("references: expected at least one dataset to pretrain on, got none")
    return [_part(reference, vocabulary, Path(directory)) for reference in references]


def _part(reference: ChunkedCounts, vocabulary: Vocabulary, directory: Path) -> Part:
    token_ids = map_genes(reference.genes, vocabulary).token_ids
    measured = np.unique(token_ids[token_ids != NO_TOKEN])
    if not len(measured):
        raise ValueError(
            f"{reference.name}: expected genes of the vocabulary, found none of {len(token_ids)}"
        )
    digest = hashlib.sha256(vocabulary.hash.encode() + token_ids.tobytes())
    digest.update(code_hash("scgpt.corpus:make_corpus").encode())
    n_cells, n_values = 0, 0
    for counts, totals in reference.chunks():  # a file of the same name may have other cells
        n_cells += counts.shape[0]
        n_values += int((counts.data[token_ids[counts.indices] != NO_TOKEN] > 0).sum())
        digest.update(np.ascontiguousarray(counts.data).data)
        digest.update(counts.indices.astype(np.int64).tobytes())
        digest.update(counts.indptr.astype(np.int64).tobytes())
        digest.update(b"" if totals is None else np.asarray(totals, np.float64).tobytes())
    if n_cells < 2:
        raise ValueError(
            f"{reference.name}: expected at least 2 cells, one to train on and one to hold out, got {n_cells}"
        )
    if not n_values:
        raise ValueError(
            f"{reference.name}: expected counts of the vocabulary's genes, got none in {n_cells} cells"
        )
    key = digest.hexdigest()
    folder = cached(
        directory,
        f"corpus-{reference.name}",
        key,
        lambda path: _write(reference, token_ids, vocabulary, path),
    )
    indptr = np.load(folder / "indptr.npy")
    part = Part(
        reference.name,
        np.memmap(folder / "genes.i4", np.int32, "r"),
        np.memmap(folder / "values.f4", np.float32, "r"),
        indptr,
        measured,
        held_out_cells(f"{reference.name} {i}" for i in range(len(indptr) - 1)),
        key,
    )
    for what, cells in (("cells to train on", ~part.held_out), ("held-out cells", part.held_out)):
        if not np.diff(indptr)[cells].any():
            raise ValueError(
                f"{part.name}: expected {what} with counts of the vocabulary's genes, got none: all {cells.sum()} of "
                f"{n_cells} cells are empty"
            )
    return part


def held_out_cells(names: Iterable[str]) -> np.ndarray:
    """True for one cell in twenty, by a hash of its name; for the first where that names none. bool (n,)."""
    chosen = mix(name_seeds(names)) % np.uint64(_HELD_OUT) == 0
    if not chosen.any():
        chosen[0] = True
    return chosen


def _write(reference: ChunkedCounts, token_ids: np.ndarray, vocabulary: Vocabulary, directory: Path) -> None:
    lengths = []
    with open(directory / "genes.i4", "wb") as genes, open(directory / "values.f4", "wb") as values:
        for counts, totals in reference.chunks():
            totals = np.asarray(counts.sum(axis=1), np.float64).ravel() if totals is None else totals
            names = np.arange(counts.shape[0]).astype(str)
            cells = Cells(counts, totals, reference.genes, names)
            made = tokenize(cells, token_ids, vocabulary, values="log1p", max_seq_len=_WHOLE)
            ids, logs, indptr = made.without_cls()
            ids.astype(np.int32).tofile(genes)
            logs.astype(np.float32).tofile(values)
            lengths.append(np.diff(indptr))
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    np.save(directory / "indptr.npy", indptr)
