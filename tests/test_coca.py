"""coca.py as a whole: what it prints, a new model's embeddings, and no checkpoint with a gap."""
import ast
import inspect
import math
import re
import runpy
import textwrap
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import fails, holds_unless, refused
from toys import same_tensors, save_checkpoint, toy_checkpoint

import coca
from coca import BEGIN, END, PAD, TABLE_1, UNKNOWN, CoCa, CoCaConfig, text_mask
from eval import load_checkpoint

# python coca.py


def check_tour(out):
    """Shapes, an x where text_mask allows it, losses, and as many parameters as in Table 1."""
    def said(pattern):
        found = re.search(pattern, out)
        assert found, pattern
        return [float(number) for number in found.groups()]

    c = CoCaConfig()
    for what, *shape in (("image tokens", 4, (c.image_size // c.patch_size) ** 2, c.width),
                         ("decoder reads", 4, c.n_query, c.width),
                         ("image embedding x", 4, c.width), ("text embedding y", 4, c.width),
                         ("saw the image", 4, 6, c.width)):
        said(rf"{what} \(.*\) +\({', '.join(map(str, shape))}\)\n")

    words = ["<begin>", "a", "red", "ring", "<end>", "<pad>", "[CLS]"]
    lines = [line.split() for line in out.splitlines()]
    assert words in lines
    mask = text_mask(torch.tensor([[BEGIN, 4, 5, 7, END, PAD]]))[0, 0]
    for word, row, printed in zip(words, mask, lines[lines.index(words) + 1:], strict=False):
        assert printed == [word, *(".x"[may] for may in row)]

    con, of_equal = said(r"contrastive +(\S+) .* = (\S+) for 4 pairs")
    cap, of_equal_words = said(r"captioning +(\S+) .* = (\S+) for 9 tokens")
    expected = [2 * math.log(4), math.log(9) + 0.5]
    assert [of_equal, of_equal_words] == pytest.approx(expected, abs=0.005)
    assert [con, cap] == pytest.approx(expected, rel=0.25)  # no training yet
    for name, (encoder, decoder) in TABLE_1.items():
        counts = said(rf"{name} +encoder +(\S+) \({encoder}\).* decoder +(\S+) \({decoder}\)")
        assert counts == pytest.approx([encoder, decoder], rel=0.08)


def test_python_coca_prints_shapes_the_mask_losses_and_the_counts_of_table_1(capsys):
    runpy.run_path(coca.__file__, run_name="__main__")
    out = capsys.readouterr().out
    check_tour(out)
    lines = out.splitlines(keepends=True)
    facts = [line for line in lines if line.startswith("  ")]
    for fact in facts:
        with fails:  # control: a line left out
            check_tour("".join(line for line in lines if line != fact))


# Embeddings


def over_the_batch(x, dim, normalize=F.normalize):
    return normalize(x, dim=0)


@holds_unless(over_the_batch=mock.patch.object(F, "normalize", over_the_batch),
              not_at_all=mock.patch.object(F, "normalize", lambda x, dim: x))
def test_every_embedding_has_length_1_by_itself(case):
    model, images, tokens = case.example()
    x, y, _ = model(images, tokens)
    for embeddings in (x, y, model.encode_image(images), model.encode_text(tokens)):
        torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(len(images)))


def distance(y):
    """Mean of 1 - cosine over all pairs of embeddings (N, E)."""
    return (1 - y @ y.T).sum() / (len(y) * (len(y) - 1))


@torch.no_grad()
def check_texts_differ(strong=()):
    """At the start other words, and the same words in another order, make another embedding."""
    torch.manual_seed(0)
    model = CoCa(CoCaConfig(vocab_size=64))
    for name in strong:
        model.unimodal.get_parameter(name).mul_(50)
    words = torch.randint(UNKNOWN + 1, 64, (8, 10))
    orders = torch.stack([words[0, torch.randperm(10)] for _ in range(8)])
    assert distance(model.encode_text(words)) > 0.2
    assert distance(model.encode_text(orders)) > 0.05


def test_at_the_start_text_embeddings_differ_by_words_and_by_their_order():
    check_texts_differ()


@pytest.mark.parametrize("name", ["cls", "position", "token.weight"])
def test_control_one_of_three_drowns_the_others_if_it_starts_with_a_spread_of_1(name):
    """As torch's own embeddings do. All three start at 0.02: [CLS], and the words and positions."""
    with fails:
        check_texts_differ([name])


# Checkpoints


def lenient(self, weights, load=CoCa.load_state_dict, **how):
    return load(self, weights, strict=False)


@pytest.mark.parametrize("name", ["log_temperature", "unimodal.cls", "multimodal.head.weight"])
def test_a_checkpoint_that_lacks_a_tensor_is_refused(name, tmp_path):
    path = tmp_path / "checkpoint.pt"
    model, tokenizer, settings = toy_checkpoint()
    save_checkpoint(path, model, tokenizer, settings)
    assert same_tensors(load_checkpoint(path)[0], model)  # control
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["model"][name]
    torch.save(checkpoint, path)
    refused(path.name, load_checkpoint, path)
    with mock.patch.object(CoCa, "load_state_dict", lenient), pytest.raises(pytest.fail.Exception):
        refused(path.name, load_checkpoint, path)  # control: the gap is left as it is


def without_docstring(function):
    """Its source, indented as at the top level."""
    lines = inspect.getsource(function).splitlines()
    node = ast.parse(textwrap.dedent("\n".join(lines))).body[0]
    docstring = node.body[0]
    kept = lines[:docstring.lineno - 1] + lines[docstring.end_lineno:]
    return textwrap.dedent("\n".join(kept))


def test_the_readme_prints_the_forward_pass_and_the_losses_as_they_are():
    page = (Path(coca.__file__).parent / "README.md").read_text(encoding="utf-8")
    code = [without_docstring(coca.CoCa.forward), without_docstring(coca.CoCa.losses)]
    assert "```python\n" + "\n\n".join(code) + "\n```" in page
