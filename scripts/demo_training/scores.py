"""How good each exit of a trained model is, on text that it has not seen."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from demo_training.text import BOS_ID


@dataclass(frozen=True)
class ExitScore:
    depth: int
    loss: float
    agreement: float  # share of held-out positions where its argmax is the last layer's
    accepted: float  # mean tokens accepted of a draft of four, along the model's own greedy text


def exit_logits(model: LlamaForCausalLM, ids: Tensor) -> Iterator[Tensor]:
    """Logits [B, T, V] of each exit, 1 to L, for ids [B, T]."""
    states = model.model(ids, output_hidden_states=True).hidden_states[1:]
    for state in states[:-1]:
        yield model.lm_head(model.model.norm(state))
    yield model.lm_head(states[-1])  # transformers has normed this one


def accepted_of_draft(hits: list[bool], k: int = 4) -> tuple[int, int]:
    """Tokens accepted and rounds taken when drafts of k walk a greedy text; hits: exit and text agree there."""
    accepted = rounds = at = 0
    while at + k <= len(hits):
        run = next((i for i, hit in enumerate(hits[at : at + k]) if not hit), k)
        accepted, rounds, at = accepted + run, rounds + 1, at + run + 1  # + 1: the verifier's own token
    return accepted, rounds


@torch.inference_mode()
def evaluate(model: LlamaForCausalLM, stream: Tensor, windows: int, length: int = 512) -> list[ExitScore]:
    """Score every exit on windows spread evenly over the held-out stream [n]."""
    starts = torch.linspace(0, len(stream) - length - 1, windows).long()[:, None]
    rows = stream[starts + torch.arange(length + 1)]
    rows[:, 0] = BOS_ID
    layers = model.config.num_hidden_layers
    loss, same = torch.zeros(layers), torch.zeros(layers)
    for batch in rows.split(4):
        choices = []
        for i, logits in enumerate(exit_logits(model, batch[:, :-1])):
            loss[i] += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
            choices.append(logits.argmax(-1))
        same += torch.stack([(c == choices[-1]).sum() for c in choices])
    prompt, new = 64, 128
    text = model.generate(rows[:32, :prompt], max_new_tokens=new, min_new_tokens=new, do_sample=False)
    scores = []
    for i, logits in enumerate(exit_logits(model, text[:, :-1])):
        hits = (logits.argmax(-1) == text[:, 1:])[:, prompt - 1 :].tolist()
        accepted, rounds = (sum(n) for n in zip(*(accepted_of_draft(h) for h in hits), strict=True))
        count = windows * length
        scores.append(ExitScore(i + 1, loss[i].item() / count, same[i].item() / count, accepted / rounds))
    return scores


@torch.inference_mode()
def continuation(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: Tensor) -> str:
    """A prompt [T] and 160 sampled tokens as text, with a mark where the model's own begins."""
    torch.manual_seed(0)
    ids = model.generate(prompt[None], max_new_tokens=160, do_sample=True, temperature=0.5, top_k=0)[0]
    given, own = tokenizer.batch_decode([ids[: len(prompt)], ids[len(prompt) :]], skip_special_tokens=True)
    return f"{given}⟨{own}⟩"
