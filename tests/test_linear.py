"""Products by oneDNN: right whatever the operands' layout, and left to PyTorch where they are not for it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from loghook.project import linear as module
from loghook.project.linear import gram, linear

LAYOUTS = {
    "rows": lambda n, m: torch.randn(n, m),
    "columns": lambda n, m: torch.randn(m, n).T,
    "part of wider rows": lambda n, m: torch.randn(n, m + 3)[:, 1 : m + 1],
    "part of longer columns": lambda n, m: torch.randn(m, n + 3).T[1 : n + 1],
    "every second": lambda n, m: torch.randn(n, 2 * m)[:, ::2],
    "one row, repeated": lambda n, m: torch.randn(1, m).expand(n, m),
    "one column, repeated": lambda n, m: torch.randn(n, 1).expand(n, m),
}
layouts = st.sampled_from(sorted(LAYOUTS))


def is_product(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Up to the rounding of each of the sums' terms, all of it in one direction: equal terms come near to that."""
    x, weight, bias = (None if t is None else t.double() for t in (x, weight, bias))
    expected = F.linear(x, weight, bias)
    size = F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    rounding = (x.shape[-1] + 2) * 2**-24
    return found.shape == expected.shape and bool(((found.double() - expected).abs() <= rounding * size).all())


@pytest.fixture
def counted(monkeypatch):
    """How often oneDNN's product was taken."""
    calls, product = [], module._onednn()
    if product is None:
        pytest.skip("no AVX-512 here, or no oneDNN")
    monkeypatch.setattr(module, "_onednn", lambda: lambda *a: calls.append(a) or product(*a))
    return calls


@settings(max_examples=60, deadline=None)
@example(0, (1, 206, 16), "one column, repeated", "one column, repeated", False, False)
@given(
    seed=st.integers(0, 99),
    sizes=st.tuples(st.integers(1, 400), st.integers(1, 300), st.integers(1, 200)),
    x_layout=layouts,
    weight_layout=layouts,
    bias=st.booleans(),
    stacked=st.booleans(),
)
def test_linear_is_f_linear(seed, sizes, x_layout, weight_layout, bias, stacked):
    torch.manual_seed(seed)
    n, m, k = sizes
    x, weight = LAYOUTS[x_layout](n, m), LAYOUTS[weight_layout](k, m)
    added = torch.randn(k, 2)[:, 0] if bias else None
    if stacked:
        x = torch.stack([x, 2 * x])
    found = linear(x, weight, added)
    assert found.dtype == torch.float32 and is_product(found, x, weight, added)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), x_layout=layouts, y_layout=layouts, wide=st.booleans())
def test_gram_is_the_product_of_the_transpose(seed, x_layout, y_layout, wide):
    torch.manual_seed(seed)
    x, y = LAYOUTS[x_layout](200, 160 if wide else 40), LAYOUTS[y_layout](200, 90)
    assert is_product(gram(x, y), x.T, y.T)


def test_large_products_of_float32_are_onednns(counted):
    x, weight = torch.randn(512, 512), torch.randn(32, 512)
    assert is_product(linear(x, weight), x, weight)
    assert len(counted) == 1


@pytest.mark.parametrize(
    "case",
    [
        "small",
        "float64",
        "bfloat16",
        "autocast",
        "gradients",
        "subclass",
        "switched off",
        "a vector",
        "few to move for",
    ],
)
def test_others_are_pytorchs(case, counted):
    class Marked(torch.Tensor):
        pass

    x, weight = torch.randn(512, 512), torch.randn(32, 512)
    if case == "small":
        x = x[:8]
    if case in ("float64", "bfloat16"):
        x, weight = (t.to(getattr(torch, case)) for t in (x, weight))
    if case == "gradients":
        x.requires_grad_()
    if case == "subclass":
        x = x.as_subclass(Marked)
    if case == "a vector":
        x, weight = torch.randn(1, 2**20), torch.randn(32, 2**20)
    if case == "few to move for":
        x, weight = x[:100], torch.randn(600, 600)[:, :512]
    torch._C._set_mkldnn_enabled(case != "switched off")
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
            found, expected = linear(x, weight), F.linear(x, weight)
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert not counted
    assert found.dtype == expected.dtype and type(found) is type(expected)
    assert found.requires_grad == (case == "gradients")
    assert torch.equal(found, expected)


def test_a_product_that_is_not_what_it_was_is_left_alone(monkeypatch):
    class Ops:
        class _linear_pointwise:
            default = staticmethod(lambda x, *_: x)

    monkeypatch.setattr(torch.ops, "mkldnn", Ops)
    module._onednn.cache_clear()
    try:
        assert module._onednn() is None
    finally:
        module._onednn.cache_clear()


@pytest.mark.parametrize("defaults", [(torch.float64, "cpu"), (torch.float32, "meta")])
def test_it_is_found_whatever_the_defaults_are(defaults):
    expected, (dtype, device) = module._onednn(), defaults
    module._onednn.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            assert module._onednn() is expected
    finally:
        torch.set_default_dtype(torch.float32)
        module._onednn.cache_clear()


def test_compiled_it_is_the_compilers():
    torch._dynamo.reset()
    x, weight = torch.randn(512, 512), torch.randn(32, 512)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, weight), F.linear(x, weight))
