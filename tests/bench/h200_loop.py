"""The plain training loop of the truth table: public shapes, one case, its memory and step time.

`python h200_loop.py OUT.csv default|expandable|fresh [--tiny]` measures the held-out or the fresh cases, all in one process.
"""

from __future__ import annotations

import csv
import gc
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def llama_like(
    d: int, ffn: int, layers: int, heads: int, kv: int, vocab: int, **rest: Any
) -> dict[str, Any]:
    """Keyword arguments shared by the Llama-like configuration classes."""
    return {
        "hidden_size": d, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocab, **rest,
    }  # fmt: skip


def gpt2(d: int, layers: int, heads: int) -> dict[str, Any]:
    """Keyword arguments of one GPT-2 size."""
    return {"n_embd": d, "n_layer": layers, "n_head": heads}


def opt(d: int, ffn: int, layers: int, heads: int) -> dict[str, Any]:
    """Keyword arguments of one OPT size."""
    return {
        "hidden_size": d,
        "ffn_dim": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "word_embed_proj_dim": d,
    }


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", gpt2(768, 12, 12)),
    "gpt2-large": ("GPT2Config", gpt2(1280, 36, 20)),
    "gpt2-xl": ("GPT2Config", gpt2(1600, 48, 25)),
    "tinyllama-1.1b": ("LlamaConfig", llama_like(2048, 5632, 22, 32, 4, 32000)),
    "llama-3.2-1b": ("LlamaConfig", llama_like(
        2048, 8192, 16, 32, 8, 128256, head_dim=64, tie_word_embeddings=True, max_position_embeddings=131072)),
    "smollm2-360m": ("LlamaConfig", llama_like(
        960, 2560, 32, 15, 5, 49152, tie_word_embeddings=True, max_position_embeddings=8192)),
    "qwen2.5-0.5b": ("Qwen2Config", llama_like(896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True)),
    "qwen3-0.6b": ("Qwen3Config", llama_like(1024, 3072, 28, 16, 8, 151936, head_dim=128, tie_word_embeddings=True)),
    "gemma-2b": ("GemmaConfig", llama_like(2048, 16384, 18, 8, 1, 256000, head_dim=256)),
    "gemma-2-2b": ("Gemma2Config", llama_like(2304, 9216, 26, 8, 4, 256000, head_dim=256)),
    "gemma-3-1b": ("Gemma3TextConfig", llama_like(
        1152, 6912, 26, 4, 1, 262144, head_dim=256, sliding_window=512, query_pre_attn_scalar=256)),
    "pythia-410m": ("GPTNeoXConfig", {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 50304}),
    "opt-125m": ("OPTConfig", opt(768, 3072, 12, 12)),
    "opt-1.3b": ("OPTConfig", opt(2048, 8192, 24, 32)),
    "phi-2": ("PhiConfig", llama_like(2560, 10240, 32, 32, 32, 51200)),
    "phi-3-mini": ("Phi3Config", llama_like(3072, 8192, 32, 32, 32, 32064)),
    "qwen3-30b-a3b": ("Qwen3MoeConfig", llama_like(
        2048, 6144, 48, 32, 4, 151936, head_dim=128, num_experts=8, num_experts_per_tok=8, moe_intermediate_size=768)),
    "mixtral": ("MixtralConfig", llama_like(4096, 1024, 32, 32, 8, 32000, num_local_experts=8)),
}  # fmt: skip
NARROW = {"n_embd": 64, "n_head": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1,
          "ffn_dim": 96, "word_embed_proj_dim": 64, "head_dim": 32, "vocab_size": 500, "moe_intermediate_size": 32}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One row: what is trained and how."""

    model: str
    seq: int
    mb: int
    prec: str
    ckpt: int = 0
    attn: str = "sdpa"
    accum: int = 1
    clip: float = 0
    layers: int | None = None


HELD_OUT = [
    Case(*row) for row in [
        ("gpt2", 1024, 16, "amp"), ("gpt2", 1024, 16, "bf16", 1), ("gpt2", 512, 4, "amp"), ("gpt2", 512, 4, "bf16"),
        ("gpt2", 256, 2, "amp"), ("gpt2", 1024, 4, "amp", 0, "eager"), ("gpt2-large", 1024, 2, "amp"),
        ("gpt2-large", 1024, 2, "bf16", 1), ("gpt2-large", 1024, 3, "amp", 1), ("gpt2-large", 1024, 3, "bf16"),
        ("gpt2-large", 512, 8, "amp"), ("gpt2-large", 1024, 2, "fp32"), ("gpt2-xl", 1024, 1, "amp"),
        ("gpt2-xl", 1024, 1, "bf16"), ("gpt2-xl", 1024, 1, "amp", 1), ("gpt2-xl", 1024, 1, "bf16", 1),
        ("gpt2-xl", 1024, 2, "amp"), ("gpt2-xl", 1024, 2, "bf16", 1), ("qwen2.5-0.5b", 1024, 2, "amp"),
        ("qwen2.5-0.5b", 1024, 4, "bf16"), ("qwen2.5-0.5b", 2048, 2, "bf16", 1), ("qwen2.5-0.5b", 2048, 2, "amp", 1),
        ("qwen2.5-0.5b", 1024, 2, "amp", 0, "sdpa", 3, 1.0), ("qwen3-0.6b", 1024, 4, "bf16", 1), ("qwen3-0.6b", 1024, 2, "amp"),
        ("llama-3.2-1b", 2048, 1, "amp"), ("llama-3.2-1b", 2048, 2, "bf16"), ("llama-3.2-1b", 1024, 1, "bf16", 1),
        ("tinyllama-1.1b", 2048, 2, "amp"), ("tinyllama-1.1b", 1024, 1, "fp32"), ("tinyllama-1.1b", 1024, 2, "fp16amp"),
        ("smollm2-360m", 1024, 4, "bf16"), ("pythia-410m", 1024, 4, "amp"), ("opt-125m", 1024, 4, "amp"),
        ("opt-1.3b", 1024, 4, "bf16"), ("phi-2", 1024, 1, "bf16"), ("gemma-2b", 1024, 1, "bf16"), ("gemma-3-1b", 1024, 1, "amp"),
    ]
]  # fmt: skip
# Never looked at while the tape was written: other models, lengths and batches, measured on 2026-11-24.
FRESH = [
    Case(*row) for row in [
        ("gpt2-medium", 768, 6, "amp"), ("gpt2-medium", 1024, 3, "bf16", 1), ("gpt2-medium", 384, 12, "fp32"),
        ("gpt2-large", 640, 5, "amp"), ("gpt2-large", 896, 6, "bf16", 1), ("gpt2-large", 320, 16, "bf16"),
        ("gpt2-xl", 768, 3, "amp", 1), ("gpt2-xl", 512, 4, "bf16"), ("gpt2", 1024, 12, "bf16", 1), ("gpt2", 896, 6, "fp16amp"),
        ("qwen2.5-1.5b", 1536, 1, "amp", 1), ("qwen2.5-1.5b", 1024, 3, "bf16"), ("qwen2.5-0.5b", 3072, 1, "amp"),
        ("qwen3-1.7b", 1536, 2, "bf16", 1), ("llama-3.2-3b", 1024, 2, "bf16", 1), ("llama-3.2-1b", 1536, 3, "amp", 1),
        ("smollm2-135m", 2048, 3, "amp"), ("smollm2-1.7b", 1024, 2, "bf16"), ("tinyllama-1.1b", 1536, 3, "bf16"),
        ("tinyllama-1.1b", 768, 2, "amp", 0, "sdpa", 2, 1.0), ("pythia-1b", 1024, 3, "bf16", 1), ("pythia-160m", 768, 8, "amp"),
        ("opt-1.3b", 768, 2, "amp", 1), ("opt-125m", 512, 16, "bf16"), ("phi-1.5", 1024, 2, "amp", 1), ("phi-3-mini", 768, 1, "bf16"),
        ("gemma-2b", 768, 2, "amp", 1), ("gemma-2-2b", 1024, 1, "amp", 0, "eager"), ("gemma-3-1b", 1536, 2, "bf16", 1),
        ("qwen2.5-0.5b", 768, 3, "fp32", 1),
    ]
]  # fmt: skip
EXPANDABLE = [HELD_OUT[i] for i in (0, 8, 10, 12, 15, 19, 23, 26, 28, 35)]


def config(case: Case, tiny: bool = False) -> Any:
    """The transformers configuration of a case."""
    if case.model not in SHAPES:
        from sftplan.facts.catalogue import builtin
        from sftplan.train.model import config_of

        built = config_of(builtin(case.model))
        built.use_cache = False
        return built
    cls, kwargs = SHAPES[case.model]
    kwargs = dict(kwargs)
    if case.layers:
        kwargs["n_layer" if "n_layer" in kwargs else "num_hidden_layers"] = case.layers
    if tiny:
        kwargs |= {k: v for k, v in NARROW.items() if k in kwargs}
    built = getattr(transformers, cls)(**kwargs)
    built.use_cache = False
    return built


def build(case: Case, tiny: bool = False) -> Any:
    """The model on the device, in training mode."""
    dtype = torch.bfloat16 if case.prec == "bf16" else torch.float32
    with torch.device(DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(
            config(case, tiny), dtype=dtype, attn_implementation=case.attn
        )
    if case.ckpt:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def clean() -> None:
    """Hand everything back to the device: garbage, cached blocks, cuBLAS workspaces."""
    gc.collect()
    if CUDA:
        torch.cuda.synchronize()
        getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class Step:
    """The plain loop's step over one fixed random batch."""

    def __init__(self, case: Case, model: Any, tiny: bool = False) -> None:
        self.case, self.model = case, model
        self.seq = 32 if tiny else case.seq
        self.ids = torch.randint(0, model.config.vocab_size, (case.mb, self.seq), device=DEVICE)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        self.scaler = torch.amp.GradScaler(DEVICE) if case.prec == "fp16amp" else None
        self.dtype = {"amp": torch.bfloat16, "fp16amp": torch.float16}.get(case.prec)

    def __call__(self, mark: Any = lambda name: None) -> None:
        """Accumulate, clip, update, clear; `mark(name)` is called at each border."""
        case, scaler = self.case, self.scaler
        for _ in range(case.accum):
            with torch.autocast(
                DEVICE, dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None
            ):
                loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
            if case.accum > 1:
                loss = loss / case.accum
            mark("forward")
            (scaler.scale(loss) if scaler else loss).backward()
            mark("backward")
        if case.clip:
            if scaler:
                scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), case.clip)
            mark("clip")
        if scaler:
            scaler.step(self.optimizer)
            scaler.update()
        else:
            self.optimizer.step()
        mark("optimizer")
        self.optimizer.zero_grad(set_to_none=True)
        mark("zero_grad")


def nvml_used() -> int:
    """Bytes in use on the whole device."""
    if not CUDA:
        return 0
    import pynvml

    pynvml.nvmlInit()
    return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)


def stat(name: str) -> int:
    """One of torch.cuda's memory readings, 0 without a GPU."""
    return int(getattr(torch.cuda, name)()) if CUDA else 0


def measure(case: Case, idle: int, tiny: bool) -> dict[str, Any]:
    """Peaks and the median step time of one case."""
    clean()
    base, context = stat("memory_allocated"), nvml_used() - idle - stat("memory_reserved")
    model = build(case, tiny)
    row = {
        "params": sum(p.numel() for p in model.parameters()),
        "model_bytes": stat("memory_allocated") - base,
        "context": context,
    }
    step, times = Step(case, model, tiny), []
    peaks: list[int] = []
    for number in range(6 if case.accum > 1 else 8):
        if CUDA:
            torch.cuda.synchronize()
        start = time.perf_counter()
        if number:
            step()
        else:
            step(lambda name: peaks.append(stat("max_memory_allocated")))
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        row.setdefault("peak_alloc_first", stat("max_memory_allocated"))
        row.setdefault("peak_alloc_first_backward", peaks[2 * case.accum - 1])
    return row | {
        "peak_alloc": stat("max_memory_allocated"), "peak_reserved": stat("max_memory_reserved"), "nvml_used": nvml_used(),
        "step_s": f"{statistics.median(times[3:8]):.5f}", "step_min_s": f"{min(times[3:8]):.5f}", "status": "ok",
    }  # fmt: skip


COLUMNS = ["model", "seq", "mb", "prec", "ckpt", "attn", "cap_gib", "compile", "params", "peak_alloc_first", "peak_alloc", "peak_reserved", "nvml_used", "context", "model_bytes", "step_s", "status", "accum", "clip", "allocator", "peak_alloc_first_backward", "step_min_s"]  # fmt: skip


def main() -> None:
    """Measure the held-out cases and append each row as it is known."""
    out, allocator, tiny = Path(sys.argv[1]), sys.argv[2], "--tiny" in sys.argv
    deadline = (
        time.time() + float(sys.argv[sys.argv.index("--seconds") + 1])
        if "--seconds" in sys.argv
        else 1e18
    )
    idle = nvml_used()
    if CUDA:
        torch.zeros(1, device=DEVICE)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="")
        writer.writeheader()
        for case in {"expandable": EXPANDABLE, "fresh": FRESH}.get(allocator, HELD_OUT):
            if time.time() > deadline:
                print("deadline: stopped before", case)
                break
            try:
                row = measure(case, idle, tiny)
            except Exception as error:
                row = {"status": f"{type(error).__name__}: {str(error)[:120]}"}
            writer.writerow(
                asdict(case)
                | row
                | {
                    "compile": 0,
                    "cap_gib": "",
                    "allocator": allocator.replace("fresh", "default"),
                    "clip": case.clip or 0,
                }
            )
            file.flush()
            if row["status"] != "ok":
                print(case, row["status"])
    print(f"idle {idle}")


if __name__ == "__main__":
    main()
