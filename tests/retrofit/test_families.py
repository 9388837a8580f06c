"""The table of families in docs/retrofit.md, by the script that writes it."""

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", "5.24", reason="needs the extra hf")

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

import retrofit_families
from families import transformers

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/retrofit.md").read_text()
ROWS = dict(re.findall(r"^\| (\w+) \| (.+) \|$", PAGE.partition("<!-- families -->")[2], flags=re.MULTILINE))


def test_every_family_of_this_version_is_tried():
    known = re.search(r"with transformers ([\d.]+):", PAGE).group(1)
    if not transformers.__version__.startswith(known):
        pytest.skip(f"the table is of transformers {known}")
    assert sorted(retrofit_families.families()) == sorted(ROWS)
    assert {said.partition(":")[0] for said in ROWS.values()} == {"works", "refused"}


@pytest.mark.parametrize("family", ["diffusion_gemma", "glm5_next", "mimo_v2_flash", "step3p7"])
def test_a_family_works(family, plain):
    assert retrofit_families.outcome(family) == ROWS[family]


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("dbrx", "DbrxFFN at transformer.blocks.0.ffn holds its experts otherwise, and gets no new ones"),
        ("inkling", "none of its matrices has a row for each of 8 experts alone"),
        ("llama4", "it does not answer with logits, gates and ids"),
        ("phimoe", "what it computes is none of softmax, top-k then softmax, sigmoid and sqrt softplus"),
        ("switch_transformers", "SwitchTransformersSparseMLP at "),
    ],
)
def test_a_family_is_refused_by_what_it_lacks(family, why):
    said = retrofit_families.outcome(family)
    assert why in said and said == ROWS[family]
