"""Records in open_clip.json what open_clip 3.3.0 computes, for test_open_clip.py.

    python tests/record_open_clip.py

That needs the packages open_clip_torch 3.3.0 and transformers 4.55.4. The inputs are made here, and
again by the test: a tiny CoCa with random weights, images and texts (numpy's RandomState gives the
same numbers for ever); texts for the tokenizer, with those byte pairs of CLIP's that they need.
"""
import json
import math
from pathlib import Path

import numpy as np
import torch

FILE = Path(__file__).with_name("open_clip.json")
V = 524  # tokens: 512 letters, 10 pairs, <begin>, <end>
L = 9
TINY = dict(
    embed_dim=128,
    vision_cfg=dict(image_size=32, patch_size=8, width=192, layers=2, attentional_pool=True,
                    attn_pooler_queries=5, attn_pooler_heads=8, output_tokens=True),
    text_cfg=dict(context_length=L, vocab_size=V, width=128, heads=2, layers=2, embed_cls=True,
                  output_tokens=True),
    multimodal_cfg=dict(context_length=L, vocab_size=V, width=128, heads=2, layers=2,
                        attn_pooler_heads=8))
TEXTS = ["A man riding a wave on top of a surfboard.", "Two dogs, one of them a zzyzx-hound!",
         "it's the girls' 36 cakes; they'll eat 2½", "  a\tblue   ring\n", "", "naïve café №5",
         "salt &amp; pepper &amp;lt;3", "a man’s “hat”", "snake_case isn't I'M", "狗 and 🐶",
         "the the the the the the the the the the", "cafe\u0301 MMXXIV Ⅳ x²"]


def weights(shapes):
    """Random ones under open_clip's names, none at a special value."""
    random = np.random.RandomState(0)
    tensors = {}
    for name, shape in shapes.items():
        x = torch.tensor(random.standard_normal(shape), dtype=torch.float32)
        if name == "logit_scale":
            x = torch.full_like(x, math.log(20))
        elif name.endswith(("proj", "proj_weight", "projection")):
            x = 2 * x * shape[-1] ** -0.5  # attention that prefers something
        elif len(shape) == 4 or name.endswith(("c_fc.weight", "c_proj.weight", "out_proj.weight")):
            x = x * math.prod(shape[1:]) ** -0.5
        elif len(shape) == 1 and name.endswith("weight"):  # of a LayerNorm
            x = 1 + 0.2 * x
        elif len(shape) == 1 and "embedding" not in name:
            x = 0.2 * x
        tensors[name] = x
    return tensors


def images(size=32):
    """(3, 3, size, size) in [-1, 1]."""
    random = np.random.RandomState(1)
    return torch.tensor(random.uniform(-1, 1, (3, 3, size, size)), dtype=torch.float32)


def texts(begin=V - 2, end=V - 1):
    """Of 4, 8 and all 9 tokens."""
    return torch.tensor([[begin, 5, 6, end, 0, 0, 0, 0, 0],
                         [begin, 7, 7, 8, 5, 9, 9, end, 0],
                         [begin, 9, 8, 7, 6, 5, 9, 8, end]])


def ramp(tensor):
    """Numbers of the tensor's shape, to keep one of it: (tensor * ramp(tensor)).sum()."""
    return torch.linspace(1, 2, tensor.numel()).view(tensor.shape)


def rounded(x):
    return [rounded(y) for y in x] if isinstance(x, list) else float(f"{x:.7g}")


def record_model():
    import open_clip
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from open_clip.loss import CoCaLoss

    model = open_clip.CoCa(**TINY).eval()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights(shapes))
    mean = torch.tensor(OPENAI_DATASET_MEAN)[:, None, None]
    spread = torch.tensor(OPENAI_DATASET_STD)[:, None, None]
    x = ((images() + 1) / 2 - mean) / spread
    captions = model.generate(x, generation_type="top_k", top_k=1, min_seq_len=1, seq_len=L + 1,
                              sot_token_id=V - 2, eos_token_id=V - 1)[:, :L]
    out = model(x, texts())
    con, cap = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)(**out)
    (con + cap).backward()
    gradients = {}
    for name, p in model.named_parameters():
        gradients[name] = (p.grad * ramp(p)).sum().item()
    with torch.no_grad():
        out = model(x, texts(), output_labels=False)
        model.text.correct_cls_mask = True
        corrected = model.encode_text(texts())
    return dict(
        shapes=shapes, image_embedding=out["image_features"][:, :6].tolist(),
        text_embedding=out["text_features"][:, :6].tolist(), corrected=corrected[:, :6].tolist(),
        logits=out["logits"][:, :, 5:8].tolist(), con=con.item(), cap=cap.item(),
        gradients=list(gradients.values()), captions=captions.tolist())


def record_tokenizer():
    import open_clip

    tokenizer = open_clip.SimpleTokenizer(context_length=32)
    encodings = tokenizer(TEXTS).tolist()
    pairs = list(tokenizer.bpe_ranks)
    made_by = {"".join(pair): i for i, pair in enumerate(pairs)}
    used = set()
    to_do = [tokenizer.decoder[i] for row in encodings for i in row]
    while to_do:  # the pair that makes a piece, those that make its two halves, and so on
        piece = to_do.pop()
        if piece in made_by:
            used.add(made_by[piece])
            to_do += pairs[made_by[piece]]
    return dict(
        pairs={i: " ".join(pairs[i]) for i in sorted(used)},
        encodings=[[i for i in row if i] for row in encodings],
        decoded=[tokenizer.decode([i for i in row if i]) for row in encodings])


def main():
    recorded = record_model()
    for name, value in recorded.items():
        if name not in ("shapes", "captions"):
            recorded[name] = rounded(value)
    recorded.update(record_tokenizer())
    text = json.dumps(recorded, ensure_ascii=False, separators=(",", ":"))
    FILE.write_text(text + "\n", encoding="utf-8")
    print(FILE.name, FILE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
