import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moepp.config import compose
from moepp.evaluation.checkpoints import Checkpoint
from moepp.training.run import freeze, train
from moepp.training.settings import RunConfig, run_directory

TEXT = "the state of our union is strong and people work hard for peace in this land every day"
CHOICES = {"text": ["red", "blue"], "label": ["A", "B"]}
TASK_ROWS = {  # two examples in the columns of each stock task
    "sciq": [
        {
            "question": question, "distractor1": "b", "distractor2": "bb", "distractor3": "bbb",
            "correct_answer": answer, "support": "",
        }
        for question, answer in (("x", "a"), ("y", "bbbb"))
    ],
    "piqa": [{"goal": "go", "sol1": "walk", "sol2": "fly", "label": label} for label in (0, 1)],
    "winogrande": [
        {"sentence": "Ann met Bo, so _ smiled.", "option1": "Ann", "option2": "Bo", "answer": answer} for answer in "12"
    ],
    "arc_easy": [{"id": i, "question": f"{i}?", "choices": CHOICES, "answerKey": key} for i, key in ("1A", "2B")],
    "arc_challenge": [{"id": i, "question": f"{i}?", "choices": CHOICES, "answerKey": key} for i, key in ("1A", "2B")],
    "hellaswag": [
        {
            "ind": i, "activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": f"he {i}",
            "ctx": f"A man sits. he {i}", "endings": ["jumps.", "eats.", "runs.", "sings."],
            "source_id": "a", "split": "val", "split_type": "indomain", "label": str(i),
        }
        for i in (0, 1)
    ],
    "logiqa": [
        {"context": "All.", "question": f"Who {label}?", "options": ["a", "b", "c", "d"], "label": label}
        for label in "ab"
    ],
    "boolq": [{"question": "is it", "passage": f"It {label}.", "label": label} for label in (0, 1)],
    "lambada_openai": [{"text": "the state of our union"}, {"text": "people of this land"}],
    "nq_open": [{"question": q, "answer": ["the union", "union"]} for q in ("who", "what")],
    "mmlu": [
        {"question": f"{subject} {i}?", "subject": subject, "choices": ["1", "2", "3", "4"], "answer": i}
        for subject in ("anatomy", "virology")
        for i in (0, 1)
    ],
}  # fmt: skip


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in TASK_ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def text_run(tmp_path_factory) -> Path:
    """The directory of a finished run of a few steps, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("text_run")
    generator, words = torch.Generator().manual_seed(0), TEXT.split()
    lines = [" ".join(words[i] for i in torch.randint(len(words), (40,), generator=generator)) for _ in range(60)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    config = freeze(compose(RunConfig, [
        "size=smoke", "tracking=jsonl", "data=text", f"data.path={folder / 'text.txt'}", r"data.separator=\n\s*\n",
        "data.val_share=0.2", f"data.cache={folder / 'cache'}", f"runs={folder / 'runs'}", "trainer.progress=false",
        "trainer.expert_timing=false", "trainer.accelerator=cpu", "trainer.threads=1",
    ]))  # fmt: skip
    return train(config, run_directory(config)).path


class Bytes:
    """A token is a byte."""

    def encode(self, text: str, add_special_tokens: bool) -> SimpleNamespace:
        return SimpleNamespace(ids=list(text.encode()))

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode()


class Unigram(torch.nn.Module):
    """Every token has its own probability, whatever stands before it: `a` 1/2, `b` 1/4, all others share 1/4."""

    def __init__(self):
        super().__init__()
        self.probabilities = torch.nn.Parameter(torch.full((256,), 0.25 / 254), requires_grad=False)
        self.probabilities[ord("a")], self.probabilities[ord("b")] = 0.5, 0.25

    def caches(self):
        return []

    def forward(self, ids_BS, caches=None, at=None):
        logits_BSV = self.probabilities.log().expand(*ids_BS.shape, 256)
        return SimpleNamespace(logits=logits_BSV if at is None else logits_BSV[at])

    def nats(self, text: str) -> float:
        return math.fsum(math.log(self.probabilities[byte]) for byte in text.encode())


@pytest.fixture
def unigram() -> Checkpoint:
    return Checkpoint(Unigram(), 0, 0, 64, Bytes(), nullcontext)
