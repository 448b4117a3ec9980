"""Opens what was trained: the last good checkpoint of a run, or one checkpoint by its folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pararnn.lm.data.errors import RunError
from pararnn.lm.data.tokenization import is_byte_tokenizer
from pararnn.lm.data.words import warn
from pararnn.lm.models.own_cells import own_cells
from pararnn.lm.training.advice import how_to_resume
from pararnn.lm.training.checkpoints import (
    Checkpoint,
    newest_checkpoint,
    quiet_transformers,
    verify,
)
from pararnn.lm.training.checks import import_kept
from pararnn.lm.training.language_model import to_device
from pararnn.lm.training.run_folder import RunFolder
from pararnn.lm.training.text import Codec, check_tokenizer, open_codec


@dataclass(frozen=True)
class Trained:
    """Where a model is, as `RunFolder.find` finds it.

    Attributes:
        run: The run; None for a checkpoint that lies elsewhere.
        chosen: The checkpoint to take; None for the last good one of the run.
    """

    run: RunFolder | None
    chosen: Path | None = None

    @property
    def codec(self) -> Codec:
        """Between text and tokens: as the run says, or the files beside the model."""
        if self.run is not None:
            return open_codec(self.run)
        return Codec(None if self.chosen is None or is_byte_tokenizer(self.chosen) else self.chosen)

    def checkpoint(self, owner: str | None = None) -> Checkpoint:
        """The checkpoint, its files compared with their checksums.

        Args:
            owner: `identity_of` that it must have; None for any.

        Raises:
            RunError: There is none, or none but damaged ones and that of step 0; or its tokenizer
                is not that of the run's data.
        """
        if self.chosen is not None:
            found: Checkpoint | None = verify(self.chosen, owner)
        else:
            assert self.run is not None  # there is one or the other
            found, problems = newest_checkpoint(self.run.checkpoints, owner)
            if found is None:
                raise RunError(
                    f"{self.run.path} holds no checkpoint yet. {how_to_resume(self.run)}"
                )
            if problems and found.step == 0:
                raise RunError(
                    f"{problems[0]}, and {found.path.name}, the newest checkpoint without damage, "
                    f"is not trained. If you want that one, name its folder: {found.path}"
                )
            for problem in problems:
                warn(f"Skipped: {problem}. Using {found.path.name}.")
        assert found is not None
        if self.run is not None:
            check_tokenizer(self.codec, found)
        return found

    def load(self, device: torch.device, owner: str | None = None) -> PreTrainedModel:
        """The model, on a device. The file of a cell of the user's own is run for it.

        Raises:
            RunError: As `checkpoint`; or that file cannot be run.
        """
        folder = self.checkpoint(owner).path
        import_kept(own_cells(folder), folder)
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
            return to_device(model, device)


def load_trained(
    run: RunFolder | str | Path, device: torch.device | str = "cpu", owner: str | None = None
) -> PreTrainedModel:
    """The model of a run's last good checkpoint, or of one checkpoint.

    Args:
        run: Folder of a run or of a checkpoint.
        device: Where the model goes.
        owner: `identity_of` that the checkpoint must have; None for any.

    Raises:
        RunError: There is none, or its tokenizer is not that of the run's data; or the file of its
            cell cannot be run.
    """
    where = Trained(run) if isinstance(run, RunFolder) else Trained(*RunFolder.find(run))
    return where.load(torch.device(device), owner)
