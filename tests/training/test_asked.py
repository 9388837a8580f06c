"""Words that nothing reads in a run are refused; as values of a preset, or where something reads them, they are not."""

import pytest
from registered import forgotten

from moepp.config import compose
from moepp.errors import UsageError
from moepp.sweeps.reading import read_sweep
from moepp.training.asked import asked_for, refuse_vain
from moepp.training.settings import RunConfig

READ = {  # a word, the words that make nothing read it, and those that make something
    "model.top_p=0.3": ("", "model=top_p"),
    "model.router_width=16": ("", "model=rmoe"),
    "model.balance.control_rate=0.5": ("", "model=loss_free"),
    "model.balance.control_decay=0.5": ("model=remoe", "model=longcat"),
    "model.balance.expected_ffn=1.1": ("", "model=longcat"),
    "model.balance.tau=0.5": ("model=vanilla", ""),
    "model.experts.ffn=8": ("model=dense", ""),
    "model.balance.beta=0.5": ("model=dense", "model.moe_every=2"),
    "model.top_k=3": ("model=top_p", "model=top_p model.dense_first=1"),
    "model.gating_residual=true": ("model.layers=1", ""),
    "model.gating_residual=false": (None, "model.layers=1"),
    "model.balance.over=sequence": ("model.balance.beta=0", ""),
    "model.balance.form=paper": ("model.balance.beta=0", ""),
    "model.balance.tau=0.4": ("model=longcat", "model=loss_free"),
    "model.dense_hidden=48": ("", "model.dense_first=1"),
    "optim.beta1=0.8": ("optim.name=SGD", "optim.name=muon"),
    "optim.eps=1e-6": ("optim.name=RMSprop", ""),
    "optim.decay_share=0.3": ("", "optim.schedule=wsd"),
    "cloze.questions=8": ("", "cloze.points=1"),
    "tracking.uri=sqlite:///x.db": ("tracking=jsonl", "tracking=mlflow"),
    "tracking.logger_options.wandb.offline=true": ("", "tracking.loggers=[csv,wandb]"),
    "model.retrofit.share=0.5": ("model.retrofit.zero=1 model.retrofit.init=warm", "model.retrofit.zero=1"),
    "model.retrofit.wake_steps=5": ("", "model.retrofit.constant=1"),
    "model.retrofit.init=zeda": ("", "model.retrofit.gating_residual=true"),
    "model.retrofit.scaled_copy=true": ("model.retrofit.zero=1", "model.retrofit.copy=1"),
    "model.retrofit.lora_rank=4": ("model.retrofit.train=new", "model.retrofit.train=lora"),
    "model.top_k=1": ("model=hf model.path=smollm2", "model.gate=softmax"),
    "model.experts.zero=1": ("model=hf model.path=smollm2", ""),
    "model.activation_checkpointing=true": (None, "model=hf model.path=smollm2"),
    "model.balance.beta=0.1": (None, "model=hf model.path=smollm2"),
}


def words_of(word, others):
    foreign = ["model=hf", "model.path=smollm2"] if "retrofit" in word else []
    return ["size=smoke", *foreign, *others.split(), word]


@pytest.mark.parametrize("word", READ)
def test_a_word_is_refused_where_nothing_reads_it_and_taken_where_something_does(word):
    unread, read = READ[word]
    if unread is not None:
        words = words_of(word, unread)
        with pytest.raises(UsageError) as caught:
            asked_for(words)
        said = str(caught.value)
        assert said.startswith(f"{word} has no effect: leave it out, or ") and "\n" not in said
        compose(RunConfig, words)  # as of a preset or a record
    asked_for(words_of(word, read))


def test_a_registered_part_may_read_any_key(tmp_path):
    plugin = tmp_path / "reads_everything.py"
    plugin.write_text(
        "from moepp import register\n\n\n"
        "@register.selection('reads_everything')\ndef choose(scores_TN, config, bias_N):\n    return scores_TN\n"
    )
    chosen = [f"plugins={plugin}", "model.selection=reads_everything", "model.capacity_factor=null"]
    with forgotten():
        asked_for(["size=smoke", *chosen, "model.top_p=0.3"])


def test_a_registered_form_of_the_balance_loss_may_read_what_no_other_does(tmp_path):
    plugin = tmp_path / "own_balance.py"
    plugin.write_text(
        "from moepp import register\n\n\n"
        "@register.balance('own_balance')\ndef term(share_N, probs_N, experts, config):\n    return share_N * probs_N\n"
    )
    chosen = ["size=smoke", "model=vanilla", f"plugins={plugin}", "model.balance.form=own_balance"]
    with forgotten():
        asked_for([*chosen, "model.balance.tau=0.5", "model.balance.expected_ffn=1.1"])


def test_a_folder_may_bring_zero_computation_experts_of_its_own():
    none = ["model.experts.zero=0", "model.experts.copy=0", "model.experts.constant=0"]
    config = compose(RunConfig, ["size=smoke", "model=hf", "model.path=smollm2", *none])
    refuse_vain(["model.balance.tau=0.5"], [config])


def test_a_word_that_another_one_refers_to_has_an_effect():
    asked_for(["size=smoke", "model.router_width=16", "model.dim=${model.router_width}"])


@pytest.fixture
def sweep(tmp_path):
    def made(arm):
        file = tmp_path / "s.yaml"
        file.write_text(
            "name: s\nquestion: q\nbase: [size=smoke]\nscales: {smoke: {}}\nbaseline: a\n"
            f"arms:\n  a: [model=moepp]\n  b: {arm}\n"
        )
        return read_sweep(str(file))

    return made


def test_an_arm_is_told_what_it_changes_in_vain(sweep):
    with pytest.raises(UsageError, match=r"s\.yaml: arm b: model\.router_width=8 has no effect: leave it out, or set"):
        sweep("[model.router_width=8]").trials("smoke")


def test_what_a_file_says_for_all_arms_and_none_reads_is_refused_unless_the_command_changes_the_file(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text(
        "name: s\nquestion: q\nbase: [size=smoke, data=text, data.path=books.txt, model.router_width=8]\n"
        "scales: {smoke: {}}\nbaseline: a\narms:\n  a: [model=moepp]\n  b: [model=vanilla]\n"
    )
    made = read_sweep(str(file))
    with pytest.raises(UsageError, match=r"s\.yaml: base: model\.router_width=8 has no effect"):
        made.trials("smoke")
    assert len(made.trials("smoke", ["data=sotu"])) == 2


def test_a_word_for_all_arms_is_taken_where_one_of_them_reads_it(sweep):
    made = sweep("[model=rmoe]")
    assert len(made.trials("smoke", ["model.router_width=8"])) == 2
    with pytest.raises(UsageError, match=r"^model\.top_p=0\.3 has no effect"):
        made.trials("smoke", ["model.top_p=0.3"])
