"""CoCa: Contrastive Captioners are Image-Text Foundation Models (Yu et al., TMLR 2022).

    arXiv 2205.01917
    python coca.py      one forward pass: shapes, the mask, both losses, parameter counts

Here you see the whole model: an image encoder, two attentional poolers, and a text decoder cut in
half, so that one model is a single encoder, a dual encoder and an encoder-decoder (Sec. 3.1). The
lower (unimodal) half never looks at the image and gives the text embedding of a contrastive loss.
The upper (multimodal) half reads the image and writes the caption. CoCa.forward and CoCa.losses are
Figure 2, and they are what trains (with --accum or several processes train.large_batch_backward
stands in for CoCa.losses). `tour`, at the end, may be skipped.

Figure 2, step by step                        here                    what differs
     1. a ViT turns the image into tokens     ImageEncoder
     2. pooling: queries attend, LayerNorm    AttentionalPooler
     3. N caption queries pool the tokens     generative_pooler
     4. one contrastive query pools, too      contrastive_pooler      it reads 3 (the cascade of
                                                                      Sec. 3.2), not 1 as drawn
     5. [CLS] is put after the padded text    UnimodalDecoder.embed   a vector of its own, no word
                                              (.forward takes it out)
     6. a mask hides the padding, not [CLS]   text_mask
     7. <end> is a target, never an input     text_mask               in the input, but masked
     8. lower layers: causal self-attention   causal_mask,
                                              UnimodalDecoder
     9. LayerNorm; [CLS] embeds the text      UnimodalDecoder.norm
    10. upper layers: all tokens but [CLS],   MultimodalDecoder       padding comes last, so it
        cross-attending to 3                                          needs no mask
    11. contrastive loss of 4 and 9           contrastive_loss        equal captions are positives
    12. captioning loss, padding left out     captioning_loss
Eq. (4), CoCa.losses, adds up 11 and 12. CoCa.generate captions (Table 7). Table 1 is CONFIGS.
Table 8's rows as settings: (b), (c) lambda_con, lambda_cap; (d) n_uni, n_multi; (f) pooler,
n_query. (a)'s classifier and (e)'s mean of [CLS] and text are in experiments/variants.py.

What the paper leaves open, and what we chose. The authors' later code (google-research, vila)
agrees where an item has a *:
    model       pre-LayerNorm *; GELU; no class token in the ViT *; learned positions, those of the
                image starting as 2-D sinusoids; [CLS] without a position *; heads of the poolers =
                heads of the model; no projection to a joint space * (nor in Figure 2); no dropout;
                texts of 64 tokens for the paper's sizes *; initial values, the patch embedding's
                from the data (train.whiten_patches)
    losses      Eq. (2) as the sum that is printed (theirs is the mean of both directions); Eq. (3)
                as a mean over the batch's target tokens *; temperature within [0.01, 1]
    training    images in [-1, 1] (theirs [0, 1]); crops and flips of photographs; gradients clipped
                to norm 1 (Tables 9 and 10 say so for finetuning); learning rate falls to 0;
                bfloat16 on GPUs; no moving average of the weights
    video       no temporal embedding; 8 frames for classification (Sec. 3.3 says 16 for retrieval)
Where we differ: equal captions are each other's positives in Eq. (2), the rule of UniCL (Yang et
al. 2022); one random number a batch chooses its prompts (data.Batches), where the paper draws one
an image; AdamW instead of Adafactor; whole words instead of SentencePiece; sizes and data.

Dimension letters
    B batch   P image tokens (patches)   Q pooled image tokens (n_query)   L text tokens   D width
    E embedding (= D)   H heads   d = D / H   V vocabulary   N pairs to compare   T targets, of
    all captions of a batch   S pixels a side
"""
import contextlib
import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

PAD, BEGIN, END, UNKNOWN = 0, 1, 2, 3  # special tokens; a caption is BEGIN words END PAD ...

# ------------------------------------------------------------------------------------------------
# Sizes: Table 1


@dataclass
class CoCaConfig:
    """Sizes of a CoCa, tiny by default. ValueError if they do not fit together. Each comment: what
    it is | its value in CoCa-Base.
    """

    image_size: int = 32  # S, pixels a side | 288, then 576
    patch_size: int = 4  # pixels a side | 18
    width: int = 128  # D of encoder, poolers and decoder alike | 768
    heads: int = 4  # H | 12
    encoder_layers: int = 4  # | 12
    encoder_mlp: int = 512  # hidden units of the encoder's MLPs | 3072
    n_uni: int = 2  # unimodal decoder layers | 12
    n_multi: int = 2  # multimodal decoder layers | 12
    decoder_mlp: int = 512  # hidden units of the decoder's MLPs | 3072
    n_query: int = 16  # Q, of the generative pooler; 0 = none: all read the image tokens | 256
    pooler: str = "cascade"  # the contrastive pooler reads the generative one's; or "parallel"
    vocab_size: int = 4096  # V, with the four special tokens | 64,000
    text_len: int = 32  # longest text in tokens, with BEGIN and END, without [CLS] | (64 here)
    lambda_con: float = 1.0  # weight of Eq. (2) in Eq. (4); 0 = an image captioner | 1
    lambda_cap: float = 2.0  # weight of Eq. (3) in Eq. (4); 0 = a dual encoder like CLIP | 2

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of "
                             f"patch_size {self.patch_size}")
        if self.pooler not in ("cascade", "parallel"):
            raise ValueError(f"pooler must be cascade or parallel, not {self.pooler!r}")
        if not self.lambda_con and not self.lambda_cap:
            raise ValueError("lambda_con and lambda_cap are both 0: nothing would be learned")


_base = CoCaConfig(image_size=288, patch_size=18, width=768, heads=12, encoder_layers=12,
                   encoder_mlp=3072, n_uni=12, n_multi=12, decoder_mlp=3072, n_query=256,
                   vocab_size=64_000, text_len=64)
CONFIGS = {
    "tiny": CoCaConfig(),
    "base": _base,
    "large": replace(_base, width=1024, heads=16, encoder_layers=24, encoder_mlp=4096,
                     decoder_mlp=4096),
    "giant": replace(_base, width=1408, heads=16, encoder_layers=40, encoder_mlp=6144, n_uni=18,
                     n_multi=18, decoder_mlp=5632),
}
# The paper's millions of encoder and decoder. The poolers seem not to be counted. The decoders of
# base and large show that the softmax is not tied to the embedding; giant's could be either
TABLE_1 = {"base": (86, 297), "large": (303, 484), "giant": (1000, 1100)}

# ------------------------------------------------------------------------------------------------
# Sec. 3.2: masks and attention


def causal_mask(L, device=None):
    """(L, L) bool, True = the row's token may look at the column's: at itself and those before it.

    MultimodalDecoder.forward asks for it, and UnimodalDecoder.forward through text_mask.
    CoCa.forward, and so training, runs both (with lambda_cap 0 the lower one alone).
    """
    return torch.ones(L, L, dtype=torch.bool, device=device).tril()


def text_mask(tokens):
    """The mask of the lower half, where [CLS] comes last: tokens (B, L) -> (B, 1, L + 1, L + 1).

    True (x) = may look. For "a red ring", in a batch whose longest caption has one word more:

                    <begin>   a   red  ring  <end>  <pad>  [CLS]
        <begin>        x      .    .     .     .      .      .
        a              x      x    .     .     .      .      .
        red            x      x    x     .     .      .      .
        ring           x      x    x     x     .      .      .
        <end>          x      x    x     x     .      .      .     no loss reads this row
        <pad>          x      x    x     x     .      .      .     nor from this
        [CLS]          x      x    x     x     .      .      x     becomes the text embedding

    Figure 2 has <end> among the targets only. Here one string is both input and target, so <end>
    stands in the input, and the mask hides it as it hides padding.
    """
    is_word = (tokens != PAD) & (tokens != END)                         # (B, L)
    visible = F.pad(is_word, (0, 1), value=True)                        # (B, L + 1), [CLS] too
    return causal_mask(visible.shape[1], tokens.device) & visible[:, None, None]


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(d)) v, written out: the definition of what torch's fused kernel does.

    q (B, H, Lq, d), k and v (B, H, Lk, d), mask (..., Lq, Lk) True = may look
    -> (B, H, Lq, d) and the weights (B, H, Lq, Lk). A row that may look at nothing gives 0.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])           # (B, H, Lq, Lk)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)  # -inf: weights are exactly 0
    weights = scores.softmax(-1).nan_to_num()
    return weights @ v, weights


def at_least_float32(x):
    """Half precision -> float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Attention(nn.Module):
    """Multi-head attention (Sec. 3.2) of x to itself or, with a context, of x to the context."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, context=None, mask=None, cache=None):
        """x (B, Lq, D), context (B, Lk, D) or None, mask (..., Lq, Lk) True = may look
        -> (B, Lq, D). cache: in generation, where x is the one token after all in earlier calls.
        """
        q = self.split(self.q(x))                                       # (B, H, Lq, d)
        k, v = self.keys_values(x, context, cache)                      # (B, H, Lk, d) each
        x = F.scaled_dot_product_attention(q, k, v, mask)  # attention(q, k, v, mask), fused
        return self.out(x.transpose(1, 2).flatten(2))                   # (B, Lq, D)

    def weights(self, x, context=None, mask=None):
        """How much each row of x looks at what: (B, H, Lq, Lk). Arguments as for forward."""
        return attention(self.split(self.q(x)), *self.keys_values(x, context), mask)[1]

    def split(self, x):
        """(B, L, D) -> (B, H, L, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, x, context=None, cache=None):
        """-> k and v (B, H, Lk, d). cache: in generation a dict {layer: (k, v)}. Keys and values of
        the image are computed in the first call and kept; a new token's are appended.
        """
        if cache is None:
            cache = {}
        known = cache.get(self)
        if known and context is not None:
            return known
        source = x if context is None else context                      # (B, Lk, D)
        k, v = map(self.split, self.kv(source).chunk(2, -1))            # (B, H, Lk, d) each
        if known:  # x is one more token
            k = torch.cat([known[0], k], 2)
            v = torch.cat([known[1], v], 2)
        cache[self] = k, v
        return k, v


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

    def forward(self, x, context=None, mask=None, cache=None):
        """x (B, L, D), context (B, Lk, D), mask (..., L, L) of the self-attention -> (B, L, D)."""
        x = x + self.self_attention(self.self_norm(x), mask=mask, cache=cache)
        if context is not None:
            x = x + self.cross_attention(self.cross_norm(x), context, cache=cache)
        return x + self.mlp(self.mlp_norm(x))


# ------------------------------------------------------------------------------------------------
# Sec. 3.2: image encoder and attentional poolers


def sinusoids_2d(grid, width):
    """(grid * grid, width): half of the channels say the row, half the column."""
    frequency = 10000 ** -(torch.arange(width // 4) / (width // 4))
    angle = torch.arange(grid)[:, None] * frequency                     # (grid, D/4)
    place = torch.cat([angle.sin(), angle.cos()], -1)                   # (grid, D/2)
    rows = place[:, None].expand(-1, grid, -1)                          # (grid, grid, D/2)
    columns = place[None].expand(grid, -1, -1)                          # (grid, grid, D/2)
    positions = torch.cat([rows, columns], -1).flatten(0, 1)            # (P, D)
    return F.pad(positions, (0, width - positions.shape[1]))  # (if 4 does not divide D)


class ImageEncoder(nn.Module):
    """A ViT (Sec. 3.2, Table 1). No class token: the poolers summarise its tokens instead, and the
    paper's "256 image tokens" are the patches alone.
    """

    def __init__(self, c):
        super().__init__()
        self.image_size = c.image_size
        self.patches = nn.Conv2d(3, c.width, c.patch_size, c.patch_size)
        # Nearly as strong as the patches' content (0.7 beside 1 when train.py starts): at a fifth
        # of this, captions needed twice as many images to name the right corners
        self.position = nn.Parameter(sinusoids_2d(c.image_size // c.patch_size, c.width))
        self.blocks = nn.ModuleList(
            Block(c.width, c.heads, c.encoder_mlp) for _ in range(c.encoder_layers))
        self.norm = nn.LayerNorm(c.width)

    def forward(self, images):
        """images (B, 3, S, S) -> image tokens (B, P, D)."""
        if images.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(f"images of {tuple(images.shape[2:])} pixels, but the model is made "
                             f"for {self.image_size} x {self.image_size}")
        x = self.patches(images)                                        # (B, D, rows, columns)
        x = x.flatten(2).transpose(1, 2)                                # (B, P, D)
        x = x + self.position
        for block in self.blocks:
            x = block(x)                                                # (B, P, D)
        return self.norm(x)


class AttentionalPooler(nn.Module):
    """One multi-head attention layer with n_query learned queries (Sec. 3.2); no MLP, no residual.

    It adapts one encoder to two tasks: 256 queries keep what a caption needs, one query what a
    comparison of whole images needs. At 288 pixels it saves nothing (256 patches, 256 queries); at
    576 the decoder reads 256 tokens instead of 1,024.
    """

    def __init__(self, width, heads, n_query):
        super().__init__()
        self.query = nn.Parameter(torch.randn(n_query, width))  # large: so they differ at once
        self.attention = Attention(width, heads)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens, mask=None):
        """tokens (B, P, D), mask (..., Q, P) True = may look -> (B, Q, D)."""
        query = self.query.expand(len(tokens), -1, -1)                  # (B, Q, D)
        return self.norm(at_least_float32(self.attention(query, tokens, mask)))

    def weights(self, tokens):
        """Where each query looks: tokens (B, P, D) -> (B, H, Q, P)."""
        return self.attention.weights(self.query.expand(len(tokens), -1, -1), tokens)


# ------------------------------------------------------------------------------------------------
# Sec. 3.2: decoupled text decoder


class UnimodalDecoder(nn.Module):
    """The n_uni lower layers: causal self-attention, a learned [CLS] after the text.

    [CLS] comes last because under a causal mask only the last token sees the whole text. It stands
    after the padding, so a position would tell it how long the longest text of the batch is: it
    has none. The multimodal half does not get it, as it predicts no word.
    """

    def __init__(self, c):
        super().__init__()
        self.token = nn.Embedding(c.vocab_size, c.width)
        self.position = nn.Parameter(torch.empty(c.text_len, c.width))
        self.cls = nn.Parameter(torch.empty(c.width))
        self.blocks = nn.ModuleList(
            Block(c.width, c.heads, c.decoder_mlp) for _ in range(c.n_uni))
        self.norm = nn.LayerNorm(c.width)

    def embed(self, tokens):
        """tokens (B, L) -> tokens with positions, then [CLS]: (B, L + 1, D)."""
        B, L = tokens.shape
        if L > len(self.position):
            raise ValueError(f"a text of {L} tokens is longer than text_len {len(self.position)}")
        x = self.token(tokens) + self.position[:L]                      # (B, L, D)
        return torch.cat([x, self.cls.expand(B, 1, -1)], 1)             # (B, L + 1, D)

    def forward(self, tokens):
        """tokens (B, L) -> states of the tokens (B, L, D), text embedding (B, E) of unit norm."""
        x = self.embed(tokens)                                          # (B, L + 1, D)
        mask = text_mask(tokens)                                        # (B, 1, L + 1, L + 1)
        for block in self.blocks:
            x = block(x, mask=mask)                                     # (B, L + 1, D)
        states = x[:, :-1]                                              # (B, L, D), [CLS] taken out
        cls = self.norm(x[:, -1])                                       # (B, D)
        return states, F.normalize(cls, dim=-1)

    def extend(self, token, place, cache):
        """In generation: the next token (B, 1) -> its state (B, 1, D). No token sees [CLS]."""
        x = self.token(token) + self.position[place]                    # (B, 1, D)
        for block in self.blocks:
            x = block(x, cache=cache)
        return x


class MultimodalDecoder(nn.Module):
    """The n_multi upper layers: causal self-attention and cross-attention to the image; softmax."""

    def __init__(self, c):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(c.width, c.heads, c.decoder_mlp, cross=True) for _ in range(c.n_multi))
        self.norm = nn.LayerNorm(c.width)
        self.head = nn.Linear(c.width, c.vocab_size, bias=False)  # not tied: see TABLE_1

    def forward(self, states, image_context, cache=None):
        """states (B, L, D) of the lower half, image_context (B, Q, D) -> (B, L, D)."""
        mask = None  # generation: the one new token may look at all before it
        if cache is None:
            mask = causal_mask(states.shape[1], states.device)          # (L, L)
        for block in self.blocks:
            states = block(states, image_context, mask, cache)          # (B, L, D)
        return self.norm(states)


# ------------------------------------------------------------------------------------------------
# Sec. 3.1: losses, Eqs. (2) and (3)


def contrastive_loss(x, y, temperature, ids, rows=slice(None)):
    """Eq. (2): -(1/N) (sum_i log softmax_j(x_i.y_j / sigma)_i
                     + sum_i log softmax_j(y_i.x_j / sigma)_i).

    Image embeddings x and text embeddings y (N, E), unit norm; temperature sigma > 0 -> scalar.
    The two directions are added, as the paper prints it. CLIP averages them: for that, return half
    of this (--lambda-con 0.5 does the same).
    ids (N,): equal numbers mark equal captions, which are each other's positives (UniCL, Yang et
    al. 2022). Among m equal captions each is the target with weight 1/m. Cross-entropy cannot then
    fall below log m, so log m is taken off, and the best loss is 0 again. The paper has no such
    rule. But half of its batch, and all of CIFAR, is class names: among 64 images of 10 classes
    a caption stands six or seven times, and Eq. (2) as printed cannot fall below 1.9 a direction.
    rows: the mean over these i only, each still compared with all N. A batch in parts needs it
    (train.large_batch_backward).
    """
    with torch.autocast(x.device.type, enabled=False):
        x = at_least_float32(x)
        y = at_least_float32(y)
        positives = (ids[rows, None] == ids).to(x.dtype)                # (rows, N)
        count = positives.sum(1, keepdim=True)                          # (rows, 1)
        image_to_text = F.cross_entropy(x[rows] @ y.T / temperature, positives / count)
        text_to_image = F.cross_entropy(y[rows] @ x.T / temperature, positives / count)
        return image_to_text + text_to_image - 2 * count.log().mean()


def captioning_loss(logits, targets):
    """Eq. (3): -log P(y_t | y_<t, x), a mean over all targets of the batch, 0 if there is none.

    logits (T, V), targets (T,) -> scalar.
    """
    loss = F.cross_entropy(at_least_float32(logits), targets, reduction="sum")
    return loss / max(1, len(targets))


def caption_ids(tokens):
    """tokens (N, L) -> (N,), equal numbers for equal captions, for contrastive_loss.

    On the CPU, as not every device has torch.unique. That waits for a GPU, so CoCa.losses calls it
    before the model runs. (Where labels are texts data.Batches draws one prompt a batch: then equal
    classes have equal captions.)
    """
    return torch.unique(tokens.cpu(), dim=0, return_inverse=True)[1].to(tokens.device)


# ------------------------------------------------------------------------------------------------
# Sec. 3.2: the model


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
        """Initial values of linear layers, tokens and text positions; LayerNorms keep torch's."""
        c = self.config
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                inputs = module.weight[0].numel()
                module.weight.normal_(std=inputs**-0.5)
                if module.bias is not None:
                    module.bias.zero_()
            # Layers that add to the residual stream start smaller, the more there are (GPT-2)
            if name.endswith(("attention.out", "mlp.2")) and "pooler" not in name:
                layers = c.encoder_layers if name.startswith("encoder") else c.n_uni + c.n_multi
                module.weight.div_(math.sqrt(2 * layers))
        for p in (self.unimodal.token.weight, self.unimodal.position, self.unimodal.cls):
            p.normal_(std=0.02)

    @property
    def temperature(self):
        """sigma of Eq. (2), learned. After each step train.train moves the parameter back, so that
        sigma is in [0.01, 1]. Nothing is clamped here: the gradient at a bound can lead back inside.
        """
        return self.log_temperature.exp()

    def pool_image(self, images):
        """images (B, 3, S, S) -> what the decoder reads (B, Q, D), image embedding (B, E)."""
        image_tokens = self.encoder(images)                             # (B, P, D)
        image_context = image_tokens
        if self.generative_pooler is not None:
            image_context = self.generative_pooler(image_tokens)        # (B, Q, D)
        cascade = self.config.pooler == "cascade"  # Table 8f; Figure 2 draws "parallel"
        pooled = self.contrastive_pooler(image_context if cascade else image_tokens)  # (B, 1, D)
        return image_context, F.normalize(pooled[:, 0], dim=-1)

    def forward(self, images, tokens):
        """Figure 2: one pass for both losses.

        images (B, 3, S, S), tokens (B, L) -> image embedding x (B, E), text embedding y (B, E),
        both of unit norm, and the captioning loss, Eq. (3).
        """
        image_context, x = self.pool_image(images)                      # (B, Q, D), (B, E)
        states, y = self.unimodal(tokens)                               # (B, L, D), (B, E)
        if not self.config.lambda_cap:  # a dual encoder has no use for the upper half
            return x, y, x.new_zeros(())
        states = self.multimodal(states, image_context)                 # (B, L, D)
        follows = tokens[:, 1:] != PAD                                  # (B, L - 1): a real token
        logits = self.multimodal.head(states[:, :-1][follows])          # (T, V), no softmax of pads
        return x, y, captioning_loss(logits, tokens[:, 1:][follows])

    def losses(self, images, tokens):
        """Eq. (4): lambda_con L_Con + lambda_cap L_Cap -> Losses. (A batch in parts or on several
        processes: train.large_batch_backward.)
        """
        ids = caption_ids(tokens)                                       # (B,)
        x, y, cap = self(images, tokens)                                # CoCa.forward
        con = contrastive_loss(x, y, self.temperature, ids)
        return Losses(self.config.lambda_con * con + self.config.lambda_cap * cap, con, cap)

    # What evaluation uses: embeddings (Tables 3 to 5), decoder states (Table 6), captions (Table 7)

    def encode_image(self, images):
        """images (B, 3, S, S) -> image embedding (B, E), unit norm: x of Eq. (2)."""
        return self.pool_image(images)[1]

    def encode_text(self, tokens):
        """tokens (B, L) -> text embedding (B, E), unit norm: y of Eq. (2)."""
        return self.unimodal(tokens)[1]

    def decode(self, images, tokens):
        """images (B, 3, S, S), tokens (B, L) -> decoder states (B, L, D): each token and those
        before it, seen with the image. self.multimodal.head makes logits (B, L, V) of them.
        """
        image_context, _ = self.pool_image(images)                      # (B, Q, D)
        states, _ = self.unimodal(tokens)                               # (B, L, D)
        return self.multimodal(states, image_context)

    @torch.no_grad()
    def generate(self, images, max_len=math.inf, temperature=0.0, top_k=0, generator=None,
                 image_context=None):
        """Captions of images (B, 3, S, S) -> tokens (B, <= max_len), BEGIN first, PAD after END.

        temperature (not sigma) 0 is greedy; else sample from softmax(logits / temperature), among
        the top_k likeliest tokens only (0 = all). image_context (B, Q, D): what pool_image gave, if
        it has run.
        """
        max_len = min(max_len, self.config.text_len)
        if not (max_len >= 1 and temperature >= 0 and top_k >= 0):
            raise ValueError("max_len must be at least 1, temperature and top_k at least 0, not "
                             f"{max_len}, {temperature}, {top_k}")
        if image_context is None:
            image_context, _ = self.pool_image(images)                  # (B, Q, D)
        tokens = torch.full((len(images), max_len), PAD, device=images.device)
        tokens[:, 0] = BEGIN
        done = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        cache = {}  # keys and values of each attention layer
        for t in range(1, max_len):
            state = self.unimodal.extend(tokens[:, t - 1:t], t - 1, cache)  # (B, 1, D)
            state = self.multimodal(state, image_context, cache)        # (B, 1, D)
            logits = self.multimodal.head(state[:, 0])                  # (B, V)
            sampled = sample(logits, temperature, top_k, generator)     # (B,)
            tokens[:, t] = sampled.masked_fill(done, PAD)
            done |= (sampled == END) | (sampled == PAD)
            if done.all():
                return tokens[:, :t + 1]
        return tokens

    def recompute_activations(self):
        """Blocks keep no activations but compute them again in backward: same gradients."""
        for module in self.modules():
            if isinstance(module, Block):
                module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def sample(logits, temperature=0.0, top_k=0, generator=None):
    """logits (B, V) -> next tokens (B,): greedy at temperature 0, else of the top_k likeliest."""
    if not temperature:
        return logits.argmax(-1)
    logits, order = (logits / temperature).sort(-1, descending=True)    # the likeliest first
    p = logits.softmax(-1)
    if top_k:
        p[:, top_k:] = 0
    return order.gather(-1, torch.multinomial(p, 1, generator=generator)).squeeze(-1)


# ------------------------------------------------------------------------------------------------
# python coca.py


def count_parameters(*modules):
    """Millions of parameters."""
    return sum(p.numel() for p in nn.ModuleList(modules).parameters()) / 1e6


@torch.no_grad()
def tour():
    torch.manual_seed(0)
    words = ["<pad>", "<begin>", "<end>", "<unk>", "a", "red", "blue", "ring", "wide"]
    captions = ["a red ring", "a wide red ring", "a blue ring", "a wide blue ring"]
    tokens = torch.full((4, 6), PAD)
    for row, caption in zip(tokens, captions):
        ids = [BEGIN, *map(words.index, caption.split()), END]
        row[:len(ids)] = torch.tensor(ids)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    model = CoCa(CoCaConfig(vocab_size=len(words)))

    image_context, x = model.pool_image(images)
    _, y = model.unimodal(tokens)
    print("Four images of noise and their captions go through an untrained model (Figure 2):")
    for what, flows in (
        ("ImageEncoder: image tokens (B, P, D)", model.encoder(images)),
        ("generative pooler: what the decoder reads (B, Q, D)", image_context),
        ("contrastive pooler on top: image embedding x (B, E)", x),
        ("UnimodalDecoder: [CLS], the text embedding y (B, E)", y),
        ("MultimodalDecoder: states that saw the image (B, L, D)", model.decode(images, tokens)),
    ):
        print(f"  {what:58}{str(tuple(flows.shape)):>17}")

    print(f"\nWho may look at whom in {captions[0]!r} (text_mask):")
    names = [*(words[i] for i in tokens[0]), "[CLS]"]
    print(" " * 10, *(f"{name:>8}" for name in names))
    for name, row in zip(names, text_mask(tokens)[0, 0]):
        print(f"  {name:8}", *(f"{'.x'[may]:>8}" for may in row))

    loss = model.losses(images, tokens)
    print("\nLosses before training, and about what to expect (1/2: logits' variance is 1):")
    print(f"  Eq. (2), contrastive {loss.con:.2f}   2 ln N = {2 * math.log(4):.2f} for 4 pairs")
    expected = math.log(9) + 0.5
    print(f"  Eq. (3), captioning  {loss.cap:.2f}   ln V + 1/2 = {expected:.2f} for 9 tokens")

    print("\nMillions of parameters (in brackets: Table 1, which seems to leave the poolers out):")
    for name, (encoder, decoder) in TABLE_1.items():
        with torch.device("meta"):  # shapes only, no memory
            model = CoCa(CONFIGS[name])
        print(f"  {name:6} encoder {count_parameters(model.encoder):6.1f} ({encoder}), poolers",
              f"{count_parameters(model.generative_pooler, model.contrastive_pooler):4.1f}, decoder",
              f"{count_parameters(model.unimodal, model.multimodal):6.1f} ({decoder})")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # somebody reads no further, as head does
        tour()
