"""Host seconds per layer of our own step: models so narrow that the GPU never holds the host up.

    python tests/bench/h200_host.py OUT.csv --seconds 150   measure
    python tests/bench/h200_host.py OUT.csv --judge         no GPU: against cost/dispatch.py

Every case is there at FEW and at MANY layers; the slope is one layer, the rest the model's ends. All of them take
their turn in every round, with readings of the host between them, for its pace changes within seconds: figures are
divided by its mean, so that they are those of the reference host.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftplan.facts.catalogue import builtin
from sftplan.facts.strategy import Checkpointing, Loss, Precision, Strategy

FAMILIES = ("gpt2", "opt-1.3b", "pythia-410m", "qwen2.5-0.5b", "qwen3-0.6b", "tinyllama-1.1b")
NARROW = {
    "n_embd": 256, "n_head": 4, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4,
    "ffn_dim": 1024, "word_embed_proj_dim": 256, "head_dim": 64, "vocab_size": 2048,
}  # fmt: skip
GROUPED = 2  # heads of keys and values, where a model shares them
ROWS, LENGTH = 2, 64
FEW, MANY = 4, 12
STEPS = 3  # of a case in a round, the first of which does not count
TWICE = 2  # the layer in the middle, to be told apart
COLUMNS = ("model", "precision", "checkpointing", "forward_s", "backward_s", "forward_ends_s", "backward_ends_s",
           "optimizer_tensor_s")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A training step but for its size."""

    model: str
    precision: str
    checkpointing: str

    @property
    def strategy(self) -> Strategy:
        """As a plan has it."""
        return Strategy(
            micro_batch=ROWS, precision=Precision(self.precision), loss=Loss.FULL,
            checkpointing=Checkpointing(self.checkpointing),
        )  # fmt: skip


def cases() -> list[Case]:
    """Families in two precisions, checkpointed or not, and some in others."""
    found = [
        Case(family, precision, checkpointing)
        for family in FAMILIES
        for precision in ("bf16-true", "bf16-mixed")
        for checkpointing in ("none", "full")
    ]
    return found + [
        Case(family, *others)
        for family in ("gpt2", "tinyllama-1.1b")
        for others in (("fp32", "none"), ("bf16-mixed", "selective"))
    ]


class Running:
    """A case's step at some depth, ready to be timed."""

    def __init__(self, case: Case, layers: int) -> None:
        import torch

        from sftplan.plan.build import strategy_record
        from sftplan.train.attention import choose_kernel
        from sftplan.train.inputs import Inputs
        from sftplan.train.model import config_of, product_dtype
        from sftplan.train.session import build_stepper
        from sftplan.train.settings import Settings

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        strategy, config = case.strategy, config_of(builtin(case.model))
        known = config.to_dict()
        grouped = known.get("num_key_value_heads", 0) < config.num_attention_heads
        shared = GROUPED if grouped else NARROW["num_attention_heads"]
        for name, value in (NARROW | {"num_key_value_heads": shared}).items():
            if name in known:
                setattr(config, name, value)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1] * layers
        kernel = choose_kernel(
            strategy.attention, device=self.device, low=product_dtype(strategy.precision), config=config,
            causal=True,
        )  # fmt: skip
        self.stepper = build_stepper(
            strategy_record(strategy, ()), config, kernel, Settings(random_weights=True), device=self.device,
            deepspeed={},
        )  # fmt: skip
        tokens = ROWS * LENGTH
        self.inputs = Inputs(
            input_ids=torch.randint(NARROW["vocab_size"], (ROWS, LENGTH), device=self.device),
            position_ids=None, cu_seqlens=None, longest=LENGTH,
            keep=torch.arange(tokens - 1, device=self.device),
            targets=torch.randint(NARROW["vocab_size"], (tokens - 1,), device=self.device),
        )  # fmt: skip
        self.factor = torch.full((), 1.0 / tokens, device=self.device)
        self.tensors = len(self.stepper.update.parameters)
        self.wait = torch.cuda.synchronize if self.device.type == "cuda" else (lambda: None)

    def phases(self) -> dict[str, float]:
        """Mean seconds of each phase on the host."""
        from sftplan.train.step import scaled_loss

        seen: dict[str, list[float]] = {}

        def timed(name: str, run: Any) -> Any:
            self.wait()
            start = time.perf_counter()
            result = run()
            seen.setdefault(name, []).append(time.perf_counter() - start)
            return result

        for _ in range(STEPS):
            loss = timed("forward", lambda: scaled_loss(self.stepper, self.inputs, self.factor))
            update = self.stepper.update
            timed("backward", lambda loss=loss: update.backward(loss, scale=1.0, last=True))
            advance: Any = lambda loss=loss: update.advance(  # noqa: E731
                loss.detach(), scale=1.0, learning_rate=1e-5, max_grad_norm=1.0
            )
            timed("optimizer", advance)
        return {name: statistics.fmean(values[1:]) for name, values in seen.items()}


def measure(path: Path, seconds: float) -> None:
    """Rounds until the time is over, then the table."""
    import torch

    from sftplan.verify.host_rate import HostProbe

    begun = time.monotonic()
    running = {(c, n): Running(c, n) for c in cases() for n in (FEW, MANY)}
    some = next(iter(running.values()))
    probe = HostProbe(some.device)
    print(f"built in {time.monotonic() - begun:.0f} s", flush=True)
    found: dict[Any, list[dict[str, float]]] = {key: [] for key in running}
    operations, blocks = [], []
    for one in running.values():
        one.phases()  # warm
    rounds = 0
    while time.monotonic() < begun + seconds:
        for key, one in running.items():
            operations.append(probe.operations())
            blocks.append(probe.block_s())
            found[key].append(one.phases())
        rounds += 1
    scale = statistics.fmean(operations)
    forward, backward = (statistics.fmean(b[i] for b in blocks) / scale for i in (0, 1))
    print(
        f"{rounds} rounds; operations {scale:.3f}; a block of the probe: {forward * 1e3:.4f} ms forward, {backward * 1e3:.4f} backward"
    )
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for case in cases():
            writer.writerow(_row(case, running, found, scale))
    print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")


def _row(case: Case, running: Any, found: Any, scale: float) -> dict[str, Any]:
    few, many = (
        {name: statistics.fmean(r[name] for r in found[case, n]) / scale for name in found[case, n][0]}
        for n in (FEW, MANY)
    )  # fmt: skip
    row: dict[str, Any] = {
        "model": case.model,
        "precision": case.precision,
        "checkpointing": case.checkpointing,
    }
    for phase in ("forward", "backward"):
        row[f"{phase}_s"] = slope = (many[phase] - few[phase]) / (MANY - FEW)
        row[f"{phase}_ends_s"] = few[phase] - FEW * slope
    tensors = running[case, MANY].tensors - running[case, FEW].tensors
    row["optimizer_tensor_s"] = (many["optimizer"] - few["optimizer"]) / tensors
    return row


def formula_s(case: Case) -> dict[str, float]:
    """Seconds of the reference host for one layer, forward and backward."""
    from sftplan.cost.device import device_of
    from sftplan.cost.passes import Passes
    from sftplan.facts.profiles import load_hardware
    from sftplan.step.batch import Batch
    from sftplan.step.few import few_layers
    from sftplan.step.repeat import MIDDLE
    from sftplan.step.simulate import steady

    model = builtin(case.model)
    batch = Batch(rows=ROWS, length=512, num_targets=0)
    few = few_layers(model, case.strategy, 512)
    tape = steady(few.model, few.strategy, batch)
    passes = Passes(tape, {MIDDLE: TWICE})
    segments = passes.priced(device_of(load_hardware("h200-sxm")), drops=False, captured=False)[
        -1
    ].segments
    return {each.phase: each.host_s for each in segments if each.times == TWICE}


def judge(path: Path) -> None:
    """Each case, the mean of its runs, against the formulas; selective checkpointing is summed up apart."""
    runs: dict[Case, list[dict[str, str]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            case = Case(row["model"], row["precision"], row["checkpointing"])
            runs.setdefault(case, []).append(row)
    errors: dict[tuple[str, bool], list[float]] = {}
    for case, rows in runs.items():
        words = []
        for phase, seconds in formula_s(case).items():
            measured = statistics.fmean(float(row[f"{phase}_s"]) for row in rows)
            error = seconds / measured - 1
            errors.setdefault((phase, case.checkpointing == "selective"), []).append(error)
            words.append(
                f"{phase} {measured * 1e3:6.3f} ms, formula {seconds * 1e3:6.3f} {error:+6.1%}"
            )
        print(f"{case.model:<16}{case.precision:<12}{case.checkpointing:<10} {'; '.join(words)}")
    for (phase, selective), values in errors.items():
        mean, worst = statistics.fmean(map(abs, values)), max(values, key=abs)
        what = "selective" if selective else f"{len(values)} others"
        print(
            f"{phase}, {what}: mean {mean:.1%}, signed {statistics.fmean(values):+.1%}, worst {worst:+.1%}"
        )


def main() -> None:
    """Measure, or judge what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--judge", action="store_true")
    args = parser.parse_args()
    if args.judge:
        judge(args.out)
    else:
        measure(args.out, args.seconds)


if __name__ == "__main__":
    main()
