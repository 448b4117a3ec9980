"""What lies beside the weights of a checkpoint: tokenizer, own cells, and how to open it."""

from pathlib import Path

from transformers import PreTrainedModel

import pararnn
from pararnn.lm.data.tokenization import add_byte_tokenizer, add_tokenizer
from pararnn.lm.models import ParaRNNConfig
from pararnn.lm.models.own_cells import files_of
from pararnn.lm.training.checkpoints import folder_name

CARD = "README.md"


def add_files(
    temporary: Path, checkpoints: Path, step: int, model: PreTrainedModel, tokenizer: Path | None
) -> None:
    """Write them into the folder of a checkpoint.

    Args:
        temporary: The folder while it is written.
        checkpoints: Where it will lie.
        step: Optimiser steps done.
        model: The model; only its configuration and number of parameters matter.
        tokenizer: Folder of the tokenizer; None for bytes.
    """
    if tokenizer is None:
        add_byte_tokenizer(temporary)
    else:
        add_tokenizer(tokenizer, temporary)
    config = model.config
    cells = files_of(config.mixers) if isinstance(config, ParaRNNConfig) else {}
    for name, content in cells.items():
        (temporary / name).write_bytes(content)
    card = _card(checkpoints / folder_name(step), step, model, list(cells))
    (temporary / CARD).write_text(card, encoding="utf-8")


def _card(folder: Path, step: int, model: PreTrainedModel, cells: list[str]) -> str:
    config = model.config
    ours = isinstance(config, ParaRNNConfig)
    kinds = (
        " and ".join(dict.fromkeys(m.partition("@")[0] for m in config.mixers))
        if ours
        else str(config.model_type)
    )
    imports = ["from transformers import pipeline"]
    if ours:
        imports.append("\nimport pararnn.lm.models  # registers the architecture")
    lines = [f"folder = {folder.as_posix()!r}  # the folder of this file"]
    if cells:
        lines.append(
            f"pararnn.lm.models.import_cells(folder)  # runs the code in {', '.join(cells)}"
        )
    lines += [
        'generator = pipeline("text-generation", model=folder)',
        'print(generator("The ", max_new_tokens=100)[0]["generated_text"])',
    ]
    program = "\n".join([*imports, "", *lines])
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [pararnn]
---

# {kinds}, {model.num_parameters():,} parameters

A language model after {step:,} optimiser steps of pararnn {pararnn.__version__}. It opens with
transformers:

```python
{program}
```

`AutoModelForCausalLM.from_pretrained(folder)` and `AutoTokenizer.from_pretrained(folder)` open its
parts. `pararnn eval` and `pararnn generate` take this folder too.
"""
