"""Seconds that the host needs to dispatch the operations of a step: Python, PyTorch, the driver.

Medians on the reference host (16 cores of an Intel Xeon beside one H200, driver 580.159.04, torch 2.11+cu130,
transformers 5.17, 2026-11-23); `Rates.dispatch_scale` scales all of them. One host differs from the next,
and from itself an hour later, by a quarter.
"""

from __future__ import annotations

from collections import Counter

MICRO = 1e-6

# Forward, µs an operation in a chain that records a graph (tests/bench/h200_dispatch.py: "forward per link",
# else "forward"); mean of fp32 and bf16. ReLU, tanh and sigmoid as GELU.
FORWARD_US: dict[str, float] = {
    "add": 9.2, "mul": 10.0, "linear": 19.5, "layer_norm": 14.6, "gelu": 8.8, "silu": 8.8, "relu": 8.8,
    "tanh": 8.8, "sigmoid": 8.8, "dropout": 13.3, "view": 4.6, "transpose": 4.4, "split": 7.0,
    "slice": 4.0, "attention": 26.3, "varlen": 148.0, "embedding": 12.6, "cast": 11.9, "pow": 8.4, "mean": 10.7,
    "rsqrt": 9.4, "cat": 10.8, "neg": 8.7, "softmax": 9.6, "clone": 14.0, "bmm": 26.0,
    "log_softmax": 12.0, "nll_loss": 9.0,
}  # fmt: skip
# varlen: a custom operator written in Python, its node too; 201 and 187 µs beside 36 and 66 of attention on a
# host of 1.36 (2026-11-26).
OTHER_US = 11.0  # an operation that was not measured by itself

# What a block costs beyond its operations and kernels. Least squares of relative errors over the forward and
# backward passes of 26 cases at 4 and at 12 layers, twice: 6 families, 2 or 3 precisions, checkpointed or not, so
# narrow that the GPU never holds the host up (tests/published/h200_host.csv, by tests/bench/h200_host.py).
MODULE_CALL_S = (
    28.5e-6  # a module's call, hooks looked up, keyword arguments, the modelling code's own lines
)
MODULE = "module"
# Of a traced block beside linear layers, norms and dropouts: itself, attention, MLP, activation.
TRACED_MODULES = 4
NODE_S = 8.8e-6  # the engine's turn of a node of the backward pass
VARLEN_NODE_S = 88e-6  # of varlen_attn's node, beyond it
LAUNCH_S = 12.7e-6  # a kernel of the backward pass, with what it allocates
CHECKPOINT_FORWARD_S = (
    0.60e-3  # a checkpointed call: the generator's state saved, hooks around kept tensors
)
CHECKPOINT_BACKWARD_S = (
    0.84e-3  # the state set and restored, tensors found again; operations not included
)
# Under a selective policy Python sees every operation below autograd, going forward and doing so again: a chain
# of additions 18.5 µs each, one of linear layers (transposed view, product kept) 58, on that host of 1.36.
SELECTIVE_OPERATION_S = 14e-6
SELECTIVE_OPERATIONS = {"linear": 3}  # of one operation above it
# The ends of a pass: medians of the same table, less the operations and kernels that are counted there.
MODEL_FORWARD_S = 1.3e-3  # around the blocks: positions, autocast, the loss's own lines
MODEL_BACKWARD_S = 0.43e-3  # the engine's start, its graph gone through, its thread woken

# A compiled block, forward or backward: guards, the wrapper of its graph, its launches and nodes. From the steps
# that are held up by it in the calibrating half of tests/published/h200_verify.csv, each with its host as it was
# measured beside it (torch 2.11, one H200, 2026-11-26 and 27); on a host nobody had measured it was 0.85 to 1.0 ms.
# Checkpointing is part of the graph and costs nothing of its own.
COMPILED_CALL_S = 0.74e-3
COMPILED = "compiled"
# In a stretch's counts, but no operations.
MARKS = frozenset(("checkpoint", "selective", MODULE, COMPILED))
VIEWS = frozenset(("view", "transpose", "split", "slice"))  # launch nothing

# Per parameter tensor: foreach calls over 400 tensors; AdamW's is what is left of the 13.2 µs of all three in
# that table.
ADAMW_TENSOR_S = 7.9e-6
ZERO_GRAD_TENSOR_S = 1.8e-6
CLIP_TENSOR_S = 3.5e-6
SCALER_TENSOR_S = 7e-6  # GradScaler: unscale_ and the check that step waits for

_NORMS = ("layer_norm", "rsqrt")


def forward_s(hosts: Counter[str]) -> float:
    """Operations of a stretch of the forward pass, with the modules around them.

    Σ ops + modules·call

    >>> from collections import Counter
    >>> round(1e6 * forward_s(Counter(linear=4, layer_norm=2, add=2, dropout=2, module=6)))
    494
    """
    total = 0.0
    for name, count in hosts.items():
        if name == COMPILED:
            total += count * COMPILED_CALL_S
        elif name == "checkpoint":  # compiled, it is part of the block's graph
            total += 0.0 if hosts[COMPILED] else count * CHECKPOINT_FORWARD_S
        elif name not in MARKS and not name.endswith("*"):
            total += count * FORWARD_US.get(name, OTHER_US) * MICRO
    return total + num_modules(hosts) * MODULE_CALL_S + selective_s(hosts)


def selective_s(hosts: Counter[str]) -> float:
    """What a selective policy's eyes on each operation cost; nothing where it is part of a graph.

    >>> from collections import Counter
    >>> round(1e6 * selective_s(Counter({"selective": 1, "add": 2, "linear": 1, "add*": 9})))
    70
    """
    if not hosts["selective"] or hosts[COMPILED]:
        return 0.0
    seen = sum(
        count * SELECTIVE_OPERATIONS.get(name, 1)
        for name, count in hosts.items()
        if name not in MARKS and not name.endswith("*")
    )
    return seen * SELECTIVE_OPERATION_S


def compiled_s(hosts: Counter[str]) -> float:
    """Of a stretch's seconds those in calls of compiled blocks, which differ from host to host otherwise.

    >>> from collections import Counter
    >>> compiled_s(Counter({"compiled": 1, "linear": 3})) == COMPILED_CALL_S
    True
    """
    return (hosts[COMPILED] + hosts[COMPILED + "*"]) * COMPILED_CALL_S


def num_modules(hosts: Counter[str]) -> int:
    """Modules that are called in a stretch; of a backward one, those that run again.

    >>> num_modules(Counter({"linear": 4, "layer_norm": 2, "dropout": 2, "linear*": 4}))
    12
    >>> num_modules(Counter({"linear": 6, "layer_norm": 2, "dropout": 2, "module": 3}))
    11
    """
    leaves = hosts["linear"] + sum(hosts[name] for name in _NORMS)
    others = hosts[MODULE] or hosts["dropout"] + TRACED_MODULES
    return leaves + others if leaves else 0


def backward_s(hosts: Counter[str], kernels: int) -> float:
    """Nodes and kernels of a stretch of the backward pass; what is computed again counts as forward.

    nodes·turn + kernels·launch, and of a checkpointed call its operations and what surrounds them

    >>> from collections import Counter
    >>> round(1e6 * backward_s(Counter({"linear*": 1, "AccumulateGrad*": 2, "view*": 1}), 3))
    73
    """
    again: Counter[str] = Counter()
    nodes = 0
    for name, count in hosts.items():
        if name.endswith("*"):
            nodes += count
        else:
            again[name] = count
    if hosts[COMPILED + "*"]:
        return nodes * NODE_S + hosts[COMPILED + "*"] * COMPILED_CALL_S
    if again:
        kernels = max(0, kernels - sum(c for name, c in again.items() if name not in VIEWS | MARKS))
    total = nodes * NODE_S + kernels * LAUNCH_S + hosts["varlen*"] * VARLEN_NODE_S
    return total + (forward_s(again) + CHECKPOINT_BACKWARD_S if again else 0.0)
