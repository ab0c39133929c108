"""transformers' Trainer: the rows of its micro-batches are those of each sample's summed loss, whatever it scales."""

import contextlib
import dataclasses
import os
import subprocess
import sys
import warnings
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import loghook
from loghook.errors import BatchError, ConfigError, UnsupportedError
from loghook.integrations import loss_scale
from loghook.integrations.transformers import log_training
from tests.harness import sides, whole
from tests.oracle import one_sample_gradients, project, relative_error

SAMPLES, VOCABULARY = 11, 40
CONFIG = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 16, "pad_token_id": 0, "num_labels": 3,
}  # fmt: skip


class LocalMean(LlamaForCausalLM):
    """Trainer's second rule: it keeps ``num_items_in_batch`` to itself, and the loss is a mean over local tokens."""

    accepts_loss_kwargs = False


class ClampedMean(LocalMean):
    """As TRL's SFTTrainer computes it for such models: over no labels the mean is 0."""

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        output = super().forward(input_ids, attention_mask, **kwargs)
        if labels is not None:
            logits, labels = output.logits[:, :-1], labels[:, 1:]
            summed = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            output.loss = summed / (labels != -100).sum().clamp(min=1)
        return output


class SmoothMean(LlamaForCausalLM):
    """The second rule with label smoothing, which shifts labels by the name of the class."""

    accepts_loss_kwargs = False


SmoothMean.__name__ = "LlamaForCausalLM"


class Tagger(nn.Module):
    """A model of one's own: no keyword arguments, no shift."""

    def __init__(self, _):
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(VOCABULARY, 12), nn.Linear(12, 20), nn.Linear(20, VOCABULARY)

    def forward(self, input_ids, attention_mask, labels=None):
        logits = self.head(torch.tanh(self.up(self.embed(input_ids))))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class Auxiliary(LlamaForCausalLM):
    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        output = super().forward(input_ids, attention_mask, labels=labels, **kwargs)
        output.loss = output.loss + output.logits.pow(2).mean()
        return output


MODELS = {
    "num_items": LlamaForCausalLM,  # the sum over tokens, divided by num_items_in_batch
    "local_mean": LocalMean,
    "clamped_mean": ClampedMean,
    "ignores": LlamaForSequenceClassification,  # accepts num_items_in_batch and does not use it
    "own": Tagger,
    "smooth": LlamaForCausalLM,  # Trainer's label smoothing
    "smooth_mean": SmoothMean,
}


def make_model(kind, dropout=0.0):
    torch.manual_seed(0)
    return MODELS[kind](LlamaConfig(**CONFIG, attention_dropout=dropout))


@cache
def samples(kind, names=False):
    """Sentences of several lengths; some positions are not learned, the first in some samples neither."""
    torch.manual_seed(1)
    out = []
    for i in range(SAMPLES):
        tokens = torch.randint(1, VOCABULARY, (5 + i % 4,))
        labels = tokens.clone()
        labels[: i % 3] = -100
        labels = int(tokens[0]) % 3 if kind == "ignores" else labels.tolist()
        out.append({"id": f"s{i}" if names else i, "input_ids": tokens.tolist(), "labels": labels, "note": "unused"})
    return out


def collate(features):
    assert all(set(feature) == {"input_ids", "labels"} for feature in features), "the collator sees the model's columns"
    length = max(len(f["input_ids"]) for f in features)

    def pad(name, value):
        rows = [f[name] for f in features]
        return torch.tensor([r + [value] * (length - len(r)) if isinstance(r, list) else r for r in rows])

    tokens = pad("input_ids", 0)
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long(), "labels": pad("labels", -100)}


def make_trainer(folder, kind="num_items", model=None, data=None, callbacks=(), subclass=Trainer, **options):
    defaults = {
        "per_device_train_batch_size": 2, "num_train_epochs": 1, "learning_rate": 0.0, "use_cpu": True, "report_to": [],
        "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "lr_scheduler_type": "constant",
        "label_smoothing_factor": 0.1 if kind.startswith("smooth") else 0.0, "seed": 3,
    }  # fmt: skip
    return subclass(
        model if model is not None else make_model(kind),
        TrainingArguments(output_dir=str(folder), **{**defaults, **options}),
        train_dataset=data if data is not None else samples(kind),
        eval_dataset=samples(kind)[:3],
        data_collator=collate,
        callbacks=list(callbacks),
    )


def open_run(path, model, **options):
    run = loghook.init(path, rank=4, **options)
    with contextlib.redirect_stdout(None):
        run.watch(model, exclude=["*lm_head", "embed"])
    return run


def train(trainer, path, **options):
    """Log one ``trainer.train()`` and return the log."""
    run = open_run(path, trainer.model)
    with log_training(trainer, run, **options):
        trainer.train()
    run.finalize()
    run.close()
    return loghook.load(path)


def summed_loss(kind):
    """The loss of one sample, written without transformers: the sum over its labels."""

    def loss(model, batch):
        logits = model(**{**batch, "labels": None} if kind != "own" else batch)
        logits, labels = (logits["logits"] if kind == "own" else logits.logits), batch["labels"]
        if kind not in ("own", "ignores"):
            logits, labels = logits[:, :-1], labels[:, 1:]
        smoothing = 0.1 if kind.startswith("smooth") else 0.0
        return F.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum", label_smoothing=smoothing
        )

    return loss


def expected_rows(kind, log, model=None, chosen=range(SAMPLES)):
    """What autograd gives for one sample at a time, unpadded, in float64: {layer: (samples, k_out, k_in)}."""
    model = (model or make_model(kind)).double()
    rows = {name: [] for name in log.layers}
    for i in chosen:
        features = [{k: v for k, v in samples(kind)[i].items() if k in ("input_ids", "labels")}]
        gradients = one_sample_gradients(model, summed_loss(kind), collate(features), log.layers)
        for name in log.layers:
            out_side, in_side = (whole(side) for side in sides(log, name))
            rows[name].append(project(gradients[name], out_side, in_side)[0])
    return {name: torch.stack(values) for name, values in rows.items()}


_REFERENCES = {}


def reference(kind, log):
    """The rows of all samples at the parameters that training begins with."""
    if kind not in _REFERENCES:
        _REFERENCES[kind] = expected_rows(kind, log)
    return _REFERENCES[kind]


def worst(log, expected, order):
    return max(relative_error(torch.from_numpy(log.rows(n)[:][order].copy()), expected[n]) for n in log.layers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trainer")


ARGUMENTS = {field.name for field in dataclasses.fields(TrainingArguments)}
CHECKPOINTING = ("activation" if "activation_checkpointing" in ARGUMENTS else "gradient") + "_checkpointing"
SETTINGS = {
    "plain": {},
    "accumulate": {"gradient_accumulation_steps": 4},  # 6 micro-batches of 2 (the last of 1): windows of 4 and 2
    "checkpointing": {CHECKPOINTING: True, "gradient_accumulation_steps": 2},
    "one_each": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "local_count": {"average_tokens_across_devices": False, "per_device_train_batch_size": 4},
}
CELLS = [(kind, setting) for kind in ("num_items", "local_mean", "ignores") for setting in SETTINGS]
CELLS += [(kind, "accumulate") for kind in ("own", "smooth", "smooth_mean", "clamped_mean")]


@pytest.mark.parametrize("kind,setting", CELLS, ids=["-".join(cell) for cell in CELLS])
def test_rows_are_those_of_the_summed_loss(folder, kind, setting):
    path = folder / f"{kind}-{setting}"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "log_training", UserWarning)  # that it could not try the loss
        log = train(make_trainer(folder, kind, **SETTINGS[setting]), path)
    assert sorted(log.data_ids) == list(range(SAMPLES)) and len(log) == SAMPLES
    assert worst(log, reference(kind, log), np.argsort(log.data_ids)) <= 1e-5


@pytest.mark.parametrize("kind", ["num_items", "local_mean"])
def test_accelerate_that_divides_by_the_steps_too(folder, kind):
    """transformers 5.2 to 5.5 hand accelerate the accumulation steps, and both divide the loss by them."""
    trainer = make_trainer(folder, kind, **SETTINGS["accumulate"])
    trainer.accelerator.gradient_accumulation_steps = 4
    log = train(trainer, folder / f"{kind}-twice")
    assert worst(log, reference(kind, log), np.argsort(log.data_ids)) <= 1e-5


def checked(trainer, model, batch, **options):
    """``check`` as docs/trainer.md shows it."""
    shift = int(isinstance(trainer.model, LlamaForCausalLM))
    with contextlib.redirect_stdout(None):
        return loghook.check(
            model,
            lambda model, batch: trainer.compute_loss(model, {**batch}),
            batch,
            exclude=["*lm_head", "embed"],
            scale=lambda batch: (batch["labels"][..., shift:] != -100).sum(),
            **options,
        )


class Check(TrainerCallback):
    """``check`` of the model as Trainer wraps it, which it does only to train."""

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        batch = next(iter(train_dataloader))
        batch.pop("id", None)
        self.report = checked(self.trainer, self.trainer.model_wrapped, batch)


@pytest.mark.parametrize("kind", MODELS)
def test_check_agrees_before_and_inside_training(folder, kind):
    callback = Check()
    callback.trainer = trainer = make_trainer(folder, kind, callbacks=[callback], per_device_train_batch_size=4)
    before = checked(trainer, trainer.model, next(iter(trainer.get_train_dataloader())))
    trainer.train()
    for report in (before, callback.report):
        assert report and max(report.errors.values()) < 1e-5, str(report)


def test_check_agrees_on_packed_samples(folder):
    trainer = make_trainer(folder)
    trainer.data_collator = DataCollatorWithFlattening()
    batch = {**next(iter(trainer.get_train_dataloader())), "use_cache": False}
    segments = lambda batch: loghook.segments.from_position_ids(batch["position_ids"])  # noqa: E731
    report = checked(trainer, trainer.model, batch, segments=segments)
    assert report and max(report.errors.values()) < 1e-5, str(report)


@pytest.mark.parametrize("kind", ["num_items", "local_mean"])
@pytest.mark.parametrize("also", [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}])
def test_packed_samples_keep_their_ids_and_rows(folder, kind, also):
    trainer = make_trainer(folder, kind, gradient_accumulation_steps=2, per_device_train_batch_size=3)
    trainer.data_collator = DataCollatorWithFlattening(**also)
    untried = pytest.warns(UserWarning, match="could not be tried")  # a loss beside a second row, as if not packed
    with untried if kind == "local_mean" else contextlib.nullcontext():
        log = train(trainer, folder / f"packed-{kind}-{''.join(also)}")
    assert sorted(log.data_ids) == list(range(SAMPLES)) and log.keys.step.max() == 3
    assert worst(log, reference(kind, log), np.argsort(log.data_ids)) <= 1e-5


def test_packed_samples_whose_bounds_are_not_known_are_refused(folder):
    trainer = make_trainer(folder)
    trainer.data_collator = DataCollatorWithFlattening(return_position_ids=False)
    with pytest.raises(BatchError, match=r"joined 2 samples into 1 rows .* position_ids, seq_idx or cu_seq_lens_q"):
        train(trainer, folder / "joined")


class Bare(Trainer):
    """A trainer without a collator of the tests' own; it brings one."""

    def __init__(self, *args, **options):
        super().__init__(*args, **{**options, "data_collator": self.collate})


class Pairs(Bare):
    """As TRL's DPOTrainer does it: both halves of a pair go through the model in one call, one half after the other."""

    @staticmethod
    def collate(features):
        rows = [f[half] for half in ("chosen", "rejected") for f in features]
        length = max(map(len, rows))
        return {"input_ids": torch.tensor([row + [0] * (length - len(row)) for row in rows])}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.pair_losses(model, inputs["input_ids"]).mean()

    @staticmethod
    def pair_losses(model, tokens):
        logits = model(input_ids=tokens, attention_mask=(tokens != 0).long()).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        chosen, rejected = (losses.view(len(tokens), -1) * (tokens[:, 1:] != 0)).sum(1).chunk(2)
        return -F.logsigmoid(rejected - chosen)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_pairs_that_are_two_rows_of_a_batch(folder, accumulated):
    data = [{"id": s["id"], "chosen": s["input_ids"], "rejected": s["input_ids"][::-1]} for s in samples("num_items")]
    options = {"remove_unused_columns": False, "gradient_accumulation_steps": accumulated, "subclass": Pairs}
    trainer = make_trainer(folder, data=data, **options)

    def pair(batch):
        rows, tokens = batch["input_ids"].shape
        return torch.arange(rows // 2).repeat(2)[:, None].expand(rows, tokens)

    log = train(
        trainer, folder / f"pairs-{accumulated}", scale=lambda b, n: len(b["input_ids"]) // 2, segments=pair, mask=None
    )
    assert sorted(log.data_ids) == list(range(SAMPLES))
    order = np.argsort(log.data_ids)
    alone = [Pairs.collate([entry])["input_ids"] for entry in data]
    for name in log.layers:
        p_out, p_in = (whole(side) for side in sides(log, name))
        weight = trainer.model.get_submodule(name).weight
        G = torch.stack(
            [torch.autograd.grad(Pairs.pair_losses(trainer.model, t).sum(), weight)[0] for t in alone]
        )  # fmt: skip
        rows = torch.from_numpy(np.array(log.rows(name)[:])[order])
        assert relative_error(rows, project(G, p_out, p_in), sizes=G.flatten(1).norm(dim=1)) <= 1e-5
    trainer = make_trainer(folder, data=data, **options)
    with pytest.raises(BatchError, match="segments= where a sample is several rows"):
        train(trainer, folder / f"unpaired-{accumulated}", scale=lambda b, n: 1, mask=None)


class Packs(Bare):
    """Entries that were packed beforehand, as TRL packs them: each brings the ids of its documents."""

    padding = 0

    @classmethod
    def collate(cls, features):
        joined = {
            name: [*chain(*(f[name] for f in features)), *[value] * cls.padding]
            for name, value in (("input_ids", 0), ("labels", -100), ("position_ids", 0))
        }
        return {name: torch.tensor(values)[None] for name, values in joined.items()}


def test_entries_packed_beforehand_bring_the_ids_of_their_documents(folder, monkeypatch):
    def pack(several):
        return {
            "id": [s["id"] for s in several],
            "input_ids": [*chain(*(s["input_ids"] for s in several))],
            "labels": [*chain(*([-100, *s["labels"][1:]] for s in several))],
            "position_ids": [*chain(*(range(len(s["input_ids"])) for s in several))],
        }

    all_samples = samples("num_items")
    data = [pack(all_samples[i : i + 3]) for i in range(0, SAMPLES, 3)]
    trainer = make_trainer(folder, data=data, subclass=Packs)
    log = train(trainer, folder / "packs")
    assert sorted(log.data_ids) == list(range(SAMPLES))
    assert worst(log, reference("num_items", log), np.argsort(log.data_ids)) <= 1e-5
    monkeypatch.setattr(Packs, "padding", 2)
    trainer = make_trainer(folder, data=data, subclass=Packs)
    with pytest.raises(BatchError, match=r"[56] ids came with [78] packed documents: .*pad_to_multiple_of"):
        train(trainer, folder / "filled")


def test_trial_labels_leave_no_trace_in_a_trainers_metrics(folder):
    class Counting(Trainer):
        _metrics: dict

        def compute_loss(self, model, inputs, *args, **options):
            self._metrics["train" if model.training else "eval"].append(float(inputs["labels"].sum()))
            return super().compute_loss(model, inputs, *args, **options)

    trainer = make_trainer(folder, subclass=Counting)
    trainer._metrics = {"train": [], "eval": []}
    train(trainer, folder / "metrics")
    assert len(trainer._metrics["train"]) == -(-SAMPLES // 2) and not trainer._metrics["eval"]


def test_smoothing_under_the_compiler_is_refused_where_labels_are_counted_here(folder):
    """transformers then smooths labels unshifted, where the probe, of the model itself, sees them shifted."""
    trainer = make_trainer(folder, "smooth_mean")
    trainer.args.torch_compile = True
    with pytest.raises(UnsupportedError, match="neither a sum over labels"):
        train(trainer, folder / "smoothed")


def test_a_gradient_scaler_is_undone(folder):
    trainer = make_trainer(folder, gradient_accumulation_steps=2)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    log = train(trainer, folder / "scaler")
    assert len(log) == SAMPLES and not log.flagged
    assert worst(log, reference("num_items", log), np.argsort(log.data_ids)) <= 1e-5


def translator(kind):
    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    if kind == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
        return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes, **ends))
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0}
    if kind == "bart":
        return BartForConditionalGeneration(
            BartConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **sizes, **heads, **ends)
        )
    speech = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16}
    return WhisperForConditionalGeneration(WhisperConfig(vocab_size=VOCABULARY, **speech, **sizes, **heads, **ends))


class Translations(Bare):
    """Labels alone: what the decoder reads is left to the model to make of them."""

    @staticmethod
    def collate(features):
        if "input_features" not in features[0]:
            return collate(features)
        length = max(len(f["labels"]) for f in features)
        labels = torch.tensor([f["labels"] + [-100] * (length - len(f["labels"])) for f in features])
        return {"input_features": torch.tensor([f["input_features"] for f in features]), "labels": labels}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("kind", ["t5", "bart", "whisper"])
def test_a_decoder_that_reads_what_the_model_makes_of_the_labels(folder, kind, size):
    data = [{"id": s["id"], "input_ids": s["input_ids"], "labels": s["input_ids"][::-1][i % 3 :]}
            for i, s in enumerate(samples("num_items"))]  # fmt: skip
    if kind == "whisper":
        made = np.random.default_rng(0).standard_normal((SAMPLES, 8, 20)).tolist()
        data = [{"id": s["id"], "input_features": made[i], "labels": s["labels"]} for i, s in enumerate(data)]
    options = {"subclass": Translations, "per_device_train_batch_size": size, "gradient_accumulation_steps": 2}
    trainer = make_trainer(folder, model=translator(kind), data=data, **options)
    log = train(trainer, folder / f"{kind}-{size}", mask=None)

    def loss(model, batch):
        batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
        return F.cross_entropy(model(**batch).logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")

    model = translator(kind).double().eval()
    alone = [Translations.collate([{k: v for k, v in data[i].items() if k != "id"}]) for i in log.data_ids]
    G = [one_sample_gradients(model, loss, batch, log.layers) for batch in alone]
    for name in log.layers:
        p_out, p_in = (whole(side) for side in sides(log, name))
        rows = torch.from_numpy(np.array(log.rows(name)[:]))
        assert relative_error(rows, project(torch.cat([g[name] for g in G]), p_out, p_in)) <= 1e-4, name


class Snapshots(TrainerCallback):
    """The parameters before each optimiser step."""

    def __init__(self):
        self.states = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.states.append({k: v.clone() for k, v in model.state_dict().items()})


def test_rows_follow_the_parameters_of_their_step(folder):
    snapshots = Snapshots()
    options = {"learning_rate": 1e-2, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    trainer = make_trainer(folder, callbacks=[snapshots], **options)
    log = train(trainer, folder / "moving")
    assert len(log) == 2 * SAMPLES and len(snapshots.states) == 6
    for window, state in enumerate(snapshots.states):
        at = np.flatnonzero(np.asarray(log.keys.step) // 2 == window)
        model = make_model("num_items")
        model.load_state_dict(state)
        expected = expected_rows("num_items", log, model, [log.data_ids[i] for i in at])
        assert worst(log, expected, at) <= 1e-5
    first, last = (snapshots.states[i]["model.layers.0.mlp.up_proj.weight"][None] for i in (0, -1))
    assert relative_error(last, first) > 1e-2


@pytest.mark.parametrize("kind", ["num_items", "local_mean"])
def test_training_is_what_it_would_have_been(folder, kind):
    """Dropout and shuffling included; evaluation in between logs nothing; the trainer is given back as it was."""
    options = {"learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 1, "num_train_epochs": 2}
    plain, logged = (make_trainer(folder, kind, make_model(kind, dropout=0.3), **options) for _ in range(2))
    before = dict(vars(logged))
    run = open_run(folder / f"same-{kind}", logged.model)
    with log_training(logged, run):
        for seed in (1, 2):  # the second time the same samples again, in rows of their own
            torch.manual_seed(seed)
            logged.train()
            logged.evaluate()
    run.finalize()
    run.close()
    log = loghook.load(folder / f"same-{kind}")
    assert len(log) == 4 * SAMPLES and sorted(set(log.keys.step)) == list(range(24))
    for seed in (1, 2):
        torch.manual_seed(seed)
        plain.train()
    assert set(vars(logged)) == set(vars(plain)) and logged.data_collator is before["data_collator"]
    assert "id" not in logged._signature_columns
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, logged.model.state_dict()[name]), name


def test_a_resumed_training_goes_on_in_its_log(folder):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3, "learning_rate": 1e-2}
    checkpoints, path = folder / "checkpoints", folder / "resumed"
    trainer = make_trainer(checkpoints, data=samples("num_items", names=True), **options)
    run = open_run(path, trainer.model)
    with log_training(trainer, run):
        trainer.train()
    run.close()
    options["max_steps"] = 6
    trainer = make_trainer(checkpoints, data=samples("num_items", names=True), dataloader_num_workers=1, **options)
    run = open_run(path, trainer.model, resume=True)
    with log_training(trainer, run):
        trainer.train(resume_from_checkpoint=True)
    run.finalize()
    run.close()
    log = loghook.load(path)
    assert sorted(log.data_ids) == sorted(f"s{i}" for i in range(SAMPLES))
    assert sorted(set(log.keys.step)) == list(range(6))


def test_ids_from_a_column_of_datasets(folder):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(samples("num_items"))
    log = train(make_trainer(folder, data=data), folder / "hub")
    assert sorted(log.data_ids) == list(range(SAMPLES))
    assert worst(log, reference("num_items", log), np.argsort(log.data_ids)) <= 1e-5


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(samples("local_mean"))


def test_a_stream_of_samples(folder, monkeypatch):
    options = {"max_steps": 2, "gradient_accumulation_steps": 4}  # the second window holds only 2 micro-batches
    log = train(make_trainer(folder, "local_mean", data=Stream(), **options), folder / "stream")
    assert log.data_ids[:SAMPLES] == list(range(SAMPLES))
    assert worst(log, reference("local_mean", log), list(range(SAMPLES))) <= 1e-5
    plain, logged = (
        make_trainer(folder, "local_mean", make_model("local_mean", 0.3), Stream(), **options, learning_rate=1e-2)
        for _ in range(2)
    )
    torch.manual_seed(1)
    plain.train()
    torch.manual_seed(1)
    train(logged, folder / "stream-moving")
    assert logged.accelerator.dataloader_config.dispatch_batches is None
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, logged.model.state_dict()[name]), name
    trainer = make_trainer(folder, "local_mean", data=Stream(), **options)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    with pytest.raises(ConfigError, match="dispatch_batches"):
        train(trainer, folder / "dispatched")


def sum_over_items(outputs, labels, num_items_in_batch):
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


def mean_of_sums(outputs, labels, num_items_in_batch):
    return sum_over_items(outputs, labels, 8.0)


@pytest.mark.parametrize("function,scale", [(sum_over_items, None), (mean_of_sums, lambda batch, items: 8.0)])
def test_a_loss_function_of_ones_own(folder, function, scale):
    trainer = make_trainer(folder, gradient_accumulation_steps=2)
    trainer.compute_loss_func = function
    log = train(trainer, folder / function.__name__, scale=scale)
    assert worst(log, reference("num_items", log), np.argsort(log.data_ids)) <= 1e-5


class Weighted(Trainer):
    """Classes that count for more or less than others."""

    weight = torch.tensor([0.2, 1.0, 5.0])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
        return F.cross_entropy(logits, inputs["labels"], weight=self.weight)


class OwnMeans(Trainer):
    """Each sequence's own mean, and the mean of these."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits, labels = model(input_ids=inputs["input_ids"]).logits[:, :-1], inputs["labels"][:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        return (losses.sum(1) / (labels != -100).sum(1)).mean()


class Beside(Bare):
    """Its batches hold things that cannot be cut into samples."""

    @staticmethod
    def collate(features):
        size = len(features)
        more = {"names": ["a"] * size, "nested": {"deep": torch.ones(3)}, "order": torch.arange(size)}
        return collate([{key: f[key] for key in ("input_ids", "labels")} for f in features]) | more

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert len(inputs["names"]) == len(inputs["labels"]) and "deep" in inputs["nested"]
        return model(input_ids=inputs["input_ids"][inputs["order"]], labels=inputs["labels"]).loss


def test_batches_that_cannot_be_cut_are_taken_as_they_are(folder):
    trainer = make_trainer(folder, "local_mean", subclass=Beside, remove_unused_columns=False)
    with pytest.warns(UserWarning, match=r"terms without labels .* could not be tried, .* scale="):
        log = train(trainer, folder / "beside")
    assert worst(log, reference("local_mean", log), np.argsort(log.data_ids)) <= 1e-5


class Collator:
    """One with an attribute that its trainer reads, as those of sentence-transformers have."""

    valid_label_columns = ("label",)

    def __call__(self, features):
        return collate([{key: f[key] for key in ("input_ids", "labels")} for f in features])


class Reads(Trainer):
    def __init__(self, *args, **options):
        super().__init__(*args, **{**options, "data_collator": Collator()})

    def get_train_dataloader(self):
        assert self.data_collator.valid_label_columns == ("label",)
        assert not hasattr(self.data_collator, "other")
        return super().get_train_dataloader()


def test_a_trainer_may_read_its_collator(folder):
    trainer = make_trainer(folder, "local_mean", subclass=Reads)
    log = train(trainer, folder / "reads")
    assert worst(log, reference("local_mean", log), np.argsort(log.data_ids)) <= 1e-5


class Generates(Bare):
    """As TRL's GRPOTrainer: the collator changes nothing, and the step makes what it trains on."""

    @staticmethod
    def collate(features):
        return features


def test_a_trainer_that_generates_inside_its_step_is_refused(folder):
    trainer = make_trainer(folder, "local_mean", subclass=Generates, remove_unused_columns=False)
    with pytest.raises(UnsupportedError, match=r"collator makes a list .* inside its step"):
        train(trainer, folder / "generates")


class RareClass(Weighted):
    """Only a class that is in none of the first batches has a weight."""

    weight = torch.tensor([1.0, 1.0, 5.0])


class ZLoss(Trainer):
    """A mean over positions, padding included, beside the mean over labels."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return outputs.loss + 0.1 * outputs.logits.logsumexp(-1).square().mean()


@pytest.mark.skipif("train_sampling_strategy" not in ARGUMENTS, reason="this transformers always shuffles")
@pytest.mark.parametrize("unlabelled", [0, 3])
def test_a_micro_batch_without_labels_has_rows_of_zeros(folder, unlabelled):
    data = [s | {"labels": [-100] * len(s["labels"])} if s["id"] == unlabelled else s for s in samples("local_mean")]
    options = {"data": data, "per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}
    trainer = make_trainer(folder, "local_mean", **options)
    log = train(trainer, folder / f"unlabelled-{unlabelled}")
    order, expected = np.argsort(log.data_ids), reference("local_mean", log)
    expected = {name: rows.clone() for name, rows in expected.items()}
    for rows in expected.values():
        rows[unlabelled] = 0
    assert worst(log, expected, order) <= 1e-5
    trainer = make_trainer(folder, "local_mean", subclass=ZLoss, **options)
    with pytest.raises(UnsupportedError, match="is neither"):
        train(trainer, folder / f"unlabelled-z-{unlabelled}")


def test_one_sample_of_equal_tokens_cannot_try_a_loss(folder):
    data = [{"id": i, "input_ids": [7] * 5, "labels": [1, 2, 3, 4, 5]} for i in range(2)]
    trainer = make_trainer(folder, "local_mean", data=data, per_device_train_batch_size=1)
    with pytest.warns(UserWarning, match=r"terms without labels .* could not be tried"):
        train(trainer, folder / "equal")


class Passes(Trainer):
    """A subclass with a data loader of its own that forgets the ids."""

    def get_train_dataloader(self):
        return [collate([{k: s[k] for k in ("input_ids", "labels")} for s in samples("num_items")[:2]])]


def test_a_trainer_is_logged_once_at_a_time(folder):
    trainer = make_trainer(folder)
    one, two = (open_run(folder / name, trainer.model) for name in ("one", "two"))
    with log_training(trainer, one), pytest.raises(ConfigError, match="logged already"), log_training(trainer, two):
        pass
    with log_training(trainer, two):
        trainer.train()
    two.finalize()
    assert len(loghook.load(two.path)) == SAMPLES


def test_errors_leave_the_trainer_as_it_was(folder):
    auxiliary, certain = Auxiliary(LlamaConfig(**CONFIG)), make_model("num_items")
    certain.lm_head.weight.data *= 30  # where all labels are equally likely, all means are equal
    floats = [{**s, "labels": float(s["labels"])} for s in samples("ignores")]
    rare = [{**s, "labels": s["labels"] % 2} for s in samples("ignores")]
    cases = [
        (UnsupportedError, "is neither", {"subclass": RareClass, "kind": "ignores", "data": rare}, {}),
        (UnsupportedError, "is neither", {"subclass": ZLoss}, {}),
        (UnsupportedError, "is neither", {"subclass": ZLoss, "per_device_train_batch_size": 1}, {}),
        (ConfigError, r"id_column='key' is no column .* \(it has 'input_ids', 'labels'", {}, {"id_column": "key"}),
        (UnsupportedError, "the loss of Auxiliary is neither", {"model": auxiliary}, {}),
        (UnsupportedError, "is neither", {"function": mean_of_sums}, {}),
        (UnsupportedError, "is neither", {"subclass": Weighted, "kind": "ignores"}, {}),
        (UnsupportedError, "is neither", {"subclass": OwnMeans, "model": certain}, {}),
        (UnsupportedError, r"LlamaForSequenceClassification trains on torch.float32 labels", {"data": floats}, {}),
        (BatchError, r"the batch has no 'id' \(it has 'input_ids'", {"subclass": Passes, "max_steps": 1}, {}),
        (BatchError, "data_id holds float", {"data": [{**s, "id": 0.5} for s in samples("num_items")]}, {}),
    ]
    for number, (error, message, options, arguments) in enumerate(cases):
        function = options.pop("function", None)
        kind = options.pop("kind", "ignores" if options.get("data") is floats else "num_items")
        trainer = make_trainer(folder, kind, **options)
        trainer.compute_loss_func = function
        keys = set(vars(trainer))
        with pytest.raises(error, match=message):
            train(trainer, folder / f"error-{number}", **arguments)
        assert set(vars(trainer)) & {"training_step", "get_train_dataloader"} == set()
        assert trainer.data_collator is collate and keys <= set(vars(trainer))
        assert not trainer.model.training or trainer.is_in_train


def test_rows_that_need_a_scale_each_are_refused_without_one(folder):
    trainer = make_trainer(folder)
    trainer.create_optimizer()
    trainer.train()
    run = loghook.init(folder / "adam", rank=4, gradient="adam")
    run.watch(trainer.model, exclude=["*lm_head", "embed"], optimizer=trainer.optimizer.optimizer)
    with pytest.raises(ConfigError, match="is not linear"), log_training(trainer, run):
        pass
    run.close()
    rows = []
    for name, of in (("number", lambda n: 3.0), ("each", lambda n: torch.full((n,), 3.0))):
        trainer = make_trainer(folder)
        trainer.train()
        torch.manual_seed(0)
        run = loghook.init(folder / name, projection="none", gradient="normalized")
        run.watch(trainer.model, exclude=["*lm_head", "embed"], optimizer=trainer.optimizer.optimizer)
        with log_training(trainer, run, scale=lambda batch, num_items, of=of: of(len(batch["labels"]))):
            trainer.train()
        run.finalize()
        log = loghook.load(run.path)
        rows.append([log.rows(layer)[:] for layer in log.layers])
    for a, b in zip(*rows, strict=True):
        np.testing.assert_array_equal(a, b)


def test_data_parallel_is_refused(folder, monkeypatch):
    trainer = make_trainer(folder)
    monkeypatch.setattr(type(trainer.args), "n_gpu", 2)
    with pytest.raises(UnsupportedError, match=r"2 devices from one process .* torchrun"):
        train(trainer, folder / "parallel")


# Two processes: torchrun starts this file, which trains every scenario one after another.


class OwnMean(Trainer):
    """A loss of one's own, which nobody multiplies by the processes."""

    def compute_loss(self, model, inputs, num_items_in_batch=None, **_):
        logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


class TimesProcesses(Trainer):
    """The same as a sum over all items of the step, times the processes, which DDP divides by."""

    def compute_loss(self, model, inputs, num_items_in_batch=None, **_):
        if num_items_in_batch is None:  # no step of a training
            return OwnMean.compute_loss(self, model, inputs)
        logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), reduction="sum")
        return loss / num_items_in_batch * self.processes()

    def processes(self):
        return self.accelerator.num_processes


class WorldSize(TimesProcesses):
    def processes(self):
        return self.args.world_size


class HandsNothingOn(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs)


class HandsAllOn(Trainer):
    def compute_loss(self, model, inputs, *args, **options):
        return super().compute_loss(model, inputs, *args, **options)


TWO = {
    "own": ("num_items", {"gradient_accumulation_steps": 2, "subclass": OwnMean}),
    "own_times_processes": ("num_items", {"subclass": TimesProcesses}),
    "own_world_size": ("num_items", {"subclass": WorldSize, "average_tokens_across_devices": False}),
    "hands_nothing_on": ("num_items", {"subclass": HandsNothingOn}),
    "hands_all_on": ("num_items", {"subclass": HandsAllOn}),
    "num_items": ("num_items", {"gradient_accumulation_steps": 2}),
    "num_items_local": ("num_items", {"average_tokens_across_devices": False}),
    "local_mean": ("local_mean", {"gradient_accumulation_steps": 2, CHECKPOINTING: True}),
    "ignores": ("ignores", {"gradient_accumulation_steps": 2}),
    "smooth": ("smooth", {}),
}


def launched(folder):
    torch.set_num_threads(1)
    refused_together(folder)
    for name, (kind, options) in TWO.items():
        callback = Check()
        callback.trainer = trainer = make_trainer(
            folder, kind, data=samples(kind, names=True), callbacks=[callback], **options
        )
        run = open_run(f"{folder}/{name}", trainer.model)
        with log_training(trainer, run):
            for _ in run.passes():
                trainer.train()
        assert trainer.accelerator.num_processes == 2
        assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
        assert callback.report, str(callback.report)
        run.finalize()
        run.close()


def refused_together(folder):
    """A loss that only the labels of one process tell from a plain mean is tried as often, and refused, on both."""
    forwards = []

    class Weighted(Trainer):
        def compute_loss(self, model, inputs, num_items_in_batch=None, **_):
            inputs = dict(inputs)
            labels, alone = inputs.pop("labels"), dist.get_rank() == 0
            forwards.append(labels)
            logits = model(**inputs).logits
            return F.cross_entropy(logits, labels, weight=torch.tensor([0.2, 1.0, 5.0]) if alone else None)

    class OverAll(Trainer):
        """A mean over the labels of all processes, which the first batch has equally many of."""

        def compute_loss(self, model, inputs, num_items_in_batch=None, **_):
            labels = inputs["labels"][:, 1:]
            logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits[:, :-1]
            dist.all_reduce(n := (labels != -100).sum())
            return 2 * F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / n

    same = [{**sample, "input_ids": [1, 2, 3, 4, 5, 6], "labels": [1, 2, 3, 4, 5, 6]} for sample in samples("", True)]
    for kind, data, subclass in (("ignores", samples("ignores", True), Weighted), ("local_mean", same, OverAll)):
        trainer = make_trainer(folder, kind, data=data, subclass=subclass)
        run = open_run(f"{folder}/refused-{kind}", trainer.model)
        with pytest.raises(UnsupportedError, match="weighted mean"), log_training(trainer, run):
            trainer.train()
        run.close()
    counts = [0, 0]
    dist.all_gather_object(counts, len(forwards))
    assert counts[0] == counts[1], counts


def test_two_processes(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([*command, str(folder / "two")], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    ids = [f"s{i}" for i in range(SAMPLES)]
    for name, (kind, _) in TWO.items():
        log = loghook.load(folder / "two" / name)
        assert sorted(log.data_ids) == sorted(ids) and log.repeats == 1 and set(log.keys.rank) == {0, 1}, name
        assert worst(log, reference(kind, log), [log.data_ids.index(i) for i in ids]) <= 1e-5, name


if __name__ == "__main__":
    launched(sys.argv[1])


def test_a_loss_is_tried_equally_often_on_all_processes(monkeypatch):
    """Forward passes of a sharded model are something that all of them do together."""
    few, many = torch.full((2, 12), -100), torch.arange(24).view(2, 12)
    few[:, 0] = 1
    counts = [int((labels != -100).sum()) for labels in (few, many)]
    monkeypatch.setattr(loss_scale, "all_gather", lambda _: counts)
    assert len({len(list(loss_scale.label_trials(labels, 20))) for labels in (few, many)}) == 1
