"""The model that is trained: built from its configuration, or loaded with its weights."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from torch.overrides import TorchFunctionMode

from sftplan.errors import NotReadyError, UsageError
from sftplan.facts.catalogue import entries
from sftplan.facts.strategy import Precision

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sftplan.facts.model import ModelShape

LOW_WEIGHTS = (Precision.BF16_MASTER, Precision.BF16_TRUE)
AUTOCAST = {Precision.FP16_MIXED: torch.float16, Precision.BF16_MIXED: torch.bfloat16}
ATTENTION_DROPOUTS = ("attn_pdrop", "attention_dropout")
# What draws: functions of torch.nn.init, those that transformers puts in their place, a tensor's own methods.
DRAWING = frozenset(("normal_", "uniform_", "kaiming_uniform_"))
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def weight_dtype(precision: Precision) -> torch.dtype:
    """The type in which weights and gradients live."""
    return torch.bfloat16 if precision in LOW_WEIGHTS else torch.float32


def product_dtype(precision: Precision) -> torch.dtype:
    """The type in which products are taken."""
    return AUTOCAST.get(precision, weight_dtype(precision))


def config_of(shape: ModelShape, *, attention_dropout: float | str = 0.0) -> Any:
    """The transformers configuration of a model, with no cache and the attention dropout asked for."""
    return trained_config(_published(shape), attention_dropout=attention_dropout)


def _published(shape: ModelShape) -> Any:
    from transformers import AutoConfig

    if shape.source == "builtin":
        found = next(each for each in entries() if _is_entry(each, shape))
        return AutoConfig.for_model(**dict(found.config))
    path = Path(shape.source).expanduser()
    folder = path if path.is_dir() else path.parent
    source = str(folder) if path.exists() else shape.source
    return AutoConfig.from_pretrained(source, trust_remote_code=False)


def trained_config(config: Any, *, attention_dropout: float | str = 0.0) -> Any:
    """A configuration as training uses it."""
    config.use_cache = False
    if attention_dropout != "model":
        for name in ATTENTION_DROPOUTS:
            if hasattr(config, name):
                setattr(config, name, float(attention_dropout))
    return config


def _is_entry(entry: Any, shape: ModelShape) -> bool:
    return bool(shape.name == entry.name or shape.hub_id == entry.hub_id)


def weights_of(shape: ModelShape) -> str | None:
    """A folder, or a hub id in the local cache, with the model's weights; None where there are none."""
    path = Path(shape.source).expanduser()
    folder = path if path.is_dir() else path.parent
    if shape.source != "builtin" and path.exists():
        return str(folder) if any((folder / name).is_file() for name in WEIGHT_FILES) else None
    if shape.hub_id is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = (try_to_load_from_cache(shape.hub_id, name) for name in WEIGHT_FILES)
    return shape.hub_id if any(isinstance(found, str) for found in cached) else None


def check_weights(shape: ModelShape, *, random: bool) -> str | None:
    """Where the weights are, or None for random ones; refuses where there is neither."""
    if random:
        return None
    found = weights_of(shape)
    if found is None:
        where = f" ({shape.hub_id} on the hub)" if shape.hub_id else ""
        message = f"no weights of {shape.name} on this machine{where}"
        fetch = f"`hf download {shape.hub_id}` fetches them, " if shape.hub_id else ""
        raise UsageError(message, f"{fetch}--random-weights trains from scratch")
    return found


def build_model(
    config: Any,
    *,
    precision: Precision,
    attention: str,
    device: torch.device,
    weights: str | None = None,
    seed: int = 0,
    drawn_on: torch.device | None = None,
) -> Any:
    """The model on the device in training mode, with `weights` from a folder or drawn at random.

    On "meta" it has shapes alone. `drawn_on` is the device of the random numbers, if another.
    """
    from transformers import AutoModelForCausalLM

    dtype = weight_dtype(precision)
    torch.manual_seed(seed)
    if weights is None or device.type == "meta":
        with device, _DrawnOn(drawn_on or device):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
    else:
        with without_bars():
            model = AutoModelForCausalLM.from_pretrained(
                weights,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=False,
                use_safetensors=True,
            ).to(device)
    model.config.use_cache = False
    return model.train()


class _DrawnOn(TorchFunctionMode):
    """Random numbers for the host's tensors from another device: a GPU draws billions in no time.

    A processor draws 40 million a second, minutes for a model that is only there to be measured; and
    what stage 3 begins with is what the other stages do.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if getattr(function, "__name__", "") not in DRAWING:
            return function(*args, **named)
        tensor, *others = args or (named.pop("tensor"),)
        if tensor.is_meta or tensor.device == self.device:
            return function(tensor, *others, **named)
        drawn = torch.empty_like(tensor, device=self.device)
        with torch.no_grad():
            return tensor.copy_(function(drawn, *others, **named))


def place_to_build(zero: int, device: torch.device, world_size: int) -> torch.device:
    """Where a rank builds the model: under stage 3 on the host, as whole it may not fit on the GPU.

    There the first rank alone does; the others take its weights' shapes ("meta") and then their shares
    of what it sends, so that a machine needs room for one model and not for one per GPU.
    """
    if zero < 3:
        return device
    return torch.device("cpu" if world_size == 1 or distributed.get_rank() == 0 else "meta")


@contextmanager
def without_pad_token(model: Any) -> Iterator[None]:
    """With a padding token transformers looks for it in every batch, waiting for the GPU each time."""
    config, kept = model.config, getattr(model.config, "pad_token_id", None)
    config.pad_token_id = None
    try:
        yield
    finally:
        config.pad_token_id = kept


@contextmanager
def without_bars() -> Iterator[None]:
    """transformers draws progress bars of its own over ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def device_of(*, cpu: bool, local_rank: int = 0) -> torch.device:
    """The GPU of this process, or the processor if that was asked for."""
    if cpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        message = "PyTorch sees no GPU"
        raise NotReadyError(message, "`sftplan env` shows why; --cpu trains on the processor")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
