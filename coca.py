"""CoCa: Contrastive Captioners are Image-Text Foundation Models (Yu et al., TMLR 2022).

    arXiv 2205.01917
    python coca.py      a guided tour of one forward pass: what flows, the mask, both losses, sizes

One model that is at once a single encoder, a dual encoder and an encoder-decoder (Sec. 3.1): an
image encoder, two attentional poolers, and a text decoder cut in half. The lower (unimodal) half
never looks at the image and gives the text embedding of a contrastive loss; the upper (multimodal)
half reads the image and writes the caption. One forward pass serves both losses.

Where to find what                                                                    runs in
    CoCaConfig, CONFIGS   Table 1 (sizes), Sec. 4.1 (resolution, vocabulary)          everything
    causal_mask           Sec. 3.2: who may look at whom, as a table; training asks   tour, tests
                          for the same by is_causal in Attention.forward
    ImageEncoder          Sec. 3.2, Table 1: a ViT                                    everything
    AttentionalPooler     Sec. 3.2 "Attentional poolers"; Table 8f: CoCa.pool_image   everything
    UnimodalDecoder       Sec. 3.2 "Decoupled text decoder"; Tables 8d (n_uni) and    everything
                          8e (one [CLS])
    MultimodalDecoder     Sec. 3.2 "Decoupled text decoder"                           everything
    contrastive_loss      Eq. (2), Sec. 3.1 "Dual-encoder contrastive learning"; its  training
                          half, contrast, in train.large_batch_backward
    captioning_loss       Eq. (3), Sec. 3.1 "Encoder-decoder captioning"; training    training
                          runs its inner half, next_token_loss
    CoCa.losses           Eq. (4), Sec. 3.2; Tables 8b (one loss), 8c (the lambdas)   training
    CoCa.encode_image,    Sec. 3.3 "Zero-shot transfer", Tables 3 and 4               evaluation
    CoCa.encode_text
    CoCa.features         both embeddings and the decoder's states, which the         training,
                          Classifier of Sec. 4.2 "Multimodal understanding" reads     evaluation
    Classifier            Eq. (1); Sec. 3.3 "Frozen-feature evaluation", "CoCa for    evaluation
                          Video Action Recognition"; Sec. 4.2
    CoCa.generate         captioning, Table 7                                         generation
(Eq. (1) as Table 8a has it, with labels read as text, is Eq. (3) on captions of class names.)

Dimension letters
    B batch   P image tokens (patches)   Q pooled image tokens (n_query)   L text tokens   D width
    E embedding (= D)   H heads   d = D / H   V vocabulary   T target tokens   N pairs to compare
    S pixels a side

Where the paper is silent we chose: pre-LayerNorm and GELU; learned positions (the image's start as
2-D sinusoids); heads of the poolers = heads of the model; LayerNorm after each pooler and before
the text embedding; no projection to a joint space (so E = D); [CLS] carries no position, sees
exactly the real tokens and itself, and is taken out before the multimodal half; Eq. (3) as a mean
over the batch's target tokens; no dropout; temperature within [0.01, 1]; texts of 64 tokens for the
paper's sizes; initial values (CoCa.init_parameters, ImageEncoder.standardise). Where we differ:
images with the same caption are each other's positives in Eq. (2) (contrastive_loss says why).
"""
import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

PAD, BEGIN, END, UNKNOWN = 0, 1, 2, 3  # special tokens; a caption is BEGIN words ... END PAD ...

# ------------------------------------------------------------------------------------------------
# Sizes: Table 1


@dataclass
class CoCaConfig:
    """Sizes of a CoCa, tiny by default; ValueError if they do not fit. Comments: what | Base."""

    image_size: int = 32  # pixels a side | 288, then 576
    patch_size: int = 4  # pixels a side | 18
    width: int = 128  # D of encoder, poolers and decoder alike | 768
    heads: int = 4  # H | 12
    encoder_layers: int = 4  # | 12
    encoder_mlp: int = 0  # hidden units of the encoder's MLPs, 0 = 4 x width | 3072
    n_uni: int = 2  # unimodal decoder layers | 12
    n_multi: int = 2  # multimodal decoder layers | 12
    decoder_mlp: int = 0  # hidden units of the decoder's MLPs, 0 = 4 x width | 3072
    n_query: int = 16  # Q, of the generative pooler; 0 = the decoder reads all image tokens | 256
    pooler: str = "cascade"  # the contrastive pooler reads the generative one's output | cascade
    vocab_size: int = 4096  # V, with the four special tokens | 64,000
    text_len: int = 32  # longest text in tokens, BEGIN and END included, [CLS] not | not stated
    lambda_con: float = 1.0  # weight of Eq. (2) in Eq. (4); 0 = an image captioner | 1
    lambda_cap: float = 2.0  # weight of Eq. (3) in Eq. (4); 0 = a dual encoder like CLIP | 2

    def __post_init__(self):
        self.encoder_mlp = self.encoder_mlp or 4 * self.width
        self.decoder_mlp = self.decoder_mlp or 4 * self.width
        least = dict(image_size=1, patch_size=1, width=1, heads=1, encoder_layers=0, n_uni=1,
                     n_multi=1, n_query=0, vocab_size=5, text_len=3, lambda_con=0, lambda_cap=0)
        for name, low in least.items():
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least {low}, not {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of "
                             f"patch_size {self.patch_size}")
        if self.pooler not in ("cascade", "parallel"):
            raise ValueError(f"pooler must be cascade or parallel, not {self.pooler!r}")
        if not self.lambda_con and not self.lambda_cap:
            raise ValueError("lambda_con and lambda_cap are both 0: nothing would be learned")


_base = CoCaConfig(image_size=288, patch_size=18, width=768, heads=12, encoder_layers=12, n_uni=12,
                   n_multi=12, n_query=256, vocab_size=64_000, text_len=64)
CONFIGS = {
    "tiny": CoCaConfig(),
    "base": _base,
    "large": replace(_base, width=1024, heads=16, encoder_layers=24, encoder_mlp=4096,
                     decoder_mlp=4096),
    "giant": replace(_base, width=1408, heads=16, encoder_layers=40, n_uni=18, n_multi=18,
                     encoder_mlp=6144, decoder_mlp=5632),
    "bench-tiny": CoCaConfig(width=192, heads=3, encoder_layers=6, n_uni=3, n_multi=3, n_query=64,
                             vocab_size=1024),
    "bench-small": CoCaConfig(image_size=64, patch_size=8, width=384, heads=6, encoder_layers=12,
                              n_uni=6, n_multi=6, n_query=64),
}
# The paper's millions: encoder, decoder. The poolers are apparently not counted. The decoders of
# base and large want a softmax not tied to the embedding; of giant, 1.1B, either could be meant
TABLE_1 = {"base": (86, 297), "large": (303, 484), "giant": (1000, 1100)}

# ------------------------------------------------------------------------------------------------
# Attention


def at_least_float32(x):
    """Half precision -> float32, for what autocast must not touch; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def causal_mask(L, device=None):
    """(L, L) bool, True = the token of that row may look at that of the column: itself or before.

    In the unimodal decoder, for "a red ring" in a batch whose longest caption has one word more:

                    <begin>   a   red  ring  <end>  [CLS]  <pad>
        <begin>        x      .    .     .     .      .      .
        a              x      x    .     .     .      .      .
        red            x      x    x     .     .      .      .
        ring           x      x    x     x     .      .      .
        <end>          x      x    x     x     x      .      .
        [CLS]          x      x    x     x     x      x      .     becomes the text embedding
        <pad>          x      x    x     x     x      x      x     is read by nobody

    Because [CLS] stands right behind the last real token, this one mask lets it see every real
    token and itself and no padding, and lets no token see it: no other mask is needed.
    """
    return torch.ones(L, L, dtype=torch.bool, device=device).tril()


def attention(q, k, v, causal=False, valid=None):
    """softmax(q k^T / sqrt(d)) v, written out: the definition of what torch's fused kernel does.

    q (B, H, Lq, d), k and v (B, H, Lk, d) -> (B, H, Lq, d) and the weights (B, H, Lq, Lk).
    causal: only what causal_mask allows (Lq = Lk). valid (B, Lk): True = may be looked at.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])           # (B, H, Lq, Lk)
    if causal:
        allowed = causal_mask(len(scores[0, 0]), q.device)              # (L, L)
        scores = scores.masked_fill(~allowed, -math.inf)  # -inf: weights are exactly 0
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None], -math.inf)
    weights = scores.softmax(-1)
    return weights @ v, weights


class Cache:
    """Keys and values that generation has computed already, for each attention layer."""

    def __init__(self):
        self.stored = {}  # Attention -> k, v

    def keys_values(self, layer, source, grows):
        """k and v of all tokens so far. grows: source is one more token; else it is the image."""
        if layer not in self.stored:
            self.stored[layer] = layer.keys_values(source)
        elif grows:
            k, v = self.stored[layer]
            new_k, new_v = layer.keys_values(source)
            self.stored[layer] = torch.cat([k, new_k], 2), torch.cat([v, new_v], 2)
        return self.stored[layer]


class Attention(nn.Module):
    """Multi-head attention (Sec. 3.2) of x to itself or, with a context, of x to the context."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def split(self, x):
        """(B, L, D) -> (B, H, L, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, source):
        """(B, Lk, D) -> k and v, (B, H, Lk, d) each."""
        k, v = self.kv(source).chunk(2, -1)
        return self.split(k), self.split(v)

    def forward(self, x, context=None, causal=False, cache=None, valid=None, return_weights=False):
        """x (B, Lq, D), context (B, Lk, D) or None -> (B, Lq, D).

        return_weights: also the weights (B, H, Lq, Lk). valid (B, Lk): True = may be looked at.
        cache: in generation; x is then the one token that follows those of the earlier calls, and
        may look at all of them.
        """
        source = x if context is None else context                      # (B, Lk, D)
        q = self.split(self.q(x))                                       # (B, H, Lq, d)
        if cache is None:
            k, v = self.keys_values(source)                             # (B, H, Lk, d) each
        else:
            k, v = cache.keys_values(self, source, grows=context is None)
            causal = False  # one token, the last: nothing comes later
        weights = None
        if return_weights or valid is not None:
            x, weights = attention(q, k, v, causal, valid)              # (B, H, Lq, d)
        else:
            # HERE training asks for the causal mask: is_causal is causal_mask in the fused kernel
            x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = self.out(x.transpose(1, 2).flatten(2))                      # (B, Lq, D)
        return (x, weights) if return_weights else x


class Block(nn.Module):
    """Pre-LayerNorm transformer layer: self-attention, cross-attention if asked for, MLP."""

    def __init__(self, width, heads, mlp, cross=False):
        super().__init__()
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads)
        if cross:
            self.cross_norm = nn.LayerNorm(width)
            self.cross_attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp), nn.GELU(), nn.Linear(mlp, width))

    def forward(self, x, context=None, causal=False, cache=None):
        """x (B, L, D), context (B, Lk, D) -> (B, L, D)."""
        x = x + self.self_attention(self.self_norm(x), causal=causal, cache=cache)
        if context is not None:
            x = x + self.cross_attention(self.cross_norm(x), context, cache=cache)
        return x + self.mlp(self.mlp_norm(x))


# ------------------------------------------------------------------------------------------------
# Sec. 3.2: image encoder and attentional poolers


def sinusoids_2d(grid, width):
    """(grid * grid, width): half of the channels say the row, half the column."""
    frequency = 10000 ** -(torch.arange(width // 4) / max(width // 4, 1))
    angle = torch.arange(grid)[:, None] * frequency                     # (grid, D/4)
    place = torch.cat([angle.sin(), angle.cos()], -1)                   # (grid, D/2)
    rows = place[:, None].expand(-1, grid, -1)                          # (grid, grid, D/2)
    columns = place[None].expand(grid, -1, -1)                          # (grid, grid, D/2)
    positions = torch.cat([rows, columns], -1).flatten(0, 1)            # (P, D)
    return F.pad(positions, (0, width - positions.shape[1]))  # (if 4 does not divide D)


def resize_positions(position, grid):
    """Learned positions (P, D) -> (grid * grid, D), for larger images (Sec. 4.1: 576 after 288)."""
    side = math.isqrt(len(position))
    square = position.T.unflatten(1, (side, side))                      # (D, side, side)
    return F.interpolate(square[None], size=(grid, grid), mode="bicubic").flatten(2)[0].T


class ImageEncoder(nn.Module):
    """ViT without a class token (Sec. 3.2, Table 1): the poolers summarise its tokens instead."""

    def __init__(self, c):
        super().__init__()
        self.patches = nn.Conv2d(3, c.width, c.patch_size, c.patch_size)
        self.position = nn.Parameter(torch.empty((c.image_size // c.patch_size) ** 2, c.width))
        blocks = [Block(c.width, c.heads, c.encoder_mlp) for _ in range(c.encoder_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(c.width)

    @torch.no_grad()
    def standardise(self, images, whitening):
        """Sets the patch embedding: centred and of spread 1 on these images (n, 3, S, S).

        whitening: each direction in which patches vary is scaled by spread^-whitening. 0 keeps the
        picture as it is; 1 makes all directions equally loud, noise too (as ConvNets do that learn
        CIFAR in seconds: Jordan 2024, arXiv 2404.00498). In photographs neighbouring pixels are
        nearly equal, so brightness outweighs edges and texture by far, and an encoder has to learn
        first that these matter: half of whitening helps. In scenes most directions are noise.
        """
        weight = self.patches.weight.flatten(1)                         # (D, 3 * patch^2)
        size = self.patches.stride
        patches = F.unfold(images, size, stride=size)                   # (n, 3 * patch^2, P)
        patches = patches.transpose(1, 2).flatten(0, 1)                 # (n * P, 3 * patch^2)
        variance, directions = torch.linalg.eigh(patches.T.cov())
        variance = variance.clamp(min=0) + 1e-5  # (blank images: no division by 0)
        scale = variance ** (-whitening / 2)
        scale = scale / (variance * scale**2).mean().sqrt()  # embeddings of spread 1
        weight = weight @ (directions * scale) @ directions.T           # (D, 3 * patch^2)
        self.patches.weight.copy_(weight.view_as(self.patches.weight))
        self.patches.bias.copy_(-weight @ patches.mean(0))

    def forward(self, images):
        """images (B, 3, S, S) -> image tokens (B, P, D)."""
        x = self.patches(images)                                        # (B, D, rows, columns)
        if x[0, 0].numel() != len(self.position):
            raise ValueError(f"images of {tuple(images.shape[2:])} pixels, "
                             f"but the model is made for {len(self.position)} patches")
        x = x.flatten(2).transpose(1, 2)                                # (B, P, D)
        x = x + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x)                                             # (B, P, D)


class AttentionalPooler(nn.Module):
    """One multi-head attention layer with n_query learned queries (Sec. 3.2); no MLP, no residual.

    It adapts one encoder to two tasks: 256 queries keep what a caption needs, one query what a
    comparison of whole images needs. At 288 pixels it saves nothing (256 patches, 256 queries); at
    576 the decoder reads 256 tokens instead of 1,024.
    """

    def __init__(self, width, heads, n_query):
        super().__init__()
        self.query = nn.Parameter(torch.randn(n_query, width))  # far apart: each asks for its own
        self.attention = Attention(width, heads)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens, valid=None, return_weights=False):
        """tokens (B, P, D), valid (B, P) True = no pad -> (B, Q, D).

        return_weights: also the weights (B, H, Q, P).
        """
        query = self.query.expand(len(tokens), -1, -1)                  # (B, Q, D)
        if return_weights:
            x, weights = self.attention(query, tokens, valid=valid, return_weights=True)
            return self.norm(at_least_float32(x)), weights
        x = self.attention(query, tokens, valid=valid)                  # (B, Q, D)
        return self.norm(at_least_float32(x))                           # (B, Q, D)


# ------------------------------------------------------------------------------------------------
# Sec. 3.2: decoupled text decoder


class UnimodalDecoder(nn.Module):
    """The n_uni lower layers: causal self-attention, a learned [CLS] behind the last real token.

    [CLS] goes last because under a causal mask only the last token sees the whole text. It has no
    position: that would say how long the text is, or worse, how long the longest of the batch is.
    The multimodal half never gets it: after END there is nothing left to predict.
    """

    def __init__(self, c):
        super().__init__()
        self.token = nn.Embedding(c.vocab_size, c.width)
        self.position = nn.Parameter(torch.empty(c.text_len, c.width))
        self.cls = nn.Parameter(torch.empty(c.width))
        blocks = [Block(c.width, c.heads, c.decoder_mlp) for _ in range(c.n_uni)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(c.width)

    def embed(self, tokens, start=0):
        """tokens (B, L), the first of them at position `start` -> (B, L, D)."""
        end = start + tokens.shape[1]
        if end > len(self.position):
            raise ValueError(f"a text of {end} tokens is longer than text_len {len(self.position)}")
        return self.token(tokens) + self.position[start:end]            # (B, L, D)

    def insert_cls(self, x, length):
        """x (B, L, D) -> (B, L + 1, D) with [CLS] at place length (B,), over a pad if there is one."""
        places = torch.arange(x.shape[1] + 1, device=x.device)
        is_cls = places == length[:, None]                              # (B, L + 1)
        return torch.where(is_cls[..., None], self.cls, F.pad(x, (0, 0, 0, 1)))

    def forward(self, tokens):
        """tokens (B, L) -> states (B, L, D) of the tokens, LayerNorm-ed state (B, D) of [CLS]."""
        B, L = tokens.shape
        length = (tokens != PAD).sum(1)                                 # (B,)
        x = self.insert_cls(self.embed(tokens), length)                 # (B, L + 1, D)
        for block in self.blocks:
            x = block(x, causal=True)                                   # (B, L + 1, D)
        cls = x[torch.arange(B, device=x.device), length]               # (B, D)
        is_pad = (tokens == PAD)[..., None]                             # (B, L, 1)
        # [CLS] is taken out: what stands before it stays in place, pads move one place back
        states = torch.where(is_pad, x[:, 1:], x[:, :-1])               # (B, L, D)
        return states, self.norm(cls)

    def extend(self, tokens, start, cache):
        """One more token (B, 1), at position `start` -> (B, 1, D). No [CLS]: no token sees it."""
        x = self.embed(tokens, start)                                   # (B, 1, D)
        for block in self.blocks:
            x = block(x, causal=True, cache=cache)
        return x


class MultimodalDecoder(nn.Module):
    """The n_multi upper layers: causal self-attention and cross-attention to the image; softmax."""

    def __init__(self, c):
        super().__init__()
        blocks = [Block(c.width, c.heads, c.decoder_mlp, cross=True) for _ in range(c.n_multi)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(c.width)
        self.head = nn.Linear(c.width, c.vocab_size, bias=False)  # not tied: see TABLE_1

    def forward(self, states, image_context, cache=None):
        """states (B, L, D) of the lower half, image_context (B, Q, D) of the image -> (B, L, D)."""
        for block in self.blocks:
            states = block(states, image_context, causal=True, cache=cache)
        return self.norm(states)


# ------------------------------------------------------------------------------------------------
# Sec. 3.1: losses, Eqs. (2) and (3)


def contrast(anchors, candidates, temperature, positives):
    """One direction of Eq. (2): mean of -log softmax(anchor . candidates / sigma) at the positive.

    anchors (n, E), candidates (N, E), temperature sigma > 0, positives (n, N) True = a pair.
    With several positives the target is uniform over them, and its entropy, the log of their
    number, is taken off, so that 0 can be reached (gradients do not change).
    """
    with torch.autocast(anchors.device.type, enabled=False):
        anchors = at_least_float32(anchors)
        candidates = at_least_float32(candidates)
        similarity = anchors @ candidates.T / temperature               # (n, N)
        positives = positives.to(similarity.dtype)                      # (n, N)
        count = positives.sum(1, keepdim=True)                          # (n, 1)
        return F.cross_entropy(similarity, positives / count) - count.log().mean()


def contrastive_loss(image_embedding, text_embedding, temperature, caption_ids=None):
    """Eq. (2): -(1/N) (sum_i log softmax_j(x_i.y_j / s)_i + sum_i log softmax_j(y_i.x_j / s)_i).

    image_embedding x and text_embedding y (N, E), unit norm; temperature s > 0 -> scalar.
    The two directions are added, as the paper prints it; CLIP averages them (half of this).
    caption_ids (N,): equal numbers mark identical captions, which count as each other's positives.
    The paper has no such rule and, with free captions, hardly needs one. With class names it is
    needed: in a batch of 64 images of 10 classes six or seven captions are equal, and Eq. (2) as
    printed cannot fall below 1.9 a direction.
    """
    if caption_ids is None:
        caption_ids = torch.arange(len(image_embedding), device=image_embedding.device)
    positives = caption_ids[:, None] == caption_ids                     # (N, N)
    image_to_text = contrast(image_embedding, text_embedding, temperature, positives)
    text_to_image = contrast(text_embedding, image_embedding, temperature, positives)
    return image_to_text + text_to_image


def number_captions(tokens):
    """tokens (N, L) -> (N,), equal numbers for equal captions.

    On the CPU, as not every device can: a GPU is waited for, so call it before the model.
    """
    return torch.unique(tokens.cpu(), dim=0, return_inverse=True)[1].to(tokens.device)


def with_target(x, tokens):
    """x (B, L, ...) where a real token follows -> (T, ...), and the tokens that follow (T,)."""
    follows = tokens[:, 1:] != PAD                                      # (B, L - 1)
    return x[:, :-1][follows], tokens[:, 1:][follows]


def captioning_loss(logits, tokens):
    """Eq. (3): -log P(y_t | y_<t, x), as the mean over the real target tokens of the batch.

    logits (B, L, V), logits[:, t] predicts tokens[:, t + 1]; tokens (B, L) -> scalar.
    """
    return next_token_loss(*with_target(logits, tokens))


def next_token_loss(logits, targets):
    """logits (T, V), targets (T,) -> mean of -log P(target), 0 if there is none."""
    loss = F.cross_entropy(at_least_float32(logits), targets, reduction="sum")
    return loss / max(1, len(targets))


# ------------------------------------------------------------------------------------------------
# Sec. 3.2: the model


class CoCaOutput(NamedTuple):
    image_embedding: torch.Tensor  # (B, E) unit norm
    text_embedding: torch.Tensor  # (B, E) unit norm
    logits: torch.Tensor  # (B, L, V); logits[:, t] predicts tokens[:, t + 1]


class Losses(NamedTuple):
    total: torch.Tensor  # Eq. (4)
    con: torch.Tensor  # Eq. (2)
    cap: torch.Tensor  # Eq. (3)


class CoCa(nn.Module):
    """Contrastive captioner (Sec. 3.2).

    Images: float (B, 3, S, S) in [-1, 1]. Tokens: int64 (B, L), L <= text_len, PAD at the right.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.encoder = ImageEncoder(c)
        self.generative_pooler = None
        if c.n_query:
            self.generative_pooler = AttentionalPooler(c.width, c.heads, c.n_query)
        self.contrastive_pooler = AttentionalPooler(c.width, c.heads, 1)
        self.unimodal = UnimodalDecoder(c)
        self.multimodal = MultimodalDecoder(c)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.07)))  # Sec. 4.1
        self.init_parameters()

    @torch.no_grad()
    def init_parameters(self):
        """Initial values. LayerNorms start as torch makes them, queries in AttentionalPooler."""
        c = self.config
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                inputs = module.weight[0].numel()
                module.weight.normal_(std=inputs**-0.5)
                if module.bias is not None:
                    module.bias.zero_()
            # What is added to a residual stream starts smaller, the more layers add to it (GPT-2)
            if name.endswith(("attention.out", "mlp.2")) and "pooler" not in name:
                layers = c.encoder_layers if name.startswith("encoder") else c.n_uni + c.n_multi
                module.weight.div_(math.sqrt(2 * layers))
        for p in (self.unimodal.token.weight, self.unimodal.position, self.unimodal.cls):
            p.normal_(std=0.02)
        # As strong as the patches' content: at 0.2 of this it took twice as many images until
        # captions had the places of things right
        self.encoder.position.copy_(sinusoids_2d(c.image_size // c.patch_size, c.width))

    @property
    def temperature(self):
        """sigma of Eq. (2), learned, kept in [0.01, 1]: CLIP's bound below, no division above.

        The gradient passes the bounds: a bare clamp would stop it there for good.
        """
        bounded = self.log_temperature.clamp(math.log(0.01), 0.0)
        return (self.log_temperature + (bounded - self.log_temperature).detach()).exp()

    def pool_image(self, images):
        """images (B, 3, S, S) -> what the decoder reads (B, Q, D), image embedding (B, E)."""
        image_tokens = self.encoder(images)                             # (B, P, D)
        if self.generative_pooler is None:  # n_query 0
            image_context = image_tokens                               # (B, P, D)
        else:
            image_context = self.generative_pooler(image_tokens)       # (B, Q, D)
        cascade = self.config.pooler == "cascade"  # Table 8f; Figure 2 draws "parallel"
        pooled = self.contrastive_pooler(image_context if cascade else image_tokens)  # (B, 1, D)
        return image_context, F.normalize(pooled[:, 0], dim=-1)

    def encode_image(self, images):
        """images (B, 3, S, S) -> image embedding (B, E), unit norm: x of Eq. (2)."""
        return self.pool_image(images)[1]

    def encode_text(self, tokens):
        """tokens (B, L) -> text embedding (B, E), unit norm: y of Eq. (2)."""
        return F.normalize(self.unimodal(tokens)[1], dim=-1)

    def features(self, images, tokens):
        """All of the model but the softmax, in one pass.

        images (B, 3, S, S), tokens (B, L) -> image embedding (B, E), text embedding (B, E),
        states of the whole decoder (B, L, D): each token, seen with the image.
        """
        image_context, image_embedding = self.pool_image(images)       # (B, Q, D), (B, E)
        states, cls = self.unimodal(tokens)                             # (B, L, D), (B, E)
        text_embedding = F.normalize(cls, dim=-1)                       # (B, E)
        states = self.multimodal(states, image_context)                # (B, L, D)
        return image_embedding, text_embedding, states

    def forward(self, images, tokens):
        """images (B, 3, S, S), tokens (B, L) -> CoCaOutput."""
        image_embedding, text_embedding, states = self.features(images, tokens)
        return CoCaOutput(image_embedding, text_embedding, self.multimodal.head(states))

    def embed_and_caption(self, images, tokens):
        """What Eq. (4) needs of one pass -> image embedding (B, E), text embedding (B, E), Eq. (3).

        captioning_loss of forward's logits, but the softmax is taken only where a token follows. A
        step of bench-tiny is 4 % faster for it with 1,024 words, and 1.5 times as fast with 64,000.
        """
        if not self.config.lambda_cap:  # a dual encoder has no use for the upper half
            image_embedding = self.encode_image(images)
            return image_embedding, self.encode_text(tokens), image_embedding.new_zeros(())
        image_embedding, text_embedding, states = self.features(images, tokens)
        states, targets = with_target(states, tokens)                   # (T, D), (T,)
        cap = next_token_loss(self.multimodal.head(states), targets)
        return image_embedding, text_embedding, cap

    def losses(self, images, tokens):
        """Eq. (4): lambda_con L_con + lambda_cap L_cap -> Losses. train.py minimises this; a batch
        in parts or on several processes by train.large_batch_backward.
        """
        c = self.config
        ids = number_captions(tokens)                                   # (B,)
        image_embedding, text_embedding, cap = self.embed_and_caption(images, tokens)
        con = contrastive_loss(image_embedding, text_embedding, self.temperature, ids)
        return Losses(c.lambda_con * con + c.lambda_cap * cap, con, cap)

    def recompute_activations(self):
        """Blocks keep no activations but compute them again in backward: same gradients."""
        for module in self.modules():
            if isinstance(module, Block):
                module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)

    @torch.no_grad()
    def generate(self, images, max_len=None, temperature=0.0, top_k=0, top_p=1.0, generator=None):
        """Captions of images (B, 3, S, S) -> tokens (B, <= max_len), BEGIN first, PAD after END.

        temperature 0 is greedy; else sample from softmax(logits / temperature), among the top_k
        likeliest tokens only (0 = all) and the fewest that hold a share top_p of the probability.
        """
        max_len = self.config.text_len if max_len is None else min(max_len, self.config.text_len)
        if max_len < 1:
            raise ValueError(f"max_len must be at least 1, not {max_len}")
        if temperature < 0 or top_k < 0:
            raise ValueError(f"temperature {temperature} and top_k {top_k} must be at least 0")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
        image_context, _ = self.pool_image(images)                     # (B, Q, D)
        tokens = torch.full((len(images), max_len), PAD, device=images.device)
        tokens[:, 0] = BEGIN
        done = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        cache = Cache()
        for t in range(1, max_len):
            states = self.unimodal.extend(tokens[:, t - 1:t], t - 1, cache)  # (B, 1, D)
            states = self.multimodal(states, image_context, cache)     # (B, 1, D)
            logits = self.multimodal.head(states[:, 0])                 # (B, V)
            chosen = choose(logits, temperature, top_k, top_p, generator)  # (B,)
            tokens[:, t] = chosen.masked_fill(done, PAD)
            done |= (chosen == END) | (chosen == PAD)
            if done.all():
                return tokens[:, :t + 1]
        return tokens


def choose(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """logits (B, V) -> next tokens (B,): greedy at temperature 0, else top-k, nucleus sampling."""
    if not temperature:
        return logits.argmax(-1)
    logits, order = (logits / temperature).sort(-1, descending=True)    # the likeliest first
    p = logits.softmax(-1)
    if top_k:
        p[:, top_k:] = 0
    p[p.cumsum(-1) - p >= top_p] = 0  # keep a token while those before it hold less than top_p
    return order.gather(-1, torch.multinomial(p, 1, generator=generator)).squeeze(-1)


# ------------------------------------------------------------------------------------------------
# Sec. 3.3: what a task learns


class Classifier(nn.Module):
    """A *new* one-query pooler and a linear layer, on tokens of encoder or decoder (Sec. 3.3, 4.2).

    Frozen, finetuned and video evaluation read the encoder's tokens and use no pretrained pooler.
    pooled=False: a linear probe, on the mean token. frames: learn a temporal embedding, which the
    paper's late fusion does without.
    """

    def __init__(self, width, heads, classes, pooled=True, frames=0):
        super().__init__()
        self.pooler = AttentionalPooler(width, heads, 1) if pooled else None
        self.time = nn.Parameter(torch.randn(frames, 1, width)) if frames else None
        self.linear = nn.Linear(width, classes)

    def forward(self, tokens, valid=None):
        """tokens (B, P, D), or of clips (B, frames, P, D); valid (B, P) True = no pad -> logits."""
        if self.time is not None:
            tokens = tokens + self.time
        tokens = tokens.flatten(1, -2)                                  # (B, frames * P, D)
        if self.pooler is None:
            pooled = tokens.mean(1)                                     # (B, D)
        else:
            pooled = self.pooler(tokens, valid=valid)[:, 0]             # (B, D)
        return self.linear(pooled)                                      # (B, classes)


# ------------------------------------------------------------------------------------------------
# python coca.py: a tour of Figure 2


def count_parameters(*parts):
    """Millions of parameters of some modules; None counts as nothing."""
    total = 0
    for part in parts:
        if part is not None:
            total += sum(p.numel() for p in part.parameters())
    return total / 1e6


@torch.no_grad()
def who_looks_at_whom(model, tokens):
    """tokens (B, L) -> weights (B, L + 1, L + 1) of the first unimodal layer, means over heads."""
    unimodal = model.unimodal
    block = unimodal.blocks[0]
    x = unimodal.insert_cls(unimodal.embed(tokens), (tokens != PAD).sum(1))  # (B, L + 1, D)
    _, weights = block.self_attention(block.self_norm(x), causal=True, return_weights=True)
    return weights.mean(1)


def tour():
    colours = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "white": (1, 1, 1)}
    images = torch.full((8, 3, 32, 32), -1.0)
    captions = []
    for i, (colour, rgb) in enumerate(colours.items()):  # a square and a bar of each, on black
        images[2 * i, :, 8:24, 8:24] = torch.tensor(rgb)[:, None, None]
        images[2 * i + 1, :, 12:20] = torch.tensor(rgb)[:, None, None]
        captions += [f"a {colour} square", f"a wide {colour} bar"]
    words = ["<pad>", "<begin>", "<end>", "<unk>", *sorted(set(" ".join(captions).split()))]
    tokens = torch.full((8, 6), PAD)
    for i, text in enumerate(captions):
        ids = [BEGIN, *(words.index(word) for word in text.split()), END]
        tokens[i, :len(ids)] = torch.tensor(ids)
    torch.manual_seed(0)
    model = CoCa(CoCaConfig(vocab_size=len(words)))

    image_tokens = model.encoder(images)
    image_context = model.generative_pooler(image_tokens)
    pooled = model.contrastive_pooler(image_context)
    states, cls = model.unimodal(tokens)
    seen = model.multimodal(states, image_context)
    print(f"Eight pictures, with captions like {captions[0]!r} and {captions[1]!r}, go through an "
          "untrained model (Sec. 3.2, Figure 2):\n")
    for what, flows in (
        ("images (B, 3, S, S)", images),
        ("ImageEncoder: image tokens, one a patch (B, P, D)", image_tokens),
        ("AttentionalPooler, generative: for the decoder (B, Q, D)", image_context),
        ("AttentionalPooler, contrastive, on top (B, 1, D)", pooled),
        ("captions as tokens (B, L)", tokens),
        ("UnimodalDecoder: states of the tokens (B, L, D)", states),
        ("UnimodalDecoder: [CLS], the text embedding (B, D)", cls),
        ("MultimodalDecoder: states that saw the image (B, L, D)", seen),
        ("its head: logits of the next token (B, L, V)", model.multimodal.head(seen)),
    ):
        print(f"  {what:58}{str(tuple(flows.shape)):>17}")

    print(f"\nWho looks at whom in {captions[0]!r} (attention weights of the first layer):")
    weights = who_looks_at_whom(model, tokens)[0]
    names = ["<begin>", *captions[0].split(), "<end>", "[CLS]", "<pad>"]
    print(f"{'':10}" + "".join(f"{name:>9}" for name in names))
    for name, row in zip(names, weights.tolist()):
        shown = "".join(f"{weight:9.2f}" if weight else "        ." for weight in row)
        print(f"  {name:8}{shown}")

    loss = model.losses(images, tokens)
    V = len(words)
    print("\nLosses before training, beside those of pure guessing (logits start with a spread of 1,")
    print("which adds 1/2 to the captioning loss, and similarities with a spread of their own):")
    print(f"  Eq. (2), contrastive {loss.con:5.2f}   2 ln N = {2 * math.log(8):.2f} for 8 pairs")
    print(f"  Eq. (3), captioning  {loss.cap:5.2f}     ln V = {math.log(V):.2f} for {V} words")
    print(f"  Eq. (4), both        {loss.total:5.2f}   1 x Eq. (2) + 2 x Eq. (3)")

    print("\nParameters in millions (in brackets: Table 1, which seems to leave the poolers out):")
    for name in ("tiny", "base", "large", "giant"):
        with torch.device("meta"):  # shapes only, no memory
            model = CoCa(CONFIGS[name])
        encoder, decoder = TABLE_1.get(name, ("-", "-"))
        print(f"  {name:6} encoder {count_parameters(model.encoder):6.1f} ({encoder}), poolers",
              f"{count_parameters(model.generative_pooler, model.contrastive_pooler):4.1f}, decoder",
              f"{count_parameters(model.unimodal, model.multimodal):6.1f} ({decoder})")


if __name__ == "__main__":
    tour()
