"""The MoE++ layer token by token, in float64, written from the paper's equations (and from the released code's gate
where it differs).
"""

import torch


def swiglu(x, w_in, w_out):
    hidden = w_in.shape[0] // 2
    gate, up = w_in[:hidden] @ x, w_in[hidden:] @ x
    return w_out @ (gate / (1 + torch.exp(-gate)) * up)


def expert_output(layer, index, x):
    """E_i(x) of Eqs. 1, 3, 4 and 5; expert order FFN, constant, copy, zero."""
    counts = layer.config.experts
    if index < counts.ffn:
        return swiglu(x, layer.ffn.w_in[index], layer.ffn.w_out[index])
    index -= counts.ffn
    if index < counts.constant:
        w_c = layer.zero_computation.w_mix[2 * index : 2 * index + 2]
        a1, a2 = torch.softmax(w_c @ x, 0)
        return a1 * x + a2 * layer.zero_computation.vectors[index]
    return x if index < counts.constant + counts.copy else torch.zeros_like(x)


def gates(logits, config):
    """{expert id: gate} of one token."""
    if config.logits_norm is not None:
        logits = logits / (logits.std() / config.logits_norm)
    probs = torch.exp(logits) / torch.exp(logits).sum()
    chosen = torch.argsort(probs, descending=True)[: config.top_k].tolist()
    found = {i: probs[i] for i in chosen}
    if config.gate == "released":
        first_zero = config.experts.total - config.experts.zero
        found = {i: g if i < first_zero else torch.zeros_like(g) for i, g in found.items()}
    if config.gate in ("released", "renormalized"):
        total = sum(found.values())
        found = {i: g / total if total > 0 else g for i, g in found.items()}
    return found, probs


def moe(layer, x_TD, previous_TN=None):
    """(y [T, D], raw logits [T, N], balance loss) of a dropless layer."""
    config = layer.config
    outputs, carried, selected, probabilities = [], [], torch.zeros(config.experts.total, dtype=x_TD.dtype), []
    for t, x in enumerate(x_TD):
        hidden = x if layer.router.hidden is None else torch.tanh(layer.router.hidden @ x)
        logits = layer.router.weight @ hidden
        if previous_TN is not None and layer.router.residual is not None:
            logits = logits + layer.router.residual @ previous_TN[t]
        found, probs = gates(logits, config)
        seen = config.top_k * x if config.multiply_by_top_k else x
        outputs.append(sum(gate * expert_output(layer, i, seen) for i, gate in found.items()))
        carried.append(logits)
        probabilities.append(probs)
        for i in found:
            selected[i] += 1
    f, p = selected / len(x_TD), torch.stack(probabilities).mean(0)
    eta = [1.0 if i < config.experts.ffn else config.balance.tau for i in range(config.experts.total)]
    balance = sum(e * fi * pi for e, fi, pi in zip(eta, f.tolist(), p, strict=True))
    if config.balance.form == "switch":
        balance = balance * config.experts.total
    return torch.stack(outputs), torch.stack(carried), balance
