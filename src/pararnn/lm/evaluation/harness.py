"""Our models as models of the lm-eval harness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

import pararnn.lm.models  # noqa: F401 # registers the architecture
from pararnn.lm.data.errors import RunError
from pararnn.lm.data.tokenization import is_byte_tokenizer
from pararnn.lm.evaluation.tokenizer import ByteTokenizer
from pararnn.lm.models.own_cells import own_cells
from pararnn.lm.training.checkpoints import newest_checkpoint
from pararnn.lm.training.checks import import_kept
from pararnn.lm.training.language_model import to_device
from pararnn.lm.training.parallel import choose_device
from pararnn.lm.training.run_folder import RunFolder

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_NUM_BYTES = 256


@register_model("pararnn")
class HarnessModel(HFLM):  # type: ignore[misc] # has no types
    """A model of a run, of a folder, or one in memory.

    Args:
        pretrained: Folder of a run, of which the last good checkpoint is taken; folder of a model
            as `save_pretrained` writes it; or a model.
        tokenizer: Folder of a tokenizer, or one in memory; None for the one in the model's folder,
            or for bytes when the vocabulary has 256 entries.
        device: A torch device; None for where a model in memory is, and else for CUDA when there is
            one, or the CPU.
        options: As `lm_eval.models.huggingface.HFLM`: `batch_size`, `dtype`, `max_length`, ...
            `max_length` cuts contexts on the left; 16,384 when the model has no limit of its own.

    Raises:
        RunError: The folder holds neither a run nor a model, no tokenizer fits, or there is no such
            device.
        TypeError: `dtype` with a model in memory, which has one.
    """

    _DEFAULT_MAX_LENGTH = 16_384
    add_bos_token: bool | None

    def __init__(
        self,
        pretrained: str | Path | PreTrainedModel,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> None:
        place = choose_device("auto" if device is None else str(device))
        if not isinstance(pretrained, PreTrainedModel):
            pretrained = str(_model_folder(Path(pretrained)))
        elif "dtype" in options:
            raise TypeError("a model in memory has a type; pass model.to(dtype), without dtype.")
        elif device is not None:
            to_device(pretrained, place)
        if isinstance(tokenizer, Path):
            tokenizer = str(tokenizer)
        if tokenizer is None:
            tokenizer = _find_tokenizer(pretrained)
        if isinstance(tokenizer, ByteTokenizer):
            options.setdefault("add_bos_token", True)
        options.setdefault("backend", "causal")
        # With a name that it does not know, as cpu:0, lm-eval takes a GPU.
        name = place.type if place.type == "cpu" else str(place)
        super().__init__(pretrained, tokenizer=tokenizer, device=name, **options)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts; the harness itself puts the first token before them."""
        before, self.add_bos_token = self.add_bos_token, False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self.add_bos_token = before


def _model_folder(path: Path) -> Path:
    """The folder to load a model from."""
    if (path / "checkpoints").is_dir():
        checkpoint, problems = newest_checkpoint(RunFolder.open(path).checkpoints)
        if checkpoint is None:
            raise RunError(f"{path} holds no checkpoint yet; train the run further.")
        for problem in problems:
            print(f"Skipped: {problem}. Using {checkpoint.path.name}.")
        path = checkpoint.path
    if not (path / "config.json").is_file():
        raise RunError(
            f"{path} holds neither a run (no checkpoints/) nor a model (no config.json); name the "
            "folder that pararnn train or save_pretrained wrote."
        )
    import_kept(own_cells(path), path)
    return path


def _find_tokenizer(pretrained: str | PreTrainedModel) -> str | ByteTokenizer:
    """The tokenizer beside a model, or bytes."""
    if isinstance(pretrained, PreTrainedModel):
        where, config = "the model", pretrained.config
    else:
        if is_byte_tokenizer(Path(pretrained)):
            return ByteTokenizer()
        if any((Path(pretrained) / name).is_file() for name in _TOKENIZER_FILES):
            return pretrained
        where, config = pretrained, AutoConfig.from_pretrained(pretrained)
    if config.vocab_size == _NUM_BYTES:
        return ByteTokenizer()
    raise RunError(
        f"{where} has {config.vocab_size} tokens and comes with no tokenizer; pass "
        "tokenizer=FOLDER, or save it with tokenizer.save_pretrained into the model's folder."
    )
