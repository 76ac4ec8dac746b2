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
    """The decoder's shape.

    Args:
        hidden_size: Width D of the residual stream; 512 (26 M parameters with 8 layers) and 768 (104 M with 16) are
            the published ones.
        num_hidden_layers: Number of blocks.
        num_attention_heads, num_key_value_heads: Query heads H and key/value heads K; K must divide H, H must divide D.
        intermediate_size: Width of the SwiGLU; by default 8/3 of the hidden size, rounded up to a multiple of 64.
        inference_rope_scaling: Stretch the rotary positions by YaRN (https://arxiv.org/abs/2309.00071) from
            `original_max_position_embeddings` by `yarn_factor`.
        yarn_attention_factor: Factor on queries and keys under YaRN, by default the paper's 0.1 ln(yarn_factor) + 1.
        qk_norm: Norm each head's queries and keys before they are rotated (https://arxiv.org/abs/2302.05442).
        use_moe: Replace the feed-forward by `n_routed_experts` experts, of which each token uses the
            `num_experts_per_tok` best, and `n_shared_experts` that every token uses.
        aux_loss_alpha: Coefficient of the experts' load-balancing loss.
        balance_over_batch: Balance the experts over all tokens of a batch, not of each sequence.

    Raises:
        ValueError: If a value is out of range, or the head counts do not fit the hidden size.
    """

    model_type = "minimind"

    def __init__(
        self,
        hidden_size: int = 512,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        num_key_value_heads: int = 2,
        vocab_size: int = 6400,
        intermediate_size: int | None = None,
        max_position_embeddings: int = 32768,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 1e6,
        dropout: float = 0.0,
        inference_rope_scaling: bool = False,
        original_max_position_embeddings: int = 2048,
        yarn_factor: float = 16.0,
        yarn_beta_fast: float = 32.0,
        yarn_beta_slow: float = 1.0,
        yarn_attention_factor: float | None = None,
        qk_norm: bool = False,
        use_moe: bool = False,
        num_experts_per_tok: int = 2,
        n_routed_experts: int = 4,
        n_shared_experts: int = 1,
        aux_loss_alpha: float = 0.01,
        balance_over_batch: bool = False,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        pad_token_id: int = 0,
        **kwargs,
    ):
        sizes = (hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, vocab_size)
        if min(*sizes, max_position_embeddings, num_experts_per_tok, n_routed_experts) < 1:
            raise ValueError("sizes, heads, layers, positions and experts must be at least 1")
        if not (0 < rms_norm_eps < 1 and 0 < rope_theta < math.inf and 0 <= dropout < 1):  # refuses NaN too
            raise ValueError(f"out of range: {rms_norm_eps=}, {rope_theta=} or {dropout=}")
        if use_moe and num_experts_per_tok > n_routed_experts:
            raise ValueError(f"{num_experts_per_tok} of {n_routed_experts} experts cannot be used")
        if hidden_size % num_attention_heads or num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"hidden_size {hidden_size} must be a multiple of num_attention_heads {num_attention_heads}, and that "
                f"a multiple of num_key_value_heads {num_key_value_heads}"
            )
        if hidden_size // num_attention_heads % 2:
            raise ValueError(f"the head size {hidden_size // num_attention_heads} must be even: rotary positions pair")
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads
        self.vocab_size = vocab_size
        self.intermediate_size = intermediate_size or 64 * math.ceil(int(hidden_size * 8 / 3) / 64)
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.dropout = dropout
        self.inference_rope_scaling = inference_rope_scaling
        self.original_max_position_embeddings = original_max_position_embeddings
        self.yarn_factor = yarn_factor
        self.yarn_beta_fast = yarn_beta_fast
        self.yarn_beta_slow = yarn_beta_slow
        self.yarn_attention_factor = yarn_attention_factor or 0.1 * math.log(yarn_factor) + 1.0
        self.qk_norm = qk_norm
        self.use_moe = use_moe
        self.num_experts_per_tok = num_experts_per_tok
        self.n_routed_experts = n_routed_experts
        self.n_shared_experts = n_shared_experts
        self.aux_loss_alpha = aux_loss_alpha
        self.balance_over_batch = balance_over_batch
        kwargs.setdefault("tie_word_embeddings", True)
        super().__init__(bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id, **kwargs)


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(hidden_states.float(), self.weight.shape, self.weight.float(), self.eps)
        return normed.to(hidden_states.dtype)


def rotary_frequencies(config: MiniMindConfig) -> tuple[torch.Tensor, float]:
    """Returns the angle per position of each pair of a head's dimensions, and the factor on cosine and sine.

    Args:
        config: Gives the head size E, theta and whether YaRN is on.

    Returns:
        Frequencies (E/2,) in radians per position, float32, and YaRN's attention factor (1 without YaRN).
    """
    head_dim = config.head_dim
    frequencies = config.rope_theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if not config.inference_rope_scaling:
        return frequencies, 1.0

    def pair_that_turns(rotations: float) -> float:
        """Returns the (fractional) pair that makes so many full turns within the original context."""
        wavelength = config.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_that_turns(config.yarn_beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(config.yarn_beta_slow)), head_dim - 1)
    # Fast pairs (below low) keep their frequency, slow ones (above high) are stretched, those between are blended.
    stretched = ((torch.arange(head_dim // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)
    frequencies = frequencies * (1 - stretched) + frequencies / config.yarn_factor * stretched
    return frequencies, config.yarn_attention_factor


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates (B, heads, L, E); the first half of a head pairs with the second.

    Cosines and sines are (B or 1, 1, L, E), the sines of the first half negative: (a, b) becomes (a cos - b sin,
    b cos + a sin).

    Computed in float32 whatever the states' type: at position 1000 a bfloat16 angle is off by more than a radian.
    """
    first, second = states.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    return torch.addcmul(states * cos, swapped, sin).to(states.dtype)


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

    def forward(self, x_BLD, rotary, attention_mask, cache, cache_position, pick):
        batch, length, _ = x_BLD.shape
        q_BHLE = self.q_proj(x_BLD).view(batch, length, -1, self.head_dim).transpose(1, 2)
        k_BKLE = self.k_proj(x_BLD).view(batch, length, -1, self.head_dim).transpose(1, 2)
        v_BKLE = self.v_proj(x_BLD).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q_BHLE, k_BKLE = apply_rotary(self.q_norm(q_BHLE), *rotary), apply_rotary(self.k_norm(k_BKLE), *rotary)
        if cache is not None:
            # Early releases of transformers 5 do not count what a static cache holds: they need the position.
            cache_kwargs = {"cache_position": cache_position}
            k_BKLE, v_BKLE = cache.update(k_BKLE, v_BKLE, self.layer_idx, cache_kwargs)
        if length == 1:
            # A group's heads see the same keys: as several queries of one head they read them once.
            q_BHLE = q_BHLE.view(batch, k_BKLE.shape[1], -1, self.head_dim)
        out_BHLE = F.scaled_dot_product_attention(
            q_BHLE,
            k_BKLE,
            v_BKLE,
            attn_mask=attention_mask,
            dropout_p=self.dropout if self.training else 0.0,
            # A single new token sees all keys; several tokens after cached keys come with a mask. (Conditional, because
            # torch.compile evaluates it once, while it would keep a comparison symbolic.)
            is_causal=False if attention_mask is not None or length == 1 else True,
            enable_gqa=True,
        )
        out_BHLE = out_BHLE.reshape(batch, -1, length, self.head_dim)
        return self.o_proj(pick(out_BHLE.transpose(1, 2).reshape(batch, length, -1)))


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
        """Returns the (B, L, D) output and each sequence's balancing loss (B,); `token_mask` (B, L) excludes pads.

        Balanced over the batch, the loss is (1,): all tokens count as one sequence.
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
        out_BLD = out_TD.to(hidden_states.dtype).view(batch, length, width)
        sequences = 1 if self.balance_over_batch else batch
        token_mask = None if token_mask is None else token_mask.reshape(sequences, -1)
        return out_BLD, self.balancing_loss(
            scores_TX.view(sequences, -1, self.num_experts), expert_Tk.view(sequences, -1, self.top_k), token_mask
        )

    def balancing_loss(self, scores_BLX, expert_BLk, token_mask):
        """alpha * sum over experts of (share of choices, times experts) * (mean score), per sequence: (B,)."""
        chosen_BLX = F.one_hot(expert_BLk, self.num_experts).sum(dim=2).float()
        if token_mask is None:
            token_mask = torch.ones_like(scores_BLX[..., 0])
        mask_BL1 = token_mask[..., None].float()
        count_B1 = mask_BL1.sum(dim=1).clamp(min=1)
        share_BX = (chosen_BLX * mask_BL1).sum(dim=1) / count_B1 * (self.num_experts / self.top_k)
        score_BX = (scores_BLX * mask_BL1).sum(dim=1) / count_B1
        return self.alpha * (share_BX * score_BX).sum(dim=-1)


def identity(states: torch.Tensor) -> torch.Tensor:
    return states


class MiniMindBlock(nn.Module):
    """One pre-norm block: attention over all positions, then the feed-forward of those that `pick` takes of them."""

    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = MoEFeedForward(config) if config.use_moe else FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states, rotary, attention_mask, cache, cache_position, token_mask, pick=identity):
        normed = self.input_layernorm(hidden_states)
        attended = self.self_attn(normed, rotary, attention_mask, cache, cache_position, pick)
        hidden_states = pick(hidden_states) + self.dropout(attended)
        normed = self.post_attention_layernorm(hidden_states)
        has_experts = isinstance(self.mlp, MoEFeedForward)
        fed, aux_loss = self.mlp(normed, token_mask) if has_experts else (self.mlp(normed), None)
        return hidden_states + self.dropout(fed), aux_loss


def causal_mask(attention_mask: torch.Tensor | None, length: int, past_length: int, key_length: int, device):
    """Returns attention's mask, None where plain causal attention (or one token that sees all) is enough.

    Args:
        attention_mask: (B, keys) with 0 at pads, a ready-made 4-d mask, or None.
        length: New positions. past_length: Positions already in the cache. key_length: Keys that attention will see
            (more than `past_length + length` with a static cache).

    Returns:
        None, or a boolean (B or 1, 1, length, key_length), True where a query may look.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    padded = attention_mask is not None and not bool(attention_mask.all())
    exact = key_length == past_length + length
    if not padded and exact and (past_length == 0 or length == 1):
        return None
    query_position = past_length + torch.arange(length, device=device)[:, None]
    key_position = torch.arange(key_length, device=device)[None, :]
    mask = (key_position <= query_position)[None, None]
    if padded:
        keys = F.pad(attention_mask.bool(), (0, key_length - attention_mask.shape[1]))
        # A pad attends to itself: a softmax over no keys is NaN, and NaN spreads through the values.
        mask = mask & keys[:, None, None, :] | (key_position == query_position)
    return mask


class MiniMindPreTrainedModel(PreTrainedModel):
    config_class = MiniMindConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, MiniMindModel):
            # Not saved in the state dict, so it is computed here.
            module.rotary_frequencies.copy_(rotary_frequencies(module.config)[0])


class MiniMindModel(MiniMindPreTrainedModel):
    """Embedding, blocks and final norm."""

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
        if self.rotary_frequencies.dtype.itemsize < 4:
            # Keep the angles exact in a half-precision model: rounded frequencies are off by radians at position 1000.
            self.rotary_frequencies = rotary_frequencies(self.config)[0].to(self.rotary_frequencies.device)
        return self

    def forward(
        self, inputs_embeds, attention_mask=None, position_ids=None, cache=None, token_mask=None, pick=identity
    ):
        """Runs the blocks over (B, L, D); returns normed hidden states, and the balancing loss per sequence or None.

        `pick` takes from (B, L, ...) the positions whose hidden states are wanted: the last block computes only those.
        """
        length, device = inputs_embeds.shape[1], inputs_embeds.device
        past_length = cache.get_seq_length() if cache is not None else 0
        is_static = cache is not None and cache.is_compileable
        key_length = cache.layers[0].max_cache_len if is_static else past_length + length
        cache_position = past_length + torch.arange(length, device=device)
        if position_ids is None:
            position_ids = positions_from_mask(attention_mask, cache_position)
        attention_mask = causal_mask(attention_mask, length, past_length, key_length, device)
        rotary = self.rotary(position_ids)

        hidden_states, aux_losses = self.dropout(inputs_embeds), []
        # The experts of the last block are balanced over all positions, so with experts none is left out there.
        early, late = (identity, pick) if self.config.use_moe else (pick, identity)
        for layer in self.layers:
            inputs = hidden_states, rotary, attention_mask, cache, cache_position, token_mask
            hidden_states, aux_loss = layer(*inputs, early if layer is self.layers[-1] else identity)
            aux_losses.append(aux_loss)
        return self.norm(late(hidden_states)), sum(aux_losses) if self.config.use_moe else None

    def rotary(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cosines and signed sines (B or 1, 1, L, E) for `apply_rotary`, float32, of positions (B or 1, L)."""
        angles = position_ids[:, None, :, None].float() * self.rotary_frequencies.float()
        cos, sin = angles.cos() * self.rotary_scale, angles.sin() * self.rotary_scale
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def positions_from_mask(attention_mask: torch.Tensor | None, cache_position: torch.Tensor) -> torch.Tensor:
    """Returns positions (B or 1, L) of the newest tokens, at (L,) in the cache; pads at the left do not count."""
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -len(cache_position) :]
    return cache_position[None]


class MiniMindForCausalLM(MiniMindPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head, which shares its weight with the embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MiniMindConfig | None = None):
        super().__init__(config or MiniMindConfig())
        self.model = MiniMindModel(self.config)
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        self.compute_loss = causal_lm_loss
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeds (B, L) ids as (B, L, D)."""
        return self.model.embed_tokens(input_ids)

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
        num_items_in_batch: int | torch.Tensor | None = None,
        past_key_values=None,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """Runs the decoder over the tokens.

        Args:
            input_ids: (B, L) token ids, or inputs_embeds: (B, L, D).
            attention_mask: (B, keys), 0 at pads. Pads at the right of a training batch need none: attention is causal.
            cache: transformers' own (past_key_values before 5.24), filled in place; any number of tokens may follow.
            labels: (B, L), -100 where nothing is learned; the token at position i is learned from position i - 1.
            logits_to_keep: Compute the logits of this many last positions only; 0 is all of them.
            learned_positions: (N,) positions in the flattened (B * L) labels, to compute logits there only: `logits` is
                then (N, V). What is labelled -100 at such a position counts for nothing.
            num_items_in_batch: Divide the summed loss by this, not by the number of learned tokens (the learned tokens
                of the whole optimizer step, where that is more than this batch). The balancing loss, which weighs by
                samples, is then left to the caller.

        Returns:
            A new output: `loss` (mean cross-entropy over the learned tokens, 0 where there is none, plus the experts'
            balancing loss), `aux_loss` (that balancing loss, mean over samples), `logits`, and the cache.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids)
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        is_masked = self.config.use_moe and input_ids is not None
        token_mask = input_ids != self.config.pad_token_id if is_masked else None

        def pick(states: torch.Tensor) -> torch.Tensor:
            """Takes the positions whose logits are wanted: those at i - 1 predict position i."""
            if learned_positions is None:
                return states[:, -logits_to_keep:]
            return states.flatten(0, 1)[(learned_positions - 1).clamp(min=0)]

        hidden_states, aux_losses = self.model(inputs_embeds, attention_mask, position_ids, cache, token_mask, pick)
        logits = self.lm_head(hidden_states)
        if learned_positions is not None:
            is_first = learned_positions % labels.shape[1] == 0  # a first position cannot be predicted
            targets = labels.flatten()[learned_positions].masked_fill(is_first, -100)
        else:
            targets = None if labels is None else labels[:, 1:].flatten()
        loss, aux_loss = None, aux_losses.mean() if aux_losses is not None else None
        if targets is not None:
            predicted = logits if learned_positions is not None else logits[:, :-1].flatten(0, 1)
            loss = self.compute_loss(predicted, targets, num_items_in_batch)
            if aux_loss is not None and num_items_in_batch is None:
                loss = loss + aux_loss
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits, **{CACHE_NAME: cache})


def causal_lm_loss(logits: torch.Tensor, targets: torch.Tensor, num_items=None) -> torch.Tensor:
    """Returns the cross-entropy of (N, V) against (N,) in float32, -100 ignored; 0 (not NaN) if nothing is learned."""
    loss = F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")
    count = (targets != -100).sum() if num_items is None else num_items
    return loss / (count + (count == 0))
