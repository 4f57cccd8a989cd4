"""The model card: what the model is, how good it is, and how it came to be."""

import platform
from pathlib import Path

import torch

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

| layers run | loss (nats/token) | agreement | accepted of 4 |
|---:|---:|---:|---:|
{table}

## Training

`scripts/train_demo_model.py`, seed {seed}: [LayerSkip](https://arxiv.org/abs/2404.16710) from scratch. Layer dropout
rising exponentially with depth to {dropout} and with time, early-exit loss through the shared norm and head with the
rotational curriculum (one exit in {rotation} at a step, weight {exit_scale}), the last layer always on.

- Data: the standard library of Python {python}, {train_files:,} files, {train_tokens:,} tokens, read where it was
  installed; tables, encodings and data files left out; one file in {one_in}, by the hash of its path, held out.
- Seen: {seen:,} tokens in {steps:,} steps: batches of 8 windows of 256, in the last two fifths
  4 of 512, and one in nine of 2 windows of 2048.
- Muon for the matrices, AdamW for the rest; peak learning rate {lr}, cosine to zero; computed in {computed_in}.
- Time: {wall:.1f} minutes by the clock, {cpu:.1f} minutes of processor time on each of {workers} cores:
  about what it takes where these have nothing else to do. {hardware}; torch {torch}.

A run with the same Python and torch repeats it, but for the order of floating-point sums and, if `--minutes` ended it,
the number of steps.

## Sample

A piece of a held-out file, and in ⟨ ⟩ what the model made of it (temperature 0.5):

```python
{sample}
```

## Licence

The weights: Apache-2.0. They were trained on the source of CPython's standard library, which is under the
[PSF License Agreement](https://docs.python.org/3/license.html), copyright Python Software Foundation.
"""


def hardware() -> str:
    """The processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    device = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return device + (names[0] if names else platform.machine())
