"""Makes synthetic checkpoints: any Llama shape with random weights, whose early exits agree with the last layer at
a chosen rate. Their costs are real; their acceptance is calibrated, and says nothing about trained models.

    python scripts/synthetic.py --shape 1b --out FOLDER --easy 0.92 --hard 0.0 --exit 3

A token's embedding already points at the token that follows it, so the first layers would do. What later layers add
is random and changes the most probable token now and then: the more often, the smaller the embedding is beside it. So
one number, the size of its embeddings, decides how often for each class of tokens. Sequences stay in the class of
their prompt, except those of the two turning classes, of which some tokens lead into the other one.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from precision import computed_in
from rich.progress import track
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = 4
"""The first tokens are `<s>`, `</s>`, `<pad>` and `<unk>`."""
CLASSES = ("easy", "hard", "turning easy", "turning hard")
TURN_EVERY = 64
"""One in so many tokens of a turning class is followed by one of the other turning class."""
GROWTH, ADDED = 8.0, 3.8
"""How much more the last layer adds than the first one, and all of them beside a token's own identity, of size 1."""
STAY = 0.6
"""How much of an embedding says which class comes next. With less, what later layers add leads into another one."""
CALIBRATION_TOKENS = 512
CALIBRATION_ROUNDS, CORRECTIONS, CHECKS = 12, 2, 4


@dataclass(frozen=True)
class Shape:
    """A Llama shape."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int


SHAPES = {
    "8b": Shape(32, 4096, 14336, 32, 8, 128_256),
    "1b": Shape(16, 2048, 8192, 32, 8, 32_000),
    "tiny": Shape(8, 512, 1024, 8, 2, 1_000),
}


def tokens_of(vocab_size: int, name: str) -> range:
    """The tokens of a class: a quarter of the vocabulary."""
    quarter = (vocab_size - SPECIAL) // len(CLASSES)
    begin = SPECIAL + CLASSES.index(name) * quarter
    return range(begin, begin + quarter)


class Synthetic:
    """A model under construction, on torch's default device: its embeddings can be given other sizes, the rest is drawn
    once."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape = shape
        device = torch.get_default_device()
        self.random = torch.Generator(device).manual_seed(seed)
        config = LlamaConfig(
            **asdict(shape),
            max_position_embeddings=8192,
            rope_theta=500_000.0,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
        with torch.device("meta"):
            self.model = LlamaForCausalLM(config)
        # Weights are of bfloat16; agreement is of what they are computed in.
        self.computed_in = computed_in(device)
        self.model = self.model.to(self.computed_in).to_empty(device=device).eval()
        self.model.model.rotary_emb = type(self.model.model.rotary_emb)(config)
        self._draw_layers()
        hidden = shape.hidden_size
        # [vocabulary, hidden size]: where a token points, which the head looks for, and what else it is made of
        self.directions = torch.randn(shape.vocab_size, hidden, generator=self.random)
        self.identities = torch.randn(shape.vocab_size, hidden, generator=self.random)
        self.classes = torch.randn(len(CLASSES), hidden, generator=self.random)
        self._draw_head()

    def _draw_layers(self) -> None:
        # The last layers add most: what the first half says of a hard token is all but unrelated to what the last one
        # says. All of them together add so much, whatever their number.
        gains = GROWTH ** torch.linspace(0, 1, self.shape.num_hidden_layers)
        gains *= ADDED / gains.square().sum().sqrt()
        for name, weight in self.model.named_parameters():
            if weight.dim() == 1:
                weight.data.fill_(1.0)
            elif "embed" not in name and "lm_head" not in name:
                drawn = torch.randn(weight.shape, generator=self.random)
                # Attention averages over the context: what it adds is nearly the same for every token, and would make
                # all of them one.
                layer = int(name.split(".")[2])
                gain = float(gains[layer]) if "down_proj" in name else 0.2 if "o_proj" in name else 1.0
                weight.data.copy_((drawn * gain / weight.shape[1] ** 0.5).bfloat16())

    def _draw_head(self) -> None:
        """The head's row of a token is the direction of the token before it, and that of its own class."""
        shape, head = self.shape, torch.randn(self.shape.vocab_size, self.shape.hidden_size, generator=self.random)
        # The class a token's successor is in.
        self.leads_to = torch.zeros(shape.vocab_size, dtype=torch.int64)
        for index, name in enumerate(CLASSES):
            tokens = torch.tensor(tokens_of(shape.vocab_size, name))
            order = tokens[torch.randperm(len(tokens), generator=self.random)]
            head[order.roll(-1)] = self.directions[order] + 2.0 * self.classes[index]
            self.leads_to[tokens] = index
            if name.startswith("turning"):
                self.leads_to[tokens[::TURN_EVERY]] = (
                    CLASSES.index("turning easy") + CLASSES.index("turning hard") - index
                )
        head[:SPECIAL] = -head[SPECIAL:].mean(0)
        self.model.lm_head.weight.data.copy_((head * (3.0 / shape.hidden_size**0.5)).bfloat16())

    def embed(self, sizes: torch.Tensor) -> None:
        """Give each token's embedding its size, [vocabulary]."""
        embedding = sizes.unsqueeze(1) * self.directions + self.identities + STAY * self.classes[self.leads_to]
        self.model.model.embed_tokens.weight.data.copy_(embedding.bfloat16())

    @torch.inference_mode()
    def agreement(self, tokens: torch.Tensor, exits: Sequence[int]) -> torch.Tensor:
        """Where each exit's most probable token is the last layer's, [tokens, exits] float32."""
        output = self.model.model(tokens.unsqueeze(0), output_hidden_states=True, use_cache=False)
        last = self.model.lm_head(output.last_hidden_state[0]).argmax(-1)
        states = (self.model.model.norm(output.hidden_states[depth][0]) for depth in exits)
        return torch.stack([self.model.lm_head(state).argmax(-1) == last for state in states], 1).float()


def calibrate(synthetic: Synthetic, name: str, rate: float, exit: int) -> float:
    """The size of embedding at which the class agrees at this rate; 0 for a class that is to agree by chance only."""
    if not rate:
        return 0.0
    vocab = synthetic.shape.vocab_size
    seen: list[torch.Tensor] = []
    for _ in track(range(CALIBRATION_ROUNDS), description=f"calibrating {name!r}"):
        # All sizes in one text: each token has its own.
        sizes = 10 ** -(2 * torch.rand(vocab, generator=synthetic.random))
        synthetic.embed(sizes)
        tokens = draw(synthetic, name)
        seen.append(torch.stack((sizes[tokens], synthetic.agreement(tokens, [exit])[:, 0])))
    size, agrees = torch.cat(seen, 1)
    order = size.argsort()
    size, agrees = size[order], agrees[order]
    # A running mean over neighbouring sizes, made steady: the larger the embedding, the more agreement.
    window = len(size) // 10
    mean = agrees.unfold(0, window, 1).mean(1)
    steady = (mean.cummax(0).values + mean.flip(0).cummin(0).values.flip(0)) / 2
    centre = size[window // 2 :][: len(steady)]
    aim, best = rate, 0.0
    for _ in range(CORRECTIONS + 1):
        best = float(centre[(steady - aim).abs().argmin()])
        # What it comes to where all tokens are of this size.
        synthetic.embed(torch.full((vocab,), best))
        aim += rate - measure(synthetic, name, [exit])[0]
    return best


def measure(synthetic: Synthetic, name: str, exits: Sequence[int]) -> list[float]:
    """How often each exit agrees on tokens of a class."""
    texts = [synthetic.agreement(draw(synthetic, name), exits) for _ in range(CHECKS)]
    return torch.cat(texts).mean(0).tolist()


def draw(synthetic: Synthetic, name: str) -> torch.Tensor:
    """Random tokens of a class, [CALIBRATION_TOKENS]."""
    pool = torch.tensor(tokens_of(synthetic.shape.vocab_size, name))
    return pool[torch.randint(len(pool), (CALIBRATION_TOKENS,), generator=synthetic.random)]


def make(shape: Shape, wanted: dict[str, float], exit: int, out: Path, seed: int = 0) -> dict[str, dict[str, float]]:
    """Write a checkpoint in which `easy` and `hard` tokens agree at the wanted rates; returns the measured ones."""
    synthetic = Synthetic(shape, seed)
    size = {name: calibrate(synthetic, name, rate, exit) for name, rate in wanted.items()}
    sizes = torch.ones(shape.vocab_size)
    for name in CLASSES:
        sizes[torch.tensor(tokens_of(shape.vocab_size, name))] = size[name.split()[-1]]
    synthetic.embed(sizes)
    measured: dict[str, dict[str, float]] = {}
    for name in wanted:
        exits = sorted({1, 2, exit, exit + 2, shape.num_hidden_layers // 2, shape.num_hidden_layers - 1})
        measured[name] = dict(zip(map(str, exits), measure(synthetic, name, exits), strict=True))
    out.mkdir(parents=True, exist_ok=True)
    synthetic.model.bfloat16().save_pretrained(out)
    _tokenizer(shape.vocab_size).save_pretrained(out)
    about = {"wanted": wanted, "exit": exit, "embedding_sizes": size, "agreement_by_exit": measured, "seed": seed}
    about["computed_in"] = str(synthetic.computed_in).removeprefix("torch.")
    (out / "synthetic.json").write_text(json.dumps(about, indent=1))
    return measured


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One word a token."""
    words = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3} | {f"w{i}": i for i in range(SPECIAL, vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--easy", type=float, default=0.92, help="agreement of easy tokens at --exit")
    parser.add_argument("--hard", type=float, default=0.0, help="agreement of hard tokens at --exit")
    parser.add_argument("--exit", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where it is made; elsewhere it is another model")
    args = parser.parse_args()
    wanted = {"easy": args.easy, "hard": args.hard}
    with torch.device(args.device):
        print(json.dumps(make(SHAPES[args.shape], wanted, args.exit, args.out, args.seed), indent=1))


if __name__ == "__main__":
    main()
