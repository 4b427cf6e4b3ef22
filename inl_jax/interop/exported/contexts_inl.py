"""How a block of INL-LLM reads the earlier tokens: positions, the cache, the four contexts.

A context maps the stream, the places of its tokens and the cache to one vector per token. Padding
may stand anywhere, and is as if it were not there.

Shapes: B batch, S tokens given, N tokens in the cache, D width, H query heads, K head width.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer


def at_least_float32(tensor):
    """The type for states, sums and positions."""
    return torch.promote_types(tensor.dtype, torch.float32)


# --- cache


class InlStateLayer(CacheLayerMixin):
    """What a layer without attention keeps of the earlier tokens: one vector per row, [B, D].

    Its size does not depend on the number of tokens, and no token can be taken back out of it.
    """

    is_sliding = False

    def __init__(self):
        super().__init__()
        self.reset()

    def reset(self):
        """Forgets all tokens."""
        self.state = None
        self.num_tokens = 0

    def update(self, state, num_tokens):
        """Replaces the state, after `num_tokens` more tokens."""
        self.state = state
        self.num_tokens += num_tokens

    def lazy_initialization(self, *args):
        """Nothing to do: the first `update` brings the state."""

    def get_seq_length(self):
        """The number of tokens read, N."""
        return self.num_tokens

    def get_mask_sizes(self, query_length):
        """Length and offset of the attention mask."""
        return self.num_tokens + query_length, 0

    def get_max_length(self):
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length  # its older name

    def crop(self, *args):
        """Not possible.

        Raises:
          NotImplementedError: always.
        """
        raise NotImplementedError("the state of a layer without attention cannot be cropped")

    def reorder_cache(self, beam_idx):
        """Takes rows, for beam search."""
        if self.state is not None:
            self.state = self.state[beam_idx.to(self.state.device)]

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats):
        """Repeats every row."""
        if self.state is not None:
            self.state = self.state.repeat_interleave(repeats, dim=0)


def make_cache(config):
    """An empty cache of the kinds that the layers need."""
    if config.context == "attention":
        return DynamicCache()
    kinds = [DynamicLayer if c == "attention" else InlStateLayer for c in config.contexts]
    return Cache(layers=[kind() for kind in kinds])


# --- positions


class TokenSpan(NamedTuple):
    """Where the tokens given to the model stand."""

    positions: torch.Tensor
    """Number of real tokens before each in its row, [B or 1, S]."""
    real: torch.Tensor | None
    """Which of them are no padding, [B, S]; None: all."""
    visible: torch.Tensor | None
    """Keys that each attends to, [B or 1, 1, S, N + S]; None: itself and all before it."""
    rotary: tuple[torch.Tensor, torch.Tensor] | None
    """Sin and cos of the rotary positions, [B or 1, 1, S, K / 2]. For attention only."""


def find_tokens(config, attention_mask, inputs, num_past):
    """The `TokenSpan` of `inputs` [B, S, D] after `num_past` tokens in the cache.

    Raises:
      ValueError: there are no tokens, or the mask is not [B, N + S].
    """
    batch_size, length = inputs.shape[:2]
    if length == 0:
        raise ValueError("no tokens given: start a text with the bos token")
    total = num_past + length
    if attention_mask is None:
        positions = torch.arange(num_past, total, device=inputs.device)[None]
        real_keys = None
    else:
        if attention_mask.shape != (batch_size, total):
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)}: must be [batch, tokens in "
                f"the cache + tokens given], {(batch_size, total)}, with 0 for padding"
            )
        real_keys = attention_mask.to(inputs.device).bool()
        positions = (real_keys.long().cumsum(-1) - 1).clamp(min=0)[:, num_past:]
    real = None if real_keys is None else real_keys[:, num_past:]
    if "attention" not in config.contexts:
        return TokenSpan(positions, real, None, None)
    visible = None
    if real_keys is not None or (num_past > 0 and length > 1):
        key = torch.arange(total, device=inputs.device)
        query = key[num_past:, None]
        visible = (key <= query)[None, None]
        if real_keys is not None:
            # A padded query sees itself: without any key its softmax would be NaN.
            visible = visible & (real_keys[:, None, None] | (key == query))
    half = config.d_model // config.num_heads // 2
    angles = position_angles(positions, half, at_least_float32(inputs))[:, None]
    return TokenSpan(positions, real, visible, (angles.sin(), angles.cos()))


def position_angles(positions, num_frequencies, dtype):
    """`position * 10000^(-i / num_frequencies)`, [..., num_frequencies]."""
    index = torch.arange(2 * num_frequencies, dtype=dtype, device=positions.device)[::2]
    frequencies = torch.exp(index * (-math.log(10000.0) / (2 * num_frequencies)))
    return positions[..., None].to(dtype) * frequencies


def sinusoid(positions, width, dtype):
    """Sinusoidal positions, [..., D]: sin on even, cos on odd columns."""
    angles = position_angles(positions, width // 2, dtype)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def rotate(x, rotary):
    """Rotary positions of [B, heads, S, K], pairing column i with column i + K / 2."""
    sin, cos = rotary
    a, b = x.to(sin.dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


# --- contexts: how a block reads the earlier tokens


class InlMean(nn.Module):
    """`h_i = mean(u_0 .. u_i)` with `u = n Wc + bc`."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, hidden_states, tokens, cache=None):
        """Maps the normalised stream [B, S, D] to the context."""
        projected = self.proj(hidden_states)
        summands = projected.to(at_least_float32(projected))
        if tokens.real is not None:
            summands = summands * tokens.real[..., None]
        sums = summands.cumsum(1)
        if cache is not None:
            layer = cache.layers[self.layer_idx]
            if layer.state is not None:
                sums = sums + layer.state[:, None]
            layer.update(sums[:, -1], summands.shape[1])
        return (sums / (tokens.positions[..., None] + 1)).to(projected.dtype)


class DecayScan(torch.autograd.Function):
    """`h_i = decay h_(i-1) + (1 - decay) u_i` from `h_(-1) = start`, in log2(S) passes over u.

    u [B, S, D], decay [D] and start [B, D] have one type. The gradient is the same recurrence run
    backwards, `g_i = dh_i + decay g_(i+1)`, and keeps u and h alone.
    """

    @staticmethod
    def forward(ctx, u, decay, start):
        """Returns h, [B, S, D]."""
        drive = (1 - decay) * u
        drive[:, 0] += decay * start
        h = DecayScan.linear_scan(drive, decay)
        ctx.save_for_backward(u, decay, start, h)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        """Returns the gradients by u, decay and start."""
        u, decay, start, h = ctx.saved_tensors
        g = DecayScan.linear_scan(dh.flip(1), decay).flip(1)
        earlier = torch.cat([start[:, None], h[:, :-1]], dim=1)
        return (1 - decay) * g, (g * (earlier - u)).sum((0, 1)), decay * g[:, 0]

    @staticmethod
    def linear_scan(drive, decay):
        """`h_i = decay h_(i-1) + drive_i` from 0. Writes over `drive`."""
        shift = 1
        while shift < drive.shape[1]:  # h_i holds the terms of the last `shift` tokens
            drive[:, shift:] += decay**shift * drive[:, :-shift]
            shift *= 2
        return drive


class InlDecay(nn.Module):
    """`h_i = decay h_(i-1) + (1 - decay) u_i` by channel, with `u = LN(x) Wc + bc`."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.norm = nn.LayerNorm(config.d_model)
        self.proj = nn.Linear(config.d_model, config.d_model)
        self.decay_logit = nn.Parameter(torch.empty(config.d_model))

    def forward(self, hidden_states, tokens, cache=None):
        """Maps the stream [B, S, D] to the context."""
        projected = self.proj(self.norm(hidden_states))
        u = projected.to(at_least_float32(projected))
        layer = None if cache is None else cache.layers[self.layer_idx]
        start = torch.zeros_like(u[:, 0]) if layer is None or layer.state is None else layer.state
        if tokens.real is not None:
            # Real tokens come to the front of their row; a stable sort keeps their order.
            front = tokens.real.logical_not().long().sort(dim=1, stable=True).indices
            u = u.take_along_dim(front[..., None], dim=1)
        h = DecayScan.apply(u, self.decay_logit.to(u.dtype).sigmoid(), start)
        if tokens.real is not None:
            # The context of a token is the one after as many real tokens as there are up to it.
            count = tokens.real.long().cumsum(1)[..., None]
            h = torch.cat([start[:, None], h], dim=1).take_along_dim(count, dim=1)
        if layer is not None:
            layer.update(h[:, -1], h.shape[1])
        return h.to(projected.dtype)


class GatedScan(torch.autograd.Function):
    """`h_i = lam_i h_(i-1) + (1 - lam_i) u_i` from `h_(-1) = start`, with `lam = sigmoid(logit)`.

    In log2(S) passes over u and lam. u, logit [B, S, D] and start [B, D] have one type. The
    gradient is a recurrence run backwards, `g_i = dh_i + lam_(i+1) g_(i+1)`, and keeps u, logit
    and h alone.
    """

    @staticmethod
    def forward(ctx, u, logit, start):
        """Returns h, [B, S, D]."""
        lam, rest = logit.sigmoid(), (-logit).sigmoid()  # 1 - lam, exact where lam is almost 1
        drive = rest * u
        drive[:, 0] += lam[:, 0] * start
        h = GatedScan.linear_scan(drive, lam)
        ctx.save_for_backward(u, logit, start, h)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        """Returns the gradients by u, logit and start."""
        u, logit, start, h = ctx.saved_tensors
        lam, rest = logit.sigmoid(), (-logit).sigmoid()
        later = nn.functional.pad(lam[:, 1:], (0, 0, 0, 1))
        g = GatedScan.linear_scan(dh.flip(1), later.flip(1)).flip(1)
        earlier = torch.cat([start[:, None], h[:, :-1]], dim=1)
        return rest * g, g * (earlier - u) * lam * rest, lam[:, 0] * g[:, 0]

    @staticmethod
    def linear_scan(drive, decay):
        """`h_i = decay_i h_(i-1) + drive_i` from 0. Writes over both."""
        shift = 1
        while shift < drive.shape[1]:  # h_i holds the terms, decay_i the product of `shift` tokens
            drive[:, shift:] += decay[:, shift:] * drive[:, :-shift]
            decay[:, shift:] = decay[:, shift:] * decay[:, :-shift]
            shift *= 2
        return drive


class InlGated(nn.Module):
    """`h_i = lam_i h_(i-1) + (1 - lam_i) u_i` by channel, and `(h * silu(n Wg)) Wo` of it.

    `n = LN(x)`, `u = n Wc + bc`, `lam = sigmoid(d + n Wd)`.
    """

    def __init__(self, config, layer_idx):
        super().__init__()
        width = config.d_model
        self.layer_idx = layer_idx
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, width)
        self.decay_proj = nn.Linear(width, width, bias=False)
        self.decay_logit = nn.Parameter(torch.empty(width))
        self.gate_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.out_proj.init_std = (2 * config.num_layers * width) ** -0.5

    def forward(self, hidden_states, tokens, cache=None):
        """Maps the stream [B, S, D] to the context."""
        normed = self.norm(hidden_states)
        projected = self.proj(normed)
        u = projected.to(at_least_float32(projected))
        logit = self.decay_logit.to(u.dtype) + self.decay_proj(normed)
        if tokens.real is not None:
            logit = logit.masked_fill(~tokens.real[..., None], math.inf)  # lam 1: h stays
        layer = None if cache is None else cache.layers[self.layer_idx]
        start = torch.zeros_like(u[:, 0]) if layer is None or layer.state is None else layer.state
        h = GatedScan.apply(u, logit, start)
        if layer is not None:
            layer.update(h[:, -1], h.shape[1])
        return self.out_proj(h.to(projected.dtype) * nn.functional.silu(self.gate_proj(normed)))


class InlAttention(nn.Module):
    """Causal attention: grouped queries, rotary positions, normalised queries and keys."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.d_model // config.num_heads
        self.num_groups = config.num_heads // config.num_kv_heads
        kv_width = config.num_kv_heads * self.head_dim
        self.norm = nn.LayerNorm(config.d_model)
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=False)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.o_proj.init_std = (2 * config.num_layers * config.d_model) ** -0.5
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6)

    def forward(self, hidden_states, tokens, cache=None):
        """Maps the stream [B, S, D] to the context."""
        normed = self.norm(hidden_states)
        heads = (*normed.shape[:2], -1, self.head_dim)
        query = self.q_norm(self.q_proj(normed).view(heads)).transpose(1, 2)
        key = self.k_norm(self.k_proj(normed).view(heads)).transpose(1, 2)
        value = self.v_proj(normed).view(heads).transpose(1, 2)
        query, key = rotate(query, tokens.rotary), rotate(key, tokens.rotary)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        context = nn.functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(self.num_groups, dim=1),
            value.repeat_interleave(self.num_groups, dim=1),
            attn_mask=tokens.visible,
            is_causal=tokens.visible is None and query.shape[2] > 1,
        )
        return self.o_proj(context.transpose(1, 2).flatten(2))


CONTEXTS = {"mean": InlMean, "decay": InlDecay, "gated": InlGated, "attention": InlAttention}
