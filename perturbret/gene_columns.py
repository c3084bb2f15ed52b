"""Columns of a count matrix that are no genes: guides, barcodes, antibodies, vectors."""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from .genes import SymbolResolver
from .labels import is_control_like
from .spelling import GUIDE_ENDING, GUIDE_START, known_as, tidy

_TYPE_COLUMNS = ("feature_types", "feature_type", "features_type")
# As 10x, and converters of its files, name expression.
_EXPRESSION = {"geneexpression", "gene", "genes", "gex", "rna", "mrna", "expression"}
# Parts of names that vectors, guides, barcodes and antibodies have.
_CONSTRUCTS = set(
    "sgrna grna guide guides guiderna crispr crispra crispri barcode barcodes featurebarcode hashtag hto adt "
    "totalseq cmo multiseq cas9 dcas9 spcas9 cas12a cas13d cpf1 krab vpr vp64 gfp egfp mgfp bfp tagbfp tagbfp2 rfp "
    "tagrfp mcherry tdtomato dsred mscarlet mkate2 yfp eyfp cfp venus citrine zsgreen mneongreen puro puror "
    "puromycin blasticidin bsdr hygro hygror neor zeor vector plasmid lenti lentivirus lentiguide lenticas9 "
    "transgene wpre sv40 luc2 luciferase lacz rtta tta tetr".split()
)
_GUIDE = re.compile(
    r"(?i).+[_\-.: |](?:sg|grna|sgrna|crrna|guide)(?:[_\-. ]?\d+)?$|.+[_\-.: |][ACGT]{17,23}$"
)
_GUIDE_OF_GENE = re.compile(r"(?i)(.+)[_\-.: |](?:g\d+|(?:P\d)+)$")


def columns_left_out(
    symbols: Sequence[str],
    var: pd.DataFrame,
    *,
    resolver: SymbolResolver,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
) -> dict[int, str]:
    """Positions of columns that are no genes, and why.

    By `feature_types` of var, where the file has it; by name, where no gene has the name as its approved symbol.

    Parameters
    ----------
    symbols : sequence of str, length n
    var : DataFrame, n rows
    resolver : SymbolResolver
    keep, drop : sequence of str
        Symbols or names of var's rows that are genes, or are not, whatever they look like.
    """
    names = list(map(str, var.index))
    found: dict[int, str] = {}
    for position, kind in _other_types(var).items():
        found[position] = f"feature type {kind}"
    for position, symbol in enumerate(map(str, symbols)):
        if position not in found:
            reason = why_no_gene(symbol, resolver)
            if reason:
                found[position] = reason
        own = {symbol, names[position]}
        if own & set(drop):
            found[position] = "drop_columns of the dataset's entry"
        elif own & set(keep):
            found.pop(position, None)
    return found


def why_no_gene(name: str, resolver: SymbolResolver) -> str:
    """Why a column of this name is no gene's, or '' where nothing speaks against it."""
    name = tidy(name)
    if resolver.approved(name):
        return ""
    parts = {part.casefold() for part in re.split(r"[^0-9A-Za-z]+", name) if part}
    if parts & _CONSTRUCTS or re.sub(r"[^0-9a-z]", "", name.casefold()) in _CONSTRUCTS:
        return "name of a guide, barcode, antibody or vector"
    if resolver.readings(name):
        return ""
    if known_as(name, resolver):
        return ""
    of_gene = _GUIDE_OF_GENE.fullmatch(name)
    start = GUIDE_START.sub("", name)
    bare = [] if start == name else [start, GUIDE_ENDING.sub("", start)]
    if _GUIDE.fullmatch(name) or any(
        known_as(text, resolver) for text in [*bare, *(of_gene.groups() if of_gene else ())]
    ):
        return "name of a guide"
    return "name of a control guide" if is_control_like(name) else ""


def _other_types(var: pd.DataFrame) -> dict[int, str]:
    column = next((name for name in _TYPE_COLUMNS if name in var), None)
    if column is None:
        return {}
    types = var[column].astype(object).where(var[column].notna(), "missing").astype(str).to_numpy()
    expressed = np.array([re.sub(r"[^a-z]", "", kind.casefold()) in _EXPRESSION for kind in types])
    # A column that never says expression says something else, such as the biotype.
    return {int(i): types[i] for i in np.flatnonzero(~expressed)} if expressed.any() else {}
