"""What the released code computes from a checkpoint in its own layout, token by token, and random checkpoints for it.

Written from the description of that code, on its names alone: nothing here knows the decoder under test.
"""

import json
import math

import torch
from safetensors.torch import save_file

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts": [9],
    "moe_2layer_gate": False,
    "moe_feature_no_mul_topk": True,
}


def shapes(keys):
    """{name: shape} of every tensor the released code expects."""
    dim, hidden, vocab = keys["hidden_size"], keys["intermediate_size"], keys["vocab_size"]
    experts = keys["num_experts"][0]
    kv = dim // keys["num_attention_heads"] * (keys.get("num_key_value_heads") or keys["num_attention_heads"])
    found = {"model.embed_tokens.weight": [vocab, dim], "model.norm.weight": [dim]}
    if not keys.get("tie_word_embeddings"):
        found["lm_head.weight"] = [vocab, dim]
    for layer in range(keys["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        found |= {at + "input_layernorm.weight": [dim], at + "post_attention_layernorm.weight": [dim]}
        for name, rows in (("q", dim), ("k", kv), ("v", kv), ("o", dim)):
            found[f"{at}self_attn.{name}_proj.weight"] = [rows, dim]
        at += "mlp.moe."
        if keys["moe_2layer_gate"]:
            found |= {at + "gate.wg.0.weight": [8 * experts, dim], at + "gate.wg.2.weight": [experts, 8 * experts]}
        else:
            found[at + "gate.wg.weight"] = [experts, dim]
        found[at + "gate.gate_map.weight"] = [experts, experts]
        for expert in range(experts - 4):
            found[f"{at}experts.experts.{expert}.up_proj.weight"] = [2 * hidden, dim]
            found[f"{at}experts.experts.{expert}.down_proj.weight"] = [dim, hidden]
        for expert in (experts - 4, experts - 3):
            found[f"{at}experts.experts.{expert}.wg.weight"] = [2, dim]
            found[f"{at}experts.experts.{expert}.constant"] = [dim]
    return found


def write_checkpoint(folder, seed=0, **changes):
    """A random checkpoint with the given keys; returns (keys, tensors)."""
    keys, generator = SMALL | changes, torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes(keys).items():
        tensor = torch.randn(shape, generator=generator)
        if "norm" in name:
            tensor = 1 + 0.1 * tensor
        elif not name.endswith("constant"):
            tensor *= 0.3 if "gate" in name or "wg" in name else 0.15
        tensors[name] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(keys))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return keys, tensors


def forward(keys, tensors, ids):
    """(logits [B, S, V], router logits of every layer [B*S, N]) in the tensors' dtype."""
    tensors, layers = dict(tensors), range(keys["num_hidden_layers"])
    head = tensors["model.embed_tokens.weight" if keys.get("tie_word_embeddings") else "lm_head.weight"]
    sequences = []
    for sequence in ids:
        x, previous, carried = tensors["model.embed_tokens.weight"][sequence], None, []
        for layer in layers:
            at = f"model.layers.{layer}."
            part = {name.removeprefix(at): tensor for name, tensor in tensors.items() if name.startswith(at)}
            x = x + attention(keys, part, norm(keys, x, part["input_layernorm.weight"]))
            h = norm(keys, x, part["post_attention_layernorm.weight"])
            tokens = [moe(keys, part, row, None if previous is None else previous[t]) for t, row in enumerate(h)]
            x, previous = x + torch.stack([y for y, _ in tokens]), torch.stack([logits for _, logits in tokens])
            carried.append(previous)
        sequences.append((norm(keys, x, tensors["model.norm.weight"]) @ head.T, carried))
    return torch.stack([logits for logits, _ in sequences]), [torch.cat([c[i] for _, c in sequences]) for i in layers]


def norm(keys, x, weight):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + keys.get("rms_norm_eps", 1e-6)) * weight


def attention(keys, part, x):
    heads = keys["num_attention_heads"]
    width = keys["hidden_size"] // heads
    group = heads // (keys.get("num_key_value_heads") or heads)
    q, k, v = (x @ part[f"self_attn.{name}_proj.weight"].T for name in "qkv")
    outputs = []
    for head in range(heads):
        queries = rotate(keys, q[:, head * width : (head + 1) * width])
        shared = slice(head // group * width, (head // group + 1) * width)
        scores = queries @ rotate(keys, k[:, shared]).T / math.sqrt(width)
        later = torch.ones_like(scores).triu(1).bool()
        outputs.append(scores.masked_fill(later, -math.inf).softmax(-1) @ v[:, shared])
    return torch.cat(outputs, -1) @ part["self_attn.o_proj.weight"].T


def rotate(keys, x):
    """Dimension i turns with dimension i + width / 2, as one complex number."""
    half = x.shape[1] // 2
    frequencies = keys.get("rope_theta", 10_000.0) ** -(torch.arange(half, dtype=x.dtype) / half)
    angles = torch.arange(len(x), dtype=x.dtype)[:, None] * frequencies
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], 1)


def moe(keys, part, x, previous):
    """(output, raw logits) of one token."""
    gate = {name.removeprefix("mlp.moe.gate."): tensor for name, tensor in part.items() if ".gate." in name}
    if keys["moe_2layer_gate"]:
        logits = gate["wg.2.weight"] @ torch.tanh(gate["wg.0.weight"] @ x)
    else:
        logits = gate["wg.weight"] @ x
    if previous is not None:
        logits = logits + gate["gate_map.weight"] @ previous
    scores = logits
    if keys.get("moe_use_logits_norm"):
        scores = logits / logits.std() * keys.get("moe_gate_norm_std", 1.0)
    mixtral, last = keys.get("moe_use_mixtral_gating", False), len(logits) - 1
    pair = scores.topk(2).indices.tolist()
    weights = {i: scores[i].exp() * (0 if i == last and not mixtral else 1) for i in pair}
    seen = x if mixtral or keys["moe_feature_no_mul_topk"] else 2 * x
    output = sum(weight * expert(part, i, last + 1, seen) for i, weight in weights.items()) / sum(weights.values())
    return output, logits


def expert(part, index, experts, x):
    own = {name.split(".", 5)[5]: t for name, t in part.items() if name.startswith(f"mlp.moe.experts.experts.{index}.")}
    if index < experts - 4:
        gate, up = (own["up_proj.weight"] @ x).chunk(2)
        return own["down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)
    if index < experts - 2:
        share = (own["wg.weight"] @ x).softmax(0)
        return share[0] * x + share[1] * own["constant"]
    return x if index == experts - 2 else torch.zeros_like(x)
