import pytest
import torch

from moepp.layers.balance import load_targets
from moepp.layers.control import SelectionBias, SparsityControl, build_control
from moepp.layers.settings import BalanceConfig, ExpertCounts, ffn_share

COUNTS = ExpertCounts(ffn=2, zero=0, copy=1, constant=0)


def longcat(**changes):
    return SelectionBias(
        BalanceConfig(**{"control": "longcat", "expected_ffn": 1.2, "control_rate": 0.5} | changes), COUNTS
    )


def test_no_control_unless_one_is_named():
    assert build_control(BalanceConfig(), COUNTS) is None
    assert isinstance(build_control(BalanceConfig(control="loss_free"), COUNTS), SelectionBias)
    assert isinstance(build_control(BalanceConfig(control="remoe", expected_ffn=1.0), COUNTS), SparsityControl)


def test_loss_free_moves_each_bias_by_the_sign_of_its_missing_load():
    control = SelectionBias(BalanceConfig(tau=0.5, control="loss_free", control_rate=0.01), COUNTS)
    assert load_targets(COUNTS, 0.5).tolist() == [0.25, 0.25, 0.5]  # 1 : 1 : 1 / tau
    control.step(torch.tensor([30, 25, 45]), tokens=50)
    torch.testing.assert_close(control.bias_N, torch.tensor([-0.01, 0.0, 0.01]))
    control.step(torch.tensor([10, 25, 65]), tokens=50)
    torch.testing.assert_close(control.bias_N, torch.tensor([0.0, 0.0, 0.0]))


@pytest.mark.parametrize("tau", [0.1, 0.75, 1.0])
def test_load_targets_are_those_of_the_balance_loss(tau):
    counts = ExpertCounts(8, 1, 1, 2)
    assert load_targets(counts, tau)[:8].sum().item() == pytest.approx(ffn_share(counts, tau))


def test_longcat_moves_ffn_experts_in_proportion_and_leaves_the_others():
    control = longcat()
    control.step(torch.tensor([80, 20, 100]), tokens=100)  # K = 2
    # mu (K_e / (K N) - T_i / (K T_all)) = 0.5 (1.2 / 4 - 80 / 200), 0.5 (1.2 / 4 - 20 / 200), 0
    torch.testing.assert_close(control.bias_N, torch.tensor([-0.05, 0.10, 0.0]))


def test_a_biass_rate_decays_by_step():
    control = longcat(control_decay=0.5)
    for _ in range(2):
        control.step(torch.tensor([80, 20, 100]), tokens=100)
    torch.testing.assert_close(control.bias_N, 1.5 * torch.tensor([-0.05, 0.10, 0.0]))


def test_remoe_multiplies_where_too_many_experts_are_active_and_divides_where_too_few():
    control = SparsityControl(BalanceConfig(control="remoe", control_rate=0.2, expected_ffn=1.2), COUNTS)
    for active, expected in ((150, 1.2), (150, 1.44), (100, 1.2), (120, 1.2)):
        control.step(torch.tensor([active - 50, 50, 7]), tokens=100)
        assert control.multiplier.item() == pytest.approx(expected)


def test_the_state_is_saved():
    assert set(longcat().state_dict()) == {"bias_N", "rate"}
    control = SparsityControl(BalanceConfig(control="remoe", expected_ffn=1.0), COUNTS)
    assert set(control.state_dict()) == {"multiplier"}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"control": "longcat"}, "expected_ffn=None: longcat"),
        ({"form": "grouped"}, "expected_ffn=None: grouped"),
        ({"control": "remoe", "expected_ffn": 0.0}, "expected_ffn=0.0 must be positive"),
        ({"control_rate": -1.0}, "control_rate"),
        ({"control_decay": 1.5}, "control_decay"),
        ({"z_loss": -1.0}, "z_loss"),
    ],
    ids=str,
)
def test_impossible_control_is_refused(changes, part):
    with pytest.raises(ValueError, match=part):
        BalanceConfig(**changes)
