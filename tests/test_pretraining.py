"""Pretraining: batches with hidden values, losses, resuming, and checkpoints that the official package reads."""

import dataclasses
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
import toy
from scipy.sparse import csr_matrix

from perturbret.alignment.chunks import ChunkedCounts
from perturbret.alignment.gene_space import (
    GeneSpaceError,
    GeneSpaceMismatch,
    read_gene_space,
    write_gene_space,
)
from perturbret.alignment.panels import align_screen
from perturbret.data.prepared import prepare
from perturbret.data.sources import DataNotFound
from perturbret.data.splits import make_split
from perturbret.networks.training import TrainingFailed
from perturbret.pretraining import run as pretraining_run
from perturbret.pretraining.run import open_pretraining, read_pretrained, run_pretraining, ship
from perturbret.runs.runs import RunExists
from perturbret.scgpt import corpus as corpus_module
from perturbret.scgpt import pretraining
from perturbret.scgpt.backbone import backbone_for, fit_scgpt
from perturbret.scgpt.checkpoint import load_checkpoint
from perturbret.scgpt.corpus import choose_vocabulary, make_corpus
from perturbret.scgpt.network import ScGPT, Shape
from perturbret.scgpt.pretraining import (
    HIDDEN,
    PAD_VALUE,
    PRESETS,
    Decoders,
    Plan,
    draw_batch,
    losses,
    pretrain,
    save_pretrained,
)
from perturbret.scgpt.vocabulary import SPECIALS, Vocabulary, load_vocabulary

GENES = np.array([f"G{i}" for i in range(30)])
PLAN = Plan(d_model=16, n_heads=2, d_hid=16, n_layers=1, steps=8, batch_cells=8, max_length=20, check_every=4)


def reference(name="ref", n_cells=60, genes=GENES, seed=0, totals=None):
    counts = csr_matrix(np.random.default_rng(seed).poisson(1.0, (n_cells, len(genes))).astype(np.float32))

    def read(size):
        for start in range(0, n_cells, size):
            yield counts[start : start + size], None if totals is None else totals[start : start + size]

    return ChunkedCounts(name, genes, None, n_cells, read), counts


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary((*GENES, "UNMEASURED", *SPECIALS), "test")


@pytest.fixture
def corpus(vocabulary, tmp_path):
    return make_corpus(
        [reference()[0], reference("other", 50, GENES[:20], 1)[0]], vocabulary, directory=tmp_path
    )


def test_corpus_holds_each_cells_genes_and_values(vocabulary, tmp_path):
    source, counts = reference()
    (part,) = make_corpus([source], vocabulary, directory=tmp_path)
    dense = counts.toarray()
    for i in (0, 7, 59):
        genes, values = part.cell(i)
        expected = np.log1p(dense[i] / dense[i].sum() * 1e4)
        np.testing.assert_array_equal(np.sort(genes), np.flatnonzero(dense[i]))
        np.testing.assert_allclose(values, expected[genes], rtol=1e-5)
    assert 0 < part.held_out.sum() < len(part.held_out) / 4
    again = make_corpus([source], vocabulary, directory=tmp_path)[0]
    np.testing.assert_array_equal(part.genes, again.genes)
    kept = ~part.held_out
    logged = np.log1p(dense / dense.sum(axis=1, keepdims=True) * 1e4)[kept]
    means = logged.sum(axis=0) / (dense[kept] > 0).sum(axis=0)
    np.testing.assert_allclose(part.gene_means(len(vocabulary))[:30], means, rtol=1e-5)
    assert np.isnan(part.gene_means(len(vocabulary))[30])


@pytest.mark.parametrize("size", [1, 7, 100])
def test_means_of_genes_are_the_same_however_the_files_are_cut(size, vocabulary, tmp_path, monkeypatch):
    counts = np.random.default_rng(0).poisson(0.5, (60, len(GENES))).astype(np.float32)
    counts[[0, 20, 21, 59]] = 0
    source = ChunkedCounts("ref", GENES, None, 60, lambda n_cells: iter([(csr_matrix(counts), None)]))
    (part,) = make_corpus([source], vocabulary, directory=tmp_path)
    whole = part.gene_means(len(vocabulary))
    monkeypatch.setattr(corpus_module, "_SLICE", size)
    np.testing.assert_allclose(part.gene_means(len(vocabulary)), whole, rtol=1e-12)


def test_memory_of_a_corpus_is_that_of_a_chunk(tmp_path, monkeypatch):
    """Ten times the cells, the same peak, in the making and in the means of genes."""
    genes = [f"G{i}" for i in range(1000)]
    vocabulary = Vocabulary((*genes, *SPECIALS), "test")

    def read(n_chunks):
        rng = np.random.default_rng(0)
        for _ in range(n_chunks):
            yield csr_matrix(rng.integers(1, 5, (100, 1000)).astype(np.float32)), None

    monkeypatch.setattr(corpus_module, "_SLICE", 50_000)
    peaks = []
    for n in (1, 4, 40):  # the first loads what is loaded once
        source = ChunkedCounts("ref", np.array(genes), None, 100 * n, lambda n_cells, n=n: read(n))
        tracemalloc.start()
        (part,) = make_corpus([source], vocabulary, directory=tmp_path)
        made = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        part.gene_means(len(vocabulary))
        peaks.append((made, tracemalloc.get_traced_memory()[1]))
        tracemalloc.stop()
        assert part.indptr[-1] == 100_000 * n
    (made, means), (made_of_more, means_of_more) = peaks[1:]
    assert made_of_more < 1.2 * made < 30e6
    assert means_of_more < 1.2 * means < 10e6


def test_a_corpus_of_other_cells_is_made_anew(vocabulary, tmp_path):
    first = make_corpus([reference(seed=0)[0]], vocabulary, directory=tmp_path)[0]
    second = make_corpus([reference(seed=5)[0]], vocabulary, directory=tmp_path)[0]
    assert first.indptr[-1] != second.indptr[-1] or (first.genes != second.genes).any()
    assert first.hash != second.hash


def test_a_corpus_of_other_totals_is_made_anew(vocabulary, tmp_path):
    first, second = (
        make_corpus([reference(totals=np.full(60, total))[0]], vocabulary, directory=tmp_path)[0]
        for total in (100.0, 200.0)
    )
    np.testing.assert_array_equal(first.genes, second.genes)
    assert (first.values > second.values).all() and first.hash != second.hash


def test_corpus_needs_references_and_genes(vocabulary, tmp_path):
    with pytest.raises(ValueError, match="expected at least one dataset"):
        make_corpus([], vocabulary, directory=tmp_path)
    odd = reference(genes=np.array([f"X{i}" for i in range(5)]))[0]
    with pytest.raises(ValueError, match="ref: expected genes of the vocabulary, found none of 5"):
        make_corpus([odd], vocabulary, directory=tmp_path)


def few(counts):
    """A dataset of these cells, each with one number for all genes."""
    matrix = csr_matrix(np.tile(np.asarray(counts, np.float32).reshape(-1, 1), len(GENES)))
    chunks = [(matrix, None)] if len(counts) else []
    return ChunkedCounts("few", GENES, None, len(counts), lambda n_cells: iter(chunks))


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ([], "few: expected at least 2 cells, one to train on and one to hold out, got 0"),
        ([1], "few: expected at least 2 cells, one to train on and one to hold out, got 1"),
        ([0, 0, 0], "few: expected counts of the vocabulary's genes, got none in 3 cells"),
        # Of three, the first is held out.
        ([1, 0, 0], "few: expected cells to train on with counts .* all 2 of 3 cells are empty"),
        ([0, 1, 1], "few: expected held-out cells with counts .* all 1 of 3 cells are empty"),
    ],
)
def test_a_dataset_too_small_to_train_on_and_hold_out_is_refused_by_name(counts, said, vocabulary, tmp_path):
    with pytest.raises(ValueError, match=said):
        make_corpus([reference()[0], few(counts)], vocabulary, directory=tmp_path)


def test_the_smallest_dataset_is_trained_on(corpus, vocabulary, tmp_path):
    (part,) = make_corpus([few([1, 1])], vocabulary, directory=tmp_path)
    made = pretrain([corpus[0], part], vocabulary, PLAN, seed=0, report=lambda text: None)
    assert np.isfinite(made.by_dataset.loc["few"]).all()


def test_what_cannot_be_pretrained_is_refused_before_the_first_step(corpus, vocabulary):
    part = corpus[0]
    for held_out, said in ((True, "got 0 and 60"), (False, "got 60 and 0")):
        other = dataclasses.replace(part, held_out=np.full(60, held_out))
        with pytest.raises(ValueError, match=f"ref: expected cells to train on and held-out cells, {said}"):
            pretrain([other], vocabulary, PLAN, seed=0)
    with pytest.raises(ValueError, match="max_length: expected at least 16 genes, got 15"):
        pretrain(corpus, vocabulary, dataclasses.replace(PLAN, max_length=15), seed=0)
    least = dataclasses.replace(PLAN, max_length=16)
    assert len(pretrain(corpus, vocabulary, least, seed=0, report=lambda text: None).history) == 2


def test_vocabulary_has_detected_genes_and_undetected_ones_with_a_symbol():
    genes = np.array(["TP53", "RP11-34P13.3", "CD3E", "AC000123.4"])
    counts = csr_matrix(np.array([[1, 2, 0, 0], [0, 1, 0, 0]], np.float32))
    source = ChunkedCounts("ref", genes, None, 2, lambda size: iter([(counts, None)]))
    chosen = choose_vocabulary([source], Vocabulary((*genes, "NOC2L", *SPECIALS), "all"))
    assert chosen.genes == ("TP53", "RP11-34P13.3", "CD3E")  # AC000123.4 is neither seen nor approved


def test_batches_hide_values_and_name_only_genes_that_are_absent(corpus, vocabulary):
    part, rng = corpus[0], np.random.default_rng(0)
    ids = {"pad_id": vocabulary.ids["<pad>"], "cls_id": vocabulary.ids["<cls>"]}
    batch = draw_batch(part, range(20), rng, length=6, hidden_share=0.5, **ids)
    assert batch.genes.shape[1] <= 7 and (batch.genes[:, 0] == ids["cls_id"]).all()
    assert not batch.hidden[:, 0].any() and not batch.hidden[batch.genes == ids["pad_id"]].any()
    assert 0.3 < batch.hidden[batch.genes < 30].mean() < 0.7
    for i in range(20):
        detected, _ = part.cell(i)
        absent = batch.absent[i][batch.absent[i] != ids["pad_id"]]
        assert not np.isin(absent, detected).any() and np.isin(absent, part.measured).all()
        assert np.isin(batch.genes[i, 1:][batch.genes[i, 1:] != ids["pad_id"]], detected).all()
    assert (batch.values[batch.genes == ids["pad_id"]] == PAD_VALUE).all()


def test_a_hidden_value_has_no_influence_on_its_guess(corpus, vocabulary):
    """Losses see hidden values as targets only: with guesses fixed at 0, they are the targets' mean squares."""
    shape = Shape(len(vocabulary), 16, 2, 16, 1, 0.0, vocabulary.ids["<pad>"])
    torch.manual_seed(0)
    network, decoders = ScGPT(shape).eval(), Decoders(16)
    batch = draw_batch(
        corpus[0], range(8), np.random.default_rng(1), length=9, hidden_share=0.4,
        pad_id=shape.pad_id, cls_id=vocabulary.ids["<cls>"],
    )  # fmt: skip
    seen = []
    network.value_encoder.register_forward_hook(lambda module, given, out: seen.append(given[0].clone()))
    with torch.no_grad():
        for weight in decoders.parameters():
            weight.zero_()
        found = losses(network, decoders, batch, pad_id=shape.pad_id)
    targets = batch.values[batch.hidden]
    assert found["gene"].item() == pytest.approx(np.square(targets).mean(), rel=1e-5)
    assert found["cell"].item() == pytest.approx(np.square(targets).mean(), rel=1e-5)
    assert found["absent"].item() == 0
    shown = set(batch.values[~batch.hidden & (batch.genes < 30)].tolist()) | {HIDDEN, PAD_VALUE}
    assert set(seen[0].ravel().tolist()) <= shown  # no value that is hidden everywhere gets in


def test_training_lowers_the_loss_and_repeats(corpus, vocabulary):
    plan = dataclasses.replace(PLAN, steps=150, check_every=50)
    first = pretrain(corpus, vocabulary, plan, seed=1, report=lambda text: None)
    again = pretrain(corpus, vocabulary, plan, seed=1, report=lambda text: None)
    assert first.history["loss"].iloc[-1] < 0.7 * first.history["loss"].iloc[0]
    assert (
        first.by_dataset.index.tolist() == ["ref", "other"] and np.isfinite(first.by_dataset.to_numpy()).all()
    )
    for a, b in zip(first.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_no_step_sees_a_held_out_cell_and_every_look_sees_them_alone(corpus, vocabulary, monkeypatch):
    drawn, steps = [], 30

    def spy(part, positions, *arguments, **keywords):
        drawn.append((part, np.asarray(positions)))
        return draw_batch(part, positions, *arguments, **keywords)

    monkeypatch.setattr(pretraining, "draw_batch", spy)
    plan = dataclasses.replace(PLAN, steps=steps)
    pretrain(corpus, vocabulary, plan, seed=0, report=lambda text: None)
    # Batches of looks are drawn once, before the first step.
    looks, stepped = drawn[:-steps], drawn[-steps:]
    assert len(looks) >= len(corpus) and {part.name for part, _ in looks} == {"ref", "other"}
    assert all(part.held_out[positions].all() for part, positions in looks)
    assert not any(part.held_out[positions].any() for part, positions in stepped)
    for part in corpus:  # and all others are seen
        seen = np.concatenate([positions for other, positions in stepped if other is part])
        assert len(np.unique(seen)) > 0.8 * (~part.held_out).sum()


def test_a_killed_run_goes_on_to_the_same_weights(corpus, vocabulary, tmp_path):
    def stop(text):
        if text.startswith("step 4/"):
            raise KeyboardInterrupt

    whole = pretrain(corpus, vocabulary, PLAN, seed=0, report=lambda text: None)
    state = tmp_path / "training.pt"
    with pytest.raises(KeyboardInterrupt):
        pretrain(corpus, vocabulary, PLAN, seed=0, state=state, report=stop)
    said = []
    resumed = pretrain(corpus, vocabulary, PLAN, seed=0, state=state, report=said.append)
    assert said[0] == "resumed after step 4"
    for a, b in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(a, b)
    said.clear()
    pretrain(corpus, vocabulary, dataclasses.replace(PLAN, steps=9), seed=0, state=state, report=said.append)
    assert said[0].startswith("step 4/9")  # a state of another plan is not gone on from


def test_a_loss_that_is_not_finite_stops(corpus, vocabulary):
    broken = ScGPT(Shape(len(vocabulary), 16, 2, 16, 1, 0.0, vocabulary.ids["<pad>"])).state_dict()
    broken["encoder.embedding.weight"] = torch.full_like(broken["encoder.embedding.weight"], float("nan"))
    with pytest.raises(TrainingFailed, match="step 1: expected a finite loss"):
        pretrain(corpus, vocabulary, PLAN, seed=0, start=broken, report=lambda text: None)


def test_checkpoint_reads_back_and_in_half_precision(corpus, vocabulary, tmp_path):
    made = pretrain(corpus, vocabulary, PLAN, seed=0, report=lambda text: None)
    save_pretrained(tmp_path / "full", made, vocabulary)
    save_pretrained(tmp_path / "half", made, vocabulary, half=True)
    said = []
    loaded = load_checkpoint(tmp_path / "full", report=said.append)
    assert "unused 9" in said[0] and loaded.token_settings["values"] == "log1p"
    for name, tensor in made.network.state_dict().items():
        assert torch.equal(tensor, loaded.network.state_dict()[name])
    half = load_checkpoint(tmp_path / "half", report=said.append).network
    assert next(half.parameters()).dtype == torch.float32
    weights = made.network.encoder.embedding.weight
    torch.testing.assert_close(half.encoder.embedding.weight, weights, atol=1e-3, rtol=1e-3)


def test_the_official_package_loads_what_a_run_leaves(tmp_path, monkeypatch):
    """Cell embeddings and both decoders of the official model equal ours with the weights that we wrote."""
    from scgpt_oracle import load_official

    run = open_run(monkeypatch, tmp_path, [reference()[0]])
    made = run_pretraining(run, report=lambda text: None)
    model = load_official(run.directory / "checkpoint")
    genes = torch.tensor([[run.vocabulary.ids["<cls>"], 3, 8, 11]])
    values = torch.tensor([[PAD_VALUE, 1.5, HIDDEN, 4.0]])
    padding = torch.zeros_like(genes, dtype=torch.bool)
    with torch.inference_mode():
        theirs = model(genes, values, padding, MVC=True)
        outputs = made.network.run(made.network.inputs(genes, values), None)
        torch.testing.assert_close(theirs["cell_emb"], outputs[:, 0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(theirs["mlm_output"], made.decoders.decoder(outputs), atol=1e-4, rtol=1e-3)
        ours = made.decoders.mvc_decoder(outputs[:, 0], made.network.encoder(genes))
        torch.testing.assert_close(theirs["mvc_output"], ours, atol=1e-4, rtol=1e-3)


def open_run(monkeypatch, tmp_path, references, **options):
    """A tiny run on the given references."""
    monkeypatch.setattr(pretraining_run, "load_references", lambda path, **keywords: list(references))
    small = Vocabulary((*GENES, *SPECIALS), "test")
    monkeypatch.setattr(
        pretraining_run, "load_vocabulary", lambda *place: load_vocabulary(*place) if place else small
    )
    return open_pretraining("tiny", **{"steps": 8, "outputs": str(tmp_path), **options})


@pytest.fixture
def spaced(tmp_path):
    """A screen, a reference with the same genes in another order and one more, and their space in a directory."""
    screen = toy.tiny_screen()
    order = np.random.default_rng(0).permutation(len(screen.genes))
    other, counts = reference(genes=np.array([*screen.genes[order], "EXTRA9"]), n_cells=50)
    with warnings.catch_warnings(action="ignore"):
        space = align_screen(screen, [other], n=15, split=make_split(screen.obs, seed=0))
    write_gene_space(space, tmp_path / "vocab")
    return screen, other, counts, space, tmp_path / "vocab"


def test_a_run_in_a_gene_space_and_a_training_run_that_refuses_another(spaced, tmp_path, monkeypatch):
    screen, other, counts, space, place = spaced
    run = open_run(monkeypatch, tmp_path, [other], gene_space=str(place))
    assert run.vocabulary.tokens == (*space.names, *SPECIALS) and len(space) == 15
    (part,) = run.corpus
    # Values in the corpus are those of the columns that bear the names.
    columns = {gene: column for column, gene in enumerate(other.genes)}
    dense, (genes, values) = counts.toarray(), part.cell(7)
    by_name = dense[7, [columns[run.vocabulary.tokens[gene]] for gene in genes]]
    np.testing.assert_allclose(values, np.log1p(by_name / dense[7].sum() * 1e4), rtol=1e-6)
    assert len(genes) == (dense[7, [columns[gene] for gene in space.names]] > 0).sum()

    run_pretraining(run, report=lambda text: None)
    checkpoint = run.directory / "checkpoint"
    assert read_gene_space(checkpoint) == space and run.directory.name.startswith("tiny-seed0-space-")
    prepared = prepare(screen, make_split(screen.obs, seed=0), mask="all_targets")
    settings = {"mode": "frozen", "checkpoint": str(checkpoint)}
    said = []
    fitted = fit_scgpt(prepared, seed=0, settings=settings, report=said.append)
    assert not any("WARNING" in line for line in said)
    assert fitted.encoder.backbone.origin["gene_space"]["cells"]["ref"] == "all"
    other_split = prepare(screen, make_split(screen.obs, seed=1), mask="all_targets")
    fit_scgpt(other_split, seed=1, settings=settings, report=said.append)
    assert any("chosen on these cells of simulated: train of in_dist-seed0" in line for line in said)
    backbone = backbone_for(
        screen.genes, checkpoint=checkpoint, init="pretrained", seed=0, report=lambda line: None
    )
    tokens = [backbone.vocabulary.tokens[i] if i >= 0 else None for i in backbone.token_ids]
    assert tokens == [gene if gene in space.names else None for gene in screen.genes]
    assert np.isfinite(fitted.encoder.embed(prepared.cells)).all()

    cells = dataclasses.replace(prepared.cells, genes=prepared.cells.genes[::-1])
    with pytest.raises(GeneSpaceMismatch, match=f"position 0: {space.names[0]} against {screen.genes[-1]}"):
        fit_scgpt(
            dataclasses.replace(prepared, cells=cells), seed=0, settings=settings, report=lambda line: None
        )
    shipped = tmp_path / "shipped"
    ship(run.directory, shipped)
    assert read_gene_space(shipped) == space


def test_references_that_are_not_those_of_the_space_are_refused(spaced, tmp_path, monkeypatch):
    _, other, _, space, place = spaced
    with pytest.raises(GeneSpaceError, match="ref2: expected one of the gene space's datasets"):
        open_run(monkeypatch, tmp_path, [dataclasses.replace(other, name="ref2")], gene_space=str(place))
    turned = dataclasses.replace(other, genes=other.genes[::-1])
    with pytest.raises(GeneSpaceError):
        open_run(monkeypatch, tmp_path, [turned], gene_space=str(place))
    # A map whose columns were sorted the wrong way, under its own hash: only values tell.
    columns = space.maps["ref"]
    wrong = dataclasses.replace(columns, columns=tuple(sorted(columns.columns)))
    write_gene_space(dataclasses.replace(space, maps={**space.maps, "ref": wrong}), place)
    with pytest.raises(GeneSpaceError, match="by name .* by position"):
        open_run(monkeypatch, tmp_path, [other], gene_space=str(place))


def test_a_run_without_reference_cells_says_simulated_and_is_reused(tmp_path, monkeypatch):
    monkeypatch.delenv("PERTURBRET_DATA", raising=False)
    options = {"steps": 2, "outputs": str(tmp_path)}
    run = open_pretraining("tiny", **options)
    assert run.simulated and run.plan.steps == 2
    made = run_pretraining(run, report=lambda text: None)
    again = run_pretraining(
        open_pretraining("tiny", **options), report=lambda text: pytest.fail("trained again")
    )
    assert torch.equal(made.network.encoder.embedding.weight, again.network.encoder.embedding.weight)
    assert read_pretrained(run.directory).history["step"].tolist() == made.history["step"].tolist()
    card = tmp_path / "shipped" / "README.md"
    card.parent.mkdir()
    card.write_text("what it is")
    ship(run.directory, card.parent)
    assert card.read_text() == "what it is"
    assert len(load_checkpoint(card.parent, report=lambda text: None).account.loaded) > 10
    with pytest.raises(RunExists, match="the run there has plan"):
        open_pretraining("tiny", steps=3, outputs=str(tmp_path))
    with pytest.raises(ValueError, match="preset: expected one of tiny, full, got 'huge'"):
        open_pretraining("huge", outputs=str(tmp_path))


def test_other_cells_under_the_same_name_are_another_run(tmp_path, monkeypatch):
    found = [reference(seed=0)[0]]
    monkeypatch.setattr(pretraining_run, "load_references", lambda path, **keywords: found)
    monkeypatch.setattr(pretraining_run, "load_vocabulary", lambda: Vocabulary((*GENES, *SPECIALS), "test"))
    options = {"steps": 2, "outputs": str(tmp_path)}
    run_pretraining(open_pretraining("tiny", **options), report=lambda text: None)
    found[0] = reference(seed=5)[0]
    with pytest.raises(RunExists, match="the run there has references"):
        open_pretraining("tiny", **options)


def test_a_dataset_asked_for_by_name_must_be_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PERTURBRET_DATA", str(tmp_path))
    with pytest.raises(DataNotFound):
        open_pretraining("tiny", names=["pbmc_10x_soupx"], outputs=str(tmp_path))


def test_presets_are_plans():
    assert set(PRESETS) == {"tiny", "full"} and PRESETS["tiny"].steps < PRESETS["full"].steps
