"""docs/tour.ipynb runs as it stands, in an order without a kernel, with a small text and a model of seconds."""

import ast
import json

import pytest

from moepp.config import CONF

TOUR = CONF.parent / "docs/tour.ipynb"
MOST_BYTES = 60_000  # with its outputs


def code_cells():
    cells = json.loads(TOUR.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The names that the notebook leaves behind."""
    folder = tmp_path_factory.mktemp("tour")
    (folder / "text.txt").write_text("".join(f"The union is strong in year {year}.\n\n" * 8 for year in range(60)))
    first, *others = code_cells()
    small = {
        "size": "smoke", "steps": 2, "seeds": [0],
        "common": [
            f"runs={folder}/runs", f"data.cache={folder}/cache", "data=text", f"data.path={folder}/text.txt",
            r"data.separator=\n\n", "data.val_share=0.3", "tracking=jsonl", "trainer.progress=false",
            "trainer.expert_timing=false", "trainer.threads=1", "trainer.val_every=1",
        ],
    }  # fmt: skip
    assert small.keys() == {name.id for node in ast.walk(ast.parse(first)) for name in assigned(node)}
    for source in others:
        exec(compile(source, str(TOUR), "exec"), small)
    return small


def assigned(node):
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def test_it_trains_both_arms_and_draws_them(ran):
    assert {name for name, _ in ran["runs"]} == {"vanilla MoE", "MoE++"}
    assert len(ran["figure"].axes[0].lines) == 2 and ran["difference"].n == 1


def test_every_token_of_the_sentence_has_its_experts(ran):
    assert "".join(ran["pieces"]) == ran["sentence"] and ((ran["used_S"] >= 0) & (ran["used_S"] <= 2)).all()


def test_its_outputs_are_kept_and_small():
    cells = json.loads(TOUR.read_text())["cells"]
    assert TOUR.stat().st_size < MOST_BYTES
    assert all(cell["outputs"] for cell in cells if "print(" in "".join(cell["source"]) and cell["cell_type"] == "code")
