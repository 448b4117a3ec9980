"""What a decoder has read so far, to return to: for texts with one beginning, and for branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pararnn._whole import check_whole
from pararnn.lm.decoding.states import Layer, select_rows


@dataclass(frozen=True)
class Snapshot:
    """The state of the texts of a `Decoder` between two steps. Nothing writes into it.

    Attributes:
        layers: States of all blocks after the tokens that were read.
        num_tokens: Tokens read per text, padding included.
        tokens: The last token of every text, (texts, 1): chosen, and not read yet.
        ended: Which texts have ended, (texts, 1).
        end: Token that ends a text, of shape (); -1 for none.
        temperature: Of the sampling, of shape ().
        random: State of the generator of the noise; None without sampling.
        vocab_size: Tokens of the model.
    """

    layers: tuple[Layer, ...]
    num_tokens: int
    tokens: Tensor
    ended: Tensor
    end: Tensor
    temperature: Tensor
    random: Tensor | None
    vocab_size: int

    @property
    def batch_size(self) -> int:
        """Number of texts."""
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Size of all states; a recurrent model's does not depend on how much was read."""
        sizes: list[int] = []
        for layer in self.layers:
            layer.map(lambda tensor: sizes.append(tensor.nbytes) or tensor)  # type: ignore[func-returns-value]
        return sum(sizes)

    def select(self, texts: Sequence[int] | Tensor) -> Snapshot:
        """These texts, in this order; one may come several times, to go on in several ways.

        Raises:
            IndexError: There is no such text.
            TypeError: A number of a text is no whole number.
        """
        texts = torch.as_tensor(texts).flatten().tolist()
        check_whole(**{f"texts[{i}]": text for i, text in enumerate(texts)})
        wrong = [text for text in texts if not 0 <= text < self.batch_size]
        if wrong or not texts:
            raise IndexError(
                f"texts is {texts}, but the snapshot has texts 0 to {self.batch_size - 1}; "
                "name at least one of these."
            )
        rows = torch.tensor(texts, device=self.tokens.device)
        return replace(
            self,
            layers=tuple(select_rows(self.layers, rows)),
            tokens=self.tokens[rows],
            ended=self.ended[rows],
        )
