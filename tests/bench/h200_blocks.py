"""What the host pays for one transformer block and for the optimizer's calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
import transformers
from h200_timing import AMP, CUDA, DEVICE, TINY, host, wait
from torch.utils.checkpoint import checkpoint


def block_of(kind: str, dtype: torch.dtype) -> tuple[torch.nn.Module, Callable[..., Any], int]:
    """One transformer block, how to call it, its width."""
    if kind == "GPT2Block":
        from transformers.models.gpt2.modeling_gpt2 import GPT2Block

        cfg = transformers.GPT2Config(n_embd=64 if TINY else 1280, n_head=2 if TINY else 20)
        cfg._attn_implementation = "sdpa"
        block: Any = GPT2Block(cfg, layer_idx=0).to(DEVICE, dtype).train()
        return block, lambda x: block(x), cfg.n_embd
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    cfg = transformers.LlamaConfig(hidden_size=64 if TINY else 2048, intermediate_size=5632, num_attention_heads=2 if TINY else 32,
                                   num_key_value_heads=1 if TINY else 4, vocab_size=32000)  # fmt: skip
    cfg._attn_implementation = "sdpa"
    block = LlamaDecoderLayer(cfg, 0).to(DEVICE, dtype).train()
    rotary = LlamaRotaryEmbedding(cfg).to(DEVICE)
    made: dict[int, Any] = {}

    def call(x: torch.Tensor) -> Any:
        if x.shape[1] not in made:
            made[x.shape[1]] = rotary(x, torch.arange(x.shape[1], device=DEVICE)[None])
        return block(x, position_embeddings=made[x.shape[1]])

    return block, call, cfg.hidden_size


def first(out: Any) -> torch.Tensor:
    """The hidden states of a block's output."""
    return out[0] if isinstance(out, tuple) else out


def blocks() -> Iterator[tuple[str, torch.nn.Module, torch.Tensor, Callable[..., torch.Tensor]]]:
    """Each block, precision and row length: its name, the block, its input, its forward pass."""
    for kind, name in product(("GPT2Block", "LlamaDecoderLayer"), ("fp32", "bf16", "autocast")):
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        block, call, width = block_of(kind, dtype)
        for rows in (64,) if TINY else (64, 1024):
            x = torch.randn(1, rows, width, device=DEVICE, dtype=dtype, requires_grad=True)

            def forward(
                wrap: bool = False,
                x: torch.Tensor = x,
                call: Any = call,
                cast: bool = name == "autocast",
                **kw: Any,
            ) -> torch.Tensor:
                with torch.autocast(**AMP, enabled=cast):
                    return first(
                        checkpoint(call, x, use_reentrant=False, **kw) if wrap else call(x)
                    )

            yield f"{kind} {name} {rows} tokens", block, x, forward


def block_rows() -> Iterator[tuple[str, str, float]]:
    """Host seconds of one block alone: forward, backward, plain and checkpointed."""
    variants: tuple[tuple[str, bool, dict[str, Any]], ...] = (
        ("plain", False, {}),
        ("checkpointed", True, {}),
        ("checkpointed, no rng", True, {"preserve_rng_state": False}),
    )
    for title, block, x, forward in blocks():
        for label, wrap, kw in variants:
            clocks: list[tuple[float, ...]] = []
            for _ in range(3 if TINY else 40):
                block.zero_grad(set_to_none=True)
                x.grad = None
                wait()
                t0 = time.perf_counter()
                y = forward(wrap, **kw)
                t1 = time.perf_counter()
                up = torch.ones_like(y)
                wait()
                t2 = time.perf_counter()
                y.backward(up)
                t3 = time.perf_counter()
                wait()
                clocks.append((t1 - t0, t3 - t2, time.perf_counter() - t2))
            for at, what in enumerate(("forward", "backward", "backward until the GPU is done")):
                yield f"{title} {label}", what, statistics.median(c[at] for c in clocks)


def block_counts() -> Iterator[tuple[str, str, float]]:
    """Operators, launches and autograd nodes of one block. Last: a profiler slows whatever follows it."""
    for title, _, _, forward in blocks():
        for what in ("forward", "backward"):
            y = forward()
            up = torch.ones_like(y)
            wait()
            with torch.profiler.profile() as profile:
                forward() if what == "forward" else y.backward(up)
                wait()
            counts = {e.key: e.count for e in profile.key_averages()}
            for name, mark in (
                ("aten calls (all depths)", "aten::"),
                ("kernel launches", "LaunchKernel"),
                ("autograd nodes", "autograd::engine::evaluate_function"),
            ):
                total = sum(c for k, c in counts.items() if mark in k)
                yield f"{title} count", f"{what}: {name}", total


def list_rows() -> Iterator[tuple[str, str, float]]:
    """The optimizer's calls per 100 tensors."""
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for count in (100, 400):
            parameters = [
                torch.randn(64, 64, device=DEVICE).to(dtype).requires_grad_() for _ in range(count)
            ]
            grads = [torch.randn_like(p) for p in parameters]
            optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

            def give(parameters: Any = parameters, grads: Any = grads) -> None:
                for p, g in zip(parameters, grads, strict=True):
                    p.grad = g

            give()
            group = f"{count} tensors {name}, per 100"
            few = 3 if TINY else 50
            yield group, "AdamW fused step", host(optimizer.step, few, 5) * 100 / count
            yield (
                group,
                "clip_grad_norm_",
                host(lambda ps=parameters: torch.nn.utils.clip_grad_norm_(ps, 1.0), few, 5)
                * 100
                / count,
            )
            with_giving, giving = (
                host(lambda o=optimizer, g=give: (g(), o.zero_grad(set_to_none=True)), few, 5),
                host(give, few, 5),
            )
            yield group, "zero_grad to none", (with_giving - giving) * 100 / count
            if name == "fp32" and CUDA:
                scaler = torch.amp.GradScaler(DEVICE)
                loss = scaler.scale(torch.ones((), device=DEVICE))
                clocks = []
                for _ in range(20):
                    give()
                    wait()
                    t0 = time.perf_counter()
                    scaler.scale(loss)
                    t1 = time.perf_counter()
                    scaler.unscale_(optimizer)
                    t2 = time.perf_counter()
                    scaler.step(optimizer)
                    t3 = time.perf_counter()
                    scaler.update()
                    clocks.append((t1 - t0, t2 - t1, t3 - t2, time.perf_counter() - t3))
                for at, what in enumerate(
                    ("scale", "unscale_", "step (waits for the GPU)", "update")
                ):
                    yield (
                        group,
                        f"GradScaler {what}",
                        statistics.median(c[at] for c in clocks) * 100 / count,
                    )
