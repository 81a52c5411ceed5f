"""Distil any pair of causal language models that share a tokenizer with Hugging Face's Trainer.

    trainer = DistillationTrainer(student, args, teacher=teacher, train_dataset=..., ...)
    trainer.train()

Both models run up to their heads only. ``linear_distillation_loss`` takes it from there, so no
logits exist, of neither model, in training or in evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments

from kdkernels import LinearDistillationLoss

IGNORE_INDEX = -100  # what Trainer's collators write and its num_items_in_batch counts by

# Options of linear_distillation_loss that are the batch's or the trainer's own.
_OURS = (
    "ignore_index",
    "mask_kd",
    "normalizer",
    "reduction",
    "return_stats",
    "student_logit_scale",
    "student_softcap",
    "teacher_grad",
    "teacher_logit_scale",
    "teacher_logits",
    "teacher_softcap",
    "token_weights",
    "vocab_size",
)


class DistillationTrainer(Trainer):
    """Trainer whose loss is ``linear_distillation_loss`` of the model and a teacher.

    Args:
        model: the student, a causal LM (a PEFT model of one too, its head without an adapter).
        args: TrainingArguments.
        teacher: a causal LM with the student's tokenizer. It is frozen, put into eval mode and, but
            for one that ``device_map`` or ``fully_shard`` has placed, on ``args.device``.
        loss_options: options of ``linear_distillation_loss``: divergence, temperature, kd_weight,
            ce_weight, chunk_rows, ...; default forward KL alone at temperature 1. Its logits'
            scale and softcap (Gemma, Cohere, Granite) come from the models.
        further arguments: Trainer's, but for those that need logits.

    A batch has ``labels``, unshifted as for any causal LM (or ``shift_labels``, shifted); a token
    whose next label is −100 counts in neither term. The mean is over ``num_items_in_batch``, the
    labels of all micro-batches of a step on all processes: the gradient does not depend on how they
    are split. Where the heads have different numbers of rows, those beyond the smaller are padding.

    Evaluation gives, averaged over all tokens (not batches): ``eval_loss``, ``eval_kd`` (the
    divergence, with T² where ``t_squared``), ``eval_ce`` (nats) and ``eval_top1_agreement``.

    The first batch compares hidden states through the head with the model's own logits of eight
    tokens. A model that does something else with its hidden states raises ValueError.

    Raises:
        TypeError: a head that is not an ``nn.Linear`` used as it is (adapter, quantised), or an
            option that is not one of the loss.
        ValueError: no labels in a batch; an argument that needs logits; a tokenizer with more
            tokens than a head; ``nn.DataParallel`` (several GPUs without a launcher).
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        teacher: PreTrainedModel | nn.Module,
        loss_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        for name in ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is given; accepted: None, it needs logits or replaces us")
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher is a {type(teacher).__name__}; accepted: a causal LM")
        if teacher is model:
            raise ValueError("teacher is the model itself; accepted: another one, it is frozen")
        self.loss_options = dict(loss_options or {})
        for name in self.loss_options:
            if name in _OURS:
                raise TypeError(f"loss_options has {name!r}, which the trainer sets itself")
        super().__init__(model, args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process would use nn.DataParallel; accepted: "
                "one process a GPU (accelerate launch, torchrun) or CUDA_VISIBLE_DEVICES=0"
            )
        for name, given in (
            ("label_smoothing_factor", self.args.label_smoothing_factor != 0),
            ("batch_eval_metrics", self.args.batch_eval_metrics),
        ):
            if given:
                raise ValueError(f"args.{name} is set; accepted: its default (see loss_options)")
        self.compute_metrics = _metrics
        # What these say of the model holds of the loss here, whatever its class.
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        self.teacher = teacher.requires_grad_(False).eval()
        placed = getattr(teacher, "hf_device_map", None) is not None or hasattr(teacher, "unshard")
        if not placed:
            teacher.to(self.args.device)
        self._logits: dict[str, dict[str, float | None]] = {}  # scale and softcap, once known
        self._check()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss = self._distil(model, inputs, normalizer=_normalizer(num_items_in_batch))
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # Gradients are averaged over processes, the normaliser counts the labels of all.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Sums a sequence, which gathering may cut off where a last batch was filled up: a mean of
        batches' means would weigh a token by the batch it is in.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, stats = self._distil(model, inputs, reduction="none", return_stats=True)
        counted = (_shifted(inputs) != IGNORE_INDEX).sum(-1)
        columns = (loss, stats.kd, stats.ce, stats.top1_agreement)
        return None, torch.stack([x.sum(-1) for x in columns], dim=-1), counted

    def _distil(self, model: nn.Module, inputs: dict[str, Any], **options: Any) -> Any:
        labels = _shifted(inputs)
        given = {k: v for k, v in inputs.items() if k not in ("labels", "shift_labels")}
        student = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        with self.accelerator.autocast():
            with torch.no_grad(), _forward_of(self.teacher, self._body("teacher", self.teacher)):
                teacher_hidden = self.teacher(**given)
            student_lm, teacher_lm = _causal_lm(student), _causal_lm(self.teacher)
            heads = [lm.get_output_embeddings() for lm in (student_lm, teacher_lm)]
            loss = LinearDistillationLoss(*heads, ignore_index=IGNORE_INDEX, **self.loss_options)
            vocab = min(head.out_features for head in heads)
            body = self._body("student", student)

            def whole(**batch: Any) -> Any:
                hidden = body(**batch)
                return loss(
                    hidden,
                    teacher_hidden.to(hidden.device),
                    labels,
                    vocab_size=vocab,
                    **self._logits["student"],
                    **self._logits["teacher"],
                    **{name: value for name, value in options.items() if value is not None},
                )

            # Not behind the model's forward but in it: DDP reduces and FSDP gathers around that.
            with _forward_of(student, whole):
                return model(**given)

    def _body(self, name: str, model: nn.Module) -> Callable[..., Tensor]:
        """A forward of the model that ends before its head."""
        lm, own_forward = _causal_lm(model), model.forward

        def forward(**batch: Any) -> Tensor:
            if name not in self._logits:
                scale, softcap = _logit_transform(name, lm, own_forward, batch["input_ids"])
                self._logits[name] = {f"{name}_logit_scale": scale, f"{name}_softcap": softcap}
            return _hidden(lm, **batch)

        return forward

    def _check(self) -> None:
        """What is wrong with the models, before the first batch."""
        sizes = {}
        for name, model in (("model", self.model), ("teacher", self.teacher)):
            if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
                raise ValueError(f"{name} has a learned prompt; accepted: adapters in its layers")
            lm = _causal_lm(model)
            head = lm.get_output_embeddings() if hasattr(lm, "get_output_embeddings") else None
            if head is None or lm.base_model is lm:
                raise TypeError(f"{name} is a {type(lm).__name__}; accepted: a causal LM")
            if getattr(lm.config.get_text_config(), "output_router_logits", False):
                raise ValueError(
                    f"{name}.config.output_router_logits is True; accepted: False, the router's "
                    "loss is not part of this one"
                )
            LinearDistillationLoss(head, **self.loss_options)
            sizes[name] = head.out_features
        tokens = len(self.processing_class) if hasattr(self.processing_class, "__len__") else 0
        if tokens > min(sizes.values()):
            raise ValueError(f"processing_class has {tokens} tokens; accepted: at most {sizes}")


def _causal_lm(model: nn.Module) -> Any:
    """Beneath PEFT, whose adapters sit inside its layers."""
    outer: Any = model
    return outer.get_base_model() if hasattr(outer, "get_base_model") else outer


def _hidden(lm: Any, **batch: Any) -> Tensor:
    """(B, L, H): what the head is applied to."""
    return lm.base_model(**batch, use_cache=False, return_dict=True).last_hidden_state


def _shifted(inputs: dict[str, Any]) -> Tensor:
    """At each place the label of the next token. The labels move, not the hidden states, of which
    that would make a copy.
    """
    if inputs.get("shift_labels") is not None:
        return inputs["shift_labels"]
    if inputs.get("labels") is None:
        raise ValueError(f"a batch has {sorted(inputs)}; accepted: input_ids with labels")
    return F.pad(inputs["labels"][..., 1:], (0, 1), value=IGNORE_INDEX)


def _normalizer(count: Tensor | int | None) -> Tensor | float | None:
    """A step without a label has the loss 0, which a tensor of 0 allows."""
    return torch.as_tensor(float(count)) if isinstance(count, int) else count


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Calls of the module, through whatever wraps it, run ``forward``."""
    own = vars(module).get("forward")  # accelerate puts one there for mixed precision
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _logit_transform(
    name: str, lm: Any, forward: Callable[..., Any], input_ids: Tensor
) -> tuple[float, float | None]:
    """(scale, softcap) that make the head's output the model's logits.

    Configurations name them, but not what they mean: ``logits_scaling`` divides in Granite and
    multiplies in HyperCLOVA X. Eight tokens tell, and they tell of a model that does more.
    """
    few, modes = input_ids[:1, :8], {module: module.training for module in lm.modules()}
    lm.eval()  # dropout would differ between the two, and draw random numbers
    try:
        with torch.no_grad():
            logits = forward(input_ids=few, use_cache=False, return_dict=True).logits
            plain = lm.get_output_embeddings()(_hidden(lm, input_ids=few))
    finally:
        for module, training in modes.items():
            module.training = training
    tolerance = 1e-4 if plain.dtype in (torch.float32, torch.float64) else 2e-2
    logits, plain = logits.float(), plain.float()
    candidates = _candidates(lm.config.get_text_config())
    for scale, softcap in candidates:
        got = plain * scale
        if softcap is not None:
            got = softcap * torch.tanh(got / softcap)
        if (got - logits).abs().max() <= tolerance * logits.abs().max():
            return scale, softcap
    raise ValueError(
        f"the logits of the {name}, a {type(lm).__name__}, are not softcap(scale·head(hidden "
        f"states)) with a (scale, softcap) of its configuration; tried: {candidates}"
    )


def _candidates(config: Any) -> list[tuple[float, float | None]]:
    """What a configuration may mean, the likeliest first."""
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    scales = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
    cap_values: list[float | None] = [getattr(config, n) for n in caps if getattr(config, n, None)]
    scale_values = [1.0]
    for value in (float(getattr(config, n)) for n in scales if getattr(config, n, None)):
        scale_values = [value, 1 / value, *scale_values]
    return [(scale, cap) for cap in [*cap_values, None] for scale in scale_values]


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    sums = prediction.predictions.astype("float64").sum(axis=0) / max(prediction.label_ids.sum(), 1)
    return dict(zip(("loss", "kd", "ce", "top1_agreement"), sums.tolist(), strict=True))
