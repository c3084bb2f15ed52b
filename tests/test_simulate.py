"""Simulated screens follow the model that they claim, bit for bit by seed."""

import re

import numpy as np
import pytest
from scipy.stats import f_oneway, norm

from perturbret.data.conditions import CTRL, canonical_condition, targets
from perturbret.data.genes import SymbolResolver
from perturbret.data.masking import POLICIES, mask_counts, mask_totals
from perturbret.data.simulate import INTERACTIONS, SELF_EFFECTS, Truth, simulate_screen


@pytest.fixture(scope="module")
def screen():
    return simulate_screen(seed=5)


def own_columns(screen):
    place = {symbol: i for i, symbol in enumerate(screen.genes)}
    return {c: np.array([place[t] for t in targets(c) if t in place], int) for c in screen.conditions}


def cell_means(screen):
    """Means (n, G) that the drawn guide, response, batch and exposure of every cell imply."""
    truth, drawn = screen.truth, screen.truth.cells
    exposure = screen.obs["total"].to_numpy() - screen.counts.toarray().sum(axis=1)
    rows = [truth.conditions.index(c) if c != CTRL else 0 for c in drawn["condition"]]
    change = truth.log_fold_changes[rows, drawn["guide"]] * drawn["responsive"].to_numpy()[:, None]
    batch = [truth.batches.index(b) for b in screen.obs["batch"]]
    return exposure[:, None] / truth.reference_exposure * truth.means[batch] * np.exp(change)


def test_same_seed_same_bytes():
    kinds = {"n_singles": 3, "n_doubles": 1, "cells_per_condition": 5, "n_genes": 40}
    one, again, other = (simulate_screen(**kinds, seed=seed) for seed in (3, 3, 4))
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert one.obs.equals(again.obs)
    for name in ("means", "log_fold_changes", "unresponsive", "guide_weights"):
        np.testing.assert_array_equal(getattr(one.truth, name), getattr(again.truth, name))


def test_number_of_cells_leaves_the_parameters():
    few, many = (simulate_screen(cells_per_condition=n, n_doubles=2, n_genes=60) for n in (20, 60))
    assert few.conditions == many.conditions
    np.testing.assert_array_equal(few.truth.log_fold_changes, many.truth.log_fold_changes)
    np.testing.assert_array_equal(few.truth.means, many.truth.means)


def test_default_screen(screen):
    singles = {c for c in screen.conditions if len(targets(c)) == 1}
    doubles = {c for c in screen.conditions if len(targets(c)) == 2}
    assert (len(singles), len(doubles)) == (14, 10)
    assert {gene for double in doubles for gene in targets(double)} <= singles
    assert all(canonical_condition(c, control_label=CTRL) == c for c in screen.conditions)
    assert len(singles & set(screen.genes)) == 10
    assert screen.simulated and isinstance(screen.truth, Truth)
    assert screen.truth.conditions == tuple(screen.conditions)
    assert (screen.obs["condition"] == CTRL).sum() == 200
    assert set(screen.obs["batch"]) == {"batch1", "batch2"}
    data = screen.counts.data
    assert data.dtype == np.float32 and data.min() > 0 and (data == np.rint(data)).all()


def test_conditions_differ_in_size_and_the_prior_says_how(screen):
    shares = screen.obs.loc[screen.obs["condition"] != CTRL, "condition"].value_counts(normalize=True)
    np.testing.assert_allclose(shares[list(screen.truth.conditions)], screen.truth.prior)
    sizes = screen.obs["condition"].value_counts()[screen.conditions]
    assert 65 <= sizes.min() < 90 < 110 < sizes.max() <= 135


def test_order_and_names_of_cells_do_not_tell_conditions(screen):
    labels = screen.obs["condition"].to_numpy()
    assert (labels[1:] == labels[:-1]).mean() < 0.1
    assert screen.obs.index.is_monotonic_increasing


def test_symbols_are_real(screen):
    resolver = SymbolResolver.from_package()
    panel = simulate_screen(n_genes=850, n_singles=60, n_doubles=0, cells_per_condition=1).genes
    unknown = [g for g in [*panel, *screen.truth.targets] if resolver.readings(g) != (g,)]
    assert unknown == []


def test_large_panels_have_unique_genes_and_artificial_names_beyond_the_real_ones():
    screen = simulate_screen(n_genes=1500, n_singles=70, n_doubles=0, cells_per_condition=1)
    genes = screen.genes
    assert len(set(genes)) == 1500
    assert len(set(genes) & set(screen.conditions)) == 49
    artificial = [gene for gene in genes if re.fullmatch(r"SIM\d{5}", gene)]
    assert 500 < len(artificial) < 700


def test_counts_have_the_mean_and_variance_of_the_model(screen):
    # Pearson residuals, summed per gene: mean 0 and, with the NB variance, mean square 1.
    x, mean = screen.counts.toarray().astype(float), cell_means(screen)
    variance = mean + screen.truth.dispersion * mean**2
    z = (x - mean).sum(axis=0) / np.sqrt(variance.sum(axis=0))
    assert abs(z.mean()) < 4 / np.sqrt(len(z))
    # Genes with next to no counts are not normal: the spread is looked at where a gene has some.
    some = mean.sum(axis=0) > 50
    assert some.sum() > 300
    assert 0.85 < z[some].std() < 1.15
    deep = mean.sum(axis=0) > 1000
    square = (((x - mean) ** 2).sum(axis=0) / variance.sum(axis=0))[deep]
    assert deep.sum() > 30
    assert abs(square.mean() - 1) < 0.03


def test_dispersion_widens_the_counts(screen):
    x, mean = screen.counts.toarray().astype(float), cell_means(screen)
    deep = mean.sum(axis=0) > 1000
    against_poisson = ((x - mean) ** 2).sum(axis=0)[deep] / mean.sum(axis=0)[deep]
    assert against_poisson.mean() > 1.3


def test_genes_without_effect_are_those_of_controls(screen):
    truth, exposure = screen.truth, screen.obs["total"].to_numpy()
    x, labels = screen.counts.toarray().astype(float), screen.obs["condition"].to_numpy(str)
    scaled = x / exposure[:, None] * truth.reference_exposure
    control = labels == CTRL
    z, changed = [], []
    for c, condition in enumerate(truth.conditions):
        cells = labels == condition
        deep = scaled[control].mean(axis=0) > 0.3
        difference = scaled[cells].mean(axis=0) - scaled[control].mean(axis=0)
        error = np.sqrt(scaled[cells].var(axis=0) / cells.sum() + scaled[control].var(axis=0) / control.sum())
        ratio = difference[deep] / error[deep]
        effect = np.abs(truth.log_fold_changes[c]).max(axis=0)[deep]
        z.append(ratio[effect == 0])
        changed.append(ratio[effect > 1])
    z, changed = np.concatenate(z), np.concatenate(changed)
    # Controls are common to all comparisons and differ in their batches a little: 1 up to that.
    assert np.abs(z).mean() < 1.1 * norm.expect(np.abs)
    assert np.abs(changed).mean() > 3


def test_null_screens_have_no_effect():
    screen = simulate_screen(n_doubles=2, n_genes=80, cells_per_condition=10, null=True)
    assert not screen.truth.log_fold_changes.any()


def test_unresponsive_cells_come_at_the_stated_rates():
    screen = simulate_screen(n_singles=4, n_doubles=0, n_genes=10, cells_per_condition=1500, n_control=50)
    drawn = screen.truth.cells
    assert not drawn.loc[drawn["condition"] == CTRL, "responsive"].any()
    for c, condition in enumerate(screen.truth.conditions):
        cells = drawn[drawn["condition"] == condition]
        rate, n = screen.truth.unresponsive[c], len(cells)
        assert 0.1 <= rate <= 0.3
        assert abs((~cells["responsive"]).mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / n)
        share = (cells["guide"] == 0).mean()
        expected = screen.truth.guide_weights[c, 0]
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / n)


def test_doubles_add_up_with_their_interaction(screen):
    truth = screen.truth
    row = {c: truth.log_fold_changes[i] for i, c in enumerate(truth.conditions)}
    columns = own_columns(screen)
    assert set(truth.interactions.values()) == set(INTERACTIONS)
    for double, kind in truth.interactions.items():
        a, b = targets(double)
        rest = np.setdiff1d(np.arange(screen.n_genes), columns[double])
        np.testing.assert_allclose(
            row[double][:, rest], INTERACTIONS[kind] * (row[a] + row[b])[:, rest], atol=1e-12
        )


@pytest.mark.parametrize("kind", SELF_EFFECTS)
def test_guides_act_on_their_own_target_by_their_efficacy(kind):
    screen = simulate_screen(self_activation=kind, measured_targets=1.0, effect=0.0, n_doubles=0, n_genes=60)
    truth = screen.truth
    for c, condition in enumerate(truth.conditions):
        efficacy = truth.efficacies[truth.targets.index(condition)]
        change = truth.log_fold_changes[c]
        np.testing.assert_allclose(change[:, screen.genes == condition][:, 0], SELF_EFFECTS[kind] * efficacy)
        assert not change[:, screen.genes != condition].any()
        assert efficacy[0] > efficacy[1] > 0


def test_some_singles_share_a_program(screen):
    truth = screen.truth
    singles = [i for i, c in enumerate(truth.conditions) if len(targets(c)) == 1]
    likeness = np.corrcoef(truth.log_fold_changes[singles, 0])
    pairs = likeness[np.triu_indices(len(singles), 1)]
    assert (pairs > 0.6).sum() >= 5
    assert np.median(np.abs(pairs)) < 0.2


def test_exposure_is_known_under_every_mask_and_says_nothing_of_the_condition(screen):
    obs, columns = screen.obs, own_columns(screen)
    totals, labels = obs["total"].to_numpy(), obs["condition"].to_numpy(str)
    exposures = []
    for policy in POLICIES:
        masked = mask_counts(screen.counts, labels, columns, policy)
        exposures.append(mask_totals(totals, screen.counts, masked) - masked.toarray().sum(axis=1))
    np.testing.assert_array_equal(exposures[0], exposures[1])
    np.testing.assert_array_equal(exposures[0], exposures[2])
    logs = np.log(exposures[0])
    assert 0.35 < logs.std() < 0.45
    groups = [logs[labels == c] for c in [CTRL, *screen.conditions]]
    assert f_oneway(*groups).pvalue > 0.001


def test_guides_are_named_after_the_genes_they_target(screen):
    for condition, guide in zip(screen.obs["condition"], screen.obs["guide"], strict=True):
        assert [re.sub(r"_g\d$", "", part) for part in guide.split("+")] == condition.split("+")
    assert screen.obs.groupby("condition")["guide"].nunique().eq(2).all()


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("n_singles", 0, "at least 1"),
        ("n_doubles", 92, "0 to 91"),
        ("cells_per_condition", 0, "at least 1"),
        ("n_control", -1, "at least 0"),
        ("n_genes", 9, "at least 10"),
        ("n_batches", 0, "at least 1"),
        ("guides_per_target", 0, "at least 1"),
        ("self_activation", "knockout", "one of"),
        ("measured_targets", 1.1, "0 to 1"),
        ("unresponsive", 0.9, "0 to 2/3"),
        ("dispersion", 0.0, "above 0"),
        ("depth", float("nan"), "above 0"),
        ("imbalance", 1.0, "below 1"),
    ],
)
def test_arguments_out_of_range(argument, value, expected):
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*{expected}.*, got {value!r}"):
        simulate_screen(**{argument: value})
