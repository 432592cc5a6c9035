"""CoCa: Contrastive Captioners are Image-Text Foundation Models (Yu et al., TMLR 2022, arXiv 2205.01917).

One model that is at once a single encoder, a dual encoder and an encoder-decoder (Sec. 3.1):
an image encoder, two attentional poolers, and a text decoder cut in half. The lower (unimodal) half
never looks at the image and gives the text embedding of a contrastive loss; the upper (multimodal)
half reads the image and writes the caption. One forward pass serves both losses.

Where to find what
    CoCaConfig, CONFIGS       Table 1 (sizes), Sec. 4.1 (resolution, vocabulary)
    attention, Attention      Sec. 3.2 (causal masking; cross-attention)
    ImageEncoder              Sec. 3.2, Table 1 (ViT)
    AttentionalPooler         Sec. 3.2 "Attentional poolers"; Table 8f: cascade / parallel / n_query
    UnimodalDecoder           Sec. 3.2 "Decoupled text decoder and CoCa architecture"; Table 8d: n_uni; Table 8e: one [CLS]
    MultimodalDecoder         the same
    (label cross-entropy)     Eq. (1): a caption made of class names turns it into Eq. (3); Table 8a
    contrastive_loss          Eq. (2), Sec. 3.1 "Dual-encoder contrastive learning"
    captioning_loss           Eq. (3), Sec. 3.1 "Encoder-decoder captioning"
    CoCa.losses               Eq. (4), Sec. 3.2; Table 8b (each loss alone), Table 8c (the lambdas)
    CoCa.encode_*             Sec. 3.3 "Zero-shot transfer" (used in eval.py); retrieval: Table 3, ImageNet: Table 4
    Head                      Sec. 3.3 "Frozen-feature evaluation", "CoCa for Video Action Recognition"; Sec. 4.2
    CoCa.decode               Sec. 4.2, Table 10 (what the head reads in multimodal understanding)
    CoCa.generate             captioning, Table 7

Dimension letters
    B batch   P image tokens (patches)   Q pooled image tokens (n_query)   L text tokens   D width
    E embedding (= D)   H heads   d = D / H   V vocabulary   T real target tokens in the batch   N pairs

Where the paper is silent we chose: pre-LayerNorm and GELU; learned positions (the image's start as 2-D
sinusoids); heads of the poolers = heads of the model; LayerNorm after each pooler and before the text
embedding; no projection to a joint space (so E = D); [CLS] carries no position, sees exactly the real
tokens and itself, and is taken out before the multimodal half; Eq. (3) as a mean over the batch's
target tokens; no dropout; temperature bounded to [0.01, 1]; text of 64 tokens for the paper's sizes;
pixels scaled to [-1, 1]; initial values (CoCa.init_parameters).
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

PAD, BEGIN, END, UNKNOWN = 0, 1, 2, 3  # the four special tokens; a caption is BEGIN words... END PAD...

# ------------------------------------------------------------------------------------------------
# Sizes: Table 1


@dataclass
class CoCaConfig:
    """Sizes of a CoCa, tiny by default. Comment: meaning | the paper's Base. ValueError if they don't fit."""

    image_size: int = 32  # pixels, square | 288, then 576
    patch_size: int = 4  # pixels, square | 18
    width: int = 128  # D of encoder, poolers and decoder alike | 768
    heads: int = 4  # | 12
    encoder_layers: int = 4  # | 12
    encoder_mlp: int = 0  # hidden units of the encoder's FFN, 0 = 4 x width | 3072
    n_uni: int = 2  # unimodal decoder layers | 12
    n_multi: int = 2  # multimodal decoder layers | 12
    decoder_mlp: int = 0  # hidden units of the decoder's FFN, 0 = 4 x width | 3072
    n_query: int = 16  # queries of the generative pooler, 0 = decoder reads all P image tokens | 256
    pooler: str = "cascade"  # contrastive pooler on top of the generative one, or "parallel" | cascade
    vocab_size: int = 4096  # with the four special tokens | 64,000
    text_len: int = 32  # longest text in tokens, BEGIN and END included, [CLS] not | not stated
    lambda_con: float = 1.0  # weight of Eq. (2) in Eq. (4); 0 = an image captioner | 1
    lambda_cap: float = 2.0  # weight of Eq. (3) in Eq. (4); 0 = a dual encoder like CLIP | 2

    def __post_init__(self):
        self.encoder_mlp = self.encoder_mlp or 4 * self.width
        self.decoder_mlp = self.decoder_mlp or 4 * self.width
        least = dict(image_size=1, patch_size=1, width=1, heads=1, encoder_layers=0, n_uni=1, n_multi=1,
                     n_query=0, vocab_size=5, text_len=3, lambda_con=0, lambda_cap=0)
        for name, low in least.items():
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least {low}, not {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.pooler not in ("cascade", "parallel"):
            raise ValueError(f"pooler must be cascade or parallel, not {self.pooler!r}")
        if not self.lambda_con and not self.lambda_cap:
            raise ValueError("lambda_con and lambda_cap are both 0: nothing would be learned")


_paper = dict(image_size=288, patch_size=18, n_query=256, vocab_size=64_000, text_len=64)
CONFIGS = {
    "tiny": CoCaConfig(),
    "base": CoCaConfig(width=768, heads=12, encoder_layers=12, n_uni=12, n_multi=12, **_paper),
    "large": CoCaConfig(width=1024, heads=16, encoder_layers=24, n_uni=12, n_multi=12, **_paper),
    "giant": CoCaConfig(width=1408, heads=16, encoder_layers=40, n_uni=18, n_multi=18,
                        encoder_mlp=6144, decoder_mlp=5632, **_paper),  # the only size with two MLP widths
    "bench-tiny": CoCaConfig(width=192, heads=3, encoder_layers=6, n_uni=3, n_multi=3, n_query=64, vocab_size=1024),
    "bench-small": CoCaConfig(image_size=64, patch_size=8, width=384, heads=6, encoder_layers=12, n_uni=6, n_multi=6, n_query=64),
}

# ------------------------------------------------------------------------------------------------
# Attention


def attention(q, k, v, causal=False, valid=None):
    """softmax(q k^T / sqrt(d)) v, written out: the definition. torch's fused kernel computes the same.

    q (B, H, Lq, d), k and v (B, H, Lk, d) -> (B, H, Lq, d) and the weights (B, H, Lq, Lk).
    causal: the queries are the last Lq of Lk positions, and none may look at a later one.
    valid (B, Lk): True = may be attended to.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])           # (B, H, Lq, Lk)
    if causal:
        Lq, Lk = scores.shape[-2:]
        allowed = torch.ones(Lq, Lk, dtype=torch.bool, device=q.device).tril(Lk - Lq)  # True = may attend
        scores = scores.masked_fill(~allowed, -math.inf)  # -inf, not a big number: weights are exactly 0
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None], -math.inf)
    weights = scores.softmax(-1)
    return weights @ v, weights


def again(function, *inputs):
    """function(*inputs), but what it keeps for backward is forgotten and computed again there, up to what is needed."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Cache:
    """Keys and values that generation need not compute again, of at most `room` positions, by Attention module."""

    def __init__(self, room):
        self.room, self.start, self.kept = room, 0, {}  # start: how many positions are done
        # kept: (B, 2, H, room, d) for self-attention, (B, 2, H, Lk, d) for cross-attention

    def extend(self, module, k, v):
        """k and v (B, H, L, d) of positions start, start + 1, ... -> those of all positions so far."""
        B, H, L, d = k.shape
        if module not in self.kept:
            self.kept[module] = k.new_empty(B, 2, H, self.room, d)
        all_kv = self.kept[module][:, :, :, :self.start + L]
        all_kv[:, 0, :, self.start:], all_kv[:, 1, :, self.start:] = k, v
        return all_kv.unbind(1)

    def select(self, rows):
        """Keeps these rows of the batch only."""
        self.kept = {module: kv[rows] for module, kv in self.kept.items()}


class Attention(nn.Module):
    """Multi-head attention (Sec. 3.2), of x to itself or, with a context, of x to the context."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)  # rows: q, k, v; one product when all three read x
        self.out = nn.Linear(width, width)

    def forward(self, x, context=None, causal=False, cache=None, return_weights=False, valid=None):
        """x (B, Lq, D), context (B, Lk, D) or None -> (B, Lq, D), with return_weights also (B, H, Lq, Lk).

        A learned x comes once, (1, Lq, D), for all of a context's batch. cache: a Cache; x is then what
        follows the earlier calls' x, and the context of the first call stays. valid (B, Lk): True = may be attended to.
        """
        def heads(t, parts):  # (B, L, parts * D) -> parts x (B, H, L, d), without copies
            return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in t.chunk(parts, -1)]

        if context is None:
            q, k, v = heads(self.qkv(x), 3)                             # 3 x (B, H, Lq, d)
            if cache is not None:
                k, v = cache.extend(self, k, v)                         # 2 x (B, H, Lk, d)
        else:
            D = x.shape[-1]
            W, b = self.qkv.weight, self.qkv.bias
            (q,) = heads(F.linear(x, W[:D], b[:D]), 1)                  # (B, H, Lq, d)
            if cache is None or self not in cache.kept:
                k, v = heads(F.linear(context, W[D:], b[D:]), 2)        # 2 x (B, H, Lk, d)
                if cache is not None:
                    cache.kept[self] = torch.stack([k, v], 1)
            else:
                k, v = cache.kept[self].unbind(1)
            q = q.expand(len(k), -1, -1, -1)
        Lq, Lk = q.shape[2], k.shape[2]
        causal = causal and Lq > 1  # a single query is the last position: it may look everywhere
        weights = None
        if return_weights or valid is not None or causal and Lq < Lk:  # the fused kernel counts positions from the first key
            x, weights = attention(q, k, v, causal, valid)
        else:
            x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = self.out(x.transpose(1, 2).flatten(2))                      # (B, Lq, D)
        return (x, weights) if return_weights else x


class Block(nn.Module):
    """Pre-LayerNorm transformer layer: self-attention, cross-attention if asked for, one two-matrix FFN."""

    recompute = False  # forget activations, and compute them again in backward

    def __init__(self, width, heads, mlp, cross=False):
        super().__init__()
        self.norm1, self.self_attention = nn.LayerNorm(width), Attention(width, heads)
        if cross:
            self.norm2, self.cross_attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp), nn.GELU(), nn.Linear(mlp, width))

    def forward(self, x, context=None, causal=False, cache=None):
        if self.recompute:
            return again(self.run, x, context, causal, cache)
        return self.run(x, context, causal, cache)

    def run(self, x, context=None, causal=False, cache=None):
        x = x + self.self_attention(self.norm1(x), causal=causal, cache=cache)
        if context is not None:
            x = x + self.cross_attention(self.norm2(x), context, cache=cache)
        hidden = self.mlp[0](self.norm3(x))                             # (B, L, mlp)
        if causal:  # text is short: doing its GELU again in backward costs 2 to 3 % of a step, and saves 7 % of the memory
            return x + again(lambda hidden: self.mlp[2](self.mlp[1](hidden)), hidden)
        return x + self.mlp[2](self.mlp[1](hidden))


# ------------------------------------------------------------------------------------------------
# Sec. 3.2: image encoder and attentional poolers


def sinusoids_2d(grid, width):
    """(grid * grid, width): where the learned image positions start. Neighbours start out alike."""
    frequency = 10000 ** -(torch.arange(width // 4) / max(width // 4, 1))
    angle = torch.arange(grid)[:, None] * frequency                     # (grid, D/4)
    one = torch.cat([angle.sin(), angle.cos()], -1)                     # (grid, D/2)
    rows, columns = one[:, None].expand(-1, grid, -1), one[None].expand(grid, -1, -1)
    return F.pad(torch.cat([rows, columns], -1).flatten(0, 1), (0, width - 4 * (width // 4)))


def resize_positions(position, grid):
    """Learned positions of a square grid (P, D) -> (grid * grid, D), for images of another size (Sec. 4.1: 288, then 576)."""
    square = position.T.unflatten(1, (math.isqrt(len(position)), -1))   # (D, h, w)
    return F.interpolate(square[None], size=(grid, grid), mode="bicubic").flatten(2)[0].T


class ImageEncoder(nn.Module):
    """ViT without a class token (Sec. 3.2, Table 1): poolers, not a class token, summarise its tokens."""

    def __init__(self, c):
        super().__init__()
        self.patches = nn.Conv2d(3, c.width, c.patch_size, c.patch_size)
        self.position = nn.Parameter(torch.empty((c.image_size // c.patch_size) ** 2, c.width))
        self.blocks = nn.ModuleList(Block(c.width, c.heads, c.encoder_mlp) for _ in range(c.encoder_layers))
        self.norm = nn.LayerNorm(c.width)

    def forward(self, images):
        x = self.patches(images)                                        # (B, D, h, w)
        if x[0, 0].numel() != len(self.position):
            raise ValueError(f"images of {tuple(images.shape[2:])} pixels, but the model is made for {len(self.position)} patches")
        x = x.flatten(2).transpose(1, 2) + self.position                # (B, P, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)                                             # (B, P, D)


class AttentionalPooler(nn.Module):
    """A single multi-head attention layer with n_query learned queries (Sec. 3.2). No FFN, no residual."""

    def __init__(self, width, heads, n_query):
        super().__init__()
        self.query = nn.Parameter(torch.empty(n_query, width))
        self.attention = Attention(width, heads)
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.query)  # far apart, to ask for different things from the start

    def forward(self, tokens, return_weights=False, valid=None):
        """tokens (B, P, D), valid (B, P) True = not a pad -> (B, n_query, D), with return_weights also (B, H, n_query, P)."""
        if return_weights:
            x, weights = self.attention(self.query[None], tokens, return_weights=True, valid=valid)
            return self.norm(x), weights
        return self.norm(self.attention(self.query[None], tokens, valid=valid))  # (B, Q, D)


class Head(nn.Module):
    """What a task learns (Sec. 3.3, 4.2): a *new* one-query pooler and a linear classifier. pooled=False: a linear
    probe, on the mean token. frames: learn a temporal embedding, which the paper's late fusion does without."""

    def __init__(self, width, heads, classes, pooled=True, frames=0):
        super().__init__()
        self.pooler = AttentionalPooler(width, heads, 1) if pooled else None
        self.time = nn.Parameter(torch.randn(frames, 1, width)) if frames else None
        self.classifier = nn.Linear(width, classes)

    def forward(self, tokens, valid=None):
        """tokens (B, P, D), or of clips (B, frames, P, D); valid (B, P) True = not a pad -> logits (B, classes)."""
        if self.time is not None:
            tokens = tokens + self.time
        tokens = tokens.flatten(1, -2)                                  # (B, frames * P, D): one query reads all
        pooled = tokens.mean(1) if self.pooler is None else self.pooler(tokens, valid=valid)[:, 0]
        return self.classifier(pooled)                                  # (B, classes)


# ------------------------------------------------------------------------------------------------
# Sec. 3.2: decoupled text decoder


class UnimodalDecoder(nn.Module):
    """The n_uni lower layers: causal self-attention only. A learned [CLS] after the last real token."""

    def __init__(self, c):
        super().__init__()
        self.token = nn.Embedding(c.vocab_size, c.width)
        self.position = nn.Parameter(torch.empty(c.text_len, c.width))
        self.cls = nn.Parameter(torch.empty(c.width))
        self.blocks = nn.ModuleList(Block(c.width, c.heads, c.decoder_mlp) for _ in range(c.n_uni))
        self.norm = nn.LayerNorm(c.width)

    def embed(self, tokens, start=0):
        end = start + tokens.shape[1]
        if end > len(self.position):
            raise ValueError(f"a text of {end} tokens is longer than text_len {len(self.position)}")
        return self.token(tokens) + self.position[start:end]            # (B, L, D)

    def extend(self, tokens, cache):
        """tokens (B, L) that follow those in the cache -> their states (B, L, D); no [CLS]."""
        x = self.embed(tokens, cache.start)
        for block in self.blocks:
            x = block(x, causal=True, cache=cache)
        return x

    def forward(self, tokens):
        """tokens (B, L) -> states (B, L, D) of the tokens, LayerNorm-ed state (B, D) of [CLS].

        [CLS] stands right behind each row's last real token, so the plain causal mask already lets it
        see every real token and itself, no padding, and no real token sees it: no mask tensor at all.
        (Among the states of a padded row it takes a pad's place, where no loss looks.)
        """
        B, L = tokens.shape
        x = self.embed(tokens)                                          # (B, L, D)
        length = (tokens != PAD).sum(1)                                 # (B,)
        is_cls = torch.arange(L + 1, device=tokens.device) == length[:, None]
        x = torch.where(is_cls[..., None], self.cls, F.pad(x, (0, 0, 0, 1)))  # (B, L + 1, D)
        for block in self.blocks:
            x = block(x, causal=True)                                   # (B, L + 1, D)
        cls = x[torch.arange(B, device=x.device), length]               # (B, D)
        return x[:, :L], self.norm(cls)                                 # (B, L, D), (B, D)


class MultimodalDecoder(nn.Module):
    """The n_multi upper layers: causal self-attention, cross-attention to the image, FFN; then the softmax."""

    def __init__(self, c):
        super().__init__()
        self.blocks = nn.ModuleList(Block(c.width, c.heads, c.decoder_mlp, cross=True) for _ in range(c.n_multi))
        self.norm = nn.LayerNorm(c.width)
        self.head = nn.Linear(c.width, c.vocab_size, bias=False)  # not tied to the embedding: Table 1's counts

    def forward(self, states, caption_tokens, cache=None):
        """states (B, L, D) of the unimodal half, caption_tokens (B, Q, D) of the image -> (B, L, D)."""
        for block in self.blocks:
            states = block(states, caption_tokens, causal=True, cache=cache)
        return self.norm(states)


# ------------------------------------------------------------------------------------------------
# Losses: Eqs. (2) and (3)


BLOCK = 2**25  # elements: 128 MiB of float32


def in_blocks(function, rows, width, *inputs):
    """Sum of function(*inputs[i:j]) over blocks of rows, so that no (rows, width) tensor is ever whole in memory:
    when there is more than one, each block's work is done again in backward instead of being kept."""
    size = max(1, BLOCK // width)
    if rows <= size:
        return function(*inputs)
    return sum(again(function, *(t[i:i + size] for t in inputs)) for i in range(0, rows, size))


def contrastive_loss(image_embedding, text_embedding, temperature, caption_ids=None):
    """Eq. (2): -(1/N) (sum_i log softmax_j(x_i.y_j / s)_i + sum_i log softmax_j(y_i.x_j / s)_i).

    image_embedding x and text_embedding y (N, E), unit norm; temperature s > 0 -> scalar.
    The two directions are added, as the paper prints it; CLIP averages them (half of this).
    caption_ids (N,): equal numbers mark identical captions, which are each other's positives: the target
    is uniform over them, and its entropy, the log of their number, is taken off so that 0 can be
    reached (gradients do not change). Without it a batch of 64 class names has a floor of 1.9 a direction.
    """
    N = len(image_embedding)
    if caption_ids is None:
        caption_ids = torch.arange(N, device=image_embedding.device)

    def direction(others):
        def block(own, own_ids):
            log_p = (own @ others.T / temperature).log_softmax(1)       # (rows, N)
            same = own_ids[:, None] == caption_ids                      # (rows, N) True = a positive
            copies = same.sum(1)
            return -(torch.where(same, log_p, 0).sum(1) / copies + copies.log()).sum()
        return block

    return (in_blocks(direction(text_embedding), N, N, image_embedding, caption_ids)
            + in_blocks(direction(image_embedding), N, N, text_embedding, caption_ids)) / N


def number_captions(tokens):
    """tokens (N, L) -> (N,), equal numbers for identical captions. On the CPU: not every device can."""
    return torch.unique(tokens.cpu(), dim=0, return_inverse=True)[1].to(tokens.device)


def captioning_loss(logits, tokens, head=None):
    """Eq. (3): -log P(y_t | y_<t, x), as the mean over the batch's real target tokens.

    logits (B, L, V), logits[:, t] predicts tokens[:, t + 1]; tokens (B, L) -> scalar. The last may be left out.
    head: if given, `logits` are states (B, L, D), and head(states) is taken where there is a target only.
    """
    targets = tokens[:, 1:]
    real = targets != PAD                                               # (B, L - 1) True = counts
    x, targets = logits[:, :targets.shape[1]][real], targets[real]                    # (T, V) or (T, D), (T,)

    def block(x, targets):
        return F.cross_entropy(head(x) if head else x, targets, reduction="sum")

    return in_blocks(block, len(x), head.out_features if head else 1, x, targets) / max(1, len(targets))


# ------------------------------------------------------------------------------------------------
# The model


class CoCaOutput(NamedTuple):
    image_embedding: torch.Tensor  # (B, E) unit norm
    text_embedding: torch.Tensor  # (B, E) unit norm
    logits: torch.Tensor  # (B, L, V); logits[:, t] predicts tokens[:, t + 1]
    states: torch.Tensor  # (B, L, D); logits = head(states); without logits (B, L - 1, D)


class Losses(NamedTuple):
    total: torch.Tensor  # Eq. (4)
    con: torch.Tensor  # Eq. (2)
    cap: torch.Tensor  # Eq. (3)


class CoCa(nn.Module):
    """Contrastive captioner (Sec. 3.2).

    Images: float (B, 3, H, W) in [-1, 1]. Tokens: int64 (B, L), L <= text_len, right-padded with PAD.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.encoder = ImageEncoder(c)
        self.generative_pooler = AttentionalPooler(c.width, c.heads, c.n_query) if c.n_query else None
        self.contrastive_pooler = AttentionalPooler(c.width, c.heads, 1)
        self.unimodal = UnimodalDecoder(c)
        self.multimodal = MultimodalDecoder(c)
        self.log_temperature = nn.Parameter(torch.empty(()))
        self.init_parameters()

    @torch.no_grad()
    def init_parameters(self):
        """Matrices: normal, variance 1 / inputs; less, the deeper, where they add to a residual stream (GPT-2).
        Embedding, softmax, [CLS], text positions: normal(0, 0.02); queries normal(0, 1), to ask for different
        things from the start. Biases 0, LayerNorm scales 1."""
        c = self.config
        for p in self.parameters():
            p.normal_(std=0.02) if p.dim() else p.fill_(math.log(0.07))
        for module in self.modules():
            if isinstance(module, AttentionalPooler):
                module.query.normal_()
            elif isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm)) and module is not self.multimodal.head:
                module.bias.zero_()
                if isinstance(module, nn.LayerNorm):
                    module.weight.fill_(1.0)
                else:
                    module.weight.normal_(std=module.weight[0].numel() ** -0.5)
        for stack, layers in ((self.encoder, c.encoder_layers), (self.unimodal, c.n_uni + c.n_multi),
                              (self.multimodal, c.n_uni + c.n_multi)):
            for name, p in stack.named_parameters():
                if name.endswith(("attention.out.weight", "mlp.2.weight")):
                    p.div_(math.sqrt(2 * layers))
        self.encoder.position.copy_(0.2 * sinusoids_2d(c.image_size // c.patch_size, c.width))
        self.log_temperature.fill_(math.log(0.07))

    @property
    def temperature(self):
        """sigma of Eq. (2): learned, from 0.07, within [0.01, 1]."""
        with torch.no_grad():  # bound the parameter itself: clamped in the graph, it would get no gradient outside
            self.log_temperature.clamp_(math.log(0.01), 0.0)
        return self.log_temperature.exp()

    def pool_image(self, images):
        """images -> what the decoder reads (B, Q, D), image_embedding (B, E)."""
        image_tokens = self.encoder(images)                             # (B, P, D)
        caption_tokens = image_tokens                                   # n_query 0: no generative pooler
        if self.generative_pooler is not None:
            caption_tokens = self.generative_pooler(image_tokens)       # (B, Q, D)
        source = caption_tokens if self.config.pooler == "cascade" else image_tokens
        x = self.contrastive_pooler(source)[:, 0]                       # (B, E)
        return caption_tokens, F.normalize(x, dim=-1)

    def encode_image(self, images):
        """images (B, 3, H, W) -> image embedding (B, E), unit norm: x of Eq. (2)."""
        return self.pool_image(images)[1]

    def encode_text(self, tokens):
        """tokens (B, L) -> text embedding (B, E), unit norm: y of Eq. (2)."""
        return F.normalize(self.unimodal(tokens)[1], dim=-1)

    def decode(self, images, tokens):
        """images (B, 3, H, W), tokens (B, L) -> states of the whole decoder (B, L, D): each token, seen with the image."""
        return self.multimodal(self.unimodal(tokens)[0], self.pool_image(images)[0])

    def forward(self, images, tokens, with_logits=True):
        """images (B, 3, H, W), tokens (B, L) -> CoCaOutput; without logits for training, which needs few of them."""
        caption_tokens, image_embedding = self.pool_image(images)       # (B, Q, D), (B, E)
        states, cls = self.unimodal(tokens)                             # (B, L, D), (B, E)
        text_embedding = F.normalize(cls, dim=-1)                       # (B, E)
        if not with_logits:
            states = states[:, :-1]  # the last position has nothing left to predict
        if with_logits or self.config.lambda_cap:  # a dual encoder in training has no use for the upper half
            states = self.multimodal(states, caption_tokens)            # (B, L, D)
        logits = self.multimodal.head(states) if with_logits else None  # (B, L, V)
        return CoCaOutput(image_embedding, text_embedding, logits, states)

    def losses(self, images, tokens):
        """Eq. (4): lambda_con L_con + lambda_cap L_cap from one forward pass -> Losses."""
        c, out = self.config, self(images, tokens, with_logits=False)
        con = contrastive_loss(out.image_embedding, out.text_embedding, self.temperature, number_captions(tokens))
        cap = captioning_loss(out.states, tokens, self.multimodal.head) if c.lambda_cap else con.new_zeros(())
        return Losses(c.lambda_con * con + c.lambda_cap * cap, con, cap)

    @torch.no_grad()
    def generate(self, images, max_len=None, temperature=0.0, top_k=0, top_p=1.0, generator=None):
        """Captions of images (B, 3, H, W) -> tokens (B, <= max_len), BEGIN first, PAD after END.

        temperature 0 is greedy; else sample from softmax(logits / temperature), among the top_k likeliest
        tokens only (0 = all) and the fewest that hold a share top_p of the probability. ValueError if senseless.
        """
        max_len = self.config.text_len if max_len is None else min(max_len, self.config.text_len)
        for name, value, fits in (("max_len", max_len, max_len > 0), ("temperature", temperature, temperature >= 0),
                                  ("top_k", top_k, top_k >= 0), ("top_p", top_p, 0 < top_p <= 1)):
            if not fits:
                raise ValueError(f"{name} cannot be {value}")
        caption_tokens, _ = self.pool_image(images)                     # (B, Q, D)
        tokens = torch.full((len(images), max_len), PAD, device=images.device)
        tokens[:, 0] = BEGIN
        rows, cache, t = torch.arange(len(images), device=images.device), Cache(max_len), 0  # rows: captions still written
        for t in range(1, max_len):
            states = self.unimodal.extend(tokens[rows, t - 1:t], cache)
            states = self.multimodal(states, caption_tokens, cache)     # (B, 1, D)
            logits = self.multimodal.head(states[:, -1])                # (B, V)
            done = (tokens[rows, t - 1] == END) | (tokens[rows, t - 1] == PAD)
            tokens[rows, t] = choose(logits, temperature, top_k, top_p, generator).masked_fill(done, PAD)
            cache.start = t
            going = (tokens[rows, t] != END) & (tokens[rows, t] != PAD)
            if not going.any():
                break
            if going.sum() <= 0.75 * len(rows):  # finished captions stop costing, once there are enough to pay for the copy
                rows, caption_tokens = rows[going], caption_tokens[going]
                cache.select(going)
        return tokens[:, :t + 1]


def choose(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """logits (B, V) -> next tokens (B,): greedy at temperature 0, else top-k and nucleus (top-p) sampling."""
    if not temperature:
        return logits.argmax(-1)
    logits, order = (logits / temperature).sort(-1, descending=True)   # likeliest first
    p = logits.softmax(-1)
    if top_k:
        p[:, top_k:] = 0
    p[p.cumsum(-1) - p >= top_p] = 0  # keep a token while those before it hold less than top_p
    return order.gather(-1, torch.multinomial(p, 1, generator=generator)).squeeze(-1)
