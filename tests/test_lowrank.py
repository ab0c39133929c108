"""Rows of low rank: factors against the singular value decomposition in float64, their layout, logs of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loghook
from loghook.influence import products
from loghook.log import maintain
from loghook.log.codec import base, make_codec
from loghook.log.codec.lowrank import TERMS, best_factors
from tests.test_influence import data, make_log

ANY = pytest.mark.parametrize("dtype", tuple(TERMS))


def optimum(x, c):
    """Error of the best approximation of rank c, from the singular values in float64."""
    return np.sqrt((np.linalg.svd(x.astype(np.float64), compute_uv=False)[..., c:] ** 2).sum(-1))


@st.composite
def matrices(draw):
    """Three float32 matrices with singular values of some kind and of some size."""
    k_out, k_in = draw(st.integers(3, 40)), draw(st.integers(3, 40))
    k = min(k_out, k_in)
    r, steps = draw(st.floats(0.1, 1)), draw(st.integers(0, k))
    values = draw(
        st.sampled_from([r ** np.arange(k), np.where(np.arange(k) < steps, 1.0, r), np.arange(k) < steps, np.zeros(k)])
    )
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    u, v = (np.linalg.qr(rng.standard_normal((3, n, n)))[0][..., :k] for n in (k_out, k_in))
    size = draw(st.sampled_from([1e-44, 1e-30, 1.0, 1e30]))
    return ((u * values) @ np.swapaxes(v, 1, 2) * size).astype(np.float32)


@settings(deadline=None, max_examples=60)
@given(matrices(), st.sampled_from([1, 2, 4, 8]))
def test_factors_are_within_one_percent_of_the_svd(x, c):
    c = min(c, *x.shape[1:])
    left, right = (side.double().numpy() for side in best_factors(torch.from_numpy(x), c))
    error = np.linalg.norm(x - np.swapaxes(left, 1, 2) @ right, axis=(1, 2))
    norm = np.linalg.norm(x.astype(np.float64), axis=(1, 2))
    assert (error <= 1.01 * optimum(x, c) + 1e-5 * norm + 1e-37).all()  # what is below 1.2e-38 counts as nothing
    sizes = np.linalg.norm(left, axis=2)
    assert (np.diff(sizes, axis=1) <= 1e-5 * norm[:, None]).all()  # the strongest first


def test_the_weakest_terms_are_in_order_too():
    """Beside the strongest their squares vanish in float32."""
    rng, values = np.random.default_rng(0), 0.12 ** np.arange(17)
    u, v = (np.linalg.qr(rng.standard_normal((100, n, n)))[0][..., :17] for n in (17, 30))
    left, _ = best_factors(torch.from_numpy(((u * values) @ np.swapaxes(v, 1, 2)).astype(np.float32)), 8)
    sizes = left.norm(dim=2)
    assert (sizes[:, 1:] <= sizes[:, :-1] * (1 + 1e-6)).all()


def test_factors_of_gradients_are_the_best():
    """Sums over a few tokens of heavy-tailed outer products, at the ranks that logs have."""
    rng = np.random.default_rng(0)
    for k in (32, 64, 96):
        x_BSk, g_BSk = (rng.standard_t(3, (12, 40, k)) * np.arange(1, k + 1) ** -0.5 for _ in range(2))
        x = np.einsum("bso,bsi->boi", g_BSk, x_BSk).astype(np.float32)
        for c in (1, 2, 4, 8):
            left, right = (side.double().numpy() for side in best_factors(torch.from_numpy(x), c))
            error = np.linalg.norm(x - np.swapaxes(left, 1, 2) @ right, axis=(1, 2))
            assert (error <= 1.002 * optimum(x, c)).all()


SHAPES = [(20, 24), (20, 24), (24, 20), (3, 5), (1, 30), (20, 24)]  # in factors where they are smaller, else whole


@ANY
def test_a_stored_row_is_what_the_page_says(dtype):
    c, n, rest = int(dtype[-1]), 4, 3
    sizes = [min(c * (o + i), o * i) for o, i in SHAPES]
    ends, widths = np.cumsum([0, *(o * i for o, i in SHAPES)]), [o * i for o, i in SHAPES]
    codec = make_codec(dtype, SHAPES, rest)
    assert codec.row_bytes == -(-(2 * sum(sizes) + 4 * rest) // 4) * 4 and codec.width == sum(widths) + rest
    x = torch.randn(n, codec.width, generator=torch.Generator().manual_seed(0))
    x[1, : widths[0]] = 0
    stored = codec.encode(x)
    decoded = codec.decode(stored)
    assert torch.equal(decoded[:, -rest:], x[:, -rest:])
    for row, values, given_row in zip(stored.numpy(), decoded.numpy(), x.numpy(), strict=True):
        place = 4 * rest
        for (o, i), size, start in zip(SHAPES, sizes, ends, strict=False):
            numbers = (row[place : place + 2 * size].copy().view("<u2").astype("<u4") << 16).view("<f4")
            place += 2 * size
            whole = given_row[start : start + o * i].reshape(o, i)
            if size == o * i:
                expected = torch.from_numpy(whole.copy()).bfloat16().float().numpy()
            else:
                left, right = numbers[: c * o].reshape(c, o), numbers[c * o :].reshape(c, i)
                expected = np.zeros((o, i), np.float32)
                for j in range(c):
                    expected += left[j, :, None] * right[j]
                bound = 1.01 * optimum(whole, c) + c * 2**-8 * np.linalg.norm(whole)
                assert np.linalg.norm(whole - expected) <= bound
            np.testing.assert_array_equal(values[start : start + o * i].reshape(o, i), expected)
            part = codec.decode(stored, slice(int(start), int(start + o * i)))
            np.testing.assert_array_equal(part, decoded[:, start : start + o * i])
        assert len(row) - place in (0, 2) and not row[place:].any()


@ANY
def test_rows_do_not_depend_on_their_batch(dtype, monkeypatch):
    codec = make_codec(dtype, SHAPES, 1)
    x = torch.randn(9, codec.width, generator=torch.Generator().manual_seed(0))
    stored = codec.encode(x)
    for place in range(9):
        assert torch.equal(codec.encode(x[place : place + 1].clone())[0], stored[place])
    monkeypatch.setattr(base, "CHUNK", 600)
    assert torch.equal(codec.encode(x), stored)


def test_rows_of_low_rank_lose_nothing_but_digits(tmp_path):
    """One token a sample: every gradient is an outer product, so that one term is the whole of it."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(20, 16), data(30)[:, :1].float().repeat(1, 1, 4)
    with loghook.init(tmp_path / "run", projection="none", dtype="float32") as run:
        run.watch(model)
        with run(data_id=list(range(30))):
            model(x).pow(3).sum().backward()
        with run.query(data_id=["a", "b"]) as query:
            model(x[:2]).pow(2).sum().backward()
        run.finalize()
    log = loghook.load(tmp_path / "run")
    report = log.compress(tmp_path / "low", "lowrank1")
    assert report.bytes_per_sample == (4 * 21 * 16, 2 * (21 + 16) + 2) and report.dtype == ("float32", "lowrank1")
    assert min(report.pearson.values()) > 0.9999
    a, b = (one.influence(query, "dot").values for one in (log, loghook.load(tmp_path / "low")))
    np.testing.assert_allclose(b, a, rtol=0, atol=0.01 * np.abs(a).max())


def test_more_terms_keep_more_of_the_scores(tmp_path):
    log, _, _ = make_log(tmp_path / "log", dtype="float32", projection="none")
    reports = [log.compress(tmp_path / dtype, dtype) for dtype in ("lowrank1", "lowrank2", "lowrank8")]
    assert reports[0].pearson["dot"] < reports[1].pearson["dot"] < 1.0001
    assert reports[2].pearson["dot"] > 0.9999  # every layer is whole: bfloat16
    assert loghook.load(tmp_path / "lowrank8").codec.row_bytes == 212 >= log.codec.row_bytes / 2
    assert maintain.DTYPES[-4:] == tuple(TERMS)


@pytest.mark.parametrize("dtype", ["lowrank1", "lowrank2", "lowrank4"])
def test_products_are_those_of_the_decoded_rows(tmp_path, monkeypatch, dtype):
    log, query, _ = make_log(tmp_path / "log", dtype=dtype, projection="none")
    rows = log.gather(np.arange(len(log))).double().numpy()
    chosen = [spec for spec in log.layout.layers if spec.name != log.layers[1]]
    matrix, expected = query.matrix.float(), 0
    for spec in chosen:
        columns = log.layout.columns[spec.name]
        expected = expected + matrix.double().numpy()[:, columns] @ rows[:, columns].T
    for terms in (100, 0):  # without decoding, and decoded
        monkeypatch.setattr(products, "TERMS", terms)
        product, as_stored = products.products(log, matrix, chosen)
        assert as_stored == (terms > 0)
        found = torch.cat([product(block) for _, block in log.blocks(7, stored=as_stored)], 1)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
