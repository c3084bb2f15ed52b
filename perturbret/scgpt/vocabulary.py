"""scGPT's tokens, and which of them the genes of a screen are.

The vocabulary of the whole-human checkpoint is in the scgpt wheel, less three special tokens. Only that file is
read: the package itself does not import beside a current torch.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from ..data.genes import SymbolResolver
from ..files.downloads import expect_sha256

# Census tokens in the order of the checkpoint's embedding rows. The wheel's default_gene_vocab.json is another.
CENSUS_FILE = "tokenizer/default_census_vocab.json"
CENSUS_SHA256 = "9fe73cf29929b5c66a5fffcfb2bcbdd3e38a3a086848cd12f8f918bcf458d75f"
# Appended in this order where they are missing, as scGPT does before it makes a model.
PAD, CLS, EOC = SPECIALS = ("<pad>", "<cls>", "<eoc>")
# How SymbolResolver finds a token, from the surest to the weakest.
LINKS = ("direct", "ensembl", "previous", "alias")
NO_TOKEN = -1


class VocabularyError(ValueError):
    """A vocabulary that is not tokens with the ids 0, 1, 2, ..."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens; the id of a token is its position, and its row in a checkpoint's embedding.

    Attributes
    ----------
    tokens : tuple of str
        Unique; the special tokens are among them.
    source : str
        Where they are from, in words.

    Examples
    --------
    >>> vocabulary = Vocabulary(("KLF1", "HBG1", "<pad>", "<cls>", "<eoc>"), "two genes")
    >>> len(vocabulary), vocabulary.ids["HBG1"], vocabulary.genes
    (5, 1, ('KLF1', 'HBG1'))
    """

    tokens: tuple[str, ...] = field(repr=False)
    source: str

    def __post_init__(self):
        for position, token in enumerate(self.tokens):
            if not isinstance(token, str) or not token.strip():
                raise VocabularyError(f"{self.source}: expected a name for token {position}, got {token!r}")
        if len(self.ids) < len(self.tokens):
            twice = next(token for i, token in enumerate(self.tokens) if self.ids[token] != i)
            raise VocabularyError(f"{self.source}: expected each token once, got {twice!r} twice")
        missing = [token for token in SPECIALS if token not in self.ids]
        if missing:
            raise VocabularyError(f"{self.source}: expected the special tokens {SPECIALS}, missing {missing}")

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token -> id."""
        return {token: i for i, token in enumerate(self.tokens)}

    @cached_property
    def genes(self) -> tuple[str, ...]:
        """Tokens that stand for genes: all but those in angle brackets."""
        return tuple(token for token in self.tokens if not (token.startswith("<") and token.endswith(">")))

    @cached_property
    def hash(self) -> str:
        """sha256 of the tokens in their order."""
        return hashlib.sha256("\0".join(self.tokens).encode()).hexdigest()


@dataclass(frozen=True)
class GeneTokens:
    """The token of each gene of a panel.

    Attributes
    ----------
    table : DataFrame, one row per gene, in the panel's order
        `gene`; `token`, None for none; `token_id`, -1 for none; `how`: `direct` (the same name), `ensembl`,
        `previous`, `alias`, or why there is none: `ambiguous`, `collision`, `missing`; `possible`: for a gene
        without token, those that may be meant, joined by commas.
    collisions : DataFrame
        One row per gene whose token another gene found, too: `token`, `gene`, `how`, `kept`.
    vocabulary_hash : str
    """

    table: pd.DataFrame
    collisions: pd.DataFrame
    vocabulary_hash: str

    @property
    def token_ids(self) -> np.ndarray:
        """int64, shape (n_genes,); -1 where a gene has no token. No other id occurs twice."""
        return self.table["token_id"].to_numpy(np.int64)


def load_vocabulary(path: str | os.PathLike = "") -> Vocabulary:
    """The vocabulary of the scgpt wheel, or of a checkpoint.

    Special tokens that are missing are appended in the order of `SPECIALS`: 60,697 tokens for the wheel's.

    Parameters
    ----------
    path : path
        Of a vocab.json, or of a checkpoint directory with one; empty for the wheel's census vocabulary.

    Raises
    ------
    FileNotFoundError
        There is no such file; without `path`: scgpt is not installed, or does not hold the file.
    ChecksumError
        The wheel's file is not the one that was compared with the checkpoint.
    VocabularyError
        The file is not a JSON object of token to id, or the ids are not 0, 1, 2, ..., each once.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as directory:
    ...     _ = Path(directory, "vocab.json").write_text('{"KLF1": 0, "HBG1": 1}')
    ...     print(load_vocabulary(directory).tokens)
    ('KLF1', 'HBG1', '<pad>', '<cls>', '<eoc>')
    """
    if os.fspath(path):
        file = Path(path).expanduser()
        file = file / "vocab.json" if file.is_dir() else file
        if not file.is_file():
            raise FileNotFoundError(
                f"vocabulary: expected a vocab.json or a directory with one, found none at {file}"
            )
        return _read(file, str(file))
    file = census_file()
    expect_sha256(file, CENSUS_SHA256, f"{file.name} of the scgpt package: sha256")
    return _read(file, "census tokens of the scgpt package")


def census_file() -> Path:
    """Where the installed scgpt package keeps its census tokens; the package is not imported.

    FileNotFoundError where it is not installed, or does not hold the file.
    """
    # find_spec of a top-level package finds it without running it.
    spec = importlib.util.find_spec("scgpt")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        if (Path(folder) / CENSUS_FILE).is_file():
            return Path(folder) / CENSUS_FILE
    found = "is not installed" if spec is None else f"does not hold it (looked in {', '.join(folders)})"
    raise FileNotFoundError(
        f"vocabulary: expected {CENSUS_FILE} in the package scgpt, which {found}; install it with "
        "`pip install --no-deps scgpt==0.2.4`, or give the path of a checkpoint's vocab.json"
    )


def map_genes(
    genes: Iterable[str], vocabulary: Vocabulary, *, resolver: SymbolResolver | None = None
) -> GeneTokens:
    """Find the token of each gene; what is not certain gets none and is listed.

    The same name first, then the same Ensembl id (any version), then an unambiguous previous symbol, then an
    unambiguous alias; either name may be the old one. Where several genes find one token, the surest link keeps
    it; several that are equally sure all lose it.

    Parameters
    ----------
    genes : iterable of str
        Unique symbols or Ensembl ids.
    vocabulary : Vocabulary
    resolver : SymbolResolver, optional
        The packaged one by default.

    Raises
    ------
    ValueError
        A gene is given twice.

    Examples
    --------
    >>> vocabulary = Vocabulary(("KLF1", "SEPT2", "<pad>", "<cls>", "<eoc>"), "two genes")
    >>> found = map_genes(["KLF1", "SEPTIN2", "NOSUCH"], vocabulary)
    >>> found.table["how"].tolist(), found.token_ids.tolist()
    (['direct', 'previous', 'missing'], [0, 1, -1])
    """
    genes = list(map(str, genes))
    if len(set(genes)) < len(genes):
        twice = next(gene for gene in genes if genes.count(gene) > 1)
        raise ValueError(f"genes: expected unique names, got {twice!r} twice")
    resolver = SymbolResolver.from_package() if resolver is None else resolver
    table = resolver.resolve_many(genes, vocabulary.genes).rename(columns={"query": "gene", "match": "token"})
    collisions = _collisions(table)
    lost = collisions.index[~collisions["kept"]]
    possible = pd.Series("", index=table.index, dtype=object)
    possible[lost] = table.loc[lost, "token"]
    table.loc[lost, "token"] = None
    table.loc[lost, "how"] = "collision"
    bare = table.index[table["token"].isna() & (table["how"] != "collision")]
    possible[bare] = _possible(table.loc[bare, "gene"], vocabulary, resolver)
    ids = [vocabulary.ids.get(token, NO_TOKEN) for token in table["token"]]
    table = table.assign(token_id=np.array(ids, np.int64), possible=possible)
    return GeneTokens(
        table[["gene", "token", "token_id", "how", "possible"]],
        collisions.sort_values(["token", "kept"], ascending=[True, False], ignore_index=True),
        vocabulary.hash,
    )


def _collisions(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `table` that share a token, with its index, and which of them keep it."""
    claims = table[table["token"].notna() & table["token"].duplicated(keep=False)]
    rank = claims["how"].map(LINKS.index).astype(int)
    surest = rank == rank.groupby(claims["token"]).transform("min")
    alone = surest.groupby(claims["token"]).transform("sum") == 1
    return claims[["token", "gene", "how"]].assign(kept=(surest & alone).astype(bool))


def _possible(genes: pd.Series, vocabulary: Vocabulary, resolver: SymbolResolver) -> list[str]:
    """For each gene without token, the tokens that share a reading with it."""
    wanted = {reading for gene in genes for reading in resolver.readings(gene)}
    if not wanted:
        return [""] * len(genes)
    bearers: dict[str, list[str]] = {}
    for token in vocabulary.genes:
        for reading in resolver.readings(token):
            if reading in wanted:
                bearers.setdefault(reading, []).append(token)
    return [
        ", ".join(
            dict.fromkeys(token for reading in resolver.readings(gene) for token in bearers.get(reading, ()))
        )
        for gene in genes
    ]


def _read(file: Path, source: str) -> Vocabulary:
    def unique(pairs):
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise VocabularyError(f"{source}: expected each token once, got {twice!r} twice")
        return dict(pairs)

    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise VocabularyError(f"{source}: expected JSON, got {error}") from error
    if not isinstance(content, dict) or not content:
        raise VocabularyError(f"{source}: expected an object of token to id, got {str(content)[:80]}")
    for token, number in content.items():
        if type(number) is not int:
            raise VocabularyError(f"{source}: expected a whole number as id of {token!r}, got {number!r}")
    tokens = sorted(content, key=content.get)
    for position, token in enumerate(tokens):
        if content[token] != position:
            raise VocabularyError(
                f"{source}: expected the ids 0 to {len(tokens) - 1}, each once; got {content[token]} for {token!r} "
                f"where {position} was due"
            )
    tokens += [token for token in SPECIALS if token not in content]
    return Vocabulary(tuple(tokens), source)
