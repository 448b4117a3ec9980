"""The language model as a transformers model."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import LongTensor, Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from pararnn.distributed import Ranks
from pararnn.lm.models.arguments import num_new_tokens, pop_cache, refuse_others
from pararnn.lm.models.block import ParaRNNBlock
from pararnn.lm.models.boundaries import Boundaries, Documents, find_boundaries, may_hold, require
from pararnn.lm.models.cache import ParaRNNCache
from pararnn.lm.models.configuration import ParaRNNConfig
from pararnn.lm.models.convolution import CausalConvolution
from pararnn.lm.models.loss import IGNORED, language_model_loss
from pararnn.lm.models.memory import MemoryMixer
from pararnn.lm.models.projection import ResidualProjection
from pararnn.lm.models.recurrence import initialises_itself


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
        cross_entropy: The loss without the z-loss, in nats per token.
        z_loss: Mean squared log-partition, before its weight; both are sums over
            `num_items_in_batch` when that is given.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache_params: ParaRNNCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    cross_entropy: Tensor | None = None
    z_loss: Tensor | None = None


class ParaRNNPreTrainedModel(PreTrainedModel):
    """Initialisation, and declarations about the architecture for transformers."""

    config: ParaRNNConfig
    config_class = ParaRNNConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
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
        elif isinstance(module, MemoryMixer):
            init.ones_(module.skip)


def _reset(module: nn.Module) -> None:
    """Initialise a part of a cell that has no weights in a checkpoint."""
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
        self.ranks: Ranks | None = None  # among which time is split
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: ParaRNNCache | None = None,
        resets: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | ParaRNNOutput:
        """Run all blocks.

        Args:
            input_ids: Shape (batch, time), int64; or give `inputs_embeds`.
            attention_mask: Shape (batch, time), or over the tokens of the cache as well; 0 at
                padding. Padding goes to the left when a cache is returned.
            position_ids: Shape (batch, time) or (1, time); used only to find where documents
                begin, see `Documents`.
            inputs_embeds: Shape (batch, time, hidden_size).
            cache_params: State to continue from, also as `past_key_values`; updated in place,
                unless `use_cache` is False.
            resets: Shape (batch, time), True at the first token of every document.
            seq_idx: Shape (batch, time), the number of the document of every token.
            cu_seq_lens_q: Ends of the documents that lie one after another in a single row.
            use_cache: Return the state after the last token. None: if a cache is passed, or outside
                training if the configuration's `use_cache` is set and no sequence ends in padding
                (under torch.compile: if there is no padding).
            output_hidden_states: Return the input of every block.
            return_dict: Return an object instead of a tuple.
            kwargs: Other arguments of transformers, see `refuse_others`.

        Raises:
            TypeError: An argument that the model does not support.
            ValueError: Both or neither of the two inputs, a shape that does not match, padding on
                the right with a cache, or a cache under reentrant activation checkpointing.
        """
        cache_params = pop_cache(cache_params, kwargs)
        refuse_others({"output_attentions": self.config.output_attentions, **kwargs})
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds.")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if x.dim() != 3:
            raise ValueError(
                f"the input has shape {tuple(x.shape[:-1])}; pass (batch, time), input_ids[None] "
                "for one text."
            )
        num_past = 0 if cache_params is None else cache_params.num_tokens
        if self.ranks is not None:
            others = (attention_mask, position_ids, seq_idx, cu_seq_lens_q)
            _refuse_on_ranks(any(given is not None for given in others))
        documents = Documents(
            resets=resets, position_ids=position_ids, seq_idx=seq_idx, cu_seq_lens_q=cu_seq_lens_q
        )
        batch, time = x.shape[:2]
        boundaries = find_boundaries(documents, attention_mask, batch, time, num_past)
        use_cache = self._makes_cache(use_cache, cache_params, boundaries)
        if use_cache and cache_params is None:
            cache_params = ParaRNNCache()
        past = cache_params.layers if cache_params is not None else []
        states: list[Any] = list(past) or [None] * len(self.layers)
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

    def _makes_cache(
        self, asked: bool | None, given: ParaRNNCache | None, boundaries: Boundaries | None
    ) -> bool:
        """Whether this call returns a cache."""
        wanted = (given is not None) if asked is None else asked
        if (wanted or given is not None) and self._checkpoints_reentrantly():
            raise ValueError(
                "gradients do not reach a cache through reentrant activation checkpointing; pass "
                'gradient_checkpointing_kwargs={"use_reentrant": False}, or no cache.'
            )
        if not wanted and (asked is False or self.training or not self.config.use_cache):
            return False
        in_padding = None if boundaries is None else boundaries.ends_in_padding()
        if in_padding is None:
            return True
        if wanted:
            require(
                ~in_padding,
                "attention_mask is 0 at the end of some sequence, so the cache would hold padding; "
                "pad on the left, or pass use_cache=False.",
            )
        return wanted or not may_hold(in_padding)

    def _checkpoints_reentrantly(self) -> bool:
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return False
        options = getattr(self._gradient_checkpointing_func, "keywords", {})
        return options.get("use_reentrant", True)


def _refuse_on_ranks(given: bool) -> None:
    if given:
        raise TypeError(
            "where time is split over ranks, documents are told by resets alone, and there is no "
            "padding: a part does not show where a document begins at its first token."
        )


class ParaRNNForCausalLM(ParaRNNPreTrainedModel, GenerationMixin):
    """Next-token prediction with `ParaRNNModel`.

    `generate` carries a `ParaRNNCache` as `cache_params`, so the cost of a token does not depend on
    the length of the text.

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
        inputs_embeds: Tensor | None = None,  # transformers looks for the name
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        num_past = 0 if cache_params is None else cache_params.num_tokens
        goes_on = num_past > 0 and not is_first_iteration
        if num_past and is_first_iteration:
            text = input_ids if inputs_embeds is None else inputs_embeds
            along = (text, kwargs.get("attention_mask"), kwargs.get("position_ids"))
            kwargs["next_sequence_length"] = num_new_tokens(along, num_past)
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc] # its narrow protocol
            input_ids,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        for name in ("attention_mask", "position_ids", "seq_idx", "cu_seq_lens_q"):
            if goes_on:  # padding and documents lie behind
                inputs.pop(name, None)
        name = "past_key_values" if num_past else "cache_params"  # peft asks for the first
        return {**inputs, name: cache_params, "resets": None if goes_on else resets}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: ParaRNNCache | None = None,
        resets: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | ParaRNNCausalLMOutput:
        """Predict the next token at every step; further arguments as `ParaRNNModel.forward`.

        Args:
            input_ids: Shape (batch, time), int64.
            attention_mask: 0 at padding.
            position_ids: Documents begin where they restart.
            inputs_embeds: Shape (batch, time, hidden_size), instead of `input_ids`.
            cache_params: State to continue from; updated in place.
            resets: Shape (batch, time), True at the first token of every document.
            seq_idx: Shape (batch, time), the number of the document of every token.
            cu_seq_lens_q: Ends of the documents that lie one after another in a single row.
            labels: Shape (batch, time), the inputs themselves, shifted here; -100 is ignored.
            use_cache: Return the state after the last token.
            output_hidden_states: Return the input of every block.
            return_dict: Return an object instead of a tuple.
            logits_to_keep: Number of last logits to compute (0 for all), or their indices. Must be
                0 with labels.
            num_items_in_batch: Divide the sums over targets by this; None for their number.
            kwargs: `shift_labels`, shape (batch, time), what each step must predict, instead of
                `labels` (transformers takes every argument by name with "label" in it for one that
                a batch must have); others as `ParaRNNModel.forward`.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            cache_params=cache_params,
            resets=resets,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        if labels is not None and shift_labels is None:
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        all_logits = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if shift_labels is not None and not all_logits:
            raise ValueError("labels need all logits; leave logits_to_keep out.")
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept]).float()
        loss = cross_entropy = z_loss = None
        if shift_labels is not None:
            targets = shift_labels.to(logits.device)
            cross_entropy, z_loss = language_model_loss(logits, targets, num_items_in_batch)
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
