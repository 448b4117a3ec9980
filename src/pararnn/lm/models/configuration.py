"""Configuration of the language model."""

import difflib
import inspect
import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from pararnn._whole import check_whole
from pararnn._words import counted
from pararnn.cells import MatrixMemoryCell
from pararnn.lm.catalogue import ATTENTION as ATTENTION
from pararnn.lm.catalogue import (
    CELLS,
    MEMORIES,
    OwnName,
    check_mixer,
    check_names,
    check_used,
    unused_options,
)

MLP_MULTIPLE = 256
ATTENTION_HEAD = 128


def default_mlp_size(hidden_size: int) -> int:
    """8/3 of the width, rounded up to a multiple of 256: a SwiGLU as large as a 4x MLP."""
    return -(-8 * hidden_size // (3 * MLP_MULTIPLE)) * MLP_MULTIPLE


class ParaRNNConfig(PreTrainedConfig):
    """Shape of a `ParaRNNForCausalLM`.

    Args:
        vocab_size: Number of tokens.
        hidden_size: Width of the residual stream, in channels.
        num_hidden_layers: Number of blocks (mixer and MLP).
        num_heads: Blocks of the cell's input projection; must divide `inner_size`.
        inner_size: Channels of the recurrence, the values of all heads of a memory; None for
            `hidden_size`.
        intermediate_size: Channels inside the SwiGLU; None for 8/3 of the width, rounded up to a
            multiple of 256.
        conv_kernel: Width of the causal depthwise convolution, in time steps.
        cell: What mixes over time: a name in `pararnn.lm.models.CELLS` or `MEMORIES`.
        mixers: The same for each block, for hybrid stacks, "attention" among them; None for the
            cell in all.
        attention_heads: Heads of attention; None for one per 128 channels.
        cell_options: Further keyword arguments of the cell.
        memory_options: Keyword arguments of memories, for all of them: `key_size` and `value_size`
            (else the `usual_sizes` of each), `shared_keys` (True: one query and one key for all
            heads), and what else they take, such as `nonlinearity`.
        dropout: Share of the channels that are left out behind every mixer and MLP in training.
        backend: Which kernels evaluate the recurrence, as in `pararnn.RNN`.
        rms_norm_eps: Added to the mean square in every norm.
        initializer_range: Standard deviation of linear and embedding weights; the projections back
            to the residual stream get it divided by the square root of their number.
        z_loss_weight: Weight of the mean squared log-partition in the loss.
        use_cache: Return a cache outside training, unless a sequence ends in padding.
        tie_word_embeddings: Use the embedding as output projection.

    Raises:
        TypeError: A size is no whole number, or a keyword is nearly that of an argument.
        ValueError: A size is not positive, a division leaves a remainder, the cell is unknown, or
            there are options that no block takes, or not of that name.
    """

    model_type = "pararnn"
    keys_to_ignore_at_inference = ["cache_params", "cross_entropy", "z_loss"]  # noqa: RUF012 # theirs

    def __init__(
        self,
        vocab_size: int = 50432,
        hidden_size: int = 1024,
        num_hidden_layers: int = 24,
        num_heads: int = 4,
        inner_size: int | None = None,
        intermediate_size: int | None = None,
        conv_kernel: int = 4,
        cell: str = "paragru",
        mixers: list[str] | None = None,
        attention_heads: int | None = None,
        cell_options: dict[str, Any] | None = None,
        memory_options: dict[str, Any] | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        z_loss_weight: float = 1e-4,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_heads = num_heads
        self.inner_size = hidden_size if inner_size is None else inner_size
        self.intermediate_size = (
            default_mlp_size(hidden_size) if intermediate_size is None else intermediate_size
        )
        self.conv_kernel = conv_kernel
        self.cell = cell
        self.mixers = [cell] * num_hidden_layers if mixers is None else list(mixers)
        self.attention_heads = attention_heads or max(1, hidden_size // ATTENTION_HEAD)
        self.cell_options = dict(cell_options or {})
        self.memory_options = dict(memory_options or {})
        self.dropout = dropout
        self.backend = backend
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.z_loss_weight = z_loss_weight
        self.use_cache = use_cache
        self._check()
        _check_keywords(kwargs)
        super().__init__(**kwargs)
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A stored configuration; options that no block takes were not always refused.

        Args:
            config_dict: The fields.
            **kwargs: Fields to change, and what transformers takes besides.
        """
        mixers = config_dict.get("mixers") or [config_dict.get("cell", "paragru")]
        unused = dict.fromkeys(unused_options(mixers))
        return super().from_dict(config_dict | unused, **kwargs)

    def _check(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_heads",
            "inner_size",
            "intermediate_size",
            "conv_kernel",
            "attention_heads",
        ):
            check_whole(**{name: getattr(self, name)})
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number from 1 up.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; give a number from 0 to below 1.")
        if self.inner_size % self.num_heads:
            raise ValueError(
                f"inner_size {self.inner_size} cannot be split into {self.num_heads} heads; "
                "choose num_heads that divides it."
            )
        for name in {self.cell, *self.mixers}:
            if name not in CELLS and OwnName.stored(name):
                raise ValueError(
                    f"the model has the cell {name!r}, whose file must be run first: call "
                    "pararnn.lm.models.import_cells(FOLDER) with the folder of the model."
                )
            check_mixer(name)
        if len(self.mixers) != self.num_hidden_layers:
            raise ValueError(
                f"mixers names {counted(len(self.mixers), 'block')} but num_hidden_layers is "
                f"{self.num_hidden_layers}; name one for each."
            )
        if ATTENTION in self.mixers and self.hidden_size % self.attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} cannot be split into {self.attention_heads} "
                "attention heads; choose attention_heads that divides it."
            )
        self._check_options()

    def _check_options(self) -> None:
        check_used(self.mixers, "the model", vars(self))
        for name in dict.fromkeys(self.mixers):
            if name in MEMORIES:
                self._check_memory(name)
            elif name != ATTENTION and self.cell_options:
                check_names(name, self.cell_options)

    def _check_memory(self, name: str) -> None:
        options = options_of_memory(name, self.memory_options, self.inner_size)
        for size in ("key_size", "value_size"):
            check_whole(**{f"memory_options' {size}": options[size]})
        if further := {n: v for n, v in self.memory_options.items() if n not in _OF_ALL_MEMORIES}:
            check_names(name, further)
        values = options["value_size"]
        if values < 1 or self.inner_size % values:
            raise ValueError(
                f"inner_size {self.inner_size} cannot be split into heads of {values} values "
                "(memory_options' value_size); choose a number that divides it."
            )


_OF_ALL_MEMORIES = ("key_size", "value_size", "shared_keys")


def options_of_memory(
    name: str, given: Mapping[str, Any], inner_size: int | None = None
) -> dict[str, Any]:
    """Keyword arguments of a memory: those that are given, and its usual sizes.

    Args:
        name: In `MEMORIES`.
        given: `memory_options` of a `ParaRNNConfig`.
        inner_size: Channels that the values of all heads fill; where the usual number of values
            does not divide it, heads have what divides both. None if it is not known.
    """
    keys, values = getattr(MEMORIES[name], "usual_sizes", MatrixMemoryCell.usual_sizes)
    if inner_size is not None:
        values = math.gcd(values, inner_size)
    return {"key_size": keys, "value_size": values, "shared_keys": True, **given}


def _check_keywords(given: dict[str, Any]) -> None:
    """Refuse what is nearly the name of an argument; transformers keeps every other keyword."""
    arguments = list(inspect.signature(ParaRNNConfig.__init__).parameters)
    for name in given:
        near = difflib.get_close_matches(name, arguments, n=1, cutoff=0.85)
        if near and not hasattr(PreTrainedConfig, name):
            raise TypeError(f"ParaRNNConfig has no argument {name!r}; did you mean {near[0]!r}?")
