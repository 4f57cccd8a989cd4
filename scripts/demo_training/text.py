"""The text the demo model learns from, and the tokenizer learned from the text."""

import hashlib
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1
EXCLUDED = ["site-packages", "encodings", "cjkencodings", "pydoc_data", "decimaltestdata", "lib2to3/tests"]
HELD_OUT_ONE_IN = 64


def read_corpus(limit: int) -> tuple[list[str], list[str]]:
    """Source files for training and held-out ones, in an order and a split given by the hash of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = {p.relative_to(root).as_posix(): p for p in root.rglob("*.py")}
    digest = {name: int(hashlib.sha256(name.encode()).hexdigest(), 16) for name in paths}
    train: list[str] = []
    held_out: list[str] = []
    for name in sorted(paths, key=digest.__getitem__):
        if any(f"/{part}/" in f"/{name}" for part in EXCLUDED):
            continue
        try:
            text = paths[name].read_text("utf-8")
        except UnicodeDecodeError:
            continue  # the test suite has broken files on purpose
        letters = sum(text.count(c) for c in "etaoinsrhldcu_ \n")
        if not text or letters < len(text) * 0.5:
            continue  # tables and other data in the shape of a program
        if digest[name] % HELD_OUT_ONE_IN == 0:
            held_out.append(text)
        elif (limit := limit - len(text)) > 0:
            train.append(text)
    return train, held_out


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that starts every text with BOS, as Llama's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, model_max_length=2048)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All texts as one stream of ids [n], each text between BOS and EOS."""
    rows = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor([i for row in rows for i in (*row, EOS_ID)])
