"""Encoders: features and layers by hand, embeddings that depend on the cell alone, saving without loss."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from toy import toy_cells

from perturbret.data.prepared import Cells, Context
from perturbret.encoders import base as encoders
from perturbret.encoders import bayes
from perturbret.encoders.base import Average, Encoder, Layer, compute_features, load_encoder

CONTEXT = Context("toy", "data", "in_dist-seed0", "split", "all_targets", 3, "genes")


def cells(counts, totals=None, batch=None, obsm=None) -> Cells:
    counts = np.asarray(counts, np.float32)
    return Cells(
        csr_matrix(counts),
        counts.sum(axis=1).astype(float) if totals is None else np.asarray(totals, float),
        np.array([f"gene{i}" for i in range(counts.shape[1])]),
        np.array([f"cell{i}" for i in range(len(counts))]),
        None if batch is None else np.array(batch),
        {} if obsm is None else obsm,
    )


def encoder(layers=(), head=None, features="log1p", settings=None, **changes) -> Encoder:
    settings = {"target_sum": 10} if settings is None else settings
    classes = changes.pop("classes", ("A", "B"))
    made = {"kind": "toy", "log_prior": None, "context": CONTEXT, **changes}
    return Encoder(
        features=features, settings=settings, layers=tuple(layers), head=head, classes=classes, **made
    )


def random_cells(n, rng):
    return cells(rng.poisson(2, (n, 3)), totals=rng.integers(50, 500, n), batch=rng.choice(["x", "y"], n))


def two_layers(rng):
    return encoder(
        [
            Layer(rng.normal(size=(3, 7)), rng.normal(size=7), relu=True),
            Layer(rng.normal(size=(7, 5)), np.ones(5)),
        ],
        Layer(rng.normal(size=(5, 2)), rng.normal(size=2)),
        log_prior=np.log([0.3, 0.7]),
    )


@pytest.mark.filterwarnings("error")
def test_expression_is_normalised_by_the_total_and_layers_follow_by_hand():
    # 4 of 20 UMIs at a target of 10 are 2: log(3); 1 of 5 is the same; no UMIs are 0, not 0 / 0.
    some = cells([[4, 0, 0], [0, 1, 0], [0, 0, 0]], totals=[20, 5, 0])
    log3 = np.log(3)
    first = Layer([[1, -1], [2, 0], [0, 0]], [0.5, 0.5], relu=True)
    second = Layer([10, 100], [1, 2])
    found = encoder([first, second]).embed(some)
    hidden = np.array([[log3 + 0.5, 0], [2 * log3 + 0.5, 0.5], [0.5, 0.5]])
    np.testing.assert_allclose(found, hidden * [10, 100] + [1, 2], rtol=1e-6)
    assert found.dtype == np.float32


def test_a_vector_scales_each_feature_and_no_layer_leaves_features():
    some = cells([[4, 0, 1]], totals=[20])
    plain = np.log1p([[2, 0, 0.5]])
    np.testing.assert_allclose(encoder().embed(some), plain, rtol=1e-6)
    scaled = encoder([Layer([1, 2, 3], [1, 1, 1])]).embed(some)
    np.testing.assert_allclose(scaled, plain * [1, 2, 3] + 1, rtol=1e-6)


def test_log_probabilities_by_hand():
    made = encoder([], Layer([[1, 0], [0, 1], [0, 0]], [0, np.log(2)]))
    np.testing.assert_allclose(
        np.exp(made.log_proba(np.array([[0, 0, 9], [np.log(4), 0, 9]], np.float32))),
        [[1 / 3, 2 / 3], [2 / 3, 1 / 3]],
        rtol=1e-6,
    )
    assert made.log_proba(np.zeros((1, 3))).dtype == np.float64
    assert encoder().log_proba(np.zeros((1, 3))) is None


def test_large_logits_do_not_overflow():
    found = encoder([], Layer([[1, 0], [0, 1], [0, 0]], [0, 0])).log_proba(
        np.array([[3e4, 0, 0]], np.float32)
    )
    np.testing.assert_allclose(found, [[0, -3e4]])


def test_other_features_by_hand():
    some = cells(
        [[4, 0, 0], [3, 1, 0]], totals=[20, 6], batch=["b", "c"], obsm={"X_a": np.array([[1.0], [2.0]])}
    )
    np.testing.assert_array_equal(compute_features("constant", some, {}), [[1], [1]])
    np.testing.assert_allclose(compute_features("depth", some, {}), np.log([[21, 2], [7, 3]]), rtol=1e-6)
    np.testing.assert_array_equal(compute_features("batch", some, {"batches": ["a", "b"]}), [[0, 1], [0, 0]])
    np.testing.assert_array_equal(compute_features("obsm:X_a", some, {}), [[1], [2]])
    chosen = compute_features("log1p", some, {"target_sum": 1, "columns": [1]})
    np.testing.assert_allclose(chosen.toarray(), np.log1p([[0], [1 / 6]]), rtol=1e-6)
    no_batch = cells([[1, 1, 1]])
    np.testing.assert_array_equal(compute_features("batch", no_batch, {"batches": []}), [[1]])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("log2", "features: expected one of .*got 'log2'"),
        ("obsm:X_b", r"obsm: expected one of \['X_a'\], got 'X_b'"),
    ],
)
def test_unknown_features_are_named(name, said):
    with pytest.raises(ValueError, match=said):
        compute_features(name, cells([[1, 1, 1]], obsm={"X_a": np.zeros((1, 2))}), {})


def test_a_cell_is_embedded_alike_in_any_company(monkeypatch):
    rng = np.random.default_rng(0)
    # Wide enough that a matrix product in float32 would sum one row in another order than 700.
    wide = [
        Layer(rng.normal(size=(3, 300)), rng.normal(size=300), relu=True),
        Layer(rng.normal(size=(300, 64)), np.ones(64)),
    ]
    some, made = random_cells(700, rng), encoder(wide)
    whole = made.embed(some)
    order = rng.permutation(700)
    np.testing.assert_array_equal(made.embed(some.take(order)), whole[order])
    np.testing.assert_array_equal(np.concatenate([made.embed(some.take([i])) for i in range(50)]), whole[:50])
    monkeypatch.setattr(encoders, "_CHUNK_VALUES", 1)
    np.testing.assert_array_equal(made.embed(some), whole)


def test_no_cells_have_no_embeddings():
    assert two_layers(np.random.default_rng(0)).embed(cells(np.zeros((0, 3)))).shape == (0, 5)


@pytest.mark.parametrize("variant", ["full", "bare"])
def test_loading_gives_back_every_bit(tmp_path, variant):
    rng = np.random.default_rng(1)
    made = two_layers(rng) if variant == "full" else encoder(features="depth", settings={})
    made.save(tmp_path / "encoder")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "encoder",
        "encoder.json",
        "weights.safetensors",
    ]
    loaded = load_encoder(tmp_path)
    for name in ("kind", "features", "settings", "classes", "context"):
        assert getattr(loaded, name) == getattr(made, name)
    assert loaded.context == CONTEXT and isinstance(loaded.classes, tuple)
    some = random_cells(30, rng)
    embeddings = made.embed(some)
    assert loaded.embed(some).tobytes() == embeddings.tobytes()
    if variant == "full":
        assert loaded.log_proba(embeddings).tobytes() == made.log_proba(embeddings).tobytes()
        assert loaded.log_prior.tobytes() == made.log_prior.tobytes()
        assert [layer.relu for layer in loaded.layers] == [True, False]
    else:
        assert loaded.head is None and loaded.log_prior is None and loaded.layers == ()


def test_the_files_are_json_and_plain_tensors(tmp_path):
    two_layers(np.random.default_rng(0)).save(tmp_path / "encoder")
    assert json.loads((tmp_path / "encoder" / "encoder.json").read_text())["format"] == "layers"
    stored = (tmp_path / "encoder" / "weights.safetensors").read_bytes()
    length = int.from_bytes(stored[:8], "little")
    header = json.loads(stored[8 : 8 + length])
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"F32", "F64"}


def test_a_save_that_fails_leaves_the_former_encoder(tmp_path):
    two_layers(np.random.default_rng(0)).save(tmp_path / "encoder")
    before = (tmp_path / "encoder" / "weights.safetensors").read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        encoder(settings={"target_sum": float("nan")}).save(tmp_path / "encoder")
    assert (tmp_path / "encoder" / "weights.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]
    encoder().save(tmp_path / "encoder")
    assert load_encoder(tmp_path).layers == ()


def test_formats_are_told_apart(tmp_path, monkeypatch):
    two_layers(np.random.default_rng(0)).save(tmp_path / "null_encoder")
    assert load_encoder(tmp_path, "null_encoder").kind == "toy"
    with pytest.raises(FileNotFoundError, match="expected a saved encoder, found no encoder.json"):
        load_encoder(tmp_path)
    path = tmp_path / "null_encoder" / "encoder.json"
    path.write_text(json.dumps({"format": "encoders.bayes"}))
    monkeypatch.setattr(bayes, "load", lambda directory, cache: directory)
    assert load_encoder(tmp_path, "null_encoder") == tmp_path / "null_encoder"
    for form in ("torch", "os.path", "encoders.gone", "..encoders.bayes", None):
        path.write_text(json.dumps({"format": form}))
        with pytest.raises(ValueError, match="expected format 'layers', 'average' or a module of perturbret"):
            load_encoder(tmp_path, "null_encoder")


def test_shapes_that_cannot_be_are_named():
    with pytest.raises(ValueError, match=r"layer: expected a weight .* got \(3, 2\) and \(3,\)"):
        Layer(np.zeros((3, 2)), np.zeros(3))
    with pytest.raises(ValueError, match="head: expected 2 classes, got 3"):
        encoder(head=Layer(np.zeros((2, 3)), np.zeros(3)))
    with pytest.raises(ValueError, match="cells: expected 3 genes, got 4"):
        encoder().embed(toy_cells(["A"], ["train"], counts=np.ones((1, 4))).cells)


def test_nothing_but_a_step_of_this_package_is_made_from_a_file(tmp_path):
    two_layers(np.random.default_rng(0)).save(tmp_path / "encoder")
    path = tmp_path / "encoder" / "encoder.json"
    saved = json.loads(path.read_text())
    for module, name in (
        ("os", "system"),
        ("perturbret.encoders.base", "Path"),
        ("perturbret.encoders.base", "gone"),
    ):
        saved["layers"][0] |= {"module": module, "name": name}
        path.write_text(json.dumps(saved))
        with pytest.raises(
            ValueError, match=f"layers: expected steps of perturbret.encoders, got {module}.{name}"
        ):
            load_encoder(tmp_path)


def test_an_average_is_of_encoders_with_classifiers_made_for_the_same():
    one = two_layers(np.random.default_rng(0))
    with pytest.raises(ValueError, match="members: expected at least one encoder, each with class prob"):
        Average("toy", {}, (one, encoder()))
    with pytest.raises(ValueError, match="members: expected the same classes and context, got 2 of them"):
        Average("toy", {}, (one, replace(one, classes=("A", "C"))))
