import math

import pytest
import torch

from moepp.config import compose
from moepp.models.decoder import Decoder
from moepp.training.loss import training_losses
from moepp.training.settings import RunConfig


@pytest.fixture
def model():
    return Decoder(compose(RunConfig, ["size=smoke", "model=moepp", "model.balance.beta=0.5"]).model, seed=0)


def test_the_loss_of_training_is_that_of_next_tokens_and_the_balance(model):
    tokens = torch.randint(0, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    cross_entropy, balance, output = training_losses(model, tokens)
    logp = model(tokens[:, :-1]).logits.detach().log_softmax(-1)
    wanted = -sum(float(logp[b, s, tokens[b, s + 1]]) for b in range(2) for s in range(8)) / 16
    assert (
        float(cross_entropy.detach())
        == pytest.approx(wanted, rel=1e-5)
        == pytest.approx(math.log(logp.shape[-1]), rel=0.1)
    )
    assert balance.detach() == pytest.approx(model.balance_loss(output).detach()) and balance > 0.1


def test_routers_learn_from_the_balance(model):
    tokens = torch.randint(0, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    training_losses(model, tokens)[1].backward()
    grads = [parameter.grad for name, parameter in model.named_parameters() if "router" in name]
    assert grads and any(grad is not None and grad.any() for grad in grads)
