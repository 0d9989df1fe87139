"""A plain PyTorch twin of the Hugging Face model, for training.

Parameters carry the names and shapes of ``transformers``' CLIP tower, LLaVA projector and Llama,
so that exporting is a ``load_state_dict``. The forward passes share one image prefix between many
questions, which the Hugging Face forward cannot do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.08  # at width 128, 0.02 leaves the model at chance for hundreds of steps


@dataclass(frozen=True)
class Sizes:
    """The sizes of the model."""

    image: int = 48
    patch: int = 2
    tower_width: int = 128
    tower_layers: int = 4  # the last one is not used: LLaVA takes the features before it
    tower_heads: int = 8
    tower_mlp: int = 256
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 192
    rope_theta: float = 10000.0
    eps: float = 1e-5


class _Bag(nn.Module):
    """Modules under the attribute names that the checkpoint needs."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class TowerLayer(nn.Module):
    """One layer of the CLIP vision encoder."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        w = s.tower_width
        self.heads = s.tower_heads
        self.self_attn = _Bag(
            k_proj=nn.Linear(w, w),
            v_proj=nn.Linear(w, w),
            q_proj=nn.Linear(w, w),
            out_proj=nn.Linear(w, w),
        )
        self.layer_norm1 = nn.LayerNorm(w, eps=s.eps)
        self.mlp = _Bag(fc1=nn.Linear(w, s.tower_mlp), fc2=nn.Linear(s.tower_mlp, w))
        self.layer_norm2 = nn.LayerNorm(w, eps=s.eps)

    def forward(self, x: Tensor) -> Tensor:
        b, n, w = x.shape
        a = self.self_attn
        h = self.layer_norm1(x)
        q, k, v = (
            p(h).view(b, n, self.heads, -1).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj)
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, w)
        x = x + a.out_proj(h)
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.layer_norm2(x))))


def _frequencies(waves: int) -> Tensor:
    return 1.3 / 12 ** (torch.arange(waves) / waves)


def _grid_embedding(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column: a start from which nearby patches look alike."""
    frequency = _frequencies(width // 4)
    angle = torch.arange(side)[:, None] * frequency
    wave = torch.cat([angle.sin(), angle.cos()], 1)
    rows = wave[:, None].expand(side, side, -1)
    columns = wave[None].expand(side, side, -1)
    return torch.cat([rows, columns], 2).reshape(side * side, width)


def _look_around(attention: nn.Module, s: Sizes, reach: float) -> None:
    """Start each head looking at one neighbour, ``reach`` patches away in its own direction.

    A shift of a place turns the waves of its embedding, so the queries are the keys turned. From
    here the tower learns shapes in a few hundred steps, as a convolution would; from random heads
    it stays at chance for as long.
    """
    waves = s.tower_width // 4
    picked = torch.linspace(0, waves * 0.7, s.tower_width // s.tower_heads // 4).long()
    frequency = _frequencies(waves)[picked]
    head = s.tower_width // s.tower_heads
    attention.q_proj.weight.normal_(0, 0.02)
    attention.k_proj.weight.normal_(0, 0.02)
    for h in range(s.tower_heads):
        direction = 2 * math.pi * h / s.tower_heads
        for axis, shift in enumerate((math.sin(direction), math.cos(direction))):
            for i, (wave, f) in enumerate(zip(picked.tolist(), frequency.tolist(), strict=True)):
                row = h * head + 4 * i + 2 * axis
                sine, cosine = 2 * axis * waves + wave, 2 * axis * waves + waves + wave
                turn = f * shift * reach
                q, k = attention.q_proj.weight, attention.k_proj.weight
                k[row, sine] = k[row + 1, cosine] = q[row, sine] = q[row + 1, cosine] = 0.0
                k[row, sine] = k[row + 1, cosine] = 1.7
                q[row, sine] = q[row + 1, cosine] = 1.7 * math.cos(turn)
                q[row, cosine], q[row + 1, sine] = 1.7 * math.sin(turn), -1.7 * math.sin(turn)


class Tower(nn.Module):
    """CLIP's vision encoder up to the layer whose features LLaVA takes."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        w, side = s.tower_width, s.image // s.patch
        self.embeddings = _Bag(
            patch_embedding=nn.Conv2d(3, w, s.patch, s.patch, bias=False),
            position_embedding=nn.Embedding(side * side + 1, w),
        )
        self.embeddings.class_embedding = nn.Parameter(torch.randn(w) * INIT_STD)
        self.pre_layrnorm = nn.LayerNorm(w, eps=s.eps)
        self.encoder = _Bag(layers=nn.ModuleList(TowerLayer(s) for _ in range(s.tower_layers)))
        self.post_layernorm = nn.LayerNorm(w, eps=s.eps)
        init_weights(self)
        with torch.no_grad():
            self.embeddings.patch_embedding.weight.normal_(0, 0.15)
            self.embeddings.position_embedding.weight[1:] = _grid_embedding(side, w)
            for layer, reach in zip(self.encoder.layers, (1.0, 2.0, 3.0, 3.0), strict=True):
                _look_around(layer.self_attn, s, reach)

    def forward(self, pixels: Tensor, cells: int = 0) -> Tensor:
        """Map normalised pixels [b, 3, h, w] to patch features [b, patches, width].

        With ``cells`` the patches of each cell of a cells x cells raster see only one another: a
        third of the work while the tower learns what digits look like.
        """
        x = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        cls = self.embeddings.class_embedding.expand(len(x), 1, -1)
        x = torch.cat([cls, x], 1) + self.embeddings.position_embedding.weight
        x = self.pre_layrnorm(x)
        if cells:
            b, n, w = x.shape
            step = math.isqrt(n - 1) // cells
            x = x[:, 1:].view(b, cells, step, cells, step, w).transpose(2, 3)
            x = x.reshape(b * cells * cells, step * step, w)
        for layer in self.encoder.layers[:-1]:
            x = layer(x)
        if cells:
            x = x.view(b, cells, cells, step, step, w).transpose(2, 3)
            return x.reshape(b, n - 1, w)
        return x[:, 1:]


class RMSNorm(nn.Module):
    """Llama's norm."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Layer(nn.Module):
    """One Llama layer."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        w, head = s.width, s.width // s.heads
        self.groups = s.heads // s.kv_heads
        self.head = head
        self.self_attn = _Bag(
            q_proj=nn.Linear(w, w, bias=False),
            k_proj=nn.Linear(w, s.kv_heads * head, bias=False),
            v_proj=nn.Linear(w, s.kv_heads * head, bias=False),
            o_proj=nn.Linear(w, w, bias=False),
        )
        self.mlp = _Bag(
            gate_proj=nn.Linear(w, s.mlp, bias=False),
            up_proj=nn.Linear(w, s.mlp, bias=False),
            down_proj=nn.Linear(s.mlp, w, bias=False),
        )
        self.input_layernorm = RMSNorm(w, s.eps)
        self.post_attention_layernorm = RMSNorm(w, s.eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], prefix: int, mask: Tensor) -> Tensor:
        """Run the layer on [prefix, questions]; ``mask`` says what the questions may see."""
        b, n, w = x.shape
        a, (cos, sin) = self.self_attn, rope
        h = self.input_layernorm(x)
        q, k, v = (
            p(h).view(b, n, -1, self.head).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj)
        )
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        k, v = (t.repeat_interleave(self.groups, 1) for t in (k, v))
        image = F.scaled_dot_product_attention(
            q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix], is_causal=True
        )
        text = F.scaled_dot_product_attention(q[:, :, prefix:], k, v, attn_mask=mask)
        h = torch.cat([image, text], 2).transpose(1, 2).reshape(b, n, w)
        x = x + a.o_proj(h)
        h = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(h)) * self.mlp.up_proj(h))


class Reader(nn.Module):
    """Projector and Llama."""

    def __init__(self, s: Sizes, layers: int, vocabulary: int) -> None:
        super().__init__()
        self.sizes = s
        self.projector = _Bag(
            linear_1=nn.Linear(s.tower_width, s.width), linear_2=nn.Linear(s.width, s.width)
        )
        self.embed_tokens = nn.Embedding(vocabulary, s.width)
        self.layers = nn.ModuleList(Layer(s) for _ in range(layers))
        self.norm = RMSNorm(s.width, s.eps)
        self.lm_head = nn.Linear(s.width, vocabulary, bias=False)
        init_weights(self)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for each position, as Llama lays them out."""
        head = self.sizes.width // self.sizes.heads
        steps = torch.arange(0, head, 2, device=positions.device).float() / head
        angle = positions[:, None].float() * (1.0 / self.sizes.rope_theta**steps)
        angle = torch.cat([angle, angle], 1)
        return angle.cos(), angle.sin()

    def forward(self, features: Tensor, opening: Tensor, questions: Tensor) -> Tensor:
        """Logits of every question token.

        ``features`` [b, patches, width] come from the tower, ``opening`` [m] are the tokens before
        the image, ``questions`` [b, q, t] those after it, padded at the end. Each question sees
        the opening, the image and itself, at the positions it would have on its own.
        """
        b, q, t = questions.shape
        p = self.projector
        image = p.linear_2(F.gelu(p.linear_1(features)))
        start = self.embed_tokens(opening).expand(b, -1, -1)
        x = torch.cat([start, image, self.embed_tokens(questions.reshape(b, q * t))], 1)
        prefix = len(opening) + image.shape[1]
        device = x.device
        positions = torch.cat(
            [torch.arange(prefix, device=device), prefix + torch.arange(t, device=device).repeat(q)]
        )
        rope = self.rope(positions)
        own = torch.block_diag(*[torch.ones(t, t, device=device).tril()] * q).bool()
        mask = torch.cat([torch.ones(q * t, prefix, dtype=torch.bool, device=device), own], 1)
        bias = torch.zeros(mask.shape, device=device).masked_fill_(~mask, -math.inf)
        for layer in self.layers:
            x = layer(x, rope, prefix, bias)
        return self.lm_head(self.norm(x[:, prefix:])).view(b, q, t, -1)


def init_weights(module: nn.Module) -> None:
    """Draw every matrix at ``INIT_STD``; biases start at zero."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=INIT_STD)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)


def normalise(pixels: Tensor) -> Tensor:
    """What the image processor does: grey uint8 [b, h, w] to three channels in -1..1."""
    return (pixels.float() / 127.5 - 1.0)[:, None].expand(-1, 3, -1, -1)
