"""What is timed and counted is what it says: a step, its work, captions, Eq. (2)."""
import functools
import re

import torch
import torch.nn.functional as F
from helpers import CONTROL, fails, words_of

import train
from coca import END, CoCa, contrastive_loss
from experiments import bench


def test_a_step_is_measured(monkeypatch, capsys):
    config = CONTROL.config()
    monkeypatch.setitem(bench.CONFIGS, "small", config)
    monkeypatch.setattr(bench, "peak_flops", functools.partial(bench.peak_flops, size=64))
    bench.main(["step", "--config", "small", "--device", "cpu", "--batch-size", "2"])
    out, err = capsys.readouterr()
    assert re.search(r"kept for backward (\S+) MiB, with --grad-checkpoint", out)
    for what in ("a product of matrices", "small, a step of 2 images", "small, captioning 1 images"):
        assert f"timing {what}: " in err
    bench.main(["grow", "--config", "small", "--device", "cpu"])
    out, err = capsys.readouterr()
    assert "timing small, a step with vocab_size 26: " in err
    assert [line.split()[0] for line in out.splitlines()] == ["batch", "image_size", "text_len",
                                                              "vocab_size"]
    assert "image_size   4: " in out and ", 16: " in out
    assert bench.bytes_kept(config, 2, "cpu", True) < bench.bytes_kept(config, 2, "cpu", False)
    model, step = bench.training(config, 2, "cpu")
    before = model.unimodal.cls.clone()
    assert step()[0] == 0
    assert step()[0] == 1
    assert not torch.equal(model.unimodal.cls, before)


def test_the_work_of_a_step_is_counted_an_image():
    config = CONTROL.config()
    for batch in (16, 32):
        _, step = bench.training(config, batch, "cpu")
        counted = bench.flops_of(step) / batch
        assert abs(bench.flops_an_image(config, "cpu") / counted - 1) < 0.15


@torch.no_grad()
def end_at_once(model):
    """From now on <end> is always the likeliest token, and word 5 the next."""
    model.multimodal.norm.weight.zero_()
    model.multimodal.norm.bias.fill_(1.0)
    model.multimodal.head.weight.zero_()
    model.multimodal.head.weight[5] = 1.0
    model.multimodal.head.weight[END] = 2.0


def check_full_length(tokens):
    assert tokens.shape[1] == CONTROL.config().text_len and words_of(tokens).all()


def test_captions_are_timed_at_full_length_though_the_model_would_end_them(monkeypatch):
    model = CONTROL.model()
    end_at_once(model)
    with fails:  # control
        check_full_length(model.generate(CONTROL.images()))
    train_as_usual, generate_as_usual = bench.training, CoCa.generate
    written = []

    def training(*args):
        model, step = train_as_usual(*args)
        end_at_once(model)
        return model, step

    def generate(*args, **how):
        written.append(generate_as_usual(*args, **how))

    monkeypatch.setattr(bench, "training", training)
    monkeypatch.setattr(CoCa, "generate", generate)
    monkeypatch.setattr(bench, "flops_an_image", lambda *args: 1.0)
    monkeypatch.setattr(bench, "peak_flops", lambda device: (1.0, torch.float32))
    monkeypatch.setitem(bench.CONFIGS, "small", CONTROL.config())
    bench.bench_step("small", "cpu", 2, [])
    assert {len(tokens) for tokens in written} == {1, 16, 64}
    for tokens in written:
        check_full_length(tokens)


def test_the_query_of_a_video_is_weighed_against_the_encoder(monkeypatch, capsys):
    config = CONTROL.config()  # width 16, one layer with an MLP of 64, 4 patches of 48 numbers
    monkeypatch.setitem(bench.CONFIGS, "small", config)
    bench.main(["query", "--config", "small", "--device", "cpu"])
    out, err = capsys.readouterr()
    assert "timing small, the query: " in err and "timing small, the encoder: " in err
    tokens = 32 * 4
    encoder = tokens * (48 * 16 + 4 * 16**2 + 2 * 4 * 16 + 2 * 16 * 64)  # multiplications
    query = 4 * 2 * 16**2 + tokens * (2 * 16**2 + 2 * 16)
    assert f"takes {query / encoder:.1%} of the encoder's" in out


def test_blocks_of_rows_add_up_to_the_contrastive_loss(monkeypatch, capsys):
    N = 12
    torch.manual_seed(0)
    x = F.normalize(torch.randn(N, 4), dim=-1).requires_grad_()
    y = F.normalize(torch.randn(N, 4), dim=-1)
    loss = contrastive_loss(x, y, 0.07, torch.arange(N))
    loss.backward()
    shown = f"loss {loss:.4f}, gradient norm {x.grad.norm():.6f}"
    monkeypatch.setattr(train, "BLOCK", 5 * N)  # blocks of 5, 5 and 2 rows
    bench.contrastive_worker(0, 1, None, N, 4)
    out, err = capsys.readouterr()
    assert shown in out and "timing 12 pairs, 1 processes: " in err
    monkeypatch.setattr(bench, "contrastive_loss", lambda *given: 2 * contrastive_loss(*given))
    bench.contrastive_worker(0, 1, None, N, 4)
    with fails:  # control
        assert shown in capsys.readouterr().out
