import csv
import shutil
import sys

import pytest
from registered import forgotten, plugin

from moepp import plugins
from moepp.cli import main
from moepp.config import compose, load, save
from moepp.data.prepare import prepare, token_digest
from moepp.data.tokenizer import load_tokenizer
from moepp.errors import UsageError
from moepp.models.budget import Budget
from moepp.sweeps.reading import read_sweep
from moepp.tracking.mirror import axes
from moepp.training.generate import continue_text
from moepp.training.run import freeze, train
from moepp.training.settings import RunConfig, run_directory

EXPERT = """
    import torch
    from torch import nn
    from moepp import register
    from moepp.layers import AffineExperts

    @register.expert("{name}")
    class Scaled(AffineExperts):
        def __init__(self, config, count, factor: float = {factor}):
            super().__init__(config, count)
            self.factor, self.scale_C = factor, nn.Parameter(torch.empty(count))

        def terms(self, x_TD, dtype):
            return (self.factor + self.scale_C.to(dtype)).expand(len(x_TD), -1), None
"""
ROWS = """
    import torch
    from torch import nn
    from moepp import register

    @register.expert("diagonal")
    class Diagonal(nn.Module):
        def __init__(self, config, count):
            super().__init__()
            self.weight_CD = nn.Parameter(torch.empty(count, config.dim))

        def forward(self, x_RD, expert_R):
            return x_RD * self.weight_CD[expert_R]
"""
ROUTER = """
    import torch
    from torch import nn
    from moepp import register

    @register.router("plain")
    class Plain(nn.Module):
        def __init__(self, config, first, scale: float = 1.0):
            super().__init__()
            self.scale, self.weight = scale, nn.Parameter(torch.empty(config.experts.total, config.dim))

        def forward(self, x_TD, previous):
            logits_TN = self.scale * x_TD @ self.weight.t()
            return logits_TN, logits_TN
"""
OPTIMIZER = """
    import torch
    from moepp import register

    @register.optimizer("signs")
    class Signs(torch.optim.Optimizer):
        def __init__(self, module, config, scale: float = 1.0):
            super().__init__(module.parameters(), {"lr": config.lr * scale})

        @torch.no_grad()
        def step(self, closure=None):
            with torch.enable_grad():
                loss = closure()
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter -= group["lr"] * parameter.grad.sign()
            return loss
"""
CALLBACK = """
    from pathlib import Path
    from lightning.pytorch import Callback
    from moepp import register

    @register.callback("steps")
    class Steps(Callback):
        def __init__(self, path: str):
            self.path = Path(path)

        def on_train_batch_end(self, trainer, *arguments):
            self.path.write_text(str(trainer.global_step))
"""
CORPUS = """
    from moepp import register

    @register.corpus("sums")
    def sums(config, largest: int = 60):
        '''Additions.'''
        for a in range(40):
            yield " ".join(f"{a} plus {b} is {a + b}." for b in range(largest))
"""


@pytest.fixture(autouse=True)
def _forgotten():
    with forgotten():
        yield


@pytest.fixture
def scaled(tmp_path):
    return plugin(tmp_path, "scaled", EXPERT.format(name="scaled", factor=0.5))


def run(*overrides):
    config = freeze(compose(RunConfig, overrides))
    return train(config, run_directory(config))


def losses(record):
    return [{key: line[key] for key in ("train/loss", "val/loss") if key in line} for line in record.metrics()]


def test_an_expert_type_trains_and_its_share_is_recorded(overrides, scaled, tmp_path):
    rows = plugin(tmp_path, "rows", ROWS)
    more = ["model.experts.others.scaled=2", "model.experts.others.diagonal=1", "model.expert_options.scaled.factor=1"]
    record = run(*overrides, f"plugins=[{scaled},{rows}]", *more)
    final = record.final()
    shares = [final[f"{kind}_share"] for kind in ("ffn", "constant", "copy", "zero", "scaled", "diagonal")]
    assert sum(shares) == pytest.approx(1) and min(shares) > 0
    assert any("router/scaled_share" in line for line in record.metrics())
    with open(record.path / "tables" / "expert_load.csv") as file:
        kinds = [row["kind"] for row in csv.DictReader(file) if row["layer"] == "0"]
    assert kinds[-3:] == ["scaled", "scaled", "diagonal"]
    assert axes(record.read("config.yaml"), {})["n_scaled"] == "2"
    assert record.read("config.yaml")["plugin_sources"] == record.read("provenance.json")["plugins"]
    assert record.read("provenance.json")["plugins"].keys() == {"scaled", "rows"}


def test_its_parameters_are_in_the_budget(scaled, tmp_path):
    from moepp.models.decoder import Decoder

    parts = [scaled, plugin(tmp_path, "rows", ROWS), plugin(tmp_path, "router", ROUTER)]
    more = ["model.experts.others.scaled=2", "model.experts.others.diagonal=3", "model.router=plain"]
    config = compose(RunConfig, ["size=smoke", f"plugins=[{','.join(parts)}]", *more]).model
    assert Budget.of(config, 8, 8).total_params == sum(p.numel() for p in Decoder(config).parameters())


def test_a_run_with_parts_of_ones_own_resumes_to_the_same_losses(overrides, scaled, tmp_path, monkeypatch):
    """One of each kind, a file each."""
    texts = {"router": ROUTER, "signs": OPTIMIZER, "steps": CALLBACK, "sums": CORPUS}
    parts = [scaled, *(plugin(tmp_path, name, text) for name, text in texts.items())]
    words = [w for w in overrides if not w.startswith("data")] + [f"plugins=[{','.join(parts)}]"]
    words += ["data.corpus=sums", f"data.cache={tmp_path / 'cache'}", "model.router=plain", "optim.name=signs"]
    words += ["model.experts.others.scaled=1", f"trainer.callbacks.steps.path={tmp_path / 'seen'}"]
    whole = run(*words, "name=whole")
    assert (tmp_path / "seen").read_text() == "12"
    shown = axes(whole.read("config.yaml"), {})
    assert (shown["router"], shown["optimizer"], shown["n_scaled"]) == ("plain", "signs", "1")
    from moepp.training import callbacks

    class Killed(BaseException):
        pass

    class Kill(callbacks.ResumeCheckpoint):
        def on_train_batch_end(self, trainer, *arguments):
            super().on_train_batch_end(trainer, *arguments)
            if trainer.global_step == 9:
                raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("moepp.training.trainer.ResumeCheckpoint", Kill)
        run(*words, "name=cut")
    assert losses(run(*words, "name=cut")) == losses(whole)


def test_an_optimizer_and_a_callback_of_ones_own(overrides, tmp_path):
    parts = plugin(tmp_path, "signs", OPTIMIZER), plugin(tmp_path, "steps", CALLBACK)
    words = [*overrides, f"plugins=[{','.join(parts)}]", f"trainer.callbacks.steps.path={tmp_path / 'seen'}"]
    adamw = run(*words)
    signs = run(*words, "optim.name=signs", "optim.options.scale=0.5")
    assert (tmp_path / "seen").read_text() == "12"
    assert losses(adamw) != losses(signs)
    with pytest.raises(UsageError, match=r"trainer\.callbacks\.steps\.paht: callback steps takes path"):
        compose(RunConfig, [*words, "trainer.callbacks.steps.paht=x"])


def test_a_corpus_is_tokenised_once_for_each_source_and_choice_of_options(overrides, tmp_path):
    path = plugin(tmp_path, "sums", CORPUS)
    words = [w for w in overrides if not w.startswith("data")]
    words += ["data.corpus=sums", f"data.cache={tmp_path / 'cache'}", f"plugins={path}"]
    first = freeze(compose(RunConfig, words)).data.digest
    assert freeze(compose(RunConfig, words)).data.digest == first
    assert freeze(compose(RunConfig, [*words, "data.corpus_options.largest=50"])).data.digest != first
    plugin(tmp_path, "sums", CORPUS.replace("plus", "and"))
    assert freeze(compose(RunConfig, words)).data.digest != first


CORPORA = """
    from moepp import register
    from moepp.data.corpora import Corpus, Files

    @register.corpus("globbed")
    def globbed(config):
        yield from open(config.path).read().split(";")

    @register.corpus("shouted")
    class Shouted(Files):
        def texts(self):
            return (text.upper() for text in super().texts())

    @register.corpus("counted")
    class Counted(Corpus):
        '''Numbers, counted.

        Up to some.'''

        def __init__(self, config, numbers: int = 40):
            super().__init__(config)
            self.numbers = numbers

        def texts(self):
            return (f"{number} comes after {number - 1}. " * 20 for number in range(self.numbers))
"""


def of_corpus(plugin_path, cache, *words):
    """The config of tokens from a plugin's corpus, in a few words."""
    few = ["size=smoke", "data.seq_len=8", f"data.cache={cache}", f"plugins={plugin_path}"]
    return compose(RunConfig, [*few, *words]).data


def test_tokens_are_of_the_path_that_a_corpus_of_ones_own_reads(tmp_path):
    path, found = plugin(tmp_path, "mine", CORPORA), {}
    for name in ("one", "two"):
        (tmp_path / name).write_text(";".join(f"{name} {number} " * 20 for number in range(20)))
        config = of_corpus(path, tmp_path / "cache", "data.corpus=globbed", f"data.path={tmp_path / name}")
        found[name] = prepare(config, progress=False)
    assert found["one"].header.digest != found["two"].header.digest


def test_a_corpus_that_changes_the_texts_of_another_has_tokens_of_its_own(tmp_path):
    path = plugin(tmp_path, "mine", CORPORA)
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(f"some words {number} " * 20)
    both = [
        of_corpus(path, tmp_path / "cache", f"data.corpus={name}", f"data.path={tmp_path}/*.txt")
        for name in ("text", "shouted")
    ]
    plain, shouted = (prepare(config, progress=False) for config in both)
    assert plain.path != shouted.path
    assert "SOME" in load_tokenizer(shouted.path / "tokenizer.json").decode(shouted.val.tolist())
    plugin(tmp_path, "mine", CORPORA.replace("upper", "title"))
    again = [of_corpus(path, tmp_path / "cache", f"data.corpus={c.corpus}", f"data.path={c.path}") for c in both]
    same, other = map(token_digest, again)
    assert same == plain.header.digest and other != shouted.header.digest


def test_a_class_need_say_neither_its_fingerprint_nor_its_origin(tmp_path):
    path = plugin(tmp_path, "mine", CORPORA)
    all_of_them, some = (
        of_corpus(path, tmp_path / "cache", "data.corpus=counted", *more)
        for more in ([], ["data.corpus_options.numbers=30"])
    )
    header = prepare(all_of_them, progress=False).header
    assert header.corpus == "Corpus counted: Numbers, counted."
    assert header.train.documents + header.val.documents == 40
    assert token_digest(some) != header.digest


def test_a_record_is_enough_without_the_file(overrides, tmp_path):
    parts = plugin(tmp_path, "sums", CORPUS), plugin(tmp_path, "router", ROUTER)
    words = [w for w in overrides if not w.startswith("data")]
    words += ["data.corpus=sums", f"data.cache={tmp_path / 'cache'}", f"plugins=[{','.join(parts)}]"]
    record = run(*words, "model.router=plain")
    shutil.rmtree(tmp_path / "cache")
    for path in parts:
        (tmp_path / path).unlink()
    plugins._loaded.clear()
    moved = tmp_path / "elsewhere"
    record.path.rename(moved)
    assert continue_text(moved, "3 plus", 4, 0.0, 0).startswith("3 plus")


def test_a_copy_stands_in_for_a_source_that_has_changed(scaled, tmp_path):
    config = compose(RunConfig, [f"plugins={scaled}", "model.experts.others.scaled=1"])
    save(config, tmp_path / "run" / "config.yaml")
    plugin(tmp_path, "scaled", EXPERT.format(name="scaled", factor=0.25))
    changed = compose(RunConfig, [f"plugins={scaled}", "model.experts.others.scaled=1"])
    assert run_directory(changed) != run_directory(config)
    assert run_directory(load(RunConfig, tmp_path / "run" / "config.yaml")) == run_directory(config)
    shutil.rmtree(tmp_path / "run" / "plugins")
    plugins._loaded.clear()
    with pytest.raises(UsageError, match=r"scaled.py is gone or another than the run was made with"):
        load(RunConfig, tmp_path / "run" / "config.yaml")


def test_where_a_file_lies_makes_no_other_run(scaled, tmp_path):
    (tmp_path / "other").mkdir()
    other = shutil.copy(scaled, tmp_path / "other")
    runs = [compose(RunConfig, [f"plugins={path}", "model.experts.others.scaled=1"]) for path in (scaled, other)]
    assert run_directory(runs[0]) == run_directory(runs[1])


def test_a_sweep_file_names_its_plugins(scaled, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "{name: mine, question: Which?, plugins: scaled.py, base: [size=smoke], scales: {smoke: {}}, baseline: copy, "
        "arms: {copy: [], scaled: [model.experts.others.scaled=1]}}"
    )
    copy, mine = read_sweep(str(tmp_path / "mine.yaml")).trials("smoke")
    assert mine.config.model.experts.others == {"scaled": 1} and mine.config.plugins == copy.config.plugins == [scaled]


def test_a_module_and_a_package_are_found_by_name_and_by_what_they_have_registered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "others_parts").mkdir()
    (tmp_path / "others_parts/__init__.py").write_text("from . import router\n")
    plugin(tmp_path / "others_parts", "router", ROUTER)
    named = compose(RunConfig, ["plugins=others_parts", "model.router=plain"])
    assert compose(RunConfig, ["model.router=plain"]).plugins == ["others_parts"]
    save(named, tmp_path / "run" / "config.yaml")
    before = run_directory(named)
    (tmp_path / "others_parts/router.py").write_text("")
    plugins._loaded.clear()
    assert run_directory(load(RunConfig, tmp_path / "run" / "config.yaml")) == before
    for name in [name for name in sys.modules if name.startswith("others_parts")]:
        del sys.modules[name]


def test_an_installed_package_is_found_by_its_entry_point(tmp_path, monkeypatch):
    plugin(tmp_path, "installed_parts", ROUTER)
    (tmp_path / "installed_parts-1.dist-info").mkdir()
    (tmp_path / "installed_parts-1.dist-info/METADATA").write_text("Name: installed_parts\nVersion: 1\n")
    (tmp_path / "installed_parts-1.dist-info/entry_points.txt").write_text("[moepp.plugins]\nany = installed_parts\n")
    monkeypatch.syspath_prepend(tmp_path)
    plugins.load_installed.cache_clear()
    assert compose(RunConfig, ["model.router=plain"]).plugins == ["installed_parts"]
    sys.modules.pop("installed_parts")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        (EXPERT.format(name="copy", factor=1.0), "moepp.layers.experts has one of that name; rename it"),
    ],
)
def test_what_cannot_be_imported_is_refused_in_one_line(tmp_path, text, line):
    with pytest.raises(UsageError) as error:
        compose(RunConfig, [f"plugins={plugin(tmp_path, 'broken', text)}"])
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "line"),
    [("nowhere.py", "plugins=nowhere.py: no such file"), ("nowhere", "plugins=nowhere: no module of that name")],
)
def test_what_is_not_there_is_refused_in_one_line(name, line):
    with pytest.raises(UsageError, match=line):
        compose(RunConfig, [f"plugins={name}"])


def test_an_error_below_an_optimizers_closure_is_not_the_optimizers(overrides, tmp_path, monkeypatch):
    path = plugin(tmp_path, "signs", OPTIMIZER)
    monkeypatch.setattr("moepp.training.module.LanguageModel._count", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["train", *overrides, f"plugins={path}", "optim.name=signs"])
