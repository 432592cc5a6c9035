"""open_clip's weights in our parts give what open_clip's own code gives, and no difference is idle.

What open_clip 3.3.0 computes is in open_clip.json, recorded by record_open_clip.py. Where that
package is installed, a public size is compared, too, with random weights.
"""
import gzip
import json
import pickle
import re
import sys
import textwrap
from operator import attrgetter

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import Bomb, fails, logits_of, refused
from PIL import Image
from record_open_clip import FILE, TEXTS, V, images, ramp, texts, weights

import coca
from coca import BEGIN, END, PAD
from data import Batches, load, read_image
from eval import caption
from experiments import open_clip
from experiments.open_clip import (
    MEAN,
    SPREAD,
    BytePairs,
    OpenClipCoCa,
    convert,
    load_open_clip,
    main,
    parse_args,
    sizes,
    special_first,
)

RECORDED = json.loads(FILE.read_text(encoding="utf-8"))
SHAPES = RECORDED["shapes"]
WEIGHTS = weights(SHAPES)
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
PAIRS = ["o g</w>", "d og</w>", "r e", "re d</w>", "t h", "th e</w>", "r i", "n g</w>", "ri ng</w>",
         "c a"]


def ours(tensors):
    """open_clip's tensors -> OpenClipCoCa."""
    state = convert(tensors)
    model = OpenClipCoCa(*sizes(state))
    model.load_state_dict(state)
    return model.eval()


def our_texts():
    return texts(BEGIN, END)


def our_tokens(tokens):
    """open_clip's numbers of tokens -> ours."""
    return torch.tensor(special_first(V)).argsort()[torch.tensor(tokens)]


@torch.no_grad()
def differences(model):
    """-> {what: how far it is from what open_clip computed, at most}."""
    tokens = our_texts()
    short = tokens[:1, :4]  # alone in its batch
    losses = model.losses(images(), tokens)
    found = {
        "image embedding": (model.encode_image(images())[:, :6], RECORDED["image_embedding"]),
        "text embedding": (model.encode_text(tokens)[:, :6], RECORDED["text_embedding"]),
        "text embedding alone": (model.encode_text(short)[:, :6], RECORDED["text_embedding"][:1]),
        "logits": (logits_of(model, images(), tokens)[..., 5:8], RECORDED["logits"]),
        "contrastive loss": (losses.con / 2, RECORDED["con"]),
        "loss": (losses.total, RECORDED["con"] + RECORDED["cap"]),
        "captions": (model.generate(images()), our_tokens(RECORDED["captions"])),
    }
    far = {}
    for what, (value, recorded) in found.items():
        far[what] = (value - torch.as_tensor(recorded)).abs().max().item()
    return far


def check(model):
    for what, far in differences(model).items():
        assert far < 1e-5 or (what.endswith("loss") and far < 2e-5), what


def test_embeddings_logits_losses_and_captions_are_open_clips():
    check(ours(WEIGHTS))


def gradients(model, tensors, state):
    """Of the loss, by open_clip's tensors, from which state was converted: one number of each."""
    loss = model.losses(images(), our_texts()).total
    here = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, model.parameters())))
    torch.autograd.backward(list(state.values()), [here[name] for name in state])
    return torch.stack([(tensor.grad * ramp(tensor)).sum() for tensor in tensors.values()])


def check_gradients(lambda_con=0.5):
    tensors = {name: tensor.requires_grad_() for name, tensor in weights(SHAPES).items()}
    state = convert(tensors)
    model = ours(tensors)
    model.config.lambda_con = lambda_con
    recorded = torch.tensor(RECORDED["gradients"])
    assert recorded.all()  # every tensor has its place
    torch.testing.assert_close(gradients(model, tensors, state), recorded, rtol=1e-4, atol=2e-5)


def test_gradients_are_open_clips():
    check_gradients()
    with fails:
        check_gradients(lambda_con=1.0)


# The differences, one by one: each breaks a model


def identity(model, tensors):
    return nn.Identity()


def tensor(name):
    return lambda model, tensors: tensors[name]


def swapped(place):
    return lambda model, tensors: torch.cat(attrgetter(place)(model).chunk(2)[::-1])


CHANGED = {  # a place in the model, and what goes there instead
    "class token without position": ("encoder.cls.data", tensor("visual.class_embedding")),
    "no first norm": ("encoder.first_norm", identity),
    "another GELU": ("encoder.blocks.0.mlp.1", lambda model, tensors: nn.GELU("tanh")),
    "no norm of queries": ("generative_pooler.query.data", tensor("visual.attn_pool.query")),
    "pooler with the decoder's heads": (
        "generative_pooler.attention.heads", lambda model, tensors: model.config.heads),
    "keys and values swapped": ("generative_pooler.attention.kv.weight.data",
                                swapped("generative_pooler.attention.kv.weight")),
    "no projection of images": ("contrastive_pooler", identity),
    "projection of images transposed": ("contrastive_pooler.weight.data", tensor("visual.proj")),
    "no projection of texts": ("unimodal.norm.1", identity),
    "[CLS] without position": ("unimodal.cls.data", tensor("text.cls_emb")),
    "mask not shifted": ("unimodal.correct_mask", lambda model, tensors: True),
    "tokens not renumbered": ("unimodal.token.weight.data", tensor("text.token_embedding.weight")),
    "logits not renumbered": (
        "multimodal.head.weight.data", lambda _, tensors: tensors["text_decoder.text_projection"].T),
    "layers in another order": (
        "multimodal.blocks", lambda model, tensors: model.multimodal.blocks[::-1]),
    "no second MLP": ("multimodal.blocks.0.cross_mlp", lambda *_: torch.zeros_like),
    "no norm of the context": ("multimodal.blocks.0.context_norm", identity),
    "temperature not inverted": ("log_temperature.data", tensor("logit_scale")),
    "sum of both directions": ("config.lambda_con", lambda model, tensors: 1.0),
}


@pytest.mark.parametrize("change", CHANGED)
def test_each_difference_is_needed(change):
    model = ours(WEIGHTS)
    place, make = CHANGED[change]
    owner, name = place.rsplit(".", 1) if "." in place else ("", place)
    owner = attrgetter(owner)(model) if owner else model
    value = make(model, WEIGHTS)
    vars(owner).get("_modules", {}).pop(name, None)  # (also what is no module may take its place)
    setattr(owner, name, value)
    with fails:
        check(model)


def class_token_not_pooled(model, patch):
    model.encoder.register_forward_hook(lambda module, given, tokens: tokens[:, 1:])


def pools(which):
    """which: the pooler's outputs -> what the decoder reads, what becomes the embedding."""
    def break_it(model, patch):
        def pool_image(images):
            context, x = which(model.generative_pooler(model.encoder(images)))
            return context, F.normalize(model.contrastive_pooler(x), dim=-1)

        model.pool_image = pool_image

    return break_it


def cls_at_the_end_of_its_batch(model, patch):
    def embed(tokens):
        x = coca.UnimodalDecoder.embed(model.unimodal, tokens)
        position = WEIGHTS["text.positional_embedding"]
        x[:, -1] += position[tokens.shape[1]] - position[-1]
        return x

    model.unimodal.embed = embed


def hides(token):
    def break_it(model, patch):
        def mask(tokens, correct):
            visible = F.pad(tokens != token, (0, 1), value=True)
            return shifted(tokens, correct) & visible[:, None, None]

        shifted = open_clip.shifted_text_mask
        patch.setattr(open_clip, "shifted_text_mask", mask)

    return break_it


def mask_of_coca(model, patch):
    patch.setattr(open_clip, "shifted_text_mask", lambda tokens, correct: coca.text_mask(tokens))


def pixels_as_in_coca(model, patch):
    patch.setattr(open_clip, "MEAN", torch.tensor(0.5))
    patch.setattr(open_clip, "SPREAD", torch.tensor(0.5))


def no_pad_behind_the_longest(model, patch):
    def forward(tokens):
        x = model.unimodal.embed(tokens)
        mask = open_clip.shifted_text_mask(tokens)
        for block in model.unimodal.blocks:
            x = block(x, mask=mask)
        return x[:, :-1], F.normalize(model.unimodal.norm(x[:, -1]), dim=-1)

    model.unimodal.forward = forward


def mlp_only_behind_both_attentions(model, patch):
    def forward(block, x, context, mask=None, cache=None):
        x = coca.Block.forward(block, x, block.context_norm(context), mask, cache)
        return x + block.cross_mlp(block.cross_mlp_norm(x))

    patch.setattr(open_clip.TwoMLPBlock, "forward", forward)


@pytest.mark.parametrize("break_it", [
    class_token_not_pooled, cls_at_the_end_of_its_batch, mask_of_coca, pixels_as_in_coca,
    no_pad_behind_the_longest, mlp_only_behind_both_attentions,
    pytest.param(pools(lambda x: (x, x[:, 0])), id="decoder_reads_output_0_too"),
    pytest.param(pools(lambda x: (x[:, 1:], x.mean(1))), id="embedding_is_the_mean_output"),
    pytest.param(hides(END), id="end_hidden"), pytest.param(hides(PAD), id="first_pad_hidden"),
])
def test_each_other_way_to_compute_is_caught(break_it, monkeypatch):
    model = ours(WEIGHTS)
    break_it(model, monkeypatch)
    with fails:
        check(model)


def check_correct_mask(correct):
    model = ours(WEIGHTS)
    model.unimodal.correct_mask = correct
    with torch.no_grad():
        found = model.encode_text(our_texts())[:, :6]
    torch.testing.assert_close(found, torch.tensor(RECORDED["corrected"]), rtol=0, atol=1e-5)


def test_correct_mask_is_open_clips_correct_cls_mask():
    check_correct_mask(True)
    with fails:
        check_correct_mask(False)


# Files


def write_vocabulary(folder, pairs=PAIRS):
    """pairs: lines of the vocabulary, the first has number 0."""
    with gzip.open(folder / VOCABULARY, "wt", encoding="utf-8", compresslevel=1) as f:
        f.write("\n".join(["#version: 0.2", *pairs]) + "\n")
    return folder / VOCABULARY


@pytest.fixture
def file(tmp_path):
    """A tiny model as open_clip saves it, the vocabulary beside it."""
    torch.save(WEIGHTS, tmp_path / "open_clip_pytorch_model.bin")
    write_vocabulary(tmp_path)
    return tmp_path / "open_clip_pytorch_model.bin"


def test_a_saved_model_is_read(file):
    model, tokenizer = load_open_clip(file)
    check(model)
    assert isinstance(model, coca.CoCa) and not model.training
    assert (model.config.image_size, model.config.text_len, model.config.n_query) == (32, 9, 5)
    assert len(tokenizer) == model.config.vocab_size == V
    named = {f"module.{name}": tensor for name, tensor in WEIGHTS.items()}
    named["module.logit_scale"] = named["module.logit_scale"].reshape(1)
    torch.save(dict(epoch=3, state_dict=named), file)  # as training saves it
    check(load_open_clip(file)[0])


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("module", [b"numpy._core.", b"numpy.core."])  # of numpy 2, of numpy 1
def test_checkpoints_of_compiled_and_parallel_training_with_numpys_numbers_are_read(
        file, prefix, module):
    named = {prefix + name: tensor for name, tensor in WEIGHTS.items()}
    numbers = [np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True)]
    torch.save(dict(epoch=numbers, state_dict=named), file, _use_new_zipfile_serialization=False)
    with pytest.raises(pickle.UnpicklingError):  # control
        torch.load(file, weights_only=True)
    content = file.read_bytes()
    assert b"numpy._core." in content or b"numpy.core." in content
    file.write_bytes(content.replace(b"numpy._core.", module).replace(b"numpy.core.", module))
    check(load_open_clip(file)[0])
    torch.save(dict(epoch=[*numbers, Bomb()], state_dict=named), file)
    refused("cut off, or no weights", load_open_clip, file)
    with pytest.raises(pytest.fail.Exception):  # control: it would explode
        torch.load(file, weights_only=False)


def test_safetensors_are_read_if_the_package_is_there(file, monkeypatch):
    path = file.with_suffix(".safetensors")
    with monkeypatch.context() as patch:
        path.write_bytes(b"...")
        patch.setitem(sys.modules, "safetensors.torch", None)
        refused("pip install safetensors", load_open_clip, path)
    pytest.importorskip("safetensors.torch").save_file(WEIGHTS, path)
    check(load_open_clip(path)[0])


def without(*starts):
    return {name: tensor for name, tensor in WEIGHTS.items()
            if tensor.dim() < 2 and not name.startswith(starts)}


@pytest.mark.parametrize("content, match", [
    (dict(vocabulary=["a"], model={}, format=2), "a checkpoint of train.py, which eval.py reads"),
    (without("text_decoder.", "text.cls_emb"), "a CLIP"),
    ({"visual.proj": torch.ones(1), "token_embedding.weight": torch.ones(1)}, "a CLIP"),
    (without("text"), "an image encoder alone"),
    ({"cls_token": torch.ones(1), "blocks.0.norm1.bias": torch.ones(1)}, "an image encoder alone"),
    (without(), "a CoCa without a pooler"),
    ({**without("text.cls_emb"), "visual.attn_pool.query": torch.ones(1)}, "another text tower"),
    ({"a": torch.ones(1)}, "a file of other things"),
    ({**WEIGHTS, "text_decoder.cross_attn.0.ls_1.gamma": torch.ones(1)}, "built otherwise"),
    ({**WEIGHTS, "visual.proj": torch.ones(128, 64)}, "built otherwise"),
    ({**WEIGHTS, "epoch": 3}, "built otherwise"),
    ({**WEIGHTS, 3: torch.ones(1)}, "cut off, or no weights"),
    ({**WEIGHTS, "visual.conv1.weight": torch.ones(())}, "built otherwise"),
    ([torch.ones(1)], "cut off, or no weights"),
])
def test_other_files_are_refused_with_what_they_seem_to_be(file, content, match):
    torch.save(content, file)
    refused(match, load_open_clip, file)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
def test_what_cannot_be_read_is_refused(file):
    content = file.read_bytes()
    file.write_bytes(content[:len(content) // 2])
    refused("cut off, or no weights", load_open_clip, file)
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    refused("cut off, or no weights \\(UnpicklingError; 43 bytes\\)", load_open_clip, file)
    torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.ones(1)), file)
    refused("TorchScript archive, as OpenAI's CLIP is", load_open_clip, file)
    file.unlink()
    refused("no such file", load_open_clip, file)


def test_a_vocabulary_that_does_not_fit_is_refused(file):
    write_vocabulary(file.parent, PAIRS[1:])
    refused("it has 524 tokens, but the vocabulary beside it 523", load_open_clip, file)
    for content in (b"no gzip", gzip.compress(b"\xff"), gzip.compress(b"x" * 999)[:-9]):
        file.with_name(VOCABULARY).write_bytes(content)
        refused(f"{VOCABULARY}: .*get it again|save it as UTF-8", load_open_clip, file)
    file.with_name(VOCABULARY).unlink()
    refused("no such file", load_open_clip, file)


# The tokenizer


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """CLIP's vocabulary, but only with the pairs that TEXTS need, each at its place."""
    pairs = [f"{i} {i}" for i in range(48_894)]  # no text has such pieces
    for i, pair in RECORDED["pairs"].items():
        pairs[int(i)] = pair
    return BytePairs(write_vocabulary(tmp_path_factory.mktemp("clip"), pairs))


def check_encodings(tokenizer):
    order = torch.tensor(special_first(len(tokenizer)))
    tokens = tokenizer.encode(TEXTS, 32)
    for row, recorded in zip(tokens, RECORDED["encodings"]):
        assert order[row[row != PAD]].tolist() == recorded


def test_encodings_are_open_clips(clips):
    check_encodings(clips)
    assert len(clips) == 49_408


def test_decoded_texts_are_open_clips(clips):
    for tokens, recorded in zip(clips.encode(TEXTS, 32), RECORDED["decoded"]):
        text = recorded.removeprefix("<start_of_text>").removesuffix("<end_of_text>")
        assert clips.decode(tokens).replace(" ", "") == text.replace(" ", "")
    assert clips.decode(clips.encode([TEXTS[0]], 32)[0]) == TEXTS[0].lower()
    assert clips.decode(clips.encode([TEXTS[2]], 32)[0]).startswith("it's the girls' 3 6 cakes;")


WORD = open_clip.WORD.pattern


@pytest.mark.parametrize("owner, name, wrong", [
    (open_clip, "WORD", re.compile(WORD.replace("'s|'t|", ""))),
    (open_clip, "WORD", re.compile(WORD.replace(r"[\d", r"\d+|[\d"))),
    (open_clip, "WORD", re.compile(WORD.replace(open_clip.NUMBERS, ""))),
    (open_clip, "WORD", re.compile(WORD.replace("|_", ""))),
    (open_clip, "STRAIGHT", {}),
    (open_clip.html, "unescape", str),
    (open_clip.unicodedata, "normalize", lambda form, text: text),
], ids=["'s", "numbers are single", "½ is a number", "_", "quotes", "html", "NFC"])
def test_each_rule_of_the_tokenizer_is_needed(clips, monkeypatch, owner, name, wrong):
    monkeypatch.setattr(clips, "known", {})
    monkeypatch.setattr(owner, name, wrong, raising=False)
    with fails:
        check_encodings(clips)


def test_texts_are_encoded_as_datas_tokenizer_does(tmp_path):
    tokenizer = BytePairs(write_vocabulary(tmp_path))
    assert tokenizer.split("dog") == ["dog</w>"]
    assert tokenizer.split("redo") == ["re", "d", "o</w>"]
    tokens = tokenizer.encode(["Red DOG", "the ring ring ring ring", ""], 5)
    the, ring, red, dog = (tokenizer.index[word] for word in ("the", "ring", "red", "dog"))
    assert tokens.tolist() == [[BEGIN, red, dog, END, PAD], [BEGIN, the, ring, ring, END],
                               [BEGIN, END, PAD, PAD, PAD]]
    assert tokenizer.encode([], 5).shape == (0, 0)
    assert tokenizer.decode(tokens[1].tolist() + [ring]) == "the ring ring"
    assert [tokenizer.words[i] for i in (the, ring)] == ["the", "ring"]


def test_pairs_are_joined_in_the_order_of_the_list(tmp_path):
    first = BytePairs(write_vocabulary(tmp_path, ["a b", "b c</w>", "ab c</w>"]))
    assert first.split("abc") == ["abc</w>"]
    second = BytePairs(write_vocabulary(tmp_path, ["b c</w>", "a b", "ab c</w>"]))
    assert second.split("abc") == ["a", "bc</w>"]


# The command line, and learning


@pytest.fixture
def pictures(tmp_path):
    names = []
    for colour in ("red", "green", "blue"):
        names.append(str(tmp_path / f"{colour}.png"))
        Image.new("RGB", (40, 32), colour).save(names[-1])
    return names


def said_of(pictures, flags, file, capsys):
    main([str(file), "--image", *pictures, *flags.split()])
    out, err = capsys.readouterr()
    assert "does not know" not in err  # byte pairs know all
    return out.splitlines()


def test_captions_labels_and_finds_are_printed(file, pictures, capsys, tmp_path):
    model, tokenizer = load_open_clip(file)
    captions = caption(model, tokenizer, np.stack([read_image(name, 32) for name in pictures]))
    wanted = [f"{name}: {text}" for name, text in zip(pictures, captions)]
    assert said_of(pictures, "", file, capsys) == wanted
    out = said_of(pictures, f"--labels redder ring --json {tmp_path}/scores.json", file, capsys)
    assert sum("%" in line for line in out) == 6
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert sum(scores["labels"][pictures[0]].values()) == pytest.approx(1)
    out = said_of(pictures, "--find ring", file, capsys)
    assert len(out) == 4 and out != said_of(pictures, "--find ring --correct-mask", file, capsys)


def write_captions(folder, pictures):
    rows = [f"{name},a {word} ring,{split}" for name, word, split in
            zip(pictures, ("red", "dog", "the"), ("train", "test", "test"))]
    (folder / "captions.csv").write_text("\n".join(["image,caption,split", *rows]))
    return str(folder)


def test_evaluation_is_that_of_eval(file, pictures, capsys, tmp_path):
    main([str(file), "--data", "captions", "--data-dir", write_captions(tmp_path, pictures)])
    out, err = capsys.readouterr()
    assert re.search(r"image to text R@1 +(0|50|100).00% +50.00%", out)
    assert "BLEU-4" in out and "CIDEr-D" in out
    assert "zero-shot left out" in err


@pytest.mark.parametrize("flags", [[], ["--labels", "a", "b"], ["--data", "coco"],
                                   ["--data", "coco", "--image", "a.png"]])
def test_flags_that_do_not_fit_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        parse_args(["file.bin", *flags])
    assert "error: " in capsys.readouterr().err


def test_the_help_names_the_files(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    out = capsys.readouterr().out
    assert out.count("laion2B-s13B-b90k") == 4 and VOCABULARY in out


def test_the_finetuning_of_the_docstring_learns(file, pictures, tmp_path, monkeypatch):
    """Its lines run as they stand, but for names of files, sizes and the number of steps."""
    code = open_clip.__doc__.split("goes on learning like any other")[1].split("\n\n")[1]
    folder = write_captions(tmp_path, pictures)
    for there, here in (("WEIGHTS", repr(str(file))), ("DIR", repr(folder)), ("size=224", "size=32"),
                        ("text_len, 32)", "text_len, 1)"), ("1000", "3")):
        assert there in code
        code = code.replace(there, here)
    losses = []

    def keep(self, *batch):
        losses.append(coca.CoCa.losses(self, *batch))
        return losses[-1]

    monkeypatch.setattr(OpenClipCoCa, "losses", keep)
    names = dict(torch=torch, load=load, Batches=Batches, load_open_clip=load_open_clip)
    exec(textwrap.dedent(code), names)
    assert len(losses) == 3 and losses[2].cap < losses[0].cap


# Where open_clip is installed


@pytest.fixture(scope="module")
def package():
    pytest.importorskip("transformers")
    return pytest.importorskip("open_clip")


def test_a_public_size_is_open_clips(package):
    theirs = package.create_model("coca_ViT-B-32", load_weights=False).eval()
    shapes = {name: list(tensor.shape) for name, tensor in theirs.state_dict().items()}
    theirs.load_state_dict(weights(shapes))
    model = ours(weights(shapes))
    tokens = package.get_tokenizer("coca_ViT-B-32")(TEXTS[:3])
    order = torch.tensor(special_first(49_408))
    x = images(224)
    with torch.no_grad():
        recorded = theirs(((x + 1) / 2 - MEAN) / SPREAD, tokens, output_labels=False)
        tokens = order.argsort()[tokens]
        torch.testing.assert_close(model.encode_image(x), recorded["image_features"],
                                   rtol=0, atol=1e-5)
        torch.testing.assert_close(model.encode_text(tokens), recorded["text_features"],
                                   rtol=0, atol=1e-5)
        torch.testing.assert_close(logits_of(model, x, tokens), recorded["logits"][..., order],
                                   rtol=0, atol=1e-4)


def test_encodings_with_the_whole_vocabulary_are_open_clips(package):
    from open_clip.tokenizer import default_bpe
    check_encodings(BytePairs(default_bpe()))
