"""open_clip's public CoCa weights in the parts of coca.py, and where that model leaves the paper.

    python -m experiments.open_clip WEIGHTS --image a.jpg b.png                     captions
    python -m experiments.open_clip WEIGHTS --image a.jpg --labels "a dog" "a cat"  which fits
    python -m experiments.open_clip WEIGHTS --image *.jpg --find "a dog on grass"   the best first
    python -m experiments.open_clip WEIGHTS --data coco --data-dir DIR              eval.py's tasks

WEIGHTS is one of four public files (MIT), open_clip_pytorch_model.bin of huggingface.co/laion/NAME,
downloaded by hand. Beside it, in the same folder, goes the vocabulary bpe_simple_vocab_16e6.txt.gz,
of github.com/openai/CLIP (folder clip) or from the wheel of open_clip_torch.

    NAME                                              size    ImageNet   for
    CoCa-ViT-B-32-laion2B-s13B-b90k                   1.0 GB    63.3 %   zero-shot, small
    CoCa-ViT-L-14-laion2B-s13B-b90k                   2.6 GB    75.6 %   zero-shot
    mscoco_finetuned_CoCa-ViT-L-14-laion2B-s13B-b90k  2.6 GB    72.0 %   captions
    mscoco_finetuned_CoCa-ViT-B-32-laion2B-s13B-b90k  1.0 GB     0.8 %   captions only, small

ImageNet: zero-shot top-1, measured by their authors (docs/openclip_results.csv in open_clip). The
last file has lost its contrastive half. There was no network where this was written: it has never
run with these files, only beside open_clip 3.3.0's own code, at random weights, and gives the same.
(Pictures are resized by data.py: nearly as there, but CIFAR's bilinearly. Captions are greedy.)

What differs from coca.py, where, and what ignoring it does at random weights of B-32's size, on
pictures and captions of COCO: cosine of the embedding to the right one; how far logits move, as a
share of their spread. All else is the same in the paper, in coca.py and in open_clip:

    pixels scaled as CLIP's                        ClassTokenEncoder   image 0.83, logits 33 %
    a class token, pooled like any patch           ClassTokenEncoder   image 0.9997, logits 0.7 %
    ... with a position                            convert             image 0.97, logits 14 %
    a LayerNorm before the blocks                  ClassTokenEncoder   image 0.80, logits 34 %
    a LayerNorm on the pooler's queries            convert             image 0.998, logits 1.5 %
    8 heads in the pooler, in any size             OpenClipCoCa        image 0.9994 (L-14: not 12)
    one pooler: output 0 becomes the embedding     pool_image          image 0.98 (by the mean)
    ... and the decoder does not read it           pool_image          logits 0.1 %
    an encoder of another width                    OpenClipCoCa        does not fit
    a projection of the image embedding            OpenClipCoCa        image 0.03
    a projection of the text embedding             LastClsDecoder      text 0.00
    [CLS] has a position, the last of all          convert             text 0.76
    [CLS] sees <end>                               shifted_text_mask   text 0.96
    ... and the first <pad>, but not itself        shifted_text_mask   text 0.91
    ... so there has to be a <pad>                 LastClsDecoder      text 0.90 (the longest text)
    two MLPs in each upper layer                   TwoMLPBlock         logits 23 %
    ... one of them before it looks at the image   TwoMLPBlock         logits 5 %
    a LayerNorm on the image tokens that it reads  TwoMLPBlock         logits 17 %
    <begin> and <end> are the last two tokens      special_first       text 0.71, logits 64 %
    Eq. (2) is a mean of its two directions        sizes               twice the loss

The model goes on learning like any other (Batches and load are those of data.py):

    model, tokenizer = load_open_clip(WEIGHTS)
    batches = Batches(load("captions", DIR, size=224), tokenizer, model.config.text_len, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for step in range(1000):
        model.losses(*batches(step)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
"""
import argparse
import gzip
import html
import json
import math
import re
import unicodedata
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

if not __package__:
    raise SystemExit("run it as a module: python -m experiments.open_clip")

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import coca
from coca import BEGIN, END, PAD, causal_mask
from data import NAMES, NO_BLANK, UserError, one_error, pad_right, run_program, words
from eval import evaluate, new_file, pick_device, write_new
from experiments.own_pictures import add_image_flags, check_image_flags, look_at

HELP = "python -m experiments.open_clip --help"

# ------------------------------------------------------------------------------------------------
# The model

# Pixels in [0, 1] minus MEAN, divided by SPREAD: CLIP's choice. coca.py takes them in [-1, 1]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
SPREAD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


class ClassTokenEncoder(coca.ImageEncoder):
    """A ViT as CLIP's: with a class token, which the pooler reads like any patch, and first_norm."""

    def __init__(self, c):
        super().__init__(c)
        self.patches = nn.Conv2d(3, c.width, c.patch_size, c.patch_size, bias=False)
        self.cls = nn.Parameter(torch.empty(c.width))
        self.first_norm = nn.LayerNorm(c.width)

    def forward(self, images):
        """images (B, 3, S, S) in [-1, 1] -> image tokens (B, 1 + P, D), the class token first."""
        images = ((images + 1) / 2 - MEAN.to(images)) / SPREAD.to(images)
        x = self.patches(images).flatten(2).transpose(1, 2)             # (B, P, D)
        x = x + self.position
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1)           # (B, 1 + P, D)
        x = self.first_norm(x)
        for block in self.blocks:
            x = block(x)                                                # (B, 1 + P, D)
        return self.norm(x)


def shifted_text_mask(tokens, correct=False):
    """The mask of the lower half: tokens (B, L) -> (B, 1, L + 1, L + 1), True = may look.

    As text_mask, but <end> can be seen, and the padding is hidden one place too late (open_clip's
    issue 549). Its authors left it, as the weights were learned so. [CLS] for "a red ring":

                    <begin>   a   red  ring  <end>  <pad>  <pad>  [CLS]
        theirs         x      x    x     x     x      x      .      .
        correct        x      x    x     x     x      .      .      x
    """
    is_token = tokens != PAD                                            # (B, L)
    place = (0, 1) if correct else (1, 0)  # of [CLS]: behind the tokens, or wrongly before them
    visible = F.pad(is_token, place, value=True)                        # (B, L + 1)
    return causal_mask(visible.shape[1], tokens.device) & visible[:, None, None]


class LastClsDecoder(coca.UnimodalDecoder):
    """[CLS] has the last position of all, another mask, and a projection behind its norm."""

    def __init__(self, c):
        super().__init__(c)
        self.norm = nn.Sequential(nn.LayerNorm(c.width), nn.Linear(c.width, c.width, bias=False))
        self.correct_mask = False

    def forward(self, tokens):
        """tokens (B, L) -> states of the tokens (B, L, D), text embedding (B, E) of unit norm."""
        L = tokens.shape[1]
        if L < len(self.position):  # [CLS] has learned to see the first <pad>: there must be one
            tokens = F.pad(tokens, (0, 1), value=PAD)
        x = self.embed(tokens)
        mask = shifted_text_mask(tokens, self.correct_mask)
        for block in self.blocks:
            x = block(x, mask=mask)
        return x[:, :L], F.normalize(self.norm(x[:, -1]), dim=-1)


class TwoMLPBlock(coca.Block):
    """Upper layer with an MLP behind each attention, and a LayerNorm on the image tokens it reads.

    open_clip counts them as two layers, of which the second only looks at the image.
    """

    def __init__(self, width, heads, mlp):
        super().__init__(width, heads, mlp, cross=True)
        self.context_norm = nn.LayerNorm(width)
        self.cross_mlp_norm = nn.LayerNorm(width)
        self.cross_mlp = nn.Sequential(nn.Linear(width, mlp), nn.GELU(), nn.Linear(mlp, width))

    def forward(self, x, context, mask=None, cache=None):
        """x (B, L, D), context (B, Q, D), mask (L, L) of the self-attention -> (B, L, D)."""
        x = super().forward(x, mask=mask, cache=cache)  # self-attention and the first MLP
        if not cache or self.cross_attention not in cache:  # else its keys and values are known
            context = self.context_norm(context)                        # (B, Q, D)
        x = x + self.cross_attention(self.cross_norm(x), context, cache=cache)
        return x + self.cross_mlp(self.cross_mlp_norm(x))


class OpenClipCoCa(coca.CoCa):
    """CoCa with one pooler for both tasks, in two widths.

    c: sizes of pooler and decoder. vision: the same, but width and heads of the encoder.
    """

    def __init__(self, c, vision):
        super().__init__(c)
        D = c.width
        self.encoder = ClassTokenEncoder(vision)
        self.generative_pooler = coca.AttentionalPooler(D, 8, c.n_query)  # 8 heads in any size
        self.generative_pooler.attention.kv = nn.Linear(vision.width, 2 * D)
        self.contrastive_pooler = nn.Linear(D, D, bias=False)  # only a projection
        self.unimodal = LastClsDecoder(c)
        blocks = [TwoMLPBlock(D, c.heads, c.decoder_mlp) for _ in range(c.n_multi)]
        self.multimodal.blocks = nn.ModuleList(blocks)

    def pool_image(self, images):
        """images (B, 3, S, S) -> what the decoder reads (B, Q - 1, D), image embedding (B, E)."""
        pooled = self.generative_pooler(self.encoder(images))           # (B, Q, D)
        x = self.contrastive_pooler(pooled[:, 0])                       # (B, E)
        return pooled[:, 1:], F.normalize(x, dim=-1)


# ------------------------------------------------------------------------------------------------
# The weights

NAMES_HERE = {  # parts of open_clip's names of tensors: what they become here, from top to bottom
    "visual.conv1": "encoder.patches",
    "visual.class_embedding": "encoder.cls",
    "visual.positional_embedding": "encoder.position",
    "visual.ln_pre": "encoder.first_norm",
    "visual.transformer.resblocks": "encoder.blocks",
    "visual.attn_pool.ln_k": "encoder.norm",
    "visual.attn_pool.attn.": "generative_pooler.attention.",
    "visual.attn_pool": "generative_pooler",
    "visual.ln_post": "generative_pooler.norm",
    "visual.proj": "contrastive_pooler.weight",
    "text.token_embedding": "unimodal.token",
    "text.positional_embedding": "unimodal.position",
    "text.cls_emb": "unimodal.cls",
    "text.transformer.resblocks": "unimodal.blocks",
    "text.ln_final": "unimodal.norm.0",
    "text.text_projection": "unimodal.norm.1.weight",
    "text_decoder.resblocks": "multimodal.blocks",
    "text_decoder.ln_final": "multimodal.norm",
    "text_decoder.text_projection": "multimodal.head.weight",
    "logit_scale": "log_temperature",
    ".ln_1_kv.": ".context_norm.",
    ".ln_1.": ".self_norm.",
    ".ln_2.": ".mlp_norm.",
    ".attn.": ".self_attention.",
    ".out_proj.": ".out.",
    ".q_proj_weight": ".q.weight",
    ".c_fc.": ".0.",
    ".c_proj.": ".2.",
}


def rename(name):
    """A tensor's name in open_clip -> its name in OpenClipCoCa."""
    for theirs, here in NAMES_HERE.items():
        name = name.replace(theirs, here)
    if name.startswith("text_decoder.cross_attn"):  # what TwoMLPBlock has more than Block
        name = name.replace("text_decoder.cross_attn", "multimodal.blocks")
        name = name.replace(".self_", ".cross_").replace(".mlp", ".cross_mlp")
    return name


def special_first(V):
    """Which of open_clip's V tokens each of ours is: its last two, <begin> and <end>, are 1 and 2.

    Token 0, a "!" that other marks follow, is open_clip's padding, too.
    """
    return [PAD, V - 2, V - 1, *range(3, V - 2), 1, 2]


def convert(tensors):
    """open_clip's tensors {name: tensor} -> those of OpenClipCoCa. Here some differences vanish."""
    state = {rename(name): tensor.float() for name, tensor in tensors.items()}
    for name in list(state):
        if ".in_proj_" in name:  # q, k and v lie in one tensor
            layer, kind = name.split("in_proj_")
            D = len(state[name]) // 3
            q, kv = state.pop(name).split([D, 2 * D])
            state[f"{layer}q.{kind}"] = q
            state[f"{layer}kv.{kind}"] = kv
        elif name.endswith("k_proj_weight"):  # in the pooler, with its two widths, in three
            keys = state.pop(name)
            values = state.pop(name.replace("k_proj", "v_proj"))
            state[name.replace("k_proj_", "kv.")] = torch.cat([keys, values])
    # A class token is the same everywhere: its position can be added once and for all
    position = state["encoder.position"]                                # (1 + P, D)
    state["encoder.cls"] = state["encoder.cls"] + position[0]
    state["encoder.position"] = position[1:]
    position = state["unimodal.position"]                               # (text_len + 1, D)
    state["unimodal.cls"] = state["unimodal.cls"] + position[-1]
    state["unimodal.position"] = position[:-1]
    # So are the queries: their LayerNorm can be taken now
    query = state["generative_pooler.query"]                            # (Q, D)
    gain = state.pop("generative_pooler.ln_q.weight")
    bias = state.pop("generative_pooler.ln_q.bias")
    state["generative_pooler.query"] = F.layer_norm(query, gain.shape, gain, bias)
    # Projections are x @ weight there, and x @ weight.T in nn.Linear
    for name in ("contrastive_pooler.weight", "unimodal.norm.1.weight", "multimodal.head.weight"):
        state[name] = state[name].T
    for name in ("unimodal.token.weight", "multimodal.head.weight"):
        state[name] = state[name][special_first(len(state[name]))]
    state["log_temperature"] = -state["log_temperature"].reshape(())  # they learn 1 / sigma
    return state


def sizes(state):
    """Sizes that tensors of OpenClipCoCa have -> its two configurations. A head has 64 channels."""
    V, D = state["unimodal.token.weight"].shape
    width, _, patch, _ = state["encoder.patches.weight"].shape
    layers = Counter(name.split(".")[0] for name in state if name.endswith("self_norm.bias"))
    c = coca.CoCaConfig(
        image_size=math.isqrt(len(state["encoder.position"])) * patch, patch_size=patch,
        width=D, heads=D // 64, decoder_mlp=len(state["unimodal.blocks.0.mlp.0.bias"]),
        encoder_layers=layers["encoder"], encoder_mlp=len(state["encoder.blocks.0.mlp.0.bias"]),
        n_uni=layers["unimodal"], n_multi=layers["multimodal"],
        n_query=len(state["generative_pooler.query"]), vocab_size=V,
        text_len=len(state["unimodal.position"]),
        lambda_con=0.5)  # open_clip takes the mean of Eq. (2)'s two directions, not the sum
    return c, replace(c, width=width, heads=width // 64)


WRAPPED = re.compile(r"^(module\.|_orig_mod\.)+")  # before names: several GPUs, torch.compile


def kind_of(names):
    """What else a file seems to be that has these names; "" if it is a CoCa as the public ones."""
    def some(*starts):
        return any(name.startswith(starts) for name in names)

    if "vocabulary" in names:
        return "a checkpoint of train.py, which eval.py reads"
    if some("text_decoder."):
        if "visual.attn_pool.query" not in names:
            return "a CoCa without a pooler, such as coca_base"
        if "text.cls_emb" not in names:
            return "a CoCa with another text tower, such as coca_roberta-ViT-B-32"
        return ""
    if some("visual.") and some("token_embedding.", "text."):
        return "a CLIP, which has no decoder to write with"
    if some("visual.", "blocks.", "patch_embed.", "conv_proj.", "encoder.", "vit."):
        return "an image encoder alone"
    return "a file of other things"


# Numbers of numpy, as training saves among its own (the loss, for example), under their two names
SCALAR = np.float64(0).__reduce__()[0]
DTYPES = [type(np.dtype(kind)) for kind in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"]
PLAIN = [np.dtype, *DTYPES, (SCALAR, "numpy.core.multiarray.scalar"),
         (SCALAR, "numpy._core.multiarray.scalar")]


def read_tensors(path):
    """A file of open_clip or of its training -> what it holds by name, on the CPU."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; {HELP} says where to get it")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            content = load_file(path)
        else:
            with warnings.catch_warnings(), torch.serialization.safe_globals(PLAIN):
                warnings.simplefilter("ignore")  # of a TorchScript archive, which is refused
                content = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
        content = content.get("state_dict", content)  # with optimizer and epoch, as training saves
        return {WRAPPED.sub("", name): value for name, value in content.items()}
    except ImportError:
        raise UserError(f"{path}: pip install safetensors, or take the .bin file") from None
    except Exception as e:  # each format fails in its own ways
        script = "TorchScript" in str(e)
        why = "a TorchScript archive, as OpenAI's CLIP is" if script else "cut off, or no weights"
        raise UserError(f"{path}: cannot be read, it seems to be {why} ({type(e).__name__}; "
                        f"{path.stat().st_size:,} bytes); get another") from None


def load_open_clip(path, correct_mask=False):
    """.bin, .pt or .safetensors of open_clip, the vocabulary beside it -> model, tokenizer."""
    path = Path(path)
    tensors = read_tensors(path)
    kind = kind_of(tensors)
    if kind:
        raise UserError(f"{path}: this seems to be {kind}, but a CoCa as the public ones is needed; "
                        f"{HELP} names them")
    try:
        state = convert(tensors)
        with torch.device("meta"):  # no memory, no random numbers: all is replaced
            model = OpenClipCoCa(*sizes(state))
        model.load_state_dict(state, assign=True)
    except Exception as e:  # whatever does not fit
        why = " ".join(str(e).split())[:200]
        raise UserError(f"{path}: a CoCa of open_clip, but built otherwise than the public ones "
                        f"({why}); take one of those") from None
    tokenizer = BytePairs(path.with_name("bpe_simple_vocab_16e6.txt.gz"))
    if len(tokenizer) != model.config.vocab_size:
        raise UserError(f"{path}: it has {model.config.vocab_size} tokens, but the vocabulary beside "
                        f"it {len(tokenizer)}; take two that belong together")
    model.unimodal.correct_mask = correct_mask
    return model.eval(), tokenizer


# ------------------------------------------------------------------------------------------------
# The tokenizer

CHARACTERS = map(chr, range(0x10000))
NUMBERS = "".join(c for c in CHARACTERS if unicodedata.category(c) in ("Nl", "No"))  # such as ½
WORD = re.compile(rf"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_{NUMBERS}]+|[\d{NUMBERS}]|(?:[^\s\w]|_)+")
STRAIGHT = str.maketrans("‘’“”", "''\"\"")


class BytePairs:
    """CLIP's tokenizer: 49,408 pieces of words, of byte pairs (Sennrich et al. 2016).

    A word is its bytes. Of all neighbours that CLIP's list names, those that it names first are
    joined to one piece, and so on. (open_clip also mends broken text, with the package ftfy.)
    """

    def __init__(self, path):
        """path: bpe_simple_vocab_16e6.txt.gz, a pair in a line, in the order of joining."""
        if not path.is_file():
            raise UserError(f"{path}: no such file; {HELP} says where to get it")
        with one_error(path), gzip.open(path, "rt", encoding="utf-8") as f:
            lines = f.read().split("\n")[1:48_895]  # those that CLIP uses
        pairs = [tuple(line.split()) for line in lines if line]
        # Each byte has a letter: itself where that can be printed, else one of those from 256
        printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printed]
        letters = [chr(byte) for byte in printed] + [chr(256 + i) for i in range(len(others))]
        pieces = letters + [letter + "</w>" for letter in letters]  # </w> ends a word
        pieces += ["".join(pair) for pair in pairs] + ["<begin>", "<end>"]
        self.letter = dict(zip(printed + others, letters))  # of a byte
        self.byte = dict(zip(letters, printed + others))
        self.order = {pair: i for i, pair in enumerate(pairs)}
        self.pieces = [pieces[i] for i in special_first(len(pieces))]
        self.number = {piece: i for i, piece in enumerate(self.pieces)}
        self.words = [piece.removesuffix("</w>") for piece in self.pieces]
        self.index = {}  # of whole words
        for piece, i in self.number.items():
            if piece.endswith("</w>"):
                self.index[piece.removesuffix("</w>")] = i
        self.known = {}  # words already split

    def __len__(self):
        return len(self.pieces)

    def split(self, word):
        """"dogs" -> ["dogs</w>"], "zzyzx" -> ["zzy", "zx</w>"]."""
        pieces = [self.letter[byte] for byte in word.encode()]
        pieces[-1] += "</w>"
        while len(pieces) > 1:
            order = [self.order.get(pair, math.inf) for pair in zip(pieces, pieces[1:])]
            i = order.index(min(order))
            if order[i] == math.inf:
                break
            pieces[i:i + 2] = [pieces[i] + pieces[i + 1]]
        return pieces

    def encode(self, texts, text_len):
        """texts -> tokens (len(texts), longest) int64: BEGIN pieces END, PAD at the right.

        What is longer than text_len is cut but still gets its END.
        """
        rows = []
        for text in texts:
            text = unicodedata.normalize("NFC", text.translate(STRAIGHT))
            text = html.unescape(html.unescape(text)).lower()
            ids = []
            for word in WORD.findall(text):
                if word not in self.known:
                    self.known[word] = [self.number[piece] for piece in self.split(word)]
                ids += self.known[word]
            rows.append([BEGIN, *ids[:text_len - 2], END])
        return pad_right(rows)

    def decode(self, tokens):
        """tokens (L,) -> text up to END, readable."""
        pieces = ""
        for i in map(int, tokens):
            if i == END:
                break
            if i not in (PAD, BEGIN):
                pieces += self.pieces[i]
        text = bytes(self.byte[letter] for letter in pieces).decode(errors="replace")
        return NO_BLANK.sub("", text.replace("</w>", " ").strip())


# ------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter,
                                prog="python -m experiments.open_clip",
                                usage="%(prog)s WEIGHTS [options]")
    p.add_argument("weights", help="open_clip_pytorch_model.bin, or .safetensors")
    add_image_flags(p)
    p.add_argument("--data", choices=NAMES, help="or: zero-shot, retrieval, captioning on these data")
    p.add_argument("--data-dir", help="folder of the data")
    p.add_argument("--correct-mask", action="store_true", help="[CLS] sees itself and no padding")
    p.add_argument("--json", metavar="FILE", type=new_file, help="also write the scores there")
    p.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the first of them)")
    args = p.parse_args(argv)
    check_image_flags(p, args)
    if not args.image and not args.data:
        p.error("--image FILE or --data NAME is needed, to say what to look at")
    if args.data not in (None, "shapes") and not args.data_dir:
        p.error(f"--data {args.data} needs --data-dir, the folder of its files")
    return args


def main(argv=None):
    args = parse_args(argv)
    model, tokenizer = load_open_clip(args.weights, args.correct_mask)
    model.to(pick_device(args.device))
    if args.image:
        for text in [*(args.labels or []), *(args.find or [])]:
            tokenizer.words += words(text)  # byte pairs know every word, if only in pieces
        _, scores = look_at(args, model, tokenizer)
    else:
        scores = evaluate(model, tokenizer, dict(data=args.data, data_dir=args.data_dir, seed=0))
    if args.json:
        write_new(args.json, json.dumps(scores, indent=1))


if __name__ == "__main__":
    run_program(main)
