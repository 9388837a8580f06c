import re

from moepp import demo
from moepp.config import compose
from moepp.training.loading import load_run
from moepp.training.run import train
from moepp.training.settings import RunConfig


def test_its_two_runs_differ_in_their_experts_alone():
    vanilla, moepp = (trial.config for trial in demo.SWEEP.trials(demo.SCALE))
    assert vanilla.model.experts.zero_computation == 0 < moepp.model.experts.zero_computation
    assert (vanilla.data, vanilla.optim, vanilla.trainer, vanilla.seed) == (
        moepp.data, moepp.optim, moepp.trainer, moepp.seed,
    )  # fmt: skip


def test_the_page_shows_both_losses_and_every_token_of_the_sentence(tmp_path):
    text = "".join(f"{demo.SENTENCE} {number} & more\n\n" for number in range(60))
    (tmp_path / "text.txt").write_text(text)
    record = train(
        compose(
            RunConfig,
            [
                "size=smoke", "tracking=jsonl", "trainer.steps=4", "trainer.val_every=2", "trainer.log_every=1",
                "trainer.threads=1", "trainer.progress=false", "trainer.expert_timing=false", "data=text",
                f"data.path={tmp_path}/text.txt", r"data.separator=\n\n", "data.val_share=0.3",
                f"runs={tmp_path}/runs", f"data.cache={tmp_path}/cache",
            ],
        )
    )  # fmt: skip
    page = demo.demo_page(dict.fromkeys(demo.NAMES, load_run(record.path)))
    assert page.count("<svg") == 1 and "vanilla MoE, held-out text" in page and "MoE++, held-out text" in page
    spans = re.findall(r'<span style="[^"]*" title="([\d.]+)">([^<]*)</span>', page)
    assert "".join(piece for _, piece in spans).startswith(demo.SENTENCE)
    assert all(0 <= float(value) <= 2 for value, _ in spans)
