"""LoRA adapters and quantised bases: rows come from inputs and output gradients, whatever a weight is made of."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import loghook
from loghook.errors import DeliveryError
from tests.harness import assert_rows_exact, causal_loss, text_batch, tiny_llama
from tests.test_matrix import EXACT, assert_same, by_id, finished, new_run, proven, relative_error

# Imported inside the tests: each of the three takes seconds.
pytestmark = pytest.mark.filterwarnings("ignore")
PARTS = {  # include, exclude
    "adapters": (["*lora_*"], []),
    "base": (["*"], ["*lora_*", "*lm_head"]),
    "both": (["*"], ["*lm_head"]),
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def log_of(model, loss, batch, size, *, frozen=False, include="*", exclude="*lm_head"):
    run = new_run(model, rank=4, include=include, exclude=exclude)
    with loghook.frozen(model) if frozen else contextlib.nullcontext():
        with run(data_id=list(range(size))):
            loss(model, batch).backward()
    return finished(run)


# PEFT


def with_adapters(model):
    peft = pytest.importorskip("peft")
    targets = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and not name.endswith("lm_head")]
    torch.manual_seed(2)
    # Adapters whose B is zero, as LoRA starts, would leave A without a gradient.
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets[::2], init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("part", PARTS)
def test_lora(device, part, frozen):
    model, batch = with_adapters(tiny_llama()).to(device), tuple(t.to(device) for t in text_batch())
    assert not model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad
    include, exclude = PARTS[part]
    log = log_of(model, causal_loss, batch, 4, frozen=frozen, include=include, exclude=exclude)
    kinds = {".lora_" in name for name in log.layers}
    assert kinds == {"adapters": {True}, "base": {False}, "both": {True, False}}[part]
    assert_rows_exact(log, copy.deepcopy(model).double(), causal_loss, batch, EXACT)
    if not frozen:
        proven(model, causal_loss, batch, include=include, exclude=exclude)


def test_the_original_of_a_layer_that_an_adapter_trains_a_copy_of_is_left_out():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["o_proj"], init_lora_weights=False)
    model, batch = peft.get_peft_model(tiny_llama(), config), text_batch()
    run = new_run(model)
    assert any("o_proj.modules_to_save" in name for name in run.layers)
    assert not any("original_module" in name for name in run.layers)
    with run(data_id=[0, 1, 2, 3]):
        causal_loss(model, batch).backward()
    run.close()
    named = new_run(model, include="*original_module*")  # as somebody may who disables the adapter
    assert named.layers and all("original_module" in name for name in named.layers)


@pytest.mark.parametrize("part", ["adapters", "both"])
@pytest.mark.parametrize("state", ["merged", "disabled"])
def test_adapters_that_are_merged_or_disabled_are_refused(state, part):
    model, batch = with_adapters(tiny_llama()), text_batch()
    include, exclude = PARTS[part]
    run = new_run(model, include=include, exclude=exclude)
    if state == "merged":
        model.merge_adapter()
    else:
        model.base_model.disable_adapter_layers()
    with pytest.raises(DeliveryError, match="adapter"), run(data_id=[0, 1, 2, 3]):
        causal_loss(model, batch).backward()
    if state == "merged":
        model.unmerge_adapter()
    else:
        model.base_model.enable_adapter_layers()
    with run(data_id=[0, 1, 2, 3]):
        causal_loss(model, batch).backward()
    assert len(finished(run)) == 4


# Quantised bases


def plain_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 32))


def squared(model, x):
    return model(x).float().pow(2).sum()


def torchao_int8(model, device):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model.to(device), quantization.Int8WeightOnlyConfig())
    return model


def bitsandbytes_8bit(model, device):
    bnb = pytest.importorskip("bitsandbytes")
    return swapped(model, device, bnb.nn.Linear8bitLt, has_fp16_weights=False, threshold=0.0)


def bitsandbytes_4bit(model, device):
    bnb = pytest.importorskip("bitsandbytes")
    return swapped(model, device, bnb.nn.Linear4bit, compute_dtype=torch.float32, quant_type="nf4")


def swapped(model, device, cls, **options):
    for name, layer in list(model.named_children()):
        if isinstance(layer, nn.Linear):
            new = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, **options)
            new.load_state_dict(layer.state_dict(), strict=False)
            setattr(model, name, new)
    return model.to(device)  # here bitsandbytes quantises


def dequantised_weight(layer):
    """What the layer multiplies by, in float32, read without loghook."""
    kind = type(layer.weight).__name__
    if kind == "Params4bit":
        import bitsandbytes.functional as F

        return F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if kind == "Int8Params":
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return layer.weight.data.float() * scales.view(-1, 1) / 127
    return layer.weight.dequantize()


def dequantised(model):
    plain = plain_model()
    for mine, theirs in zip(plain, model, strict=True):
        if isinstance(mine, nn.Linear):
            mine.weight.data = dequantised_weight(theirs).detach().float().cpu()
            if mine.bias is not None:
                mine.bias.data = theirs.bias.detach().float().cpu()
    return plain


QUANTISED = [torchao_int8, bitsandbytes_8bit, bitsandbytes_4bit]


def data_on(device):
    torch.manual_seed(1)
    return torch.randn(4, 3, 64).to(device)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("quantise", QUANTISED)
def test_quantised_base(device, quantise, frozen):
    """Rows are those of the dequantised model, sample by sample in float64; 8-bit kernels round activations too."""
    if device == "cuda" and quantise is bitsandbytes_8bit:
        pytest.skip("on CUDA the 8-bit kernel quantises activations as well: no float equivalent to compare with")
    model, x = quantise(plain_model(), device), data_on(device)
    squared(model, x)  # bitsandbytes settles its state in the first forward
    log = log_of(model, squared, x, 4, frozen=frozen)
    plain = dequantised(model).double()
    assert_rows_exact(log, plain, lambda m, b: squared(m, b.double()), x.cpu(), EXACT)
    assert len(log.layers) == 3 and log.manifest.parameters["first"]
    proven(model, squared, x)


@pytest.mark.parametrize("quantise", QUANTISED)
def test_lora_on_a_quantised_base(quantise):
    """As QLoRA trains: the base quantised and frozen, adapters in float32."""
    x = data_on("cpu")
    base = quantise(plain_model(), "cpu")
    squared(base, x)
    plain = dequantised(base)
    model, twin = with_adapters(base), with_adapters(plain)
    adapters = {k: v for k, v in model.state_dict().items() if "lora_" in k}
    assert adapters and not twin.load_state_dict(adapters, strict=False).unexpected_keys
    for include, exclude in PARTS.values():
        log = log_of(model, squared, x, 4, include=include, exclude=exclude)
        expected = log_of(twin, squared, x, 4, include=include, exclude=exclude)
        assert log.layers == expected.layers
        for layer in log.layers:
            assert relative_error(by_id(log, layer), by_id(expected, layer)) <= EXACT
        proven(model, squared, x, include=include, exclude=exclude)


def test_quantised_activations_are_refused():
    """Such a layer passes no gradient on to its input, so that layers below it would be left out."""
    quantization = pytest.importorskip("torchao.quantization")
    model, x = plain_model(), data_on("cpu")
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    run = new_run(model)
    with pytest.raises(DeliveryError, match=r"no rows|no backward pass"), run(data_id=[0, 1, 2, 3]):
        squared(model, x).backward()
    run.close()


def test_other_values_under_the_same_quantisation_have_another_digest():
    model, x = torchao_int8(plain_model(), "cpu"), data_on("cpu")
    log = log_of(model, squared, x, 4)
    other = plain_model()
    with torch.no_grad():
        other[0].weight.mul_(1.5)
    other_log = log_of(torchao_int8(other, "cpu"), squared, x, 4)
    assert log.manifest.parameters["first"] != other_log.manifest.parameters["first"]
    assert_same(log_of(torchao_int8(plain_model(), "cpu"), squared, x, 4), log)
