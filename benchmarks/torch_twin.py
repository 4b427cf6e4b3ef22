"""A plain GPT and its update in PyTorch, eager, as nanoGPT has them, to time ours beside.

LayerNorm and linear layers without biases, one product for q, k and v, PyTorch's fused attention,
exact GELU, learned positions, tied head; gradients clipped by their global norm, AdamW.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from inl_jax.config import TrainConfig


class Block(nn.Module):
    """Attention and feed-forward, each on a norm of the stream."""

    def __init__(self, width: int, hidden: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        """The stream after this block, [B, S, D]."""
        heads = (
            t.unflatten(-1, (self.num_heads, -1)) for t in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        q, k, v = (t.transpose(1, 2) for t in heads)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(h.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Token ids to the mean loss of the next ones."""

    def __init__(self, config: TrainConfig):
        super().__init__()
        c = config.model
        self.tokens = nn.Embedding(c.vocab_size, c.d_model)
        self.positions = nn.Embedding(config.data.seq_len, c.d_model)
        self.blocks = nn.ModuleList(
            Block(c.d_model, c.d_ff, c.num_heads) for _ in range(c.num_layers)
        )
        self.final_norm = nn.LayerNorm(c.d_model, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids, targets):
        """The mean loss in nats per token."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.final_norm(x) @ self.tokens.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_update(config: TrainConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that trains a fresh `GPT` on tokens [B, S + 1], and returns the loss."""
    o = config.optim
    torch.manual_seed(config.seed)
    model = GPT(config)
    kernels = [p for p in model.parameters() if p.ndim > 1]
    scales = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": kernels, "weight_decay": o.weight_decay},
        {"params": scales, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=o.learning_rate, betas=(o.b1, o.b2), eps=o.eps)

    def update(batch):
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return update
