"""The model card: what the model is, how good it is, and how it came to be."""

from typing import Any

CARD = """\
---
license: apache-2.0
language: [code]
pipeline_tag: text-generation
tags: [llama, early-exit, layerskip, self-speculative-decoding]
---

# A small Llama trained for early exit

{layers} layers, {width} wide, {vocab:,} byte-level BPE tokens, {parameters:.2f} million parameters (tied embeddings),
bfloat16, {size:.1f} MB. It writes text in the shape of Python and knows nothing: it is here so that self-speculative
decoding can be run, tested and shown on real text without a download. A standard `LlamaForCausalLM` checkpoint.

## Quality

On {scored:,} tokens of files it was not trained on ({held_out:,} tokens in all), the saved bfloat16 weights computed in
float32. *Agreement*: how often the exit's most likely token is the last layer's. *Accepted*: mean tokens accepted
of a draft of four by that exit, on the model's own greedy text (32 prompts), which repeats itself and so is easier
to draft than real text.

| layers run | loss (nats/token) | agreement | accepted of 4 | after the first part: loss | agreement | accepted |
|---:|---:|---:|---:|---:|---:|---:|
{scores}

## Training

`scripts/train_demo_model.py`; `scripts/demo_training/recipe.py` has the recipe in full. First
[LayerSkip](https://arxiv.org/abs/2404.16710) from scratch: layer dropout rising exponentially with depth to {dropout}
and with time, early-exit loss through the shared norm and head with the rotational curriculum, the last layer always
on. Then a shorter part in which the last layer learns from its exits too: where several tokens are about as likely it
comes to say the one that they say. That costs it some of its own loss, and gains what drafts are accepted by.

- Data: the standard library of Python {python}, {train_files:,} files, {train_tokens:,} tokens, read where it was
  installed; tables, encodings and data files left out; one file in {one_in}, by the hash of its path, held out.
- Batches of 8 windows of 256; from three fifths of the first part on 4 of 512, and one in nine of 2 windows of 2048.
- Muon for the matrices, AdamW for the rest; learning rates of {rates} at their peaks, cosine to zero.
- Time: {minutes:.1f} minutes of training by the clock; reading the text and scoring come on top.

| part | seed | tokens | steps | minutes | of processor time on each core | cores | computed in | on |
|---:|---:|---:|---:|---:|---:|---:|---|---|
{took}

A run with the same Python and torch repeats it, but for the order of floating-point sums and, if `--minutes` ended a
part, the number of steps.

## Sample

A piece of a held-out file, and in ⟨ ⟩ what the model made of it (temperature 0.5):

```python
{sample}
```

## Licence

The weights: Apache-2.0. They were trained on the source of CPython's standard library, which is under the
[PSF License Agreement](https://docs.python.org/3/license.html), copyright Python Software Foundation.
"""


def scores_of(records: list[dict[str, Any]]) -> str:
    """Rows of the exits: after the last part, and after the first."""
    rows = []
    for now, before in zip(records[-1]["scores"], records[0]["scores"], strict=True):
        cells = [f"{s['loss']:.3f} | {s['agreement']:.3f} | {s['accepted']:.2f}" for s in (now, before)]
        rows.append(f"| {now['depth']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def took_by(records: list[dict[str, Any]]) -> str:
    """Rows of the parts."""
    rows = []
    for part, of in enumerate(records, start=1):
        counts = part, of["seed"], f"{of['tokens']:,}", f"{of['steps']:,}", of["minutes"], of["processor_minutes"]
        where = of["workers"], of["computed_in"], f"{of['hardware']}, torch {of['torch']}"
        rows.append(f"| {' | '.join(map(str, (*counts, *where)))} |")
    return "\n".join(rows)
