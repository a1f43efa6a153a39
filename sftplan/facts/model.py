"""The shape of a causal language model: what fixes its parameters, operations and memory."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from sftplan.facts.tensors import Parameter


class Family(StrEnum):
    """Which block the model repeats; one function of step/blocks.py each."""

    GPT2 = "gpt2"
    LLAMA = "llama"  # Llama, Mistral, Qwen2, Qwen3, SmolLM, TinyLlama
    GEMMA = "gemma"  # Gemma 1 to 3
    PHI = "phi"  # Phi 1 and 2: one norm, attention and MLP in parallel
    PHI3 = "phi3"  # Phi 3 and 4: fused projections
    NEOX = "neox"  # Pythia, GPT-NeoX
    OPT = "opt"
    MOE = "moe"  # Mixtral, Qwen2-MoE, Qwen3-MoE
    TRACED = "traced"  # any other: its passes come from the real model on fake tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A mixture-of-experts MLP."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int  # of one expert
    shared_intermediate_size: int = 0  # of the always active expert; 0 if there is none
    shared_gate: bool = False
    norm_topk: bool = False  # weights of the chosen experts are divided by their sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """What transformers builds from a configuration whose family is not modelled.

    `config` is its JSON text. `buffers` are names and bytes of tensors that are not trained, `tables`
    names of parameters that are looked up in. Names of the layers' tensors begin
    with `blocks`, a dot and the layer's number; `alike` layers do the same.
    """

    config: str
    parameters: tuple[Parameter, ...]
    buffers: tuple[tuple[str, int], ...]
    tables: tuple[str, ...]
    blocks: str
    alike: bool
    product_flops: int  # of products with weights, forward, per token
    idle_parameters: int  # of experts that a token is not sent to
    attention_layers: int
    attentions: tuple[str, ...]  # kinds that the architecture can run
    plain_head: bool  # logits are nothing but the last hidden states' product with the head
    takes_positions: bool  # else packed documents cannot be told apart


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Everything that planning knows of a model.

    `model_type` is the Hugging Face name of the architecture, `source` says where the shape is
    from: "builtin", a path or a hub id; `hub_id` is where weights and tokenizer are, if known.
    Dropouts are the model's own. `layer_kinds` holds "full" or "sliding" per layer where layers
    differ in attention; with `sliding_window` and no kinds every layer slides.
    """

    name: str
    source: str
    model_type: str
    family: Family
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tied_embeddings: bool
    embedding_size: int | None = None  # OPT-350m projects; None: hidden_size
    position_rows: int = 0  # rows of a learned position table (OPT has two more than positions)
    activation: str = "silu"
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False  # Qwen3, Gemma 3: RMSNorm over each head's q and k
    sandwich_norms: bool = False  # Gemma 2, 3: a norm after attention and after the MLP
    parallel_residual: bool = False
    rotary_fraction: float = 1.0
    final_norm: bool = True
    post_norm: bool = False  # OPT-350m: norms after the residual additions, not before the blocks
    sliding_window: int | None = None
    layer_kinds: tuple[str, ...] = ()
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    logit_scale: float | None = None
    embedding_scale: bool = False
    embedding_dropout: float = 0.0
    residual_dropout: float = 0.0
    attention_dropout: float = 0.0
    experts: Experts | None = None
    dense_layers: tuple[int, ...] = ()  # of a mixture of experts: layers with a plain MLP
    hub_id: str | None = None
    anatomy: Anatomy | None = None  # of a traced family

    @property
    def query_size(self) -> int:
        """Columns of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of the key (and of the value) projection."""
        return self.num_kv_heads * self.head_dim
