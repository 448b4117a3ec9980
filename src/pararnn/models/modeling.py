"""The language model as a transformers model."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import LongTensor, Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from pararnn.models.block import ParaRNNBlock, initialises_itself
from pararnn.models.boundaries import find_boundaries
from pararnn.models.cache import ParaRNNCache
from pararnn.models.configuration import ParaRNNConfig
from pararnn.models.convolution import CausalConvolution
from pararnn.models.loss import IGNORED, language_model_loss
from pararnn.models.projection import ResidualProjection


@dataclass
class ParaRNNOutput(ModelOutput):
    """Result of `ParaRNNModel`.

    Attributes:
        last_hidden_state: Shape (batch, time, hidden_size), after the last norm.
        cache_params: State after the last token, when `use_cache`.
        hidden_states: Input of every block and the result, when asked for.
    """

    last_hidden_state: Tensor | None = None
    cache_params: ParaRNNCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class ParaRNNCausalLMOutput(ModelOutput):
    """Result of `ParaRNNForCausalLM`.

    Attributes:
        loss: Cross-entropy plus weighted z-loss, when there are labels.
        logits: Shape (batch, time, vocab_size), float32.
        cache_params: State after the last token, when `use_cache`.
        hidden_states: Input of every block and the result, when asked for.
        cross_entropy: The part of the loss that measures the model, in nats per token.
        z_loss: Mean squared log-partition, before its weight.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache_params: ParaRNNCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    cross_entropy: Tensor | None = None
    z_loss: Tensor | None = None


class ParaRNNPreTrainedModel(PreTrainedModel):
    """Initialisation, and what transformers wants to know of the architecture."""

    config: ParaRNNConfig
    config_class = ParaRNNConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ["ParaRNNBlock"]  # noqa: RUF012 # transformers' own declaration
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module that has parameters of its own."""
        if initialises_itself(module):
            _reset(module)
            return
        super()._init_weights(module)
        if isinstance(module, ResidualProjection):
            branches = 2 * self.config.num_hidden_layers
            std = self.config.initializer_range / math.sqrt(branches)
            init.normal_(module.weight, std=std)
        elif isinstance(module, CausalConvolution):
            module.reset_parameters()
        elif isinstance(module, ParaRNNBlock):
            init.ones_(module.residual_scale)


def _reset(module: nn.Module) -> None:
    """Initialise a part of a cell whose weights a checkpoint lacks."""
    reset = getattr(module, "reset_parameters", None)
    if not callable(reset):
        raise ValueError(
            f"the checkpoint lacks weights of {type(module).__name__}, which has no "
            "reset_parameters() to make new ones; add it, or load a complete checkpoint."
        )
    reset()


class ParaRNNModel(ParaRNNPreTrainedModel):
    """Embedding, blocks and last norm.

    Args:
        config: Shape of the model.
    """

    def __init__(self, config: ParaRNNConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = (ParaRNNBlock(config, mixer) for mixer in config.mixers)
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: ParaRNNCache | None = None,
        resets: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> tuple | ParaRNNOutput:
        """Run all blocks.

        Args:
            input_ids: Shape (batch, time), int64; or give `inputs_embeds`.
            attention_mask: Shape (batch, time), or over the tokens of the cache as well; 0 at
                padding. Padding goes to the left when a cache is returned.
            inputs_embeds: Shape (batch, time, hidden_size).
            cache_params: State to go on from; updated in place.
            resets: Shape (batch, time), True at the first token of every document.
            use_cache: Return the state after the last token; None for the configuration's
                `use_cache` outside training and no cache in it.
            output_hidden_states: Return the input of every block.
            return_dict: Return an object instead of a tuple.
            kwargs: Ignored; transformers passes arguments for other architectures.

        Raises:
            ValueError: Both or neither of the two inputs, a mask or resets of the wrong shape, or
                padding on the right with a cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds.")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache_params is None:
            cache_params = ParaRNNCache()
        num_past = 0 if cache_params is None else cache_params.num_tokens
        boundaries = find_boundaries(attention_mask, resets, x.shape[1], num_past)
        if use_cache and boundaries is not None:
            boundaries.check_can_continue()
        past = cache_params.layers if cache_params is not None else []
        states: list = list(past) or [None] * len(self.layers)
        inputs = []
        for index, layer in enumerate(self.layers):
            inputs.append(x)
            x, states[index] = layer(x, boundaries, states[index])
        x = self.norm(x)
        if use_cache and cache_params is not None:
            cache_params.update(states, x.shape[1])
        wants_hidden = (
            self.config.output_hidden_states
            if output_hidden_states is None
            else (output_hidden_states)
        )
        output = ParaRNNOutput(
            last_hidden_state=x,
            cache_params=cache_params if use_cache else None,
            hidden_states=(*inputs, x) if wants_hidden else None,
        )
        return output if _wants_dict(self.config, return_dict) else output.to_tuple()


class ParaRNNForCausalLM(ParaRNNPreTrainedModel, GenerationMixin):
    """Next-token prediction with `ParaRNNModel`.

    `generate` carries a `ParaRNNCache` as `cache_params`, so that a token costs the same whatever
    came before it.

    Args:
        config: Shape of the model.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 # as above

    def __init__(self, config: ParaRNNConfig) -> None:
        super().__init__(config)
        self.model = ParaRNNModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(  # type: ignore[override] # noqa: D102 # its own cache
        self,
        input_ids: LongTensor,
        cache_params: ParaRNNCache | None = None,
        resets: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        num_past = 0 if cache_params is None else cache_params.num_tokens
        if is_first_iteration and num_past:
            kwargs["next_sequence_length"] = _num_new_tokens(input_ids, num_past)
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc] # its narrow protocol
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if num_past and not is_first_iteration:
            inputs.pop("attention_mask", None)
        return {
            **inputs,
            "cache_params": cache_params,
            "resets": resets if is_first_iteration or not num_past else None,
        }

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: ParaRNNCache | None = None,
        resets: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> tuple | ParaRNNCausalLMOutput:
        """Predict the next token at every step; further arguments as `ParaRNNModel.forward`.

        Args:
            input_ids: Shape (batch, time), int64.
            attention_mask: 0 at padding.
            inputs_embeds: Shape (batch, time, hidden_size), instead of `input_ids`.
            cache_params: State to go on from; updated in place.
            resets: Shape (batch, time), True at the first token of every document.
            labels: Shape (batch, time), the inputs themselves: shifted here; -100 does not count.
            shift_labels: Shape (batch, time), already shifted: what each step must predict.
            use_cache: Return the state after the last token.
            output_hidden_states: Return the input of every block.
            return_dict: Return an object instead of a tuple.
            logits_to_keep: Compute only so many last logits (0 for all), or those at these indices;
                labels need all of them.
            kwargs: Ignored.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache_params=cache_params,
            resets=resets,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept]).float()
        if labels is not None and shift_labels is None:
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        loss = cross_entropy = z_loss = None
        if shift_labels is not None:
            cross_entropy, z_loss = language_model_loss(logits, shift_labels)
            loss = cross_entropy + self.config.z_loss_weight * z_loss
        output = ParaRNNCausalLMOutput(
            loss=loss,
            logits=logits,
            cache_params=outputs.cache_params,
            hidden_states=outputs.hidden_states,
            cross_entropy=cross_entropy,
            z_loss=z_loss,
        )
        return output if _wants_dict(self.config, return_dict) else output.to_tuple()


def _wants_dict(config: ParaRNNConfig, return_dict: bool | None) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)


def _num_new_tokens(input_ids: LongTensor, num_past: int) -> int:
    """Tokens after those of a cache that the caller hands in, given the whole text."""
    num_new = input_ids.shape[1] - num_past
    if num_new < 1:
        raise ValueError(
            f"the cache has seen {num_past} tokens but input_ids has only {input_ids.shape[1]}; "
            "pass the whole text, at least one token longer than the cache."
        )
    return num_new
