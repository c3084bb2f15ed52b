"""What labels of cells say: conditions, controls, or nothing."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from .conditions import CTRL, JOIN, canonical_condition, control_names
from .genes import SymbolResolver
from .spelling import GUIDE_ENDING, GUIDE_START, known_as, strip_guide, tidy

# Whole labels, case ignored, that say that no perturbation was found, or no single one.
_NO_LABEL = set(
    "nan na n/a #n/a none null nil nat <na> <nan> <none> <null> - -- . ? unassigned unassign notassigned unknown "
    "undefined undetermined ambiguous ambig negative multiplet multiplets multiple multi doublet doublets "
    "uncalled nocall noguide nosgrna nogrna noperturbation notdetected unmapped missing blank".split()
)
_CONTROL = re.compile(
    r"(?:neg(?:ative)?|pos(?:itive)?|sg|guide|human|mouse)*(?:ctrl|ctl|ctr|cntrl|control)s?(?:guide|sg|grna|sgrna)*\d*"
    r"|.*non?targett?(?:ing|ed)?.*|.*scramble.*|.*safe(?:harbou?r|target|cutter).*|.*intergenic.*|.*emptyvector.*"
    r"|nt|ntc\d*|nt(?:ctrl|control|sg|guide|grna)?\d+|neg(?:sg|guide)?\d*|scr\d*|aavs1(?:ctrl|control|sg|guide)?\d*"
    r"|g?t?rosa26\d*|ccr5safe\d*|(?:f|r|n)?luc(?:iferase)?\d*|lacz\d*|[em]?(?:gfp|bfp|rfp|yfp)\d*|mcherry\d*|mock"
    r"|untreated|unperturbed|untransduced|nontransduced|uninfected|parental|wt|wildtype|vehicle|dmso|pbs|dummy"
)
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?")
_ALSO_SAFE_HARBOURS = {"AAVS1"}


@dataclass(frozen=True)
class LabelRules:
    """How a dataset's entry reads labels.

    Attributes
    ----------
    controls : str, sequence of str or None
        What controls are called.
    delimiter : str or None
        As for `perturbret.conditions.canonical_condition`.
    target_map : mapping of label or target to what it stands for
    strip : bool or str
        Take guide and promoter endings off targets; a str is the regular expression of what to take off.
    drop : sequence of str
        Raw labels whose cells are left out.
    columns : collection of str
        Names of the screen's columns.
    resolver : SymbolResolver
    """

    controls: str | Sequence[str] | None = None
    delimiter: str | None = JOIN
    target_map: Mapping[str, str] = field(default_factory=dict)
    strip: bool | str = False
    drop: Sequence[str] = ()
    columns: Collection[str] = ()
    resolver: SymbolResolver = field(default_factory=SymbolResolver)

    def read(self, label: object) -> str | None:
        """The condition that `label` names, `ctrl` for controls; None where it names no perturbation.

        Raises
        ------
        ValueError
            As `canonical_condition`.
        """
        text = tidy(label.decode() if isinstance(label, bytes) else label)
        if re.fullmatch(r"\d+\.0", text):
            # A missing value among whole numbers makes all of them fractions.
            text = text.removesuffix(".0")
        if text in self.target_map:
            return canonical_condition(self.target_map[text], control_label=self.controls)
        if self._names_control(text):
            return CTRL
        if self._names_nothing(text):
            return None
        if self.delimiter is None:
            return canonical_condition(text, control_label=self.controls, delimiter=None)
        parts = self._parts(text)
        if any(self._names_nothing(part) for part in parts if part):
            return None
        read = [self._target(part) for part in parts]
        # Empty parts are left in, for the error that names their position.
        return canonical_condition(JOIN.join(read), control_label=self.controls)

    def dropped(self, label: object) -> bool:
        """Whether the entry leaves cells of this label out by name."""
        return str(label) in self.drop or tidy(label) in self.drop

    def is_gene(self, name: str) -> bool:
        """Whether `name` is an approved symbol or a column of the screen."""
        return self.resolver.approved(name) or name in self.columns

    def _is_name(self, name: str) -> bool:
        """Whether a gene has or had this name, in whatever case."""
        return name in self.columns or bool(known_as(name, self.resolver))

    def _names_control(self, text: str) -> bool:
        return text == CTRL or text.casefold() in {name.casefold() for name in control_names(self.controls)}

    def _names_nothing(self, text: str) -> bool:
        bare = re.sub(r"[\s_-]", "", text.casefold())
        return (not bare or bare in _NO_LABEL or text.casefold() in _NO_LABEL) and not self.is_gene(text)

    def _parts(self, text: str) -> list[str]:
        """Split at the delimiter, but not within a name: `HLA-A` is one gene where combinations are `A-B`."""
        parts = [part.strip() for part in text.split(self.delimiter)]
        if len(parts) == 1 or all(self.is_gene(part) for part in parts):
            return parts
        joined, start = [], 0
        while start < len(parts):
            for stop in range(len(parts), start + 1, -1):
                whole = self.delimiter.join(parts[start:stop])
                if self._is_name(whole) or self._names_control(whole) or whole in self.target_map:
                    break
            else:
                stop, whole = start + 1, parts[start]
            # Behind a gene, what only numbers its guide belongs to it.
            ending = f"_{whole}"
            if self.strip is True and joined and GUIDE_ENDING.fullmatch(ending) and not self._is_name(whole):
                start = stop
                continue
            joined.append(whole)
            start = stop
        return joined

    def stripped(self, part: str) -> str:
        """A target without guide and promoter endings, where the entry asks for that."""
        if self.strip is True and not self._names_control(part):
            return strip_guide(part, self._is_name)
        if isinstance(self.strip, str) and not self._is_name(part):
            return re.sub(self.strip, "", part)
        return part

    def _target(self, part: str) -> str:
        if part in self.target_map:
            return self.target_map[part]
        part = self.stripped(part)
        part = self.target_map.get(part, part)
        return CTRL if self._names_control(part) else part


def is_number(name: str) -> bool:
    """Whether `name` is a bare number, as codes of a factor are."""
    return _NUMBER.fullmatch(name.strip()) is not None


def is_control_like(name: str, is_gene: Callable[[str], bool] = lambda name: False) -> bool:
    """Whether `name` is one that controls are given: NegCtrl1, non-targeting, NT, scramble, AAVS1, ...

    Names of genes are not (WT1, NT5E, CTRL), but for safe harbours, which are cut to perturb nothing.
    """
    if is_gene(name) and name.upper() not in _ALSO_SAFE_HARBOURS:
        return False
    short = GUIDE_ENDING.sub("", GUIDE_START.sub("", tidy(name)))
    return any(_CONTROL.fullmatch(re.sub(r"[^0-9a-z]", "", text.casefold())) for text in (name, short))
