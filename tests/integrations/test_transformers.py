"""DistillationTrainer against plain torch on materialised logits: loss, gradients and training."""

import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (kdkernels[llm])"
)
from transformers import (  # noqa: E402
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    TrainingArguments,
)

from kdkernels.integrations.transformers import DistillationTrainer  # noqa: E402

V, TOKENS = 61, 9  # V is no multiple of anything


def causal_lm(config=LlamaConfig, seed=0, hidden=16, vocab=V, **options):
    torch.manual_seed(seed)
    common = dict(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        # Logits of standard deviation 3 and so: a softcap of 5 bends them.
        initializer_range=0.5,
    )
    model = transformers.AutoModelForCausalLM.from_config(config(**{**common, **options}))
    return model.eval()


def batch(rows=3, seed=7):
    """Sequences of other lengths, padded on the right; the first tokens are a prompt."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, V, (rows, TOKENS), generator=generator)
    lengths = torch.randint(4, TOKENS + 1, (rows,), generator=generator)
    attention_mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :2] = -100
    return dict(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def rows_of(batches):
    return [
        {k: v[row] for k, v in one.items()} for one in batches for row in range(len(one["labels"]))
    ]


def make(tmp_path, model=None, teacher=None, loss_options=None, processing_class=None, **options):
    options = dict(use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no") | options
    data = {k: options.pop(k) for k in ("train_dataset", "eval_dataset") if k in options}
    return DistillationTrainer(
        causal_lm() if model is None else model,
        TrainingArguments(str(tmp_path), **options),
        teacher=causal_lm(seed=1, hidden=24) if teacher is None else teacher,
        loss_options=loss_options,
        processing_class=processing_class,
        data_collator=lambda rows: {k: torch.stack([row[k] for row in rows]) for k in rows[0]},
        **data,
    )


def truth(model, teacher, inputs, ce_weight=0.0, vocab=V, normalizer=None):
    """KL(teacher ‖ student) + ce_weight·CE of the models' own logits, in float64: the mean over
    next tokens with a label; and the labels, the logits of both.
    """
    given = {k: v for k, v in inputs.items() if k != "labels"}
    student_logits = model(**given).logits[:, :-1, :vocab].double()
    with torch.no_grad():
        teacher_logits = teacher(**given).logits[:, :-1, :vocab].double()
    labels = inputs["labels"][:, 1:]
    kept = labels != -100
    s, t = (x[kept].log_softmax(-1) for x in (student_logits, teacher_logits))
    kd, ce = (t.exp() * (t - s)).sum(), F.nll_loss(s, labels[kept], reduction="sum")
    agreement = (s.argmax(-1) == t.argmax(-1)).double().sum()
    count = kept.sum() if normalizer is None else normalizer
    return SimpleNamespace(
        loss=(kd + ce_weight * ce) / count, kd=kd, ce=ce, agreement=agreement, count=kept.sum()
    )


def assert_trains_as(trainer, model, teacher, inputs, **options):
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    want = truth(model, teacher, inputs, **options).loss
    torch.testing.assert_close(loss.double(), want, rtol=2e-5, atol=1e-6)
    parameters = [p for p in model.parameters() if p.requires_grad]
    got, wanted = (torch.autograd.grad(x, parameters) for x in (loss, want))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize(
    "config, options",
    [
        (LlamaConfig, {}),
        (LlamaConfig, {"tie_word_embeddings": True}),
        # TRL's fused path once passed by what these do with their logits (trl #6629).
        (Gemma2Config, {"final_logit_softcapping": 5.0}),
        (CohereConfig, {"logit_scale": 0.25}),
        (GraniteConfig, {"logits_scaling": 4.0}),
        (HyperCLOVAXConfig, {"logits_scaling": 0.25}),  # multiplies where Granite divides
    ],
)
def test_loss_and_gradients(config, options, tmp_path):
    """As student beside a plain teacher, and as teacher."""
    special, plain = causal_lm(config, **options), causal_lm(seed=1, hidden=24)
    for model, teacher in ((special, plain), (plain, special)):
        model.requires_grad_(True)
        trainer = make(tmp_path, model, teacher, {"ce_weight": 0.5})
        assert_trains_as(trainer, model, teacher, batch(), ce_weight=0.5)


def test_a_model_that_does_more_is_refused(tmp_path):
    model = causal_lm()
    own = type(model).forward

    def forward(*args, **kwargs):
        output = own(model, *args, **kwargs)
        output.logits = output.logits * 3
        return output

    model.forward = forward
    for student, teacher, name in ((model, None, "student"), (None, model, "teacher")):
        trainer = make(tmp_path, student, teacher)
        with pytest.raises(ValueError, match=f"logits of the {name}, a LlamaForCausalLM"):
            trainer.compute_loss(trainer.model, batch())


def test_another_padding_of_the_vocabulary(tmp_path):
    """Qwen's 151936 and 152064 rows (trl #2215, #3028): the tokenizer has the smaller number."""
    for sizes in ((V + 3, V), (V, V + 3)):
        model, teacher = causal_lm(vocab=sizes[0]), causal_lm(seed=1, vocab=sizes[1])
        trainer = make(tmp_path, model, teacher, {"ce_weight": 1.0})
        assert_trains_as(trainer, model, teacher, batch(), ce_weight=1.0)
    tokenizer = type("Tokenizer", (), {"__len__": lambda self: V + 1})()
    with pytest.raises(ValueError, match=f"{V + 1} tokens"):
        make(tmp_path, processing_class=tokenizer)


def test_every_option_reaches_the_loss(tmp_path):
    """TRL's GKDTrainer kept its temperature from the loss (trl #5731)."""
    model, teacher, inputs = causal_lm(), causal_lm(seed=1, hidden=24), batch()
    losses = {
        str(options): make(tmp_path, model, teacher, options).compute_loss(model, inputs).item()
        for options in (
            {},
            {"temperature": 3.0},
            {"temperature": 3.0, "t_squared": False},
            {"divergence": "jsd"},
            {"kd_weight": 0.0, "ce_weight": 1.0},
        )
    }
    assert len(set(losses.values())) == len(losses)


@pytest.mark.parametrize("rows, steps", [(1, 4), (2, 2)])
def test_how_a_batch_is_split_does_not_matter(rows, steps, tmp_path):
    """Sequences with 1 to 7 labels: a mean of micro-batches' means is another number
    (trl #4719, #6006). One of them has none at all.
    """
    data = batch(rows=4)
    data["labels"][1] = -100
    data["labels"][2, 3:] = -100
    finals = []
    for size, accumulate in ((4, 1), (rows, steps)):
        model = causal_lm()
        trainer = make(
            tmp_path,
            model,
            loss_options={"ce_weight": 0.5},
            train_dataset=rows_of([data]),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            max_steps=1,
            optim="sgd",
            learning_rate=0.5,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
        )
        trainer.train()
        finals.append((trainer.state.log_history[0]["loss"], model.state_dict()))
    (first, one), (second, other) = finals
    want = truth(causal_lm(), causal_lm(seed=1, hidden=24), data, ce_weight=0.5).loss.item()
    assert first == pytest.approx(want, rel=1e-4) and second == pytest.approx(want, rel=1e-4)
    start = causal_lm().state_dict()
    for name in one:
        moved = (one[name] - start[name]).abs().max().item()
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-4 * moved)


def test_evaluation_is_a_mean_over_tokens(tmp_path):
    model, teacher = causal_lm(), causal_lm(seed=1, hidden=24)
    batches = [batch(3, seed) for seed in range(2)]
    batches[1]["labels"][0, 4:] = -100
    want = [truth(model, teacher, one, ce_weight=0.5) for one in batches]
    count = sum(one.count for one in want).item()
    for size in (1, 4):
        trainer = make(
            tmp_path,
            model,
            teacher,
            {"ce_weight": 0.5},
            eval_dataset=rows_of(batches),
            per_device_eval_batch_size=size,
        )
        got = trainer.evaluate()
        kd, ce = sum(one.kd for one in want) / count, sum(one.ce for one in want) / count
        assert got["eval_kd"] == pytest.approx(kd.item(), rel=1e-5)
        assert got["eval_ce"] == pytest.approx(ce.item(), rel=1e-5)
        assert got["eval_loss"] == pytest.approx((kd + 0.5 * ce).item(), rel=1e-5)
        agreement = sum(one.agreement for one in want).item() / count
        assert got["eval_top1_agreement"] == pytest.approx(agreement, rel=1e-6)


def test_training_goes_on_from_a_checkpoint(tmp_path):
    """The same weights as without a break; the teacher is in no checkpoint and does not change."""
    data = rows_of([batch(8)])
    options = dict(
        train_dataset=data,
        eval_dataset=data,
        per_device_train_batch_size=2,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=1e-2,
        bf16=False,
        gradient_checkpointing=True,
    )
    teacher = causal_lm(seed=1, hidden=24)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    teacher.train().requires_grad_(True)
    model = causal_lm(attention_dropout=0.1)
    trainer = make(tmp_path, model, teacher, **options)
    trainer.train()
    evaluations = [
        entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry
    ]
    assert len(evaluations) == 2 and evaluations[1] < evaluations[0]
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    resumed = causal_lm(attention_dropout=0.1)
    make(tmp_path, resumed, teacher, **options).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert torch.equal(saved.lm_head.weight, model.lm_head.weight)
    assert "forward" not in vars(model)


def test_mixed_precision(tmp_path):
    """accelerate puts a forward of its own on the model; the loss is under its autocast too."""
    model, teacher = causal_lm(), causal_lm(seed=1, hidden=24)
    data = [batch(4)]
    trainer = make(
        tmp_path,
        model,
        teacher,
        train_dataset=rows_of(data),
        per_device_train_batch_size=4,
        max_steps=1,
        bf16=True,
        logging_steps=1,
    )
    want = truth(model, teacher, data[0]).loss.item()
    trainer.train()
    got = trainer.state.log_history[0]["loss"]
    assert got == pytest.approx(want, rel=5e-2) and got != pytest.approx(want, rel=1e-6)


class _Largest(TorchDispatchMode):
    """The most elements of any tensor with V columns that an op gives."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and x.dim() > 1 and x.shape[-1] == V:
                self.most = max(self.most, x.numel())
        return result


def test_no_logits(tmp_path):
    """Nothing has as many elements outside the op, whose chunks have a test of their own."""
    inputs = batch(8)
    size = inputs["input_ids"].numel() * V
    trainer = make(tmp_path)
    with _Largest() as ours:
        trainer.compute_loss(trainer.model, inputs).backward()
        trainer.prediction_step(trainer.model, inputs, True)
    with _Largest() as plain:
        trainer.model(inputs["input_ids"])
    assert 0 < ours.most < size <= plain.most


class LoRA(nn.Linear):
    """trl #4612, #5977: an adapter on the head that a fused loss passes by."""


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(compute_metrics=print), ValueError, "compute_metrics"),
        (dict(compute_loss_func=print), ValueError, "compute_loss_func"),
        (dict(teacher="gpt2"), TypeError, "teacher is a str"),
        (dict(teacher=nn.Linear(2, 2)), TypeError, "teacher is a Linear"),
        (dict(loss_options={"temprature": 2.0}), TypeError, "temprature"),
        (dict(loss_options={"mask_kd": False}), TypeError, "mask_kd"),
    ],
)
def test_refused(change, error, text, tmp_path):
    with pytest.raises(error, match=text):
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
        DistillationTrainer(causal_lm(), args, **{"teacher": causal_lm(seed=1), **change})


def test_refused_models_and_batches(tmp_path):
    same = causal_lm()
    with pytest.raises(ValueError, match="model itself"):
        make(tmp_path, same, same)
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        make(tmp_path, label_smoothing_factor=0.1)
    adapted = causal_lm()
    adapted.lm_head = LoRA(16, V, bias=False)
    with pytest.raises(TypeError, match="LoRA"):
        make(tmp_path, adapted)
    trainer = make(tmp_path)
    with pytest.raises(ValueError, match="labels"):
        trainer.compute_loss(trainer.model, {"input_ids": batch()["input_ids"]})


# ---- two processes -----------------------------------------------------------------------------


def _train_two(rank, folder, port):
    """Trainer under DDP: rank and world as torchrun tells them."""
    os.environ |= dict(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    model, data = causal_lm(), two_process_data()
    trainer = make(
        folder,
        model,
        loss_options={"ce_weight": 0.5},
        train_dataset=rows_of([data]),
        eval_dataset=rows_of([data])[:3],  # 2 processes: the last sequence is one of a pair
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=2,
        **SGD,
    )
    trainer.train()
    evaluation = trainer.evaluate()
    assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    _sharded(rank, folder)
    if rank == 0:
        torch.save((model.state_dict(), evaluation), f"{folder}/result.pt")
    torch.distributed.destroy_process_group()


def _sharded(rank, folder):
    """FSDP2 around both models, layers and root: the loss is in the student's forward."""
    from torch.distributed.fsdp import fully_shard

    model, teacher, inputs = causal_lm(), causal_lm(seed=1, hidden=24), batch(2, seed=rank)
    want = truth(model, teacher, inputs).loss
    grads = torch.autograd.grad(want, list(model.parameters()))
    for lm in (model, teacher):
        for layer in lm.model.layers:
            fully_shard(layer)
        fully_shard(lm)
    trainer = make(folder, model, teacher)
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    torch.testing.assert_close(loss.double(), want, rtol=2e-5, atol=1e-6)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        torch.distributed.all_reduce(grad.div_(2))
        got = parameter.grad.full_tensor()
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))


SGD = dict(
    max_steps=1,
    optim="sgd",
    learning_rate=0.5,
    lr_scheduler_type="constant",
    max_grad_norm=0.0,
)


def two_process_data():
    data = batch(rows=4)
    data["labels"][2, 3:] = -100
    return data


def test_two_processes(tmp_path):
    """DDP with accumulation takes the step of one process with the whole batch; evaluation counts
    no sequence twice. And FSDP2 around both models.
    """
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_train_two, (str(tmp_path), port), nprocs=2)
    got, evaluation = torch.load(tmp_path / "result.pt")
    model, data = causal_lm(), two_process_data()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make(
        tmp_path / "one",
        model,
        loss_options={"ce_weight": 0.5},
        train_dataset=rows_of([data]),
        eval_dataset=rows_of([data])[:3],
        per_device_train_batch_size=4,
        **SGD,
    )
    trainer.train()
    for name, value in model.state_dict().items():
        moved = (value - start[name]).abs().max().item()
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-4 * moved)
    assert evaluation["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-4)
