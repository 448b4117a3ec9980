"""Generation: prompts in parallel over time, then one step per token from the recurrent state.

A step reads and writes tensors that are made once: the states of all blocks, the last tokens, and
which sequences have ended. So on a GPU the step is captured in a CUDA graph and replayed. On other
devices the same function is called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pararnn.layers.stepping import Form, captured_step, compile_options
from pararnn.lm.catalogue import ATTENTION
from pararnn.lm.models.cache import LayerState, ParaRNNCache, State
from pararnn.lm.models.convolution import advance_windows
from pararnn.lm.models.modeling import ParaRNNForCausalLM
from pararnn.planning.costs import COSTS

_LEAST_NOISE = 2.0**-25  # the generator rounds noise below 2**-24 to 0


def generate(
    model: ParaRNNForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    end_of_text: int | None = None,
) -> list[list[int]]:
    """Continue texts of any lengths side by side.

    Args:
        model: Model on the device to use; put into evaluation mode.
        prompts: Tokens of every text, at least one each.
        max_new_tokens: Largest number of tokens to add to each text.
        temperature: Temperature of the sampling; 0 takes the most probable token.
        seed: Seed of the sampling. PyTorch's own random state is neither used nor changed.
        end_of_text: Token that ends a text; None for no such token.

    Returns:
        The new tokens of every text, without `end_of_text`.

    Raises:
        ValueError: No prompts, an empty one, a token outside the vocabulary, or a setting out of
            range.
    """
    decoder = Decoder(model, len(prompts))
    return decoder.generate(
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        end_of_text=end_of_text,
    )


class Decoder:
    """Generates for batches of one size. Keeps its tensors and its CUDA graph between calls.

    Args:
        model: Model on the device to use; put into evaluation mode. `start`, and so `generate`,
            notices changes of the model.
        batch_size: Texts side by side.
        compiled: Fuse the operations of a step with `torch.compile`, in the first call. Without it
            a step consists of many small kernels.

    Raises:
        ValueError: batch_size is less than 1, or the model has attention, whose state grows.
    """

    def __init__(
        self, model: ParaRNNForCausalLM, batch_size: int, *, compiled: bool = False
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; pass at least one prompt.")
        if ATTENTION in model.config.mixers:
            raise ValueError(
                "the model has blocks of attention, whose state grows with the text; use "
                "model.generate(...)."
            )
        self.model = model.eval()
        self.batch_size = batch_size
        device = model.device
        self.tokens = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        """The last token of every text, shape (batch_size, 1); the next step reads it."""
        self._ended = torch.zeros(batch_size, 1, dtype=torch.bool, device=device)
        self._end = torch.zeros((), dtype=torch.int64, device=device)
        self._temperature = torch.zeros((), device=device)
        self._noise = torch.ones(batch_size, model.config.vocab_size, device=device)
        self._generator: torch.Generator | None = None
        self._layers: list[LayerState] = []
        self._windows: list[Tensor] = []  # of all blocks whose windows have the same shape
        self._places: list[list[int]] = []  # which blocks these are
        self._next: Callable[[], tuple[list[Tensor], list[Tensor]]] = self._advance
        if compiled:
            self._next = torch.compile(
                self._advance, fullgraph=True, dynamic=False, options=compile_options()
            )
        self._run: Callable[[], None] = self._replace
        self._prepared_for: Form | None = None

    @property
    def state_bytes(self) -> int:
        """Size of the states of all blocks and texts; 0 before the first call."""
        return sum(tensor.nbytes for tensor in (*self._windows, *_recurrent(self._layers)))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        end_of_text: int | None = None,
    ) -> list[list[int]]:
        """As the function `generate`, for `batch_size` prompts."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
        self.start(prompts, temperature=temperature, seed=seed, end_of_text=end_of_text)
        new = [self.tokens.clone()]
        while len(new) < max_new_tokens:
            if len(new) % COSTS.steps_between_checks == 0 and self._ended.all():
                break
            self.step()
            new.append(self.tokens.clone())
        rows = torch.cat(new, dim=1).tolist()
        return [_until(row, end_of_text) for row in rows]

    @torch.no_grad()
    def start(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        temperature: float = 0.0,
        seed: int = 0,
        end_of_text: int | None = None,
    ) -> None:
        """Read the prompts in one pass over all of their tokens, and choose the first new ones."""
        if not temperature >= 0:
            raise ValueError(f"temperature is {temperature}; it must be at least 0.")
        tokens, mask = self._pad(prompts)
        self._temperature.fill_(temperature)
        self._end.fill_(-1 if end_of_text is None else end_of_text)
        self._ended.zero_()
        self._noise.fill_(1.0)
        self._generator = None
        if temperature > 0:
            self._generator = torch.Generator(self.model.device).manual_seed(seed)
        output = self.model(input_ids=tokens, attention_mask=mask, use_cache=True, logits_to_keep=1)
        layers = output.cache_params.layers
        if self._prepared_for is None or self._prepared_for.has_changed():
            self._prepare(layers)
        for windows, places in zip(self._windows, self._places, strict=True):
            windows.copy_(_windows(layers, places))
        torch._foreach_copy_(_recurrent(self._layers), _recurrent(layers))
        self._draw()
        self._choose(output.logits)

    @torch.no_grad()
    def step(self) -> None:
        """Read the last token and choose the next, for every text. Does not wait for the device."""
        self._draw()
        self._run()

    def _pad(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        """Tokens with padding on the left, and the mask of the tokens; None without padding."""
        if len(prompts) != self.batch_size:
            raise ValueError(
                f"there are {len(prompts)} prompts but batch_size is {self.batch_size}; pass as "
                "many, or make another Decoder."
            )
        lengths = [len(prompt) for prompt in prompts]
        if 0 in lengths:
            raise ValueError(
                f"prompt {lengths.index(0)} is empty; begin it with the token that begins a text."
            )
        tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, -len(prompt) :] = torch.as_tensor(prompt)
            mask[row, -len(prompt) :] = 1
        size = self.model.config.vocab_size
        if tokens.min() < 0 or tokens.max() >= size:
            raise ValueError(
                f"the prompts hold tokens from {tokens.min()} to {tokens.max()} but the model has "
                f"{size}; encode them with the tokenizer that it was trained with."
            )
        device = self.model.device
        return tokens.to(device), None if mask.all() else mask.to(device)

    def _prepare(self, layers: list[LayerState]) -> None:
        """Make the tensors of the states, and the graph, whose first runs write into them."""
        alike: dict[torch.Size, list[int]] = {}
        for place, layer in enumerate(layers):
            alike.setdefault(layer.window.shape, []).append(place)
        self._places = list(alike.values())
        self._windows = [torch.zeros_like(_windows(layers, places)) for places in self._places]
        self._layers = [layer.map(torch.zeros_like) for layer in layers]
        for windows, places in zip(self._windows, self._places, strict=True):
            for window, place in zip(windows, places, strict=True):
                self._layers[place] = dataclasses.replace(self._layers[place], window=window)
        self._prepared_for = Form(self.model)
        self._run = captured_step(self._replace, self.model.device)
        self._ended.zero_()

    def _replace(self) -> None:
        """Take a step. One call copies the states of all blocks, which are small."""
        newest, recurrent = self._next()
        for windows, places in zip(self._windows, self._places, strict=True):
            advance_windows(windows, [newest[place] for place in places])
        torch._foreach_copy_(_recurrent(self._layers), recurrent)

    def _advance(self) -> tuple[list[Tensor], list[Tensor]]:
        """Choose the next tokens. Returns the new entries of the windows and the new states."""
        cache = ParaRNNCache(list(self._layers), 1)
        output = self.model(input_ids=self.tokens, cache_params=cache, use_cache=True)
        self._choose(output.logits)
        return [layer.window[:, -1:] for layer in cache.layers], _recurrent(cache.layers)

    def _draw(self) -> None:
        """Draw noise, outside of the graph, so that the seed of each call is used."""
        if self._generator is not None:
            self._noise.exponential_(generator=self._generator)

    def _choose(self, logits: Tensor) -> None:
        """Next tokens: the largest logit plus temperature times Gumbel noise is a sample.

        At temperature 0 the noise has no effect. Texts that have ended repeat their last token.
        """
        gumbel = -self._noise.clamp_min(_LEAST_NOISE).log()
        scores = logits[:, -1] + self._temperature * gumbel
        chosen = largest(scores)
        self.tokens.copy_(torch.where(self._ended, self.tokens, chosen))
        self._ended.logical_or_(self.tokens == self._end)


def largest(scores: Tensor) -> Tensor:
    """`scores.argmax(-1, keepdim=True)` in two stages; in one, a long row takes one processor."""
    size = min(COSTS.part_of_scores, scores.shape[-1])
    parts = F.pad(scores, (0, -scores.shape[-1] % size), value=-torch.inf).unflatten(-1, (-1, size))
    values, indices = parts.max(-1)
    best = values.argmax(-1, keepdim=True)
    return best * size + indices.gather(-1, best)


def _windows(layers: list[LayerState], places: list[int]) -> Tensor:
    return torch.stack([layers[place].window for place in places])


def _recurrent(layers: list[LayerState]) -> list[Tensor]:
    return [tensor for layer in layers for tensor in _components(layer.recurrent)]


def _components(state: State) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else state


def _until(tokens: list[int], end: int | None) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens
