"""examples/distill_llm.py as its docstring says: `accelerate launch`, here on two CPU processes."""

import ast
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (kdkernels[llm])"
)
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "distill_llm.py"


def save_models(folder):
    """A teacher and a smaller student with one tokenizer, of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<s>", "</s>", "<unk>", "a", "student", "learns", "what", "its", "teacher", "says"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    for seed, (name, layers) in enumerate({"teacher": 3, "student": 1}.items()):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=12,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.3,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)


def test_accelerate_launch(tmp_path):
    save_models(tmp_path)
    (tmp_path / "text").write_text("a student learns what its teacher says\n\n" * 60)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = f"""{sys.executable} -m accelerate.commands.launch --multi_gpu --num_processes 2
        --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port {port}
        {EXAMPLE} --teacher {tmp_path}/teacher --student {tmp_path}/student
        --text {tmp_path}/text --output-dir {tmp_path}/out --length 12 --batch 2 --accumulate 2
        --held-out 5 --steps 10 --learning-rate 0.02""".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr[-3000:]
    # At every fifth of the steps, then at the end by both processes: the same.
    losses = [float(x) for x in re.findall(r"'eval_kd': '?([\d.e-]+)", result.stdout)]
    assert len(losses) == 7 and losses[-1] == losses[-2] < 0.5 * losses[0]
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.config.num_hidden_layers == 1
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "checkpoint-10").is_dir()


def test_the_example_stays_short():
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) < 100 and ast.get_docstring(ast.parse(text))
