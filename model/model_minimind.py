"""The MiniMind decoder: mathematically a Llama (RMSNorm, rotary positions, grouped-query attention, SwiGLU).

Shape suffixes: B samples, L positions, D hidden size, H query heads, K key/value heads, E head size, V vocabulary,
T tokens (B * L), X experts.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

# transformers 5.24 renamed the key/value cache `past_key_values` to `cache`.
CACHE_NAME = "cache" if hasattr(MoeCausalLMOutputWithPast, "cache") else "past_key_values"


class MiniMindConfig(PretrainedConfig):
    """The decoder's shape; raises ValueError if the numbers of heads or experts do not fit."""

    model_type = "minimind"

    hidden_size: int = 512  # width D; published are 512 (26 M parameters with 8 layers) and 768 (104 M with 16)
    num_hidden_layers: int = 8
    num_attention_heads: int = 8  # query heads H; 2 H must divide D
    num_key_value_heads: int = 2  # key/value heads K, which must divide H
    vocab_size: int = 6400
    intermediate_size: int | None = None  # of the SwiGLU; by default 8/3 of D, rounded up to a multiple of 64
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    dropout: float = 0.0
    # Whether YaRN (https://arxiv.org/abs/2309.00071) stretches the rotary positions, from
    # original_max_position_embeddings by yarn_factor.
    inference_rope_scaling: bool = False
    original_max_position_embeddings: int = 2048
    yarn_factor: float = 16.0
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_attention_factor: float | None = None  # on queries and keys; by default the paper's 0.1 ln(yarn_factor) + 1
    qk_norm: bool = False  # norms of each head's queries and keys before they rotate, https://arxiv.org/abs/2302.05442
    use_moe: bool = False  # experts: each token takes the num_experts_per_tok best routed ones, and all shared ones
    num_experts_per_tok: int = 2
    n_routed_experts: int = 4
    n_shared_experts: int = 1
    aux_loss_alpha: float = 0.01  # coefficient of the experts' load-balancing loss
    balance_over_batch: bool = False  # balance the experts over all tokens of a batch, not of each sequence
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0

    @classmethod
    def defaults(cls) -> dict:
        """Returns the settings that make a configuration, with their defaults."""
        return {name: getattr(cls, name) for kind in (MiniMindConfig, cls) for name in kind.__annotations__}

    def __init__(self, **settings):
        own = {name: settings.pop(name, default) for name, default in self.defaults().items()}
        super().__init__(**{"tie_word_embeddings": True} | settings)
        for name, value in own.items():
            setattr(self, name, value)
        if self.use_moe and self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(f"{self.num_experts_per_tok} of {self.n_routed_experts} experts cannot be used")
        # Twice the heads, as rotary positions pair the dimensions of a head.
        if self.hidden_size % (2 * self.num_attention_heads) or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be an even multiple of num_attention_heads "
                f"{self.num_attention_heads}, and that a multiple of num_key_value_heads {self.num_key_value_heads}"
            )
        self.head_dim = self.hidden_size // self.num_attention_heads
        self.intermediate_size = self.intermediate_size or 64 * math.ceil(int(self.hidden_size * 8 / 3) / 64)
        self.yarn_attention_factor = self.yarn_attention_factor or 0.1 * math.log(self.yarn_factor) + 1.0


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm, computed in float32 (https://arxiv.org/abs/1910.07467)."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(hidden_states.float(), self.normalized_shape, self.weight.float(), self.eps)
        return normed.to(hidden_states.dtype)


def rotary_frequencies(config: MiniMindConfig) -> tuple[torch.Tensor, float]:
    """Returns the radians per position of each pair of a head's dimensions, (E/2,), and YaRN's attention factor."""
    head_dim, base = config.head_dim, config.rope_theta
    frequencies = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if not config.inference_rope_scaling:
        return frequencies, 1.0
    # The (fractional) pairs that make so many full turns within the original context.
    fast, slow = (
        head_dim * math.log(config.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (config.yarn_beta_fast, config.yarn_beta_slow)
    )
    low, high = max(math.floor(fast), 0), min(math.ceil(slow), head_dim - 1)
    # Fast pairs (below low) keep their frequency, slow ones (above high) are stretched, those between are blended.
    stretched = ((torch.arange(head_dim // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)
    frequencies = frequencies * (1 - stretched) + frequencies / config.yarn_factor * stretched
    return frequencies, config.yarn_attention_factor


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates (B, heads, L, E); the first half of a head pairs with the second.

    Cosines and sines are (B or 1, 1, L, E) and float32, whatever the states are: at position 1000 a bfloat16 angle is
    off by more than a radian. The first half's sines are negative: (a, b) becomes (a cos - b sin, b cos + a sin).
    """
    first, second = states.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    return torch.addcmul(states * cos, swapped, sin).to(states.dtype)


def take(states: torch.Tensor, positions: torch.Tensor | slice | None) -> torch.Tensor:
    """Takes positions of (B, L, ...): a slice of every sample, (N,) indices into all B * L, or None for all."""
    if positions is None:
        return states
    return states[:, positions] if isinstance(positions, slice) else states.flatten(0, 1)[positions]


class Attention(nn.Module):
    """Causal grouped-query attention (https://arxiv.org/abs/2305.13245)."""

    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        norm = RMSNorm if config.qk_norm else nn.Identity
        self.q_norm = norm(config.head_dim, config.rms_norm_eps)
        self.k_norm = norm(config.head_dim, config.rms_norm_eps)

    def forward(self, x_BLD, rotary, attention_mask, cache, cache_position, positions):
        batch, length, _ = x_BLD.shape
        q_BHLE = self.q_proj(x_BLD).view(batch, length, -1, self.head_dim).transpose(1, 2)
        k_BKLE = self.k_proj(x_BLD).view(batch, length, -1, self.head_dim).transpose(1, 2)
        v_BKLE = self.v_proj(x_BLD).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q_BHLE, k_BKLE = apply_rotary(self.q_norm(q_BHLE), *rotary), apply_rotary(self.k_norm(k_BKLE), *rotary)
        if cache is not None:
            # Early releases of transformers 5 do not count what a static cache holds: they need the position.
            k_BKLE, v_BKLE = cache.update(k_BKLE, v_BKLE, self.layer_idx, {"cache_position": cache_position})
        if length == 1:
            # A group's heads see the same keys: as several queries of one head they read them once.
            q_BHLE = q_BHLE.view(batch, k_BKLE.shape[1], -1, self.head_dim)
        # A single new token sees all keys; several tokens after cached keys come with a mask. (Conditional, because
        # torch.compile evaluates it once, while it would keep a comparison symbolic.)
        is_causal = False if attention_mask is not None or length == 1 else True
        how = {"attn_mask": attention_mask, "dropout_p": self.dropout if self.training else 0.0, "is_causal": is_causal}
        out_BHLE = F.scaled_dot_product_attention(q_BHLE, k_BKLE, v_BKLE, **how, enable_gqa=True)
        out_BLD = out_BHLE.reshape(batch, -1, length, self.head_dim).transpose(1, 2).reshape(batch, length, -1)
        return self.o_proj(take(out_BLD, positions))


class FeedForward(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class MoEFeedForward(nn.Module):
    """Routed experts and shared ones, with a balancing loss (https://arxiv.org/abs/2401.06066)."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.n_routed_experts
        self.alpha, self.balance_over_batch = config.aux_loss_alpha, config.balance_over_batch
        self.gate = nn.Linear(config.hidden_size, self.num_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(self.num_experts))
        self.shared_experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_shared_experts))

    def forward(self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None):
        """Returns the (B, L, D) output and each sequence's balancing loss; `token_mask` (B, L) is 0 at pads.

        The loss is alpha * sum over experts of (share of choices, times experts) * (mean score): (B,), or (1,) where it
        is balanced over the batch and all tokens count as one sequence.
        """
        batch, length, width = hidden_states.shape
        x_TD = hidden_states.reshape(-1, width)
        # The router decides between near-equal scores, so it runs in float32 under autocast too.
        with torch.autocast(hidden_states.device.type, enabled=False):
            scores_TX = F.linear(x_TD.float(), self.gate.weight.float()).softmax(dim=-1)
        weight_Tk, expert_Tk = scores_TX.topk(self.top_k, dim=-1)
        weight_Tk = weight_Tk / weight_Tk.sum(dim=-1, keepdim=True)

        out_TD = sum(expert(x_TD) for expert in self.shared_experts) if self.shared_experts else torch.zeros_like(x_TD)
        out_TD = out_TD.float()
        for index, expert in enumerate(self.experts):
            token, slot = (expert_Tk == index).nonzero(as_tuple=True)
            out_TD = out_TD.index_add(0, token, expert(x_TD[token]).float() * weight_Tk[token, slot, None])

        sequences = 1 if self.balance_over_batch else batch
        mask_BL1 = torch.ones_like(x_TD[:, 0]) if token_mask is None else token_mask
        mask_BL1 = mask_BL1.reshape(sequences, -1, 1).float()
        chosen_BLX = F.one_hot(expert_Tk, self.num_experts).sum(dim=1).float().view(sequences, -1, self.num_experts)
        count_B1 = mask_BL1.sum(dim=1).clamp(min=1)
        share_BX = (chosen_BLX * mask_BL1).sum(dim=1) / count_B1 * (self.num_experts / self.top_k)
        score_BX = (scores_TX.view_as(chosen_BLX) * mask_BL1).sum(dim=1) / count_B1
        loss_B = self.alpha * (share_BX * score_BX).sum(dim=-1)
        return out_TD.to(hidden_states.dtype).view(batch, length, width), loss_B


class MiniMindBlock(nn.Module):
    """One pre-norm block: attention over all positions, then the feed-forward of the selected `positions`."""

    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = MoEFeedForward(config) if config.use_moe else FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states, rotary, attention_mask, cache, cache_position, token_mask, positions):
        normed = self.input_layernorm(hidden_states)
        attended = self.self_attn(normed, rotary, attention_mask, cache, cache_position, positions)
        hidden_states = take(hidden_states, positions) + self.dropout(attended)
        normed = self.post_attention_layernorm(hidden_states)
        has_experts = isinstance(self.mlp, MoEFeedForward)
        fed, aux_loss = self.mlp(normed, token_mask) if has_experts else (self.mlp(normed), None)
        return hidden_states + self.dropout(fed), aux_loss


class MiniMindPreTrainedModel(PreTrainedModel):
    config_class = MiniMindConfig
    base_model_prefix = "model"
    accepts_loss_kwargs = False  # transformers' Trainer then averages over accumulated batches itself
    _supports_sdpa = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, MiniMindModel):  # in no state dict, so it is computed here
            module.rotary_frequencies.copy_(rotary_frequencies(module.config)[0])


class MiniMindModel(MiniMindPreTrainedModel):
    """Blocks between embedding and final norm."""

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(MiniMindBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        frequencies, self.rotary_scale = rotary_frequencies(config)
        self.register_buffer("rotary_frequencies", frequencies, persistent=False)
        self.post_init()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # Stay in float32 in a half-precision model: rounded frequencies are off by radians at position 1000.
        self.rotary_frequencies = rotary_frequencies(self.config)[0].to(self.rotary_frequencies.device)
        return self

    def forward(self, inputs_embeds, attention_mask, position_ids, cache, token_mask, positions):
        """Runs the blocks over (B, L, D); returns normed hidden states, and each sequence's balancing loss or None.

        `attention_mask` is (B, keys) with 0 at pads, a ready-made mask of four dimensions, or None. Only `positions`,
        see `take`, are returned, and the last block computes only those.
        """
        length, device = inputs_embeds.shape[1], inputs_embeds.device
        past_length = cache.get_seq_length() if cache is not None else 0
        is_static = cache is not None and cache.is_compileable
        key_length = cache.layers[0].max_cache_len if is_static else past_length + length
        cache_position = past_length + torch.arange(length, device=device)
        is_per_key = attention_mask is not None and attention_mask.dim() == 2
        if position_ids is None and is_per_key:
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:]  # pads do not count
        elif position_ids is None:
            position_ids = cache_position[None]
        angles = position_ids[:, None, :, None].float() * self.rotary_frequencies
        cos, sin = angles.cos() * self.rotary_scale, angles.sin() * self.rotary_scale
        rotary = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

        mask = None if is_per_key else attention_mask  # (B or 1, 1, L, keys), True where a query may look
        is_padded = is_per_key and not bool(attention_mask.all())
        # Plain causal attention, or one token that sees all keys, needs no mask; a static cache has more keys.
        if mask is None and (is_padded or key_length != past_length + length or (past_length != 0 and length != 1)):
            key_position, query_position = torch.arange(key_length, device=device), cache_position[:, None]
            mask = (key_position <= query_position)[None, None]
            if is_padded:
                keys = F.pad(attention_mask.bool(), (0, key_length - attention_mask.shape[1]))
                # A pad attends to itself: a softmax over no keys is NaN, and NaN spreads through the values.
                mask = mask & keys[:, None, None, :] | (key_position == query_position)
        inputs = rotary, mask, cache, cache_position, token_mask

        hidden_states, aux_losses = self.dropout(inputs_embeds), []
        for layer in self.layers:
            # Experts are balanced over all positions, so with them the last block computes all.
            takes = layer is self.layers[-1] and not self.config.use_moe
            hidden_states, aux_loss = layer(hidden_states, *inputs, positions if takes else None)
            aux_losses.append(aux_loss)
        if not self.config.use_moe:
            return self.norm(hidden_states), None
        return self.norm(take(hidden_states, positions)), sum(aux_losses)


class MiniMindForCausalLM(MiniMindPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head, which shares its weight with the embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MiniMindConfig | None = None):
        super().__init__(config or MiniMindConfig())
        self.model = MiniMindModel(self.config)
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        self.compute_loss = causal_lm_loss  # an attribute, so CompiledVLM can replace it
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        learned_positions: torch.Tensor | None = None,
        reduction: str = "mean",
        past_key_values=None,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """Runs the decoder over the tokens.

        Args:
            input_ids: (B, L) token ids, or inputs_embeds: (B, L, D).
            attention_mask: (B, keys), 0 at pads. Pads at the right of a training batch need none: attention is causal.
            cache: transformers' own (past_key_values before 5.24), filled in place; any number of tokens may follow.
            labels: (B, L), -100 where nothing is learned; position i - 1 predicts label i.
            logits_to_keep: Compute the logits of this many last positions only; 0 is all of them.
            learned_positions: (N,) positions in the flattened (B * L) labels that are learned, to compute nothing else:
                `logits` is then (N, V). A label of -100 at such a position is ignored.
            reduction: "mean" over the learned tokens, plus the experts' balancing loss; or "sum", without it.

        Returns a new output: `loss` (cross-entropy, 0 if nothing is learned; None without labels), `aux_loss` (the
        experts' balancing loss, mean over samples; None without experts), `logits`, and the cache.
        """
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        is_masked = self.config.use_moe and input_ids is not None
        token_mask = input_ids != self.config.pad_token_id if is_masked else None
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids)
        positions = slice(-logits_to_keep, None)
        if learned_positions is not None:
            positions = (learned_positions - 1).clamp(min=0)
        states, aux_losses = self.model(inputs_embeds, attention_mask, position_ids, cache, token_mask, positions)
        logits = self.lm_head(states)
        loss = learned_loss(self.compute_loss, logits, labels, learned_positions, reduction)
        aux_loss = None if aux_losses is None else aux_losses.mean()
        if loss is not None and aux_loss is not None and reduction == "mean":
            loss = loss + aux_loss
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits, **{CACHE_NAME: cache})


def learned_loss(compute_loss, logits, labels, learned_positions, reduction) -> torch.Tensor | None:
    """Returns the loss of logits (B, L, V), or (N, V) at `learned_positions`; None without labels."""
    if labels is None:
        return None
    if learned_positions is None:
        return compute_loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction)
    is_first = learned_positions % labels.shape[1] == 0  # no position predicts it
    return compute_loss(logits, labels.flatten()[learned_positions].masked_fill(is_first, -100), reduction)


def causal_lm_loss(logits: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
    """Returns the cross-entropy of (N, V) against (N,) in float32, -100 ignored; its mean is 0, not NaN, over none."""
    loss = F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")
    return loss if reduction == "sum" else loss / (targets != -100).sum().clamp(min=1)
