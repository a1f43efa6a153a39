"""The terms that `sftplan explain` knows.

Symbols: L layers, T sequence length, d hidden size, d_a = heads x head size, V vocabulary, b rows
per forward pass, N parameters, n GPUs. A multiply and an add are two FLOPs.

References:
    [PALM]  Chowdhery et al. 2022, arXiv:2204.02311, appendix B: FLOPs per token and MFU.
    [ZERO]  Rajbhandari et al. 2020, arXiv:1910.02054.
    [OFFL]  Ren et al. 2021, arXiv:2101.06840.
    [CKPT]  Chen et al. 2016, arXiv:1604.06174.
    [FLASH] Dao et al. 2022, arXiv:2205.14135.
    [ROOF]  Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785.
    [ADAM]  Kingma and Ba 2015, arXiv:1412.6980; Loshchilov and Hutter 2019, arXiv:1711.05101.
    [CCA]   PyTorch, c10/cuda/CUDACachingAllocator.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One word of the plan: `where` names the code that computes it."""

    name: str
    summary: str
    formula: str
    source: str
    where: str


def _term(name: str, summary: str, formula: str, source: str, where: str) -> tuple[str, Term]:
    return name, Term(name=name, summary=summary, formula=formula, source=source, where=where)


TERMS: dict[str, Term] = dict(
    [
        _term(
            "parameters",
            "how many numbers the model learns",
            "the sum over weight tensors of the product of their sizes; a tied head counts once",
            "counted tensor by tensor, as transformers builds the model",
            "sftplan/facts/params.py",
        ),
        _term(
            "weights",
            "bytes of the parameters on the GPU",
            "N x bytes per weight: 4 in fp32, fp16-mixed and bf16-mixed, 2 in bf16-master and "
            "bf16-true; over n with ZeRO-3",
            "[ZERO] section 3.1",
            "sftplan/step",
        ),
        _term(
            "gradients",
            "bytes of the gradients that are alive at the peak",
            "N x bytes per weight when all have been computed; over n with ZeRO-2 and 3. During "
            "backward they grow while activations shrink",
            "[ZERO] section 3.1",
            "sftplan/step",
        ),
        _term(
            "optimizer",
            "bytes of AdamW's states",
            "8 N: two fp32 moments per parameter; 10 N in bf16-master, with 16 bits that make bf16 "
            "weights fp32; 4 N in bf16-true; about 2 N with 8-bit moments, 6 N with fp32 weights; "
            "over n from ZeRO-1 on, which has 12 N in bf16-master",
            "[ADAM] algorithm 1; [ZERO] section 3.1",
            "sftplan/step",
        ),
        _term(
            "activations",
            "what forward keeps for backward, layer by layer",
            "the sum over all operations of the tensors they save; grows with L, b, T and d, and "
            "with eager attention also with L b heads T^2",
            "each operation's autograd formula in PyTorch",
            "sftplan/step/ops",
        ),
        _term(
            "attention",
            "FLOPs of the two T x T products, QK^T and softmax(QK^T) V",
            "12 L d_a T per token: 4 d_a T forward and twice that backward, in each of L layers, "
            "not halved for the causal mask",
            "[PALM] appendix B",
            "sftplan/step/ops/attention.py",
        ),
        _term(
            "linear",
            "FLOPs of all products with weights",
            "6 per token and weight of a product: 2 forward, 4 backward; the LM head is one, the "
            "embedding look-up is none",
            "[PALM] appendix B",
            "sftplan/step/ops/matmul.py",
        ),
        _term(
            "logits",
            "bytes of the scores over the vocabulary and of their loss",
            "b T V elements, in the product's type and in fp32: logits, log-probabilities and "
            "their gradients. `--loss response` keeps response positions only, `chunked` a chunk",
            "the autograd formulas of linear, log_softmax and nll_loss in PyTorch",
            "sftplan/step/ops/lookup.py",
        ),
        _term(
            "allocator",
            "what PyTorch reserves beyond what it has allocated",
            "the step's allocations replayed: sizes rounded up to 512 bytes, segments of 2 MiB, "
            "20 MiB or a multiple of 2 MiB, best fit, splitting; expandable segments grow instead",
            "[CCA]",
            "sftplan/cost/allocator.py",
        ),
        _term(
            "context",
            "GPU memory of the driver and of loaded kernels",
            "a constant of GPU and driver, outside PyTorch's view; NCCL adds its buffers",
            "measured where the profile says so, else assumed",
            "sftplan/facts/hardware.py",
        ),
        _term(
            "temporary",
            "what an operation holds only while it runs",
            "the largest set of such tensors at the peak: casts, workspaces, the optimizer's "
            "scratch",
            "each operation's kernels in PyTorch",
            "sftplan/step/ops",
        ),
        _term(
            "roofline",
            "the time of one operation",
            "max(FLOPs / reachable FLOPs per s, bytes moved / reachable bytes per s)",
            "[ROOF]; reachable rates: datasheet x the profile's fractions",
            "sftplan/cost/time.py",
        ),
        _term(
            "dispatch",
            "time in which the GPU waits for the host to launch kernels",
            "launches x host time per launch, where that is longer than the kernels themselves",
            "measured on a reference host, scaled by the profile",
            "sftplan/cost/time.py",
        ),
        _term(
            "step-time",
            "seconds of one optimizer step",
            "accumulation x (forward + backward) + clipping + optimizer, plus the communication "
            "and copies that cannot hide behind them",
            "the sum of the rooflines over the step's operations",
            "sftplan/cost/time.py",
        ),
        _term(
            "cost",
            "money of the whole run",
            "(start-up + steps x step time) x price per hour of all machines / 3600",
            "prices of the offer, with their date",
            "sftplan/plan/build.py",
        ),
        _term(
            "zero",
            "what the GPUs share out instead of each holding all",
            "per GPU: stage 1 optimizer / n; stage 2 also gradients / n; stage 3 also weights / n, "
            "gathered layer by layer",
            "[ZERO] section 5",
            "sftplan/step/shard.py",
        ),
        _term(
            "offload",
            "what waits in host memory or on NVMe",
            "optimizer: gradients leave over the host link in fp32, weights come back in their own "
            "type, the update runs on the CPU; all: weights travel too. What is pinned takes the "
            "next power of two",
            "[OFFL] section 4; DeepSpeed's stage_1_and_2.py and stage3.py, PyTorch's "
            "CachingHostAllocator.h",
            "sftplan/cost/transfers.py, sftplan/cost/host.py",
        ),
        _term(
            "checkpointing",
            "activations that backward computes again",
            "full: one b T d tensor per layer is kept, and forward runs twice (+1/3 FLOPs); "
            "selective: products and attention are kept, what lies between runs again; of some layers, "
            "from the first, where that is all it takes",
            "[CKPT]; selective as in Korthikanti et al. 2022, arXiv:2205.05198, section 5",
            "sftplan/step",
        ),
        _term(
            "mfu",
            "share of the GPUs' peak that the model's FLOPs use",
            "FLOPs per token x tokens per s / (n x dense peak for the precision), recomputation "
            "not counted",
            "[PALM] appendix B",
            "sftplan/plan/build.py",
        ),
        _term(
            "margin",
            "GPU memory that is kept free",
            "a plan fits if used <= (1 - margin) x capacity; the default margin is 5 %",
            "a choice of ours: what other processes, fragmentation and longer rows may take",
            "sftplan/search/choose.py",
        ),
    ]
)
