"""Generation: prompts in parallel over time, then one step per token from the recurrent state.

A step reads and writes tensors that are made once: the states of all blocks, the last tokens, and
which sequences have ended. So on a GPU the step is captured in a CUDA graph and replayed. On other
devices the same function is called. The tensors of attention have room for more tokens; when it is
used up, they are made twice as large, and the step is captured again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pararnn._whole import check_whole
from pararnn._words import counted
from pararnn.layers.stepping import Form, captured_step, compile_options, inline_steps
from pararnn.lm.catalogue import ATTENTION
from pararnn.lm.decoding.forms import StateForm
from pararnn.lm.decoding.prompts import check_prompts, read_prompts
from pararnn.lm.decoding.snapshot import Snapshot
from pararnn.lm.decoding.states import Layer, StaticStates, newest
from pararnn.lm.models.cache import ParaRNNCache
from pararnn.lm.models.modeling import ParaRNNForCausalLM
from pararnn.planning.costs import COSTS

P = ParamSpec("P")
R = TypeVar("R")

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
        TypeError: A token or a number is no whole number.
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


def apart_from_gradients(method: Callable[P, R]) -> Callable[P, R]:
    """Run without gradients, on tensors that other calls may write into.

    Those made in `torch.inference_mode` cannot be written into outside of it.
    """

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return run


class Decoder:
    """Generates for batches of one size. Keeps its tensors and its CUDA graph between calls.

    Calls may come in and out of `torch.no_grad` and `torch.inference_mode`, in any order.

    Args:
        model: Model on the device to use; put into evaluation mode. `start`, and so `generate`,
            notices changes of the model.
        batch_size: Texts side by side.
        compiled: Fuse the operations of a step with `torch.compile`, in the first call. Without it
            a step consists of many small kernels. `choose_step` says when it pays.

    Raises:
        TypeError: batch_size is no whole number.
        ValueError: batch_size is less than 1.
    """

    @apart_from_gradients
    def __init__(
        self, model: ParaRNNForCausalLM, batch_size: int, *, compiled: bool = False
    ) -> None:
        check_whole(batch_size=batch_size)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; pass at least one prompt.")
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
        self._states: StaticStates | None = None
        self._form: StateForm | None = None
        self._num_read = 0  # tokens of a text, padding included
        self._compiled = compiled
        self._next: Callable[[], list[Tensor]] = self._advance
        if compiled:
            self._next = torch.compile(
                self._advance, fullgraph=True, dynamic=False, options=compile_options()
            )
        self._run: Callable[[], None] = self._replace
        self._prepared_for: Form | None = None

    @property
    def state_bytes(self) -> int:
        """Size of the states of all blocks and texts; 0 before the first call."""
        return 0 if self._states is None else self._states.nbytes

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        end_of_text: int | None = None,
        after: Snapshot | None = None,
    ) -> list[list[int]]:
        """As the function `generate`, for `batch_size` prompts; `after` as for `start`."""
        _check_number(max_new_tokens)
        self.start(
            prompts, temperature=temperature, seed=seed, end_of_text=end_of_text, after=after
        )
        new = [self.tokens.clone()]
        while len(new) < max_new_tokens:
            if len(new) % COSTS.steps_between_checks == 0 and self._ended.all():
                break
            self.step()
            new.append(self.tokens.clone())
        rows = torch.cat(new, dim=1).tolist()
        return [_until(row, end_of_text) for row in rows]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        end_of_text: int | None = None,
        after: Snapshot | None = None,
    ) -> Iterator[list[int | None]]:
        """The tokens that `generate` returns, as they come; arguments as for `generate`.

        The device computes the next step meanwhile, so the decoder itself is one step ahead.

        Yields:
            The next token of every text; None for a text that has ended.
        """
        _check_number(max_new_tokens)
        self.start(
            prompts, temperature=temperature, seed=seed, end_of_text=end_of_text, after=after
        )
        return self._stream(max_new_tokens, end_of_text)

    def _stream(self, count: int, end: int | None) -> Iterator[list[int | None]]:
        ended = [False] * self.batch_size
        for left in reversed(range(count)):
            chosen = OnTheWay(self.tokens)
            if left:
                self.step()
            tokens = chosen.arrived()
            ended = [was or token == end for was, token in zip(ended, tokens, strict=True)]
            if all(ended):
                return
            yield [None if e else token for e, token in zip(ended, tokens, strict=True)]

    @apart_from_gradients
    def start(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        temperature: float = 0.0,
        seed: int = 0,
        end_of_text: int | None = None,
        after: Snapshot | None = None,
    ) -> None:
        """Read the prompts in one pass over all of their tokens, and choose the first new ones.

        Args:
            prompts: Tokens of every text, at least one each.
            temperature: Temperature of the sampling; 0 takes the most probable token.
            seed: Seed of the sampling.
            end_of_text: Token that ends a text; None for no such token.
            after: What was read before the prompts, of one text for all or of each text; only the
                prompts are read then. Its own `tokens` were not read: put them first in the
                prompts to go on with a text that was generated.

        Raises:
            TypeError: A token or a number is no whole number.
            ValueError: What cannot be read, see `generate`, or does not fit `after`.
        """
        check_whole(seed=seed)
        if end_of_text is not None:
            check_whole(end_of_text=end_of_text)
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature is {temperature}; it must be at least 0, and finite.")
        check_prompts(prompts, self.batch_size, self.model.config.vocab_size)
        if after is not None:
            after = self._own("after", after)
        logits, layers, num_read = read_prompts(self.model, prompts, after)
        self._temperature.fill_(temperature)
        self._end.fill_(-1 if end_of_text is None else end_of_text)
        self._noise.fill_(1.0)
        self._generator = None
        if temperature > 0:
            self._generator = torch.Generator(self.model.device).manual_seed(seed)
        self._load(layers, num_read)
        self._ended.zero_()
        self._draw()
        self._choose(logits)

    @apart_from_gradients
    def step(self) -> None:
        """Read the last token and choose the next, for every text. Does not wait for the device.

        Raises:
            RuntimeError: Nothing was read yet.
        """
        if self._states is None:
            raise RuntimeError("the decoder has read nothing; call start or restore first.")
        if ATTENTION in self.model.config.mixers and self._num_read == self._states.room:
            self.restore(self.snapshot())  # with more room
        self._draw()
        self._run()
        self._num_read += 1

    @apart_from_gradients
    def snapshot(self) -> Snapshot:
        """The state of all texts, to `restore`, or to `start` from after what was read.

        Raises:
            RuntimeError: Nothing was read yet.
        """
        if self._states is None:
            raise RuntimeError("the decoder has read nothing; call start or restore first.")
        return Snapshot(
            layers=tuple(self._states.saved(self._num_read)),
            num_tokens=self._num_read,
            tokens=self.tokens.clone(),
            ended=self._ended.clone(),
            end=self._end.clone(),
            temperature=self._temperature.clone(),
            random=None if self._generator is None else self._generator.get_state(),
            vocab_size=self.model.config.vocab_size,
        )

    @apart_from_gradients
    def restore(self, snapshot: Snapshot, *, seed: int | None = None) -> None:
        """Go on from a snapshot, of this or of another decoder: the next steps are the same.

        Args:
            snapshot: Of `batch_size` texts; `Snapshot.select` picks or repeats texts. It may come
                from another device or type, and from other weights of a model of the same shape.
            seed: Sample with other noise from here on, for another branch; None for the same.

        Raises:
            TypeError: seed is no whole number.
            ValueError: The snapshot has another number of texts, or is of a model whose states have
                another shape or that knows more tokens; or it samples on another kind of device
                and seed is None.
        """
        if seed is not None:
            check_whole(seed=seed)
        if snapshot.batch_size != self.batch_size:
            raise ValueError(
                f"the snapshot has {counted(snapshot.batch_size, 'text')} but batch_size is "
                f"{self.batch_size}; pick or repeat texts with snapshot.select([...])."
            )
        if snapshot.vocab_size > self.model.config.vocab_size:
            raise ValueError(
                f"the snapshot is of a model with {counted(snapshot.vocab_size, 'token')} but this "
                f"one has {self.model.config.vocab_size}; restore it in a Decoder of that model."
            )
        fresh = torch.Generator(self.model.device).get_state()
        if seed is None and snapshot.random is not None and len(snapshot.random) != len(fresh):
            raise ValueError(
                "the snapshot samples with the noise of another kind of device than "
                f"{self.model.device}; pass seed=... for noise of this one."
            )
        snapshot = self._own("the snapshot", snapshot)
        self._load(snapshot.layers, snapshot.num_tokens)
        self.tokens.copy_(snapshot.tokens)
        self._ended.copy_(snapshot.ended)
        self._end.copy_(snapshot.end)
        self._temperature.copy_(snapshot.temperature)
        self._noise.fill_(1.0)
        self._generator = None
        if snapshot.random is not None:
            self._generator = torch.Generator(self.model.device)
            if seed is None:
                self._generator.set_state(snapshot.random)
            else:
                self._generator.manual_seed(seed)

    def _own(self, name: str, snapshot: Snapshot) -> Snapshot:
        """A snapshot in the types and on the device of the model, after a check."""
        if self._form is None or self._prepared_for is None or self._prepared_for.has_changed():
            self._form = StateForm(self.model)
        return replace(snapshot, layers=self._form.taken_over(name, snapshot.layers))

    def _load(self, layers: Sequence[Layer], num_read: int) -> None:
        """Continue from these states; make tensors and graph where there are none that fit."""
        changed = self._prepared_for is None or self._prepared_for.has_changed()
        grows = ATTENTION in self.model.config.mixers
        room = COSTS.attention_room
        while grows and room <= num_read:
            room *= 2
        if changed or self._states is None or (grows and self._states.room < room):
            self._states = StaticStates(layers, room)
            if self._compiled:
                inline_steps(self.model)
            self._prepared_for = Form(self.model)
            self._run = captured_step(self._replace, self.model.device)  # the first runs write
        self._states.load(layers)
        self._num_read = num_read

    def _replace(self) -> None:
        """Take a step."""
        self._now().advance(self._next())

    def _advance(self) -> list[Tensor]:
        """Choose the next tokens. Returns what is new in the states."""
        layers: list[Any] = list(self._now().layers)
        cache = ParaRNNCache(layers, 1)
        output = self.model(input_ids=self.tokens, cache_params=cache, use_cache=True)
        self._choose(output.logits[:, -1])
        return newest(cache.layers)

    def _now(self) -> StaticStates:
        assert self._states is not None
        return self._states

    def _draw(self) -> None:
        """Draw noise, outside of the graph, so that the seed of each call is used."""
        if self._generator is not None:
            self._noise.exponential_(generator=self._generator)

    def _choose(self, logits: Tensor) -> None:
        """Next tokens: the largest logit plus temperature times Gumbel noise is a sample.

        At temperature 0 the noise has no effect. Texts that have ended repeat their last token.
        """
        gumbel = -self._noise.clamp_min(_LEAST_NOISE).log()
        scores = logits + self._temperature * gumbel
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


class OnTheWay:
    """Tokens that are copied to the host, while the device goes on.

    Args:
        tokens: Shape (texts, 1); they may be written to at once.
    """

    def __init__(self, tokens: Tensor) -> None:
        self._event = None
        if tokens.device.type != "cuda":
            self._host = tokens.clone()
            return
        self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        self._host.copy_(tokens, non_blocking=True)
        self._event = torch.cuda.current_stream(tokens.device).record_event()

    def arrived(self) -> list[int]:
        """Wait for them."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.flatten().tolist()


def _check_number(max_new_tokens: int) -> None:
    check_whole(max_new_tokens=max_new_tokens)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")


def _until(tokens: list[int], end: int | None) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens
