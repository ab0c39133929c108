"""Low-bit rows: the codec against its formula; logs of coded rows of any kind against the float32 log of the run."""

import functools
import itertools
import json
import shutil
import tracemalloc
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import linalg
from typer.testing import CliRunner

import loghook
from loghook.cli import app
from loghook.errors import ConfigError, LogExistsError, NotFiniteError, StateError
from loghook.influence import products
from loghook.influence.fidelity import compare
from loghook.log import maintain, reader
from loghook.log.codec import base, make_codec
from loghook.log.codec.lowbit import BITS
from tests.harness import log_and_ask, squares
from tests.killing import OPTIONS, Killer, Plan, assert_same, log_everything
from tests.test_influence import METHODS, make_log
from tests.test_maintain import flip, write

DTYPES = tuple(BITS)
ANY = pytest.mark.parametrize("dtype", DTYPES)
CODED = (*DTYPES, "lowrank1", "lowrank2")  # at rank 4 the last stores whole layers
ANY_CODED = pytest.mark.parametrize("dtype", CODED)


@functools.cache
def rotation(width):
    """R, in float64, as the page says."""
    b = max(2**i for i in range(13) if 2**i <= width)
    whole = width // b * b
    flips = 1 - 2 * (np.random.Philox(key=0).random_raw(whole) >> np.uint64(63)).astype(np.float64)
    mix = np.kron(np.eye(whole // b), linalg.hadamard(b) / b**0.5) * flips
    first, last = np.eye(width), np.eye(width)
    first[:whole, :whole] = mix
    last[width - whole :, width - whole :] = mix
    return first if whole == width else last @ first


def formula(x, bits):
    """Decoded values of one layer of one row, in float64, as the page says."""
    x = x.astype(np.float64)
    y = rotation(len(x)) @ x if bits == 1 else x
    s = np.abs(y).mean() if bits == 1 else np.abs(x).max() / (2 ** (bits - 1) - 1)
    if s < np.finfo(np.float32).tiny:
        return s, np.zeros_like(x)
    return s, s * (np.where(y > 0, 1, -1) @ rotation(len(x)) if bits == 1 else np.round(x / s))


@st.composite
def rows_of_layers(draw, dtype):
    widths = draw(st.lists(st.sampled_from([1, 2, 7, 8, 8, 9, 33]), min_size=1, max_size=6))
    rest, n = draw(st.integers(0, 3)), draw(st.integers(1, 4))
    finite = st.floats(-1, 1, width=32)
    x = draw(arrays(np.float32, (n, sum(widths) + rest), elements=finite))
    largest = 1e36 if dtype == "int1" else 3e38  # which may come back up to 64 times as large
    size = draw(arrays(np.float32, (n, 1), elements=st.sampled_from([0.0, 1.0, 1e-44, 1e-30, 1e30, largest])))
    return widths, rest, torch.from_numpy(x * size)


@ANY
@settings(deadline=None)
@given(data=st.data())
def test_codec_is_the_formula(dtype, data):
    widths, rest, x = data.draw(rows_of_layers(dtype))
    codec = make_codec(dtype, [(1, width) for width in widths], rest)
    stored = codec.encode(x)
    assert stored.shape == (len(x), codec.row_bytes) and stored.dtype == torch.uint8
    y = codec.decode(stored)
    assert torch.equal(y[:, sum(widths) :], x[:, sum(widths) :])
    ends = np.cumsum([0, *widths])
    for start, stop in itertools.pairwise(ends.tolist()):
        part = codec.decode(stored, slice(start, stop))
        assert torch.equal(part, y[:, start:stop])
        for a, b in zip(x[:, start:stop].numpy(), part.double().numpy(), strict=True):
            s, expected = formula(a, BITS[dtype])
            if np.array_equal(expected, b):
                continue
            if dtype == "int1":  # whether the smallest values and scales count is a matter of rounding
                turn = rotation(len(a))
                sure = np.abs(turn @ a) > 1e-5 * s
                assert s > 1e-38
                np.testing.assert_allclose((turn @ b)[sure], (turn @ expected)[sure], rtol=1e-5)
                np.testing.assert_allclose(np.abs(turn @ b), s, rtol=1e-5)
                continue
            # Whether the smallest scales count is a matter of rounding, and so is a value between two whole numbers.
            assert s > 1e-38 and np.abs(b - a).max() <= s * 0.5001
            tie = np.abs(np.abs(a / s) % 1 - 0.5) < 1e-4
            np.testing.assert_allclose(b[~tie], expected[~tie], rtol=1e-6)
    for place in range(len(x)):  # batches do not matter
        assert torch.equal(codec.encode(x[place : place + 1])[0], stored[place])


@ANY
def test_rows_do_not_depend_on_chunks(dtype, monkeypatch):
    codec = make_codec(dtype, [(10, 10), (10, 10), (8, 8), (3, 1)], 2)
    x = torch.randn(50, codec.width, generator=torch.Generator().manual_seed(0))
    stored, decoded = codec.encode(x), codec.decode(codec.encode(x))
    monkeypatch.setattr(base, "CHUNK", 300)
    assert torch.equal(codec.encode(x), stored) and torch.equal(codec.decode(stored), decoded)


@ANY
def test_signs_keep_the_inner_product_in_the_least_squares_sense(dtype):
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    codec = make_codec(dtype, [(8, 8)], 0)
    y = codec.decode(codec.encode(x))
    fitted = (x * y).sum(1) / y.square().sum(1)  # what y would have to be multiplied by to be closest to x
    np.testing.assert_allclose(fitted, 1, atol={"int8": 5e-3, "int4": 0.1, "int1": 1e-5}[dtype])


@pytest.mark.parametrize("shape", [(64, 64), (10, 32), (119, 119), (37, 5)])
def test_signs_of_rotated_values_are_worth_more_where_few_values_are_large(shape):
    """The gradient of one token is the outer product of two vectors: of all its values few are large."""
    draw = torch.Generator().manual_seed(0)
    g, x = (torch.randn(200, width, generator=draw) for width in shape)
    rows = torch.einsum("bo,bi->boi", g, x).flatten(1)
    decoded = make_codec("int1", [shape], 0).decode(make_codec("int1", [shape], 0).encode(rows))
    kept = torch.nn.functional.cosine_similarity(rows, decoded).mean()
    plain = torch.nn.functional.cosine_similarity(rows, rows.sign()).mean()
    assert kept > plain + 0.1
    if rows.shape[1] > 1000:
        assert abs(float(kept) - (2 / np.pi) ** 0.5) < 0.01  # as of values that are normally distributed


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    return make_log(tmp_path_factory.mktemp("low") / "float32", dtype="float32", shard_bytes=3000)


@pytest.fixture(scope="module")
def low(tmp_path_factory, exact):
    folder, logs = tmp_path_factory.mktemp("compressed"), {}
    for dtype in CODED:
        maintain.compress(exact[0].path, folder / dtype, dtype)
        logs[dtype] = loghook.load(folder / dtype)
    return logs


def stored(log):
    return torch.cat([block for _, block in log.blocks(stored=True)])


@ANY_CODED
def test_logging_coded_rows_equals_compressing(tmp_path, exact, low, dtype):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        direct, _, _ = make_log(tmp_path / "direct", dtype=dtype)
    assert [str(w.message) for w in caught if "whitened" in str(w.message)] == [] or dtype == "int1"
    assert torch.equal(stored(direct), stored(low[dtype])) and direct.data_ids == low[dtype].data_ids
    np.testing.assert_array_equal(direct.moments(), low[dtype].moments())
    np.testing.assert_array_equal(exact[0].moments(), direct.moments())
    for log in (direct, low[dtype]):
        assert not log.verify() and log.manifest.sealed and log.manifest.dtype == dtype
        assert log.fingerprint == exact[0].fingerprint
    assert low[dtype].manifest.history[0]["dtype"] == "float32"


@ANY_CODED
def test_rows_are_read_as_from_an_array(exact, low, dtype):
    log, expected = low[dtype], low[dtype].codec.decode(stored(low[dtype])).numpy()
    for name in log.layers:
        rows = log.rows(name)
        whole = expected[:, log.layout.columns[name]].reshape(rows.shape)
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows[:], whole)
        for key in (3, slice(5, 30, 3), slice(None, None, -1), [7, 2, 2], np.arange(40) % 3 == 0, (slice(2), 1)):
            np.testing.assert_array_equal(rows[key], whole[key])
    for size in (1, 7, None):
        np.testing.assert_array_equal(torch.cat([block for _, block in log.blocks(size)]), expected)
    np.testing.assert_array_equal(log.gather(np.array([39, 0, 5])), expected[[39, 0, 5]])


@pytest.mark.parametrize(
    ("dtype", "way"),
    [*((dtype, "integers") for dtype in DTYPES), *((dtype, "floats") for dtype in CODED), ("int1", "tables")],
)
def test_scores_are_those_of_the_decoded_rows(tmp_path, monkeypatch, low, exact, dtype, way):
    """A float64 log of the decoded rows is the reference: every method, option and layer."""
    if way == "integers" and not products.exact_integers():
        pytest.skip("this processor has no exact integer products")
    monkeypatch.setattr(products, "has_integer_products", lambda: way == "integers")
    if way == "floats":
        monkeypatch.setattr(products, "TABLES", 0)
    query = exact[1]
    maintain.compress(low[dtype].path, tmp_path / "decoded", "float64")
    decoded, log = loghook.load(tmp_path / "decoded"), loghook.load(low[dtype].path)
    monkeypatch.setattr(products, "UNPACKED", 100)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 3000)
    for method in METHODS:
        for options in ({}, {"normalize": "unit"}, {"layers": log.layers[1:]}):
            expected = decoded.influence(query, method, per_layer=True, **options)
            found = log.influence(query, method, per_layer=True, **options)
            allowed = 3e-4 * np.abs(expected.values).max()
            np.testing.assert_allclose(found.values, expected.values, rtol=1e-4, atol=allowed)
            np.testing.assert_allclose(found.by_layer, expected.by_layer, rtol=1e-4, atol=allowed)
            best = log.influence(query, method, top=5, **options)
            np.testing.assert_array_equal(best.values, -np.sort(-found.values, 1)[:, :5])
        np.testing.assert_allclose(log.self_influence(method), decoded.self_influence(method), rtol=1e-4)


def test_integer_products_are_of_the_questions_themselves(monkeypatch, low, exact):
    """Against float64 products with the decoded rows, also for questions of zeros and of very different sizes."""
    if not products.exact_integers():
        pytest.skip("this processor has no exact integer products")
    monkeypatch.setattr(products, "has_integer_products", lambda: True)
    generator = torch.Generator().manual_seed(0)
    for log in (low[dtype] for dtype in DTYPES):
        matrix = torch.randn(5, log.layout.gradient_width, generator=generator)
        matrix *= torch.tensor([1.0, 0.0, 1e-20, 1e20, 1.0])[:, None]
        rows = log.codec.decode(stored(log)).double()
        found, as_stored = products.products(log, matrix, log.layout.layers)
        assert as_stored
        expected = matrix.double() @ rows.T
        bound = matrix.double().norm(dim=1)[:, None] * rows.norm(dim=1)[None]
        assert ((found(stored(log)) - expected).abs() <= 5e-5 * bound).all()


def signs(x, layers):
    """What 1-bit rows say, in float64: of every layer the mean size times the signs, as the page says."""
    parts = [[formula(row, 1)[1] for row in part] for part in np.split(x.astype(np.float64), np.cumsum(layers)[:-1], 1)]
    return [np.stack(part) for part in parts]


@settings(deadline=None)
@given(
    widths=st.lists(st.sampled_from([1, 8, 8, 63, 64, 65, 130, 130, 520]), min_size=1, max_size=5),
    rest=st.integers(0, 2),
    queries=st.integers(1, products.FEW + 1),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_one_bit_questions_are_the_formula(widths, rest, queries, seed, data):
    codec, generator = make_codec("int1", [(1, width) for width in widths], rest), np.random.default_rng(seed)
    specs = [SimpleNamespace(name=str(i), width=width) for i, width in enumerate(widths)]
    chosen = data.draw(st.lists(st.sampled_from(range(len(widths))), min_size=1, unique=True).map(sorted))
    columns = {s.name: slice(e - s.width, e) for s, e in zip(specs, np.cumsum(widths).tolist(), strict=True)}
    log = SimpleNamespace(
        codec=codec, layers=tuple(columns), layout=SimpleNamespace(kinds={"gradients": columns}), dtype=torch.float32
    )
    x, q = (generator.normal(size=(n, codec.width)).astype(np.float32) for n in (7, queries))
    q[:, : widths[0]] *= data.draw(st.sampled_from([0.0, 1e-3, 1e6]))
    q = q[:, : codec.width - rest]
    asked, as_stored = products.products(log, torch.from_numpy(q), [specs[i] for i in chosen], "int1")
    assert as_stored
    found = asked(codec.encode(torch.from_numpy(x)))
    pairs = list(zip(signs(q, widths), signs(x[:, : q.shape[1]], widths), strict=True))
    expected = sum(pairs[i][0] @ pairs[i][1].T for i in chosen)
    size = sum(np.linalg.norm(pairs[i][0], axis=1)[:, None] * np.linalg.norm(pairs[i][1], axis=1) for i in chosen)
    assert (np.abs(found.numpy() - expected) <= 1e-6 * size).all()


@settings(deadline=None)
@given(
    widths=st.lists(st.sampled_from([1, 7, 8, 9, 64, 130, 520]), min_size=1, max_size=5),
    queries=st.integers(1, 10),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_sums_that_are_looked_up_are_products_with_the_decoded_rows(widths, queries, seed, data):
    codec, generator = make_codec("int1", [(1, width) for width in widths], 0), torch.Generator().manual_seed(seed)
    stored = codec.encode(torch.randn(7, codec.width, generator=generator))
    matrix = torch.randn(queries, codec.width, generator=generator)
    chosen = data.draw(st.lists(st.sampled_from(range(len(widths))), min_size=1, unique=True).map(sorted))
    ends = np.cumsum(widths).tolist()
    columns = np.concatenate([np.arange(ends[i] - widths[i], ends[i]) for i in chosen])
    rows, asked = codec.decode(stored).double()[:, columns], matrix.double()[:, columns]
    found = products._tables(codec, matrix, chosen)(stored)
    bound = asked.norm(dim=1)[:, None] * rows.norm(dim=1)[None]
    assert found.shape == (queries, 7) and ((found - asked @ rows.T).abs() <= 1e-6 * bound).all()


@pytest.mark.parametrize("many", [False, True])
def test_one_bit_questions_of_a_log(monkeypatch, low, exact, many):
    """All options; the last step of each method, at full precision, is what is cut to signs."""
    if many:
        monkeypatch.setattr(products, "FEW", 2)
    log, query, widths = low["int1"], exact[1], [spec.width for spec in low["int1"].layout.layers]
    rows = signs(log.gather(np.arange(len(log))).numpy(), widths)
    asked = signs(query.matrix.float().numpy(), widths)
    found = log.influence(query, "dot", per_layer=True, query_dtype="int1")
    for layer, q, x in zip(found.by_layer, asked, rows, strict=True):
        np.testing.assert_allclose(layer, q @ x.T, rtol=1e-4, atol=1e-5 * np.abs(q @ x.T).max())
    assert found.method == "dot (1-bit questions)" and "1-bit" in repr(found) and found.fidelity is None
    for method in ("ekfac", "fisher"):
        for options in ({}, {"normalize": "unit"}, {"normalize": "relatif"}, {"layers": log.layers[1:]}):
            full = log.influence(query, method, per_layer=True, query_dtype="int1", **options)
            np.testing.assert_allclose(full.by_layer.sum(0), full.values, rtol=1e-4, atol=1e-5)
            best = log.influence(query, method, top=5, query_dtype="int1", **options)
            np.testing.assert_array_equal(best.values, -np.sort(-full.values, 1)[:, :5])
            whole = log.influence(query, method, **options)
            assert not np.array_equal(whole.values, full.values) and whole.method == method
            assert min(np.corrcoef(a, b)[0, 1] for a, b in zip(whole.values, full.values, strict=True)) > 0.3


def test_one_bit_questions_want_one_bit_rows(low, exact):
    with pytest.raises(ConfigError, match=r"query_dtype='int1'.* stored as int8.*compress"):
        low["int8"].influence(exact[1], "dot", query_dtype="int1")
    with pytest.raises(ConfigError, match="query_dtype='int8' is unknown: choose one of None, 'int1'"):
        low["int8"].influence(exact[1], "dot", query_dtype="int8")


@pytest.mark.parametrize("queries, error", [(1, 5e-5), (2, 1e-6), (5, 1e-6), (6, 5e-5), (40, 5e-5)])
@ANY
def test_integer_products_lose_next_to_nothing(low, dtype, queries, error):
    """One question is multiplied a column at a time, two to five have three digits, the others two."""
    log = low[dtype]
    matrix = torch.randn(queries, log.layout.gradient_width, generator=torch.Generator().manual_seed(queries))
    rows = log.codec.decode(stored(log)).double()
    asked, as_stored = products.products(log, matrix, log.layout.layers)
    found = asked(stored(log) if as_stored else rows.float())
    bound = matrix.double().norm(dim=1)[:, None] * rows.norm(dim=1)[None]
    assert ((found - matrix.double() @ rows.T).abs() <= error * bound).all()


@pytest.mark.parametrize("quick", [True, False])
def test_integer_products_are_taken_where_they_are_quicker(monkeypatch, quick):
    """Processors without dot products of bytes have plain loops for them, several times as slow as floats."""
    times = iter([1.0, 2.0] if quick else [2.0, 1.0])
    monkeypatch.setattr(products, "_seconds", lambda work: work() is not None and next(times))
    assert products.has_integer_products.__wrapped__() is (quick and products.exact_integers())


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_too_wide_for_integer_sums_are_scored_without(monkeypatch, low, exact, dtype):
    expected = low[dtype].influence(exact[1], "dot").values
    monkeypatch.setattr(products, "WIDEST", 10)
    monkeypatch.setattr(products.torch, "_int_mm", lambda *_: pytest.fail("an integer product"))
    monkeypatch.setattr(low[dtype].codec, "decode", lambda *_: pytest.fail("decoded"))
    np.testing.assert_allclose(low[dtype].influence(exact[1], "dot").values, expected, rtol=1e-3, atol=1e-4)


def test_compress_reports_what_is_left(tmp_path, exact):
    log, reports = exact[0], {}
    for dtype in DTYPES:
        report = reports[dtype] = log.compress(tmp_path / dtype, dtype, queries=8, seed=1)
        assert report.bytes_per_sample == (log.codec.row_bytes, loghook.load(tmp_path / dtype).codec.row_bytes)
        assert (report.dtype, report.rows, report.queries) == (("float32", dtype), 40, 8)
        assert set(report.pearson) == set(report.top10) == {"dot", "ekfac"} and min(report.rows_per_second) > 0
    for method in ("dot", "ekfac"):
        assert reports["int8"].pearson[method] > 0.999 and reports["int8"].top10[method] > 0.9
        assert reports["int8"].pearson[method] > reports["int4"].pearson[method] > reports["int1"].pearson[method]
    same = log.compress(tmp_path / "same", "float32")
    assert same.pearson == pytest.approx({"dot": 1, "ekfac": 1}) and same.top10 == {"dot": 1, "ekfac": 1}


def test_fidelity_is_what_the_scores_of_both_logs_say(tmp_path, exact):
    log = exact[0]
    report = log.compress(tmp_path / "int1", "int1", queries=len(log))
    rows, low = (
        r.gather(np.arange(len(r)), slice(0, r.layout.gradient_width)).double().numpy()
        for r in (log, loghook.load(tmp_path / "int1"))
    )
    pairs = [(np.delete(rows @ q, i), np.delete(low @ q, i)) for i, q in enumerate(rows)]
    pearson = np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs])
    overlap = np.mean([len(set(np.argsort(-a)[:10]) & set(np.argsort(-b)[:10])) / 10 for a, b in pairs])
    assert report.pearson["dot"] == pytest.approx(pearson, abs=1e-4)
    assert report.top10["dot"] == pytest.approx(overlap, abs=0.01)


def test_logs_are_compared_one_question_at_a_time(tmp_path):
    """What numpy takes for it, which has the scores from torch, is less than the scores of one log."""
    model, rows, queries = torch.nn.Linear(2, 1, bias=False), 4000, 50
    log, _ = log_and_ask(tmp_path, model, squares, torch.randn(rows, 2), projection="none")
    compare(log, log, queries=1, seed=0)  # what is kept with an open log
    tracemalloc.start()
    try:
        found = compare(log, log, queries=queries, seed=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.pearson == {"dot": 1, "ekfac": 1} and peak < 4 * queries * rows


def test_compress_refuses(tmp_path, exact):
    log = exact[0]
    with pytest.raises(ConfigError, match=r"int2.*choose one of"):
        log.compress(tmp_path / "out", "int2")
    for queries in (0, 2.5, "3"):
        with pytest.raises(ConfigError, match=r"queries=.* must be a whole number"):
            log.compress(tmp_path / "out", queries=queries)
    assert not (tmp_path / "out").exists()
    with pytest.raises(LogExistsError):
        log.compress(log.path)
    shutil.copytree(log.path, tmp_path / "open")
    maintain.reopen(tmp_path / "open")
    with pytest.raises(StateError, match="not finished"):
        loghook.load(tmp_path / "open").compress(tmp_path / "out")
    model = torch.nn.Linear(4, 4)
    large = {"block": {"scale": 1e6}, "projection": "none"}
    log_and_ask(tmp_path / "large", model, lambda m, x: m(x).sum(), torch.ones(12, 4), **large)
    with pytest.raises(NotFiniteError, match="too narrow"):
        loghook.load(tmp_path / "large").compress(tmp_path / "out", "float16")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["large", "open"]


def test_command(tmp_path, exact):
    result = CliRunner().invoke(app, ["compress", str(exact[0].path), str(tmp_path / "out"), "--dtype", "int1"])
    assert result.exit_code == 0 and "times fewer" in result.output and "ekfac  Pearson 0." in result.output
    assert loghook.load(tmp_path / "out").manifest.dtype == "int1"
    shown = CliRunner().invoke(app, ["info", str(tmp_path / "out"), "--json"])
    assert json.loads(shown.output)["dtype"] == "int1"


def test_activations_are_not_quantised(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    x = torch.randn(4, 6)
    watch = {"activations": "mean", "output_gradients": "sum"}
    log, _ = log_and_ask(tmp_path, model, lambda m, x: m(x).sum(), x, watch=watch, rank=4, dtype="int4")
    np.testing.assert_array_equal(log.rows("0", "activations")[:], x)
    np.testing.assert_array_equal(log.rows("2", "output_gradients")[:], np.ones((4, 3)))


def test_one_bit_is_a_fifteenth_of_bfloat16():
    for rank in (32, 64):
        layers = [(rank, rank)] * 224
        assert make_codec("int1", layers, 0).row_bytes * 15 <= make_codec("bfloat16", layers, 0).row_bytes


# What the log does for every dtype.


def parts(log):
    return {i: row.numpy().tobytes() for i, row in zip(log.data_ids, stored(log), strict=True)}


@ANY_CODED
def test_delete_merge_append_and_repair(tmp_path, dtype):
    options = {"dtype": dtype, "shard_bytes": 1, "commit_seconds": 1e-9}
    whole = parts(write(tmp_path / "whole", list(range(40)), **options))
    a, b = (write(tmp_path / name, list(ids), **options) for name, ids in (("a", range(20)), ("b", range(20, 40))))
    maintain.merge(tmp_path / "out", [a.path, b.path])
    log = loghook.load(tmp_path / "out")
    assert parts(log) == whole and not log.verify()
    assert maintain.delete(tmp_path / "out", [3, 30]).rows == 38
    log = loghook.load(tmp_path / "out")
    assert parts(log) == {i: row for i, row in whole.items() if i not in (3, 30)} and not log.verify()
    maintain.reopen(b.path)
    assert parts(write(b.path, list(range(40)), resume=True, **options)) == whole
    flip(a.path / "rows-00000-00001.safetensors", -1)
    assert "do not match their checksum" in loghook.load(a.path).verify()[0]
    lost = maintain.repair(a.path).ids
    log = loghook.load(a.path)
    assert 0 < len(lost) < 20 and not log.verify()
    assert parts(log) == {i: whole[i] for i in range(20) if i not in lost}


@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_a_killed_run_ends_as_if_it_never_was(tmp_path, number):
    options = OPTIONS[number] | {"dtype": ("int8", "lowrank1")[number % 2]}
    log_everything(Plan(str(tmp_path / "whole"), options))
    killer = Killer(number)
    killer.until_done(4, path=str(tmp_path / "run"), options=options)
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert torch.equal(stored(loghook.load(tmp_path / "run")), stored(loghook.load(tmp_path / "whole")))
    assert killer.kills


@ANY_CODED
def test_repeats_and_many_shards_become_few(tmp_path, exact, dtype):
    log = write(tmp_path / "run", [0, 1, 2, 3, 2, 5, 6, 7, *range(8, 40)], dtype="float32", shard_bytes=1)
    maintain.compress(log.path, tmp_path / "out", dtype)
    small = loghook.load(tmp_path / "out")
    files = [len(list(path.glob("rows-*"))) for path in (log.path, small.path)]
    assert (
        files[0] > files[1] == len({place * small.codec.row_bytes // log.codec.row_bytes for place in range(files[0])})
    )
    assert small.data_ids == log.data_ids and small.repeats == log.repeats and not small.verify()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_floats_are_widened_a_piece_at_a_time(tmp_path, monkeypatch, dtype):
    log, query, _ = make_log(tmp_path / "run", n=80, dtype=dtype)
    assert any(spec.width > 10 for spec in log.layout.layers)
    monkeypatch.setattr(products, "WIDENED", 10)
    monkeypatch.setattr(products, "UNPACKED", 140)  # seven rows of ten columns, or more for more threads
    rows = log.gather(np.arange(80)).double().numpy()
    found = log.influence(query, "dot", per_layer=True)
    np.testing.assert_allclose(found.values, query.matrix.double().numpy() @ rows.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.by_layer.sum(0), found.values, rtol=1e-5, atol=1e-6)


def test_products_by_layer_widen_their_own_columns_alone(tmp_path, monkeypatch):
    log, query, _ = make_log(tmp_path / "run", n=80, dtype="bfloat16")
    widened, inner = [], products.inner
    monkeypatch.setattr(products, "inner", lambda few, rows: widened.append(rows.numel()) or inner(few, rows))
    log.influence(query, "dot", per_layer=True)
    # Once for all layers together, and once for each by itself.
    assert sum(widened) == 2 * 80 * log.layout.gradient_width


@pytest.mark.parametrize("dtype", ["int8", "int4", "bfloat16"])
def test_memory_to_widen_rows_in_is_that_of_a_block(monkeypatch, tmp_path, low, dtype):
    """Also for layers whose least number of rows would not fit in memory, and for many products at once, by layer."""
    monkeypatch.setattr(products, "has_integer_products", lambda: False)
    log = low[dtype] if dtype in low else make_log(tmp_path / "run", dtype=dtype)[0]
    made, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: made.append(size) or empty(*size, **options))
    asked = [products.products(log, torch.randn(3, log.layout.gradient_width), [spec])[0] for spec in log.layout.layers]
    assert not made  # before there is a block
    block = next(log.blocks(rows=2, stored=True))[1]
    assert torch.isfinite(sum(product(block) for product in asked)).all()
    assert made and all(size <= 2 * (log.layout.gradient_width + 7) for (size,) in made)


def test_tables_stay_within_their_limit(monkeypatch, low):
    """With the questions of zeros that fill a vector, and the bits that fill a byte."""
    monkeypatch.setattr(products, "has_integer_products", lambda: False)
    monkeypatch.setattr(products, "_tables", lambda *_: "looked up")
    log = low["int1"]
    sums = 256 * sum(-(-spec.width // 8) for spec in log.layout.layers)
    for queries, lanes in ((1, 1), (2, 8), (8, 8), (9, 16)):
        for limit, fits in ((4 * sums * lanes, True), (4 * sums * lanes - 1, False)):
            monkeypatch.setattr(products, "TABLES", limit)
            product, _ = products.products(log, torch.randn(queries, log.layout.gradient_width), log.layout.layers)
            assert (product == "looked up") is fits


def test_scores_and_what_is_kept_of_them_are_not_rounded_by_autocast(tmp_path):
    log, query, _ = make_log(tmp_path / "run", dtype="float32")
    expected = log.influence(query, "ekfac").values
    with torch.autocast("cpu", torch.bfloat16):
        again = loghook.load(log.path)
        np.testing.assert_array_equal(again.influence(query, "ekfac").values, expected)
        rounded = again.self_influence("ekfac")
    np.testing.assert_array_equal(rounded, make_log(tmp_path / "other", dtype="float32")[0].self_influence("ekfac"))
    np.testing.assert_array_equal(rounded, loghook.load(log.path).self_influence("ekfac"))
