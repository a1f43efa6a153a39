"""The parameters of a model: names, shapes and order as transformers 5.23 builds them.

The order is that of `model.parameters()`, in which memory is allocated; a tied head is listed once,
as the embedding. Gated MLPs of experts are stored fused: one tensor holds the gate and the up
projection of all experts of a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.facts.anatomy import listed
from sftplan.facts.model import Family
from sftplan.facts.tensors import Parameter, Parameters, conv1d, count, linear

if TYPE_CHECKING:
    from sftplan.facts.model import Experts, ModelShape


def norm(model: ModelShape, name: str, size: int | None = None) -> Parameters:
    """A norm over `size` features (by default hidden_size): a weight, with LayerNorm a bias too."""
    shape = (size or model.hidden_size,)
    weight = Parameter(f"{name}.weight", shape)
    return (weight, Parameter(f"{name}.bias", shape)) if model.norm == "layernorm" else (weight,)


def attention(model: ModelShape) -> Parameters:
    """Projections (and norms of q and k) of one attention block.

    With hidden size d, query columns a = heads·head_dim and key columns k = kv_heads·head_dim the
    products hold d·a + 2·d·k + a·d elements.

    >>> from sftplan.facts.catalogue import builtin
    >>> count(attention(builtin("gpt2")))  # 768*2304 + 2304 + 768*768 + 768
    2362368
    >>> count(attention(builtin("llama-3.2-1b")))  # 2 * 2048*2048 + 2 * 2048*512
    10485760
    """
    hidden, query, kv = model.hidden_size, model.query_size, model.kv_size
    bias, out_bias = model.qkv_bias, model.output_bias
    match model.family:
        case Family.GPT2:
            return conv1d("attn.c_attn", hidden, 3 * hidden) + conv1d("attn.c_proj", hidden, hidden)
        case Family.NEOX:
            return linear("attention.query_key_value", hidden, 3 * hidden, bias=bias) + linear(
                "attention.dense", hidden, hidden, bias=out_bias
            )
        case Family.PHI3:  # in this order: the output projection is built first
            return linear("self_attn.o_proj", query, hidden, bias=out_bias) + linear(
                "self_attn.qkv_proj", hidden, query + 2 * kv, bias=bias
            )
        case _:
            return _separate_projections(model)


def _separate_projections(model: ModelShape) -> Parameters:
    hidden, query, kv = model.hidden_size, model.query_size, model.kv_size
    bias = model.qkv_bias
    q = linear("self_attn.q_proj", hidden, query, bias=bias)
    k = linear("self_attn.k_proj", hidden, kv, bias=bias)
    v = linear("self_attn.v_proj", hidden, kv, bias=bias)
    out_name = {Family.OPT: "out_proj", Family.PHI: "dense"}.get(model.family, "o_proj")
    out = linear(f"self_attn.{out_name}", query, hidden, bias=model.output_bias)
    if model.family is Family.OPT:
        return k + v + q + out
    norms: Parameters = ()
    if model.qk_norm:
        norms = norm(model, "self_attn.q_norm", model.head_dim)
        norms += norm(model, "self_attn.k_norm", model.head_dim)
    return q + k + v + out + norms


def gated_mlp(name: str, hidden: int, intermediate: int, *, bias: bool) -> Parameters:
    """act(x·gate)·(x·up), then down: 3·d·f elements without biases.

    >>> count(gated_mlp("mlp", 2048, 8192, bias=False))
    50331648
    """
    return (
        linear(f"{name}.gate_proj", hidden, intermediate, bias=bias)
        + linear(f"{name}.up_proj", hidden, intermediate, bias=bias)
        + linear(f"{name}.down_proj", intermediate, hidden, bias=bias)
    )


def mlp(model: ModelShape) -> Parameters:
    """The MLP of a dense layer.

    >>> from sftplan.facts.catalogue import builtin
    >>> count(mlp(builtin("gpt2")))  # 2 * 768*3072 + 3072 + 768
    4722432
    """
    hidden, inner, bias = model.hidden_size, model.intermediate_size, model.mlp_bias
    match model.family:
        case Family.GPT2:
            return conv1d("mlp.c_fc", hidden, inner) + conv1d("mlp.c_proj", inner, hidden)
        case Family.PHI3:
            return linear("mlp.gate_up_proj", hidden, 2 * inner, bias=bias) + linear(
                "mlp.down_proj", inner, hidden, bias=bias
            )
        case Family.LLAMA | Family.GEMMA | Family.MOE:
            return gated_mlp("mlp", hidden, inner, bias=bias)
        case Family.NEOX:
            up, down = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
        case Family.PHI:
            up, down = "mlp.fc1", "mlp.fc2"
        case Family.OPT:
            up, down = "fc1", "fc2"
        case Family.TRACED:  # listed as a whole, not part by part
            return ()
    return linear(up, hidden, inner, bias=bias) + linear(down, inner, hidden, bias=bias)


def sparse_mlp(model: ModelShape, experts: Experts) -> Parameters:
    """Router, experts and the shared expert of a mixture-of-experts layer: E·3·d·f + E·d + shared.

    >>> from sftplan.facts.catalogue import builtin
    >>> mixtral = builtin("mixtral-8x7b")
    >>> count(sparse_mlp(mixtral, mixtral.experts))  # 8 * 3*4096*14336 + 8*4096
    1409318912
    """
    hidden, inner, number = model.hidden_size, experts.intermediate_size, experts.num_experts
    router = linear("mlp.gate", hidden, number, bias=False)
    stacked = (
        Parameter("mlp.experts.gate_up_proj", (number, 2 * inner, hidden)),
        Parameter("mlp.experts.down_proj", (number, hidden, inner)),
    )
    shared: Parameters = ()
    if experts.shared_intermediate_size:
        shared = gated_mlp(
            "mlp.shared_expert", hidden, experts.shared_intermediate_size, bias=False
        )
    if experts.shared_gate:
        shared += linear("mlp.shared_expert_gate", hidden, 1, bias=False)
    if model.model_type == "qwen3_moe":
        return stacked + router + shared
    return router + stacked + shared


def layer(model: ModelShape, index: int = 0) -> Parameters:
    """All parameters of one layer, names relative to the layer.

    >>> from sftplan.facts.catalogue import builtin
    >>> count(layer(builtin("gpt2"))), count(layer(builtin("llama-3.2-1b")))
    (7087872, 60821504)
    """
    sparse = model.experts is not None and index not in model.dense_layers
    feedforward = sparse_mlp(model, model.experts) if sparse and model.experts else mlp(model)
    attend = attention(model)
    match model.family:
        case Family.GPT2:
            return norm(model, "ln_1") + attend + norm(model, "ln_2") + feedforward
        case Family.NEOX:
            norms = norm(model, "input_layernorm") + norm(model, "post_attention_layernorm")
            return norms + attend + feedforward
        case Family.OPT:
            first, second = norm(model, "self_attn_layer_norm"), norm(model, "final_layer_norm")
            return attend + first + feedforward + second
        case Family.PHI:
            return attend + feedforward + norm(model, "input_layernorm")
        case _:
            return attend + feedforward + _llama_norms(model)


def _llama_norms(model: ModelShape) -> Parameters:
    norms = norm(model, "input_layernorm") + norm(model, "post_attention_layernorm")
    if model.sandwich_norms:
        norms += norm(model, "pre_feedforward_layernorm")
        norms += norm(model, "post_feedforward_layernorm")
    return norms


_NAMES = {  # what stands before the layers, the token embedding, the layers, the final norm
    Family.GPT2: ("transformer", "wte", "h", "ln_f"),
    Family.NEOX: ("gpt_neox", "embed_in", "layers", "final_layer_norm"),
    Family.OPT: ("model.decoder", "embed_tokens", "layers", "final_layer_norm"),
    Family.PHI: ("model", "embed_tokens", "layers", "final_layernorm"),
}
_LLAMA_NAMES = ("model", "embed_tokens", "layers", "norm")


def embeddings(model: ModelShape) -> Parameters:
    """Token embedding, position table and OPT-350m's projections around them.

    >>> from sftplan.facts.catalogue import builtin
    >>> count(embeddings(builtin("gpt2")))  # 50257*768 + 1024*768
    39383808
    """
    prefix, tokens, _, _ = _NAMES.get(model.family, _LLAMA_NAMES)
    width = model.embedding_size or model.hidden_size
    found = [Parameter(f"{prefix}.{tokens}.weight", (model.vocab_size, width))]
    if model.position_rows:
        table = "wpe" if model.family is Family.GPT2 else "embed_positions"
        found.append(
            Parameter(f"{prefix}.{table}.weight", (model.position_rows, model.hidden_size))
        )
    if width != model.hidden_size:
        found += linear(f"{prefix}.project_out", model.hidden_size, width, bias=False)
        found += linear(f"{prefix}.project_in", width, model.hidden_size, bias=False)
    return tuple(found)


def final_norm(model: ModelShape) -> Parameters:
    """The norm after the last layer, if there is one."""
    prefix, _, _, name = _NAMES.get(model.family, _LLAMA_NAMES)
    return norm(model, f"{prefix}.{name}") if model.final_norm else ()


def head(model: ModelShape) -> Parameters:
    """The LM head; a tied one is the token embedding and adds at most its bias.

    >>> from sftplan.facts.catalogue import builtin
    >>> count(head(builtin("phi-2"))), count(head(builtin("gpt2")))  # 51200 * (2560 + 1)
    (131123200, 0)
    """
    width = model.embedding_size or model.hidden_size
    whole = linear("lm_head", width, model.vocab_size, bias=model.head_bias)
    return whole[1:] if model.tied_embeddings else whole


def parameters(model: ModelShape) -> Parameters:
    """Every parameter of the model, in the order of `model.parameters()`.

    >>> from sftplan.facts.catalogue import builtin
    >>> listed = parameters(builtin("gpt2"))
    >>> len(listed), listed[0].name, listed[-1].name
    (148, 'transformer.wte.weight', 'transformer.ln_f.bias')
    """
    if model.anatomy is not None:
        return listed(model.anatomy, model.num_layers)
    prefix, _, name, _ = _NAMES.get(model.family, _LLAMA_NAMES)
    sparse = layer(model, first_sparse(model))
    dense = layer(model, model.dense_layers[0]) if model.dense_layers else sparse
    found = list(embeddings(model))
    if model.family is Family.OPT:  # built before its layers
        found += final_norm(model)
    for index in range(model.num_layers):
        start = f"{prefix}.{name}.{index}."
        block = dense if index in model.dense_layers else sparse
        found += [Parameter(start + each.name, each.shape) for each in block]
    if model.family is not Family.OPT:
        found += final_norm(model)
    return (*found, *head(model))


def num_parameters(model: ModelShape) -> int:
    """Parameters of the model, a tied head counted once.

    >>> from sftplan.facts.catalogue import builtin
    >>> num_parameters(builtin("gpt2-large")), num_parameters(builtin("qwen2.5-0.5b"))
    (774030080, 494032768)
    """
    if model.anatomy is not None:
        return count(listed(model.anatomy, model.num_layers))
    around = count(embeddings(model)) + count(final_norm(model)) + count(head(model))
    num_dense = len(model.dense_layers)
    dense = num_dense * count(layer(model, model.dense_layers[0])) if num_dense else 0
    return (
        around + dense + (model.num_layers - num_dense) * count(layer(model, first_sparse(model)))
    )


def num_active_parameters(model: ModelShape) -> int:
    """Parameters that one token meets: of the experts only those it is sent to.

    >>> from sftplan.facts.catalogue import builtin
    >>> num_active_parameters(builtin("mixtral-8x7b"))
    12879925248
    """
    total = num_parameters(model)
    if model.anatomy is not None:
        return total - model.anatomy.idle_parameters
    if model.experts is None:
        return total
    each = 3 * model.hidden_size * model.experts.intermediate_size
    idle = model.experts.num_experts - model.experts.experts_per_token
    return total - (model.num_layers - len(model.dense_layers)) * idle * each


def first_sparse(model: ModelShape) -> int:
    """The first layer that is no exception; where all are, one past the last."""
    dense = set(model.dense_layers)
    return next(
        (index for index in range(model.num_layers) if index not in dense), model.num_layers
    )
