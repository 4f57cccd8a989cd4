"""The training script writes a whole checkpoint, and the committed one is what its card says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.demo_training.muon import Muon
from scripts.demo_training.text import read_corpus
from tests.conftest import DEMO_MODEL

SCRIPT = DEMO_MODEL.parent / "train_demo_model.py"


def test_quick_run_writes_a_whole_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "model"
    subprocess.run([sys.executable, SCRIPT, "--quick", "--out", out], check=True, capture_output=True, timeout=300)
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = "def add(a, b):\n    return a + b\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == text
    assert torch.isfinite(model(ids).logits).all()
    assert "agreement" in (out / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_muon_steps_as_the_one_of_torch_does() -> None:
    """In the type that that one computes in."""
    torch.manual_seed(0)
    theirs = [torch.nn.Parameter(torch.randn(shape)) for shape in ((32, 16), (16, 48))]
    ours = [torch.nn.Parameter(matrix.detach().clone()) for matrix in theirs]
    steppers = (
        torch.optim.Muon(theirs, 0.01, 0.1, adjust_lr_fn="match_rms_adamw"),
        Muon(ours, 0.01, 0.1, torch.bfloat16),
    )
    for _ in range(3):
        for one, other in zip(theirs, ours, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for stepper in steppers:
            stepper.step()
    for one, other in zip(theirs, ours, strict=True):
        torch.testing.assert_close(one, other)


def test_workers_share_the_work_of_muon(tmp_path: Path) -> None:
    """Two step as one does, in float32."""
    alone = stepped()
    mp.spawn(_step_together, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        for one, other in zip(alone, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            torch.testing.assert_close(one, other)


def stepped() -> list[torch.Tensor]:
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 4), (4, 6), (5, 5))]
    muon = Muon(matrices, 0.01, 0.1, torch.float32)
    for _ in range(2):
        for matrix in matrices:
            matrix.grad = torch.randn_like(matrix)
        muon.step()
    return [matrix.detach() for matrix in matrices]


def _step_together(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(stepped(), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_committed_model_is_small_and_of_the_promised_form() -> None:
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert 8 <= config["num_hidden_layers"] <= 12
    assert 2000 <= config["vocab_size"] <= 8192
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    assert 3e6 <= model.num_parameters() <= 8e6
    assert sum(path.stat().st_size for path in DEMO_MODEL.iterdir()) <= 16e6


@torch.inference_mode()
def test_committed_model_has_learned_and_agrees_as_its_card_says() -> None:
    """Loss and agreement with the last layer on held-out files of the standard library, as the card states them.

    More or less: other Pythons have other files, some distributions a quarter of them.
    """
    card = (DEMO_MODEL / "README.md").read_text()
    rows = [list(map(float, row)) for row in re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \|", card, re.MULTILINE)]
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    assert len(rows) == model.config.num_hidden_layers

    _, held_out = read_corpus(0)
    ids = torch.cat([tokenizer(text, return_tensors="pt").input_ids[0] for text in held_out])
    windows = ids[: len(ids) // 512 * 512].view(-1, 512)
    windows = windows[torch.linspace(0, len(windows) - 1, 32).long()]
    states = model.model(windows, output_hidden_states=True).hidden_states
    final = model.lm_head(states[-1])
    loss = torch.nn.functional.cross_entropy(final[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).item()
    assert loss < 1.4 * rows[-1][1]

    for depth, _, stated in rows[:-1]:
        choice = model.lm_head(model.model.norm(states[int(depth)])).argmax(-1)
        agreement = (choice == final.argmax(-1)).float().mean().item()
        assert abs(agreement - stated) < 0.08, f"exit {depth:.0f}: {agreement:.2f} here, {stated} on the card"
