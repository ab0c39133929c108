"""Mixture-of-experts models with fused 3-D expert parameters: rows for every expert, credited to their samples."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import loghook
from loghook.capture.experts import watched
from loghook.errors import BatchError
from tests.harness import log_and_ask, log_batch, sides, whole
from tests.oracle import one_sample, one_sample_gradients, project, relative_error

SMALL = dict(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    num_experts_per_tok=2, max_position_embeddings=32,
)  # fmt: skip


def make(kind):
    torch.manual_seed(0)
    if kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**SMALL, intermediate_size=24, num_local_experts=4))
    elif kind == "qwen2_moe":
        config = Qwen2MoeConfig(
            **SMALL, intermediate_size=24, moe_intermediate_size=12, shared_expert_intermediate_size=20, num_experts=4
        )
        model = Qwen2MoeForCausalLM(config)
    else:
        config = GptOssConfig(**SMALL, intermediate_size=24, num_local_experts=4, head_dim=8, sliding_window=16)
        model = GptOssForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model.set_experts_implementation("eager")
    return model.double().eval()


def loss_fn(model, ids):
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def batch():
    torch.manual_seed(1)
    return torch.randint(0, 40, (3, 7))


def expert_gradients(model, ids):
    """{layer name: (B, O, I [+ 1])} of every expert's projections, one sample at a time."""
    found = {}
    for i in range(len(ids)):
        model.zero_grad()
        loss_fn(model, one_sample(ids, i)).backward()
        for name, module in model.named_modules():
            for projection in ("gate_up_proj", "down_proj"):
                if not name.endswith("experts") or not hasattr(module, projection):
                    continue
                weight = getattr(module, projection).grad
                bias = getattr(module, f"{projection}_bias", None)
                for number in range(len(weight)):
                    g = weight[number].T if module.is_transposed else weight[number]
                    if bias is not None:
                        g = torch.cat([g, bias.grad[number][:, None]], 1)
                    found.setdefault(f"{name}.{projection}.{number}", []).append(g.clone())
    model.zero_grad()
    return {name: torch.stack(rows) for name, rows in found.items()}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_rows_of_every_expert_against_autograd(kind, frozen):
    model, ids = make(kind), batch()
    before = loss_fn(model, ids)
    flattened = "*shared_expert*" if kind == "qwen2_moe" else ()
    log = log_batch(model, loss_fn, ids, rank=6, include=["*", "*experts*"], frozen=frozen, flattened=flattened)
    if flattened:
        shared = "model.layers.0.mlp.shared_expert.down_proj"
        gradients = one_sample_gradients(model, loss_fn, ids, [shared])[shared]
        reference = project(gradients, *(whole(side) for side in sides(log, shared)))
        assert relative_error(torch.from_numpy(log.rows(shared)[:].copy()), reference) <= 1e-9
    expected = expert_gradients(model, ids)
    assert set(expected) <= set(log.layers) and len(expected) == 16
    for name, gradients in expected.items():
        p_out, p_in = sides(log, name)
        rows = torch.from_numpy(log.rows(name)[:].copy())
        reference = project(gradients, whole(p_out), whole(p_in))
        if reference.any():
            assert relative_error(rows, reference) <= 1e-9, name
        else:
            assert not rows.any()
    assert sum(bool(g.any()) for g in expected.values()) >= 12
    assert loss_fn(model, ids) == before
    assert not any("forward" in vars(module) for module in model.modules())


def test_experts_that_are_left_out_are_a_warning_and_in_the_record():
    model = make("mixtral")
    with pytest.warns(UserWarning, match="fused experts with .* are not covered"):
        log = log_batch(model, loss_fn, batch())
    left_out = log.manifest.coverage["not_covered"]
    assert sum("fused experts" in item["reason"] for item in left_out) == 2


def test_questions_checks_and_packed_documents_reach_experts_too(tmp_path):
    model, ids = make("mixtral"), batch()
    log = log_batch(model, loss_fn, ids, rank=6, include="*experts*")
    asker = log.attach(model)
    with asker.query(data_id=["q"]) as query:
        loss_fn(model, ids[:1]).backward()
    asker.close()
    scores = log.influence(query, "ekfac")
    assert scores.top(1)[0][0].data_id == 0
    assert loghook.check(model, loss_fn, ids, include="*experts*")
    options = {"ids": range(ids.numel()), "block": {"segments": loghook.segments.per_token(*ids.shape)}}
    options |= {"watch": {"include": "*experts*"}, "rank": 6, "dtype": "float64"}
    tokens, _ = log_and_ask(tmp_path, model, loss_fn, ids, **options)
    for layer in log.layers:
        summed = tokens.rows(layer)[:].reshape(3, 7, *tokens.rows(layer).shape[1:]).sum(1)
        torch.testing.assert_close(torch.from_numpy(summed), torch.from_numpy(log.rows(layer)[:].copy()))


def test_a_forward_is_put_back_whichever_block_ends_first():
    experts = make("mixtral").model.layers[0].mlp.experts
    for order in ((0, 1), (1, 0)):
        blocks = [watched([experts]), watched([experts, experts])]
        for block in blocks:
            block.__enter__()
        blocks[order[0]].__exit__(None, None, None)
        assert "forward" in vars(experts)
        blocks[order[1]].__exit__(None, None, None)
        assert "forward" not in vars(experts)


def test_arguments_of_experts_by_name_in_any_order():
    experts, hidden = make("mixtral").model.layers[0].mlp.experts, torch.randn(5, 16, dtype=torch.double)
    index, weight = torch.tensor([[0, 1], [2, 3], [1, 3], [0, 2], [3, 0]]), torch.rand(5, 2, dtype=torch.double)
    expected = experts(hidden, index, weight)
    with watched([experts]):
        found = experts(top_k_weights=weight, hidden_states=hidden, top_k_index=index)
    torch.testing.assert_close(found, expected)


def test_a_mask_of_samples_holds_for_the_tokens_of_experts():
    model, ids, keep = make("mixtral"), batch(), torch.tensor([True, False, True])

    def found(mask):
        return log_batch(model, loss_fn, ids, mask=mask, rank=3, include="*experts*")

    by_sample, by_token = found(keep), found(keep[:, None].expand(3, 7))
    assert (by_sample.moments() == by_token.moments()).all() and not (
        by_sample.moments() == found(None).moments()
    ).all()


@pytest.mark.parametrize("mask", [None, [1.0, 0.0, 1.0, 1.0], [[1.0, 1.0, 0.0, 0.0]] * 4])
def test_whole_entries_count_in_experts_as_their_tokens_do(tmp_path, mask):
    """Segments of (batch, 1) say the same as (batch, tokens): of entries of nobody, of repeats, under masks."""
    model = make("mixtral")
    ids = torch.randint(3, model.config.vocab_size, (4, 4), generator=torch.Generator().manual_seed(3))
    entries, logs = torch.tensor([[0], [0], [1], [-1]]), []
    for number, segments in enumerate((entries, entries.expand(4, 4))):
        run = loghook.init(tmp_path / str(number), rank=4, dtype="float64")
        run.watch(model, ["*", "*experts*"], may_sleep="*experts*")
        for _ in run.passes():
            for data_id in ([0, 1], [1, 2]):  # 1 comes again
                with run(data_id=data_id, segments=segments, mask=None if mask is None else torch.tensor(mask)):
                    loss_fn(model, ids).backward()
        run.finalize()
        logs.append(loghook.load(run.path))
    assert torch.equal(*(torch.from_numpy(log.moments()) for log in logs))
    for name in logs[0].layers:
        assert torch.equal(*(torch.tensor(log.rows(name)[:]) for log in logs))


def test_experts_of_a_compiled_model_are_not_the_compilers():
    torch._dynamo.reset()
    model, ids = make("mixtral"), batch()
    compiled = torch.compile(model, backend="aot_eager")
    outside, losses = loss_fn(model, ids).item(), []

    def noted(_, ids):
        loss = loss_fn(compiled, ids)
        losses.append(loss.item())
        return loss

    options = dict(rank=6, include=["*", "*experts*"], may_sleep="*experts*")
    eager, log = log_batch(model, loss_fn, ids, **options), log_batch(compiled, noted, ids, **options)
    assert losses == pytest.approx([outside] * len(losses), rel=1e-12)
    for name in eager.layers:
        assert relative_error(torch.tensor(log.rows(name)[:]), torch.tensor(eager.rows(name)[:])) <= 1e-9, name
    assert loss_fn(compiled, ids).item() == pytest.approx(outside, rel=1e-12)


class PartOfTheTokens(torch.nn.Module):
    """Hands its experts every second token, as models do that keep others for images."""

    def __init__(self):
        super().__init__()
        block = torch.nn.Module()
        block.before, block.experts = torch.nn.Linear(16, 16).double(), make("mixtral").model.layers[0].mlp.experts
        self.layers = torch.nn.ModuleList([block])

    def forward(self, x):
        block = self.layers[0]
        h = block.before(x)
        some = h[:, ::2].flatten(0, 1)
        index = torch.arange(len(some))[:, None] % 4
        return h.sum() + block.experts(some, index, torch.ones(len(some), 1).double()).square().sum()


def test_experts_that_get_a_part_of_the_tokens_are_refused():
    with pytest.raises(BatchError, match="an expert of 12 tokens, where layers beside it see 24"):
        log_batch(PartOfTheTokens(), lambda m, x: m(x), torch.randn(4, 6, 16).double(), include=["*", "*experts*"])
