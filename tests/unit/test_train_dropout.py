"""Dropout by hash: the right share, independent masks, the same again in the backward pass."""

# ruff: noqa: TID253
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from sftplan.train.dropout import HashedDropout, Seeds, hash_dropouts

ROWS, WIDTH, P = 512, 1280, 0.1


class Model(nn.Module):
    """Two blocks, each with a dropout that drops and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Dropout(P), nn.Dropout(0.0)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def dropped(dropout: HashedDropout) -> torch.Tensor:
    """1 where an element of ones was dropped."""
    out: torch.Tensor = dropout(torch.ones(ROWS, WIDTH))
    return (out == 0).float()


def pair() -> tuple[HashedDropout, HashedDropout, Seeds]:
    torch.manual_seed(5)
    one, two = HashedDropout(P), HashedDropout(P)
    return one, two, Seeds([one, two], torch.device("cpu"))


def test_drops_its_share_evenly_over_rows_and_columns() -> None:
    one, _, seeds = pair()
    seeds.draw(one, None)
    mask = dropped(one)
    error = (P * (1 - P)) ** 0.5
    assert abs(float(mask.mean()) - P) < 5 * error / (ROWS * WIDTH) ** 0.5
    assert float(mask.mean(dim=1).std()) == pytest.approx(error / WIDTH**0.5, rel=0.15)
    assert float(mask.mean(dim=0).std()) == pytest.approx(error / ROWS**0.5, rel=0.15)
    kept = one(torch.full((ROWS, WIDTH), 3.0))
    assert float(kept.max()) == pytest.approx(3.0 / (1 - P))


def test_masks_of_passes_dropouts_and_neighbours_are_independent() -> None:
    one, two, seeds = pair()
    seeds.draw(one, None)
    first, other = dropped(one).flatten(), dropped(two).flatten()
    seeds.draw(one, None)
    later = dropped(one).flatten()
    pairs = [(first, other), (first, later)]
    pairs += [(first[:-lag], first[lag:]) for lag in (1, 2, 4, 16, WIDTH, WIDTH + 1)]
    for a, b in pairs:
        correlation = float(((a - P) * (b - P)).mean()) / (P * (1 - P))
        assert abs(correlation) < 5 / a.numel() ** 0.5


def test_the_backward_pass_sees_the_mask_of_the_forward_pass() -> None:
    one, _, seeds = pair()
    seeds.draw(one, None)
    x = torch.ones(ROWS, WIDTH, requires_grad=True)
    out = one(x)
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, out.detach())


def test_only_what_drops_in_the_blocks_is_taken_and_evaluation_keeps_all() -> None:
    model = Model()
    names = set(model.state_dict())
    hash_dropouts(model, list(model.blocks))
    kinds = [type(m) for m in model.modules() if isinstance(m, nn.Dropout)]
    assert kinds == [HashedDropout, nn.Dropout, HashedDropout, nn.Dropout]
    assert set(model.state_dict()) == names
    x = torch.ones(64, 8)
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
        torch.manual_seed(1)
        once = model(x)
        torch.manual_seed(1)
        torch.testing.assert_close(model(x), once, rtol=0, atol=0)
        model.eval()
        torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)


def opt(*, norm_first: bool) -> OPTForCausalLM:
    """Two blocks that drop by functions; nothing drops beside them."""
    config = OPTConfig(
        vocab_size=64, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, dropout=P, attention_dropout=0.0,
        layerdrop=0.0, do_layer_norm_before=norm_first, use_cache=False,
    )  # fmt: skip
    return OPTForCausalLM(config)


IDS = torch.arange(64).view(2, 32)


@pytest.mark.parametrize("norm_first", [True, False])
def test_what_blocks_of_opt_drop_by_functions_is_dropped_by_hash(norm_first: bool) -> None:
    model = opt(norm_first=norm_first)
    names = set(model.state_dict())
    expected = model.eval()(input_ids=IDS).logits
    blocks = list(model.model.decoder.layers)
    hash_dropouts(model.model.decoder, blocks)
    found = [m for m in model.modules() if isinstance(m, HashedDropout)]
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)
    model.train()
    once, again = (model(input_ids=IDS).logits for _ in range(2))
    for dropout in found:
        dropout.eval()

    assert [dropout.p for dropout in found] == [P] * 4
    assert set(model.state_dict()) == names
    assert not torch.equal(once, again)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)  # nothing else drops


def test_attention_and_mlp_of_opt_drop_what_they_give() -> None:
    model = opt(norm_first=True)
    blocks = list(model.model.decoder.layers)
    hash_dropouts(model.model.decoder, blocks)
    model.train()(input_ids=IDS)
    block = blocks[0]
    attended, _ = block.self_attn(torch.randn(2, 32, 32))
    fed = block.fc2(torch.randn(64, 64))

    for out in (attended, fed):
        assert float((out == 0).float().mean()) == pytest.approx(P, abs=0.03)


@pytest.mark.filterwarnings("default")  # the compiler itself warns
@pytest.mark.parametrize("name", ["modules", "functions"])
def test_a_compiled_block_keeps_no_mask(name: str) -> None:
    model: Any = Model() if name == "modules" else opt(norm_first=True)
    runner = model if name == "modules" else model.model.decoder
    blocks = list(model.blocks if name == "modules" else runner.layers)
    hash_dropouts(runner, blocks)
    for block in blocks:
        block.forward = torch.compile(
            block.forward, dynamic=False, backend="aot_eager_decomp_partition"
        )
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.ones(64, 8, requires_grad=True) if name == "modules" else IDS)
    assert kept
    assert all(t.dtype not in (torch.bool, torch.uint8) for t in kept)


def test_a_model_that_had_shapes_alone_draws_where_it_comes_to_be() -> None:
    with torch.device("meta"):
        model = Model()
    hash_dropouts(model, list(model.blocks))
    model.to_empty(device="cpu")
    model.train()(torch.ones(4, 8))
    seeds = [m.seed for m in model.modules() if isinstance(m, HashedDropout)]

    assert {seed.device.type for seed in seeds} == {"cpu"}
    assert len({int(seed) for seed in seeds}) == len(seeds) == 2
