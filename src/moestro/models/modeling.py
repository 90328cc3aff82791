"""`MoestroForCausalLM`: a decoder native to transformers, whose blocks list their feed-forward sub-layers.

Attention and rotary embedding are transformers' own; experts follow its `@use_experts_implementation` interface (see
`moestro.models.layers`), so all its experts backends, PEFT, expert-parallel plans and generation work unchanged.
"""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.mixtral.modeling_mixtral import MixtralAttention
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention, Qwen3MoeRotaryEmbedding
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from moestro.architecture.sub_layers import MoE
from moestro.errors import Misuse
from moestro.models.chunked_cross_entropy import chunked_cross_entropy
from moestro.models.configuration import MoestroConfig
from moestro.models.layers import Experts, Router, SparseMoE, build_sub_layer, writes_to_the_stream
from moestro.models.norm import RMSNorm


class MoestroDecoderLayer(GradientCheckpointingLayer):
    """Attention, then each feed-forward sub-layer in turn, all pre-norm and residual."""

    def __init__(self, config: MoestroConfig, layer_idx: int):
        super().__init__()
        attention = Qwen3MoeAttention if config.qk_norm else MixtralAttention
        self.self_attn = attention(config, layer_idx)  # type: ignore[arg-type]  # it reads the fields that we share
        if config.qk_norm:
            self.self_attn.q_norm = RMSNorm(self.self_attn.head_dim, eps=config.rms_norm_eps)
            self.self_attn.k_norm = RMSNorm(self.self_attn.head_dim, eps=config.rms_norm_eps)
        writes_to_the_stream(self.self_attn.o_proj)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        specs = config.sub_layers[layer_idx]
        self.feed_forward_norm = nn.ModuleList(RMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in specs)
        self.feed_forward = nn.ModuleList(build_sub_layer(config, spec) for spec in specs)
        self.composition = config.composition

    def forward(self, hidden_states: Tensor, **attention_inputs) -> Tensor:
        """[batch, sequence, dim] to the same."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **attention_inputs)
        return self.fed_forward(hidden_states + attended)

    def fed_forward(self, stream: Tensor) -> Tensor:
        """The residual stream after all feed-forward sub-layers, composed as the config says."""
        before, of_first = stream, None
        for norm, sub_layer in zip(self.feed_forward_norm, self.feed_forward, strict=True):
            hidden = norm(before if self.composition == "parallel" else stream)
            if self.composition == "tied" and isinstance(sub_layer, SparseMoE):
                of_first = hidden if of_first is None else of_first
                stream = stream + sub_layer(hidden, routed_by=of_first)
            else:
                stream = stream + sub_layer(hidden)
        return stream


class MoestroPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about the family."""

    config: MoestroConfig
    config_class = MoestroConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoestroDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    # transformers looks for the literal decorator in this file's text; the experts live in a file of their own.
    _can_set_experts_implementation_cached_value = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(Router, index=0),
        "hidden_states": MoestroDecoderLayer,
        "attentions": [Qwen3MoeAttention, MixtralAttention],
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        # Each write adds its variance to the stream: smaller by the root of their number, they end where one would.
        # Paper: GPT-2 (Radford et al. 2019), section 2.3; a Cartesian block writes three times, not twice.
        written = std / math.sqrt(self.config.residual_writes) if self.config.depth_scaled_init else std
        if isinstance(module, nn.Linear) and getattr(module, "writes_to_the_stream", False):
            init.normal_(module.weight, mean=0.0, std=written)
        elif isinstance(module, Experts):
            for name, weight in module.named_parameters():
                init.normal_(weight, mean=0.0, std=written if name == "down_proj" else std)
        elif isinstance(module, Router):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.selection_bias is not None:
                init.zeros_(module.selection_bias)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, *args, **kwargs):
        """As in transformers (its `gradient_checkpointing_enable` ends here too), but never reentrant, which silently
        drops the gradient of auxiliary losses and is torch's default wherever other options are passed alone.
        """
        options = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})
        if options["use_reentrant"] is not False:
            raise Misuse(
                "checkpointing must not be reentrant (auxiliary losses would lose their gradient): pass "
                f'{{"use_reentrant": False}}, got use_reentrant={options["use_reentrant"]}'
            )
        super().activation_checkpointing_enable(options, *args, **kwargs)


def weights_tied_by_composition(config: MoestroConfig) -> dict[str, str]:
    """Target to source: the routers, or the experts, of a block's later MoE sub-layers are those of its first."""
    shared = {"tied": ("router.weight",), "shared-pool": ("experts.gate_up_proj", "experts.down_proj")}
    tied = {}
    for index, block in enumerate(config.sub_layers):
        places = [f"layers.{index}.feed_forward.{i}" for i, spec in enumerate(block) if isinstance(spec, MoE)]
        for target in places[1:]:
            tied |= {f"{target}.{name}": f"{places[0]}.{name}" for name in shared.get(config.composition, ())}
    return tied


class MoestroModel(MoestroPreTrainedModel):
    """The decoder without its language-model head."""

    def __init__(self, config: MoestroConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(MoestroDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3MoeRotaryEmbedding(config)  # type: ignore[arg-type]
        self.gradient_checkpointing = False
        self._tied_weights_keys = weights_tied_by_composition(config)
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """As in transformers, which saves by `_tied_weights_keys` itself, but whether or not embeddings are tied."""
        return super().get_expanded_tied_weights_keys(True) if all_submodels else dict(self._tied_weights_keys)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        """Token ids (or embeddings) [batch, sequence] to hidden states [batch, sequence, dim]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise Misuse("pass exactly one of input_ids and inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen).unsqueeze(0)
        make_mask = create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask
        mask = make_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class MoestroForCausalLM(MoestroPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head.

    `chunked_loss` (an attribute, off by default): while training with labels, the cross-entropy and its gradient are
    computed in chunks of tokens and `logits` are not returned, which saves their memory and most of their time.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    chunked_loss: bool = False

    def __init__(self, config: MoestroConfig):
        super().__init__(config)
        self.model = MoestroModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """As every causal model of transformers: labels equal input_ids (they are shifted here), -100 is ignored."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=self.config.output_router_logits
            if output_router_logits is None
            else output_router_logits,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if labels is not None and self.training and self.chunked_loss:
            shifted, num_items = kwargs.get("shift_labels"), kwargs.get("num_items_in_batch")
            loss, logits = self.loss_in_chunks(hidden_states, labels, shifted, num_items), None
        else:
            logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
            loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def loss_in_chunks(
        self, hidden_states: Tensor, labels: Tensor, shifted: Tensor | None, num_items: Tensor | int | None
    ) -> Tensor:
        """Cross-entropy per label token (sum over `num_items` where it is given), without ever holding all logits.

        `shifted` labels, where given, stand at the positions that predict them.
        """
        if shifted is None:
            hidden_states, shifted = hidden_states[:, :-1], labels[:, 1:]
        shifted = shifted.flatten()
        count = (shifted != -100).sum() if num_items is None else num_items
        return chunked_cross_entropy(hidden_states.flatten(0, 1), self.lm_head.weight, shifted, num_items=count)


__all__ = ["MoestroForCausalLM", "MoestroModel", "MoestroPreTrainedModel"]
