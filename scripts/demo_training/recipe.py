"""The recipe: LayerSkip's, and a second part in which the last layer meets its exits.

LayerSkip (Elhoushi et al., 2024, https://arxiv.org/abs/2404.16710, section 4), for L layers l = 0..L-1 and time t, from
0 at the first step to 1 at the last:

* layer dropout: a sequence skips layer l with probability  S(t) * D(l) * p_max,  D(l) = exp(l ln2 / (L-1)) - 1
  and, as training starts from scratch, S(t) = exp(t ln2) - 1: rare in early layers and early in training;
* early-exit loss: every layer is read out through the *same* final norm and LM head, and
  J = sum_l e~(l) CE(head(norm(x_{l+1})), y)  with  e~(l) = C(t, l) e(l) / sum_i C(t, i) e(i);
* rotational curriculum: C(t, l) is 1 for every R-th layer, shifted by one each step, and always for the last layer.

Differences, for drafts by the first few layers and in aid of a small budget: e(l) is the same for all exits (the
paper's grows with l); an exit is scored on a part of the positions of its step; and its target turns, as training goes
on, from the text alone to what the last layer makes of the text, (1 - t) y + t p with p = softmax(head(norm(x_L))): a
draft has to be what the last layer would say, right or wrong.

In the second part t is 1, e(l) is largest at the second and third layer, and the last layer learns from its exits too
(as in mutual learning, Zhang et al., 2017, https://arxiv.org/abs/1706.00384): to the term of an exit that says q is
added m e(l) KL(p || q), of which p alone learns. Where several tokens are about as likely it comes to say the one that
its early layers say. That costs it some of its own loss, and gains what drafts are accepted by.
"""

from dataclasses import dataclass, replace

from transformers import LlamaConfig

from demo_training.text import BOS_ID, EOS_ID


@dataclass(frozen=True)
class Part:
    """A part of the training, with a learning rate that falls to zero in it."""

    tokens: int
    lr: float
    begins: float  # t at its first step; at its last t is 1
    # e(l) after 1, 2, ... layers, and the last of these for all deeper exits; the last layer has 1
    exit_scales: tuple[float, ...]
    rotation: int  # R: one exit in R is scored at a step ...
    stride: int  # ... on one position in `stride`
    meeting: float  # m

    def time(self, progress: float) -> float:
        """t, where so much of the part is done."""
        return self.begins + (1 - self.begins) * progress

    def exit_scale(self, depth: int) -> float:
        return self.exit_scales[min(depth, len(self.exit_scales)) - 1]

    def batch(self, step: int, progress: float) -> tuple[int, int]:
        """Windows in a batch and their length: many small steps do more here than few big ones. Short at first, as
        attention is dear on a CPU; then longer, one in nine of the full context (nine, so that every exit sees some).
        """
        if self.time(progress) < 0.6:
            return 8, 256
        return (2, 2048) if step % 9 == 0 else (4, 512)


LAYER_SKIP = Part(10_300_000, 3e-3, begins=0, exit_scales=(1.0,), rotation=4, stride=2, meeting=0)
MEETING = Part(1_200_000, 5e-4, begins=1, exit_scales=(0.8, 2.2, 1.4, 0.6, 0.3), rotation=2, stride=4, meeting=0.6)


@dataclass(frozen=True)
class Recipe:
    """Everything the result depends on besides the text and the seed."""

    parts: tuple[Part, ...] = (LAYER_SKIP, MEETING)
    layers: int = 8
    width: int = 256
    vocab: int = 4096
    weight_decay: float = 0.1
    dropout: float = 0.1  # p_max of layer dropout

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    def of_tokens(self, tokens: int) -> "Recipe":
        """The same with so many tokens in all."""
        share = tokens / self.tokens
        return replace(self, parts=tuple(replace(part, tokens=round(share * part.tokens)) for part in self.parts))

    def config(self) -> LlamaConfig:
        heads = max(1, self.width // 64)
        return LlamaConfig(
            vocab_size=self.vocab, hidden_size=self.width, num_hidden_layers=self.layers, head_dim=64,
            num_attention_heads=heads, num_key_value_heads=max(1, heads // 2), intermediate_size=self.width * 11 // 4,
            max_position_embeddings=2048, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=BOS_ID, eos_token_id=EOS_ID,
        )  # fmt: skip
