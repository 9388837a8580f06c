import pytest
import torch

from moepp.config import compose
from moepp.layers.settings import ExpertCounts
from moepp.models.budget import active_parameters, expected_ffn_per_token, forward_flops, parameters
from moepp.models.decoder import Decoder
from moepp.models.settings import DecoderConfig
from moepp.training.settings import RunConfig

# Table 2 with a vocabulary of 65,536 and untied embeddings, in billions: total, activated with and without the input
# embedding, and what MoE++ adds to vanilla MoE in millions (counting the unused gating residual of layer 1, which the
# released code carries).
PAPER = {
    "0.6b": (0.582, 0.242, 0.192, 0.094),
    "1b": (1.035, 0.242, 0.192, 0.097),
    "2b": (1.941, 0.242, 0.192, 0.259),
    "7b": (7.676, 1.334, 1.234, 0.378),
}


@pytest.mark.parametrize("size", PAPER)
def test_the_papers_sizes_build_with_its_parameter_counts(size):
    total, active, without_input, added = PAPER[size]
    vanilla, moepp = (compose(RunConfig, [f"size={size}", f"model={m}"]).model for m in ("vanilla", "moepp"))
    for config in (vanilla, moepp):
        with torch.device("meta"):
            model = Decoder(config)
        assert sum(p.numel() for p in model.parameters()) == sum(parameters(config).values())
    assert sum(parameters(moepp).values()) / 1e9 == pytest.approx(total, abs=1e-3)
    assert active_parameters(vanilla) / 1e9 == pytest.approx(active, abs=6e-4)
    assert (active_parameters(vanilla) - parameters(vanilla)["embedding"]) / 1e9 == pytest.approx(
        without_input, abs=6e-4
    )
    unused = moepp.experts.total**2
    difference = sum(parameters(moepp).values()) + unused - sum(parameters(vanilla).values())
    assert difference / 1e6 == pytest.approx(added, abs=6e-4)


def test_the_papers_expert_sets():
    sets = {size: compose(RunConfig, [f"size={size}"]).model.experts for size in PAPER}
    assert sets == {
        "0.6b": ExpertCounts(8, 1, 1, 2),
        "1b": ExpertCounts(16, 1, 1, 2),
        "2b": ExpertCounts(32, 1, 1, 6),
        "7b": ExpertCounts(16, 1, 1, 2),
    }
    assert expected_ffn_per_token(compose(RunConfig, ["size=7b"]).model) == pytest.approx(1.5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_heads": 2},
        {"moe_every": 2},
        {"tie_embeddings": True},
        {"gating_residual": False},
        {"router": "two_layer"},
        {"router": "shared_null", "gating_residual": False, "capacity_factor": None},
        {"router": "recurrent", "router_width": 8, "gating_residual": False},
        {"experts": ExpertCounts(ffn=4, shared=2)},
        {"moe_every": 0},
        {"moe_every": 0, "dense_hidden": 30},
    ],
    ids=str,
)
def test_counted_parameters_equal_the_built_models(changes):
    config = DecoderConfig(dim=32, hidden=24, layers=4, heads=4, vocab_size=61, **changes)
    assert sum(p.numel() for p in Decoder(config).parameters()) == sum(parameters(config).values())


@pytest.mark.parametrize(
    ("method", "expected"),
    [  # FFN experts per token that each method aims at, as conf/model states them for 8 FFN experts
        ("vanilla", 2.0),
        ("moepp", 1.2),
        ("switch", 1.0),
        ("adamoe", 3 * 8 / 20),
        ("shared_null", 0.4 * 3),
        ("longcat", 1.2),
        ("loss_free", 1.2),
        ("remoe", 1.2),
        ("top_p", 4.0),  # at most: ceil(0.4 * 8) experts where all are equally probable
    ],
)
def test_expected_ffn_experts_per_token(method, expected):
    assert expected_ffn_per_token(compose(RunConfig, ["size=tiny", f"model={method}"]).model) == pytest.approx(expected)


def test_with_a_variable_number_of_experts_all_may_be_active():
    config = compose(RunConfig, ["size=tiny", "model=remoe"]).model
    assert active_parameters(config) == sum(parameters(config).values())
    assert active_parameters(config, 1.2) < active_parameters(config, 2.0) < active_parameters(config)


def test_the_arms_of_the_routers_sweep_share_their_ffn_compute():
    from moepp.sweeps.reading import read_sweep

    models = {trial.arm: trial.config.model for trial in read_sweep("routers").trials("laptop", seeds=[0])}
    width = {
        arm: (expected_ffn_per_token(model) + model.experts.shared) * model.hidden
        for arm, model in models.items()
        if arm not in ("vanilla", "dense", "top_p")
    }
    assert width["moepp"] == pytest.approx(1.2 * 192)
    assert width == pytest.approx(dict.fromkeys(width, width["moepp"]), rel=0.005)
    experts = {arm: (model.experts.ffn + model.experts.shared) * model.hidden for arm, model in models.items()}
    del experts["dense"]
    assert experts == pytest.approx(dict.fromkeys(experts, 8 * 192), rel=0.05)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"experts": ExpertCounts(ffn=8, shared=2)},
        {"router": "recurrent", "router_width": 16, "gating_residual": False},
        {"moe_every": 0},
    ],
    ids=str,
)
def test_flops_equal_what_torch_counts(changes):
    from torch.utils.flop_counter import FlopCounterMode

    config = DecoderConfig(dim=32, hidden=24, layers=2, heads=4, vocab_size=61, **changes)
    model, ids = (
        Decoder(config, seed=0).eval(),
        torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(0)),
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = model(ids)
    ffn_per_token = sum(layer.chosen_N[:8].sum().item() for layer in output.stats) / (2 * ids.numel())
    ours = forward_flops(config, 16, ffn_per_token)
    products = (
        sum(ours.values()) - 2 * config.layers * 16 * config.dim
    )  # scores: we count the causal half, on CPU torch none
    counted = counter.get_total_flops()
    attention = sum(v for op, v in counter.get_flop_counts()["Global"].items() if "attention" in str(op))
    assert (counted - attention) / ids.numel() == pytest.approx(products, rel=2e-3)
