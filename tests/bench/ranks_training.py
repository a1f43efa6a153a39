"""`python -m ranks_training DIR`: one rank of a training run on made-up examples that can be learned.

Steps as `sftplan launch` takes them: the plan's stepper, packed rows, the next step's data on its way
while this one runs, numbers read one step behind.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

from ranks_apart import SETTINGS
from ranks_cases import Case, machine, plan_of

from sftplan.data.conversation import Place
from sftplan.data.mask import Example
from sftplan.verify.child import end_with_parent
from sftplan.verify.request import result_file

UNTIMED = 6  # steps at the beginning
WORDS = 997  # of a larger vocabulary; examples count through them


def examples(count: int, seq_len: int, words: int) -> list[Example]:
    """Examples with lengths as in instruction data that count on from a word in steps of 1 to 9."""
    draw = random.Random(7)
    found = []
    for number in range(count):
        prompt = max(4, min(seq_len // 2, int(draw.lognormvariate(4.4, 0.8))))
        answer = max(4, min(seq_len - prompt, int(draw.lognormvariate(5.2, 0.9))))
        start, by = draw.randrange(words), draw.randrange(1, 10)
        ids = array("i", ((start + by * at) % words for at in range(prompt + answer)))
        place = Place(file="made up", row=number + 1)
        found.append(Example(input_ids=ids, trained=bytes(prompt) + b"\1" * answer, place=place))
    return found


def save_weights(model: str, folder: str) -> None:
    """The random weights that every run begins with, as a model's folder in 16 bits."""
    import torch

    from sftplan.facts.resolve import resolve_model
    from sftplan.facts.strategy import Precision
    from sftplan.train.model import build_model, config_of

    cpu = torch.device("cpu")
    config = config_of(resolve_model(model))
    made = build_model(config, precision=Precision.BF16_MASTER, attention="eager", device=cpu)
    made.save_pretrained(folder)


def trained(asked: dict[str, Any]) -> dict[str, Any]:
    """Losses, and tokens of all ranks per second."""
    import torch
    from torch import distributed

    from sftplan.data.batches import Sharing, batches
    from sftplan.train.inputs import Layout, prefetched
    from sftplan.train.material import shape_of
    from sftplan.train.model import config_of, device_of, without_pad_token
    from sftplan.train.session import build_stepper, kernel_of, place_of_process
    from sftplan.train.settings import Settings
    from sftplan.train.step import Reading, train_step

    case, steps, rate = Case(**asked["case"]), asked["steps"], asked["learning_rate"]
    place = place_of_process()
    plan = plan_of(case, machine("h200-sxm", place.world_size))
    device = device_of(cpu=asked["cpu"], local_rank=place.local_rank)
    if place.world_size > 1:
        distributed.init_process_group("gloo" if asked["cpu"] else "nccl")
    config = config_of(shape_of(plan))
    for name in ("resid_pdrop", "embd_pdrop") if asked["no_dropout"] else ():
        setattr(config, name, 0.0)
    kernel = kernel_of(plan, shape_of(plan), config, device)
    settings = Settings(learning_rate=rate, random_weights=True, cpu=asked["cpu"])
    stepper = build_stepper(
        plan.strategy, config, kernel, settings, device=device, deepspeed=plan.launch.deepspeed,
        weights=asked.get("weights"), world_size=place.world_size,
    )  # fmt: skip
    sharing = Sharing(
        micro_batch=case.micro_batch, accumulation=case.accumulation, world_size=place.world_size
    )
    data = batches(
        examples(asked["examples"], case.seq_len, min(WORDS, plan.inputs.model.vocab_size)),
        seq_len=case.seq_len, sharing=sharing, packing=True, seed=1,
    )  # fmt: skip
    data = replace(data, epochs=float(-(-steps // data.steps_per_epoch)))
    layout = Layout(flat=kernel.flat, packed=True)
    readings: list[Any] = []
    tokens, start = 0, time.perf_counter()
    source = prefetched(data, layout, device, start=(0, 0), rank=place.rank)
    with without_pad_token(stepper.model):
        for number, ready in zip(range(steps), source, strict=False):
            step = ready.step
            outcome = train_step(
                stepper, ready.inputs, num_targets=step.num_targets,
                learning_rate=rate * min(1.0, (number + 1) / asked["warmup_steps"]),
            )  # fmt: skip
            readings.append(Reading(outcome.loss, outcome.grad_norm))
            if number:
                readings[number - 1].values()
            tokens += step.num_tokens
            if number == UNTIMED - 1:
                readings[number].values()
                tokens, start = 0, time.perf_counter()
    losses = [reading.values() for reading in readings]
    seconds = time.perf_counter() - start
    cuda = device.type == "cuda"
    found = {
        "losses": [loss for loss, _ in losses], "grad_norms": [norm for _, norm in losses],
        "tokens_per_s": tokens / seconds, "step_s": seconds / max(1, steps - UNTIMED),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "reserved": torch.cuda.max_memory_reserved() if cuda else None,
    }  # fmt: skip
    if place.world_size > 1:
        distributed.barrier()
    return found


def main(folder: Path) -> None:
    """Leave what was found in the folder."""
    end_with_parent()
    asked = json.loads((folder / SETTINGS).read_text())
    rank = int(os.environ.get("RANK", "0"))
    if "save" in asked:
        save_weights(asked["save"], asked["weights"])
        found = {}
    else:
        found = trained(asked)
    result_file(folder, rank).write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
