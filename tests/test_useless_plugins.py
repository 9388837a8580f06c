"""Plugins whose parts give what nothing can use: the last line of a command names the part."""

import pytest
from registered import forgotten, plugin

from moepp.cli import main


@pytest.fixture(autouse=True)
def _forgotten():
    with forgotten():
        yield


PART_OF_NO_USE = """
    import torch
    from torch import nn
    from moepp import register
    from moepp.layers import AffineExperts

    class Base(nn.Module):
        def __init__(self, config, first):
            super().__init__()
            self.ffn, self.weight = config.experts.ffn, nn.Parameter(torch.empty(config.experts.total, config.dim))

    @register.router("narrow")
    class Narrow(Base):
        def forward(self, x_TD, previous):
            logits = (x_TD @ self.weight.t())[:, :self.ffn]
            return logits, logits

    @register.router("lonely")
    class Lonely(Base):
        def forward(self, x_TD, previous):
            return x_TD @ self.weight.t()

    @register.router("raising")
    class Raising(Base):
        def forward(self, x_TD, previous):
            return helper(x_TD)

    def helper(x_TD):
        return {}["missing"]

    @register.expert("short")
    class Short(nn.Module):
        def __init__(self, config, count):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(count, config.dim))

        def forward(self, x_RD, expert_R):
            return x_RD[:, :5]

    @register.expert("wide")
    class Wide(AffineExperts):
        def terms(self, x_TD, dtype):
            return x_TD.to(dtype), None

    @register.expert("unlucky")
    class Unlucky(nn.Module):
        def __init__(self, config, count):
            super().__init__()
            torch.empty(config.dim, "wide")

    @register.corpus("ints")
    def ints(config):
        yield from range(1, 100)

    @register.corpus("halves")
    def halves(config):
        yield "half of a pair: \\ud83d"

    @register.corpus("elsewhere")
    def elsewhere(config):
        yield open("/nowhere/at/all").read()

    @register.corpus("nothing")
    def nothing(config):
        pass

    @register.optimizer("none")
    def none(module, config):
        return [module]

    @register.optimizer("unknowing")
    def unknowing(module, config):
        return torch.optim.SGD(module.parameters(), learning=3)

    class Steps(torch.optim.Optimizer):
        def step(self):
            pass

    @register.optimizer("parameterless")
    def parameterless(module, config):
        return torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=config.lr)

    class Ignoring(torch.optim.SGD):
        def step(self, closure=None):
            pass

    @register.optimizer("ignoring")
    def ignoring(module, config):
        return Ignoring(module.parameters(), lr=config.lr)

    @register.optimizer("rateless")
    def rateless(module, config):
        return Steps(module.parameters(), {})

    @register.optimizer("closureless")
    def closureless(module, config):
        return Steps(module.parameters(), {"lr": 1.0})

    @register.callback("uncalled")
    class Uncalled:
        pass

    @register.logger("unlogged")
    def unlogged(record):
        return 3

    @register.model("nobody")
    def nobody(config, seed):
        return None

    @register.model("half_a_model")
    class HalfAModel(nn.Module):
        def __init__(self, config, seed):
            super().__init__()
            self.config = config

    @register.corpus("unasked")
    def unasked():
        yield "text"
"""


@pytest.mark.parametrize(
    ("word", "line", "own_lines"),
    [
        ("model.router=narrow", "router 'narrow' (mine.py) returned logits [256, 4]; [256, 8] is needed", 0),
        ("model.router=lonely", "router 'lonely' (mine.py) returned Tensor; a pair is needed, logits [256, 8]", 0),
        ("model.router=raising", "router 'raising' (mine.py) failed: KeyError: 'missing'", 2),
        ("model.experts.others.short=1", "expert type 'short' (mine.py) gave output [", 0),
        ("model.experts.others.wide=1", "expert type 'wide' (mine.py) gave term a [256, 32]; [256, 1] is needed", 0),
        ("model.experts.others.unlucky=1", "expert type 'unlucky' (mine.py) failed: TypeError: empty()", 1),
        ("data.corpus=ints", "corpus 'ints' (mine.py) yielded int as document 1; it must yield texts", 0),
        ("data.corpus=halves", "corpus 'halves' (mine.py) document 1: holds half a character, a surrogate by", 0),
        ("data.corpus=elsewhere", "corpus 'elsewhere' (mine.py) failed: FileNotFoundError: [Errno 2] No such", 1),
        ("data.corpus=nothing", "corpus 'nothing' (mine.py) returned NoneType; it must yield texts", 0),
        ("optim.name=none", "optimizer 'none' (mine.py) returned list; a torch.optim.Optimizer is needed", 0),
        ("optim.name=unknowing", "optimizer 'unknowing' (mine.py) failed: TypeError: SGD.__init__() got an", 1),
        ("optim.name=parameterless", "optimizer 'parameterless' (mine.py) has none of the parameters that are tr", 0),
        ("optim.name=ignoring", "Ignoring has a step() that does not call its closure, which computes the loss and", 0),
        ("optim.name=rateless", "optimizer 'rateless' (mine.py) has parameter groups without lr, which the sched", 0),
        ("optim.name=closureless", "optimizer 'closureless' (mine.py) has a step() without closure, which computes", 0),
        ("trainer.callbacks={uncalled: {}}", "callback 'uncalled' (mine.py) returned Uncalled; a Lightning Call", 0),
        ("tracking.loggers=[unlogged]", "logger 'unlogged' (mine.py) returned int; a Lightning Logger is needed", 0),
        ("model.name=nobody", "model 'nobody' (mine.py) returned NoneType; an nn.Module is needed", 0),
        ("model.name=half_a_model", "model 'half_a_model' (mine.py) has no balance_loss, step_control, active_par", 0),
        ("data.corpus=unasked", "corpus 'unasked' (mine.py) takes nothing; it is called with config", 0),
        ("trainer.callbacks.EarlyStopping.monitor=perf/mfu", "trainer.callbacks.EarlyStopping: Early stopping", 0),
    ],
)
def test_a_part_of_no_use_is_named_in_the_last_line(overrides, tmp_path, capsys, word, line, own_lines):
    words = [w for w in overrides if not (word.startswith("data") and w.startswith("data"))]
    path = plugin(tmp_path, "mine", PART_OF_NO_USE)
    code = main(["train", *words, f"data.cache={tmp_path / 'cache'}", f"plugins={path}", word])
    *before, last = capsys.readouterr().err.rstrip().splitlines()
    assert code == 2
    assert last.startswith(f"error: {line}")
    assert [name for name in before if "File" in name] == [name for name in before if f'File "{path}"' in name]
    assert sum("File" in name for name in before) == own_lines
