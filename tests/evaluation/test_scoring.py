from dataclasses import dataclass, field

import pytest
import torch

from moepp.evaluation.scoring import Family, Window, batches, families, log_likelihoods, windows
from moepp.layers.settings import ExpertCounts
from moepp.models.attention import KeyValueCache
from moepp.models.decoder import Decoder
from moepp.models.settings import DecoderConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    config = DecoderConfig(
        vocab_size=40, dim=16, hidden=24, layers=2, heads=2, experts=ExpertCounts(ffn=4), init_std=0.3,
        capacity_factor=1.0,
    )  # fmt: skip
    return Decoder(config, seed=0).eval()


@dataclass
class Reading:
    """Of a decoder, and what it was asked to read."""

    decoder: Decoder
    read: list[torch.Size] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)  # places, of each call

    def caches(self):
        return [KeyValueCache() for _ in self.decoder.blocks]

    @torch.inference_mode()
    def logits(self, ids_BS, at=None, caches=None):
        self.read.append(ids_BS.shape)
        logits_QV = self.decoder(ids_BS, caches, at=at).logits
        self.scored.append(len(logits_QV))
        return logits_QV


def requests(count: int, longest: int, scored: int, seed: int = 0) -> list[tuple[list[int], int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(scored + 1, longest + 1, (count,), generator=generator).tolist()
    return [(torch.randint(40, (length,), generator=generator).tolist(), scored) for length in lengths]


@torch.inference_mode()
def plain_loop(model: Decoder, tokens: list[int], scored: int, context: int) -> tuple[float, bool]:
    """One token at a time, each with all of the context that the definition of the windows gives it."""
    nats, greedy = 0.0, True
    for window in windows(tokens, scored, context):
        first = len(window.inputs) - len(window.targets)
        for offset, target in enumerate(window.targets):
            logits = model(torch.tensor([window.inputs[: first + offset + 1]])).logits[0, -1]
            nats += float(logits.double().log_softmax(-1)[target])
            greedy &= int(logits.argmax()) == target
    return nats, greedy


def test_what_fits_is_cut_from_the_left():
    assert windows(range(8), 3, 10) == [Window(tuple(range(7)), (5, 6, 7))]
    assert windows(range(8), 3, 4) == [Window((3, 4, 5, 6), (5, 6, 7))]
    assert windows(range(8), 4, 4) == [Window((3, 4, 5, 6), (4, 5, 6, 7))]


def test_longer_targets_roll_with_half_a_context_before_each():
    assert windows(range(10), 9, 4) == [  # a whole text behind its prefix
        Window((0, 1, 2, 3), (1, 2, 3, 4)),
        Window((2, 3, 4, 5), (5, 6)),
        Window((4, 5, 6, 7), (7, 8)),
        Window((5, 6, 7, 8), (9,)),
    ]


@pytest.mark.parametrize(
    ("length", "scored", "context"), [(50, 49, 8), (50, 30, 7), (50, 9, 8), (3, 2, 8), (20, 19, 1)]
)
def test_every_target_is_predicted_once_within_the_context(length, scored, context):
    found = windows(range(length), scored, context)
    assert [target for window in found for target in window.targets] == list(range(length - scored, length))
    for window in found:
        assert len(window.inputs) <= context
        assert window.inputs[-1] + 1 == window.targets[-1]  # contiguous, so every target follows its position
        before = window.inputs[-len(window.targets)] - window.inputs[0] + 1
        assert before >= min(context // 2, window.targets[0]) or len(found) == 1


def test_nothing_before_the_first_scored_token_is_refused():
    with pytest.raises(ValueError, match="needs a token before it"):
        windows([1, 2], 2, 8)


def test_batches_hold_at_most_so_many_padded_tokens():
    alone = [Family((), ((0,) * length,)) for length in (9, 5, 4, 2, 2, 1)]
    found = [[family.longest for family in batch] for batch in batches(alone, 8)]
    assert found == [[9], [5], [4, 2], [2, 1]]


def test_a_batch_has_prefixes_of_one_length_and_reads_each_once():
    long, short = Family((0,) * 16, ((1,), (1, 2))), Family((0,) * 8, ((1,), (2,)))
    assert list(batches([long, long, short, short], 40)) == [[long, long], [short, short]]
    assert list(batches([long, long, short, short], 39)) == [[long], [long], [short, short]]


def test_answers_to_one_question_share_what_stands_before_them():
    question, other = tuple(range(20)), tuple(range(1, 5))
    scorers = {(*question, 7): [(0, (7, 8))], (*question, 9, 9): [(1, (9, 9, 9))], other: [(2, (5,))]}
    assert families(scorers) == [
        Family(question[:16], ((16, 17, 18, 19, 7), (16, 17, 18, 19, 9, 9))),
        Family((), (other,)),
    ]


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
@pytest.mark.parametrize("scored", [3, 20])
def test_scores_equal_those_of_a_plain_loop(decoder, batch_tokens, scored):
    """At overflow (context 12 for up to 40 tokens) and whatever the batch, in which padding and other rows differ."""
    asked = requests(8, 40, scored)
    found = log_likelihoods(Reading(decoder), asked, 12, batch_tokens, CPU)
    for likelihood, (tokens, scored_) in zip(found, asked, strict=True):
        nats, greedy = plain_loop(decoder, tokens, scored_, 12)
        assert likelihood.nats == pytest.approx(nats, abs=2e-5)
        assert likelihood.greedy == greedy


def test_the_greedy_continuation_is_recognised(decoder):
    ids = decoder.generate(torch.tensor([[1, 2, 3]]), 5)[0].tolist()
    changed = [*ids[:-1], (ids[-1] + 1) % 40]
    found = log_likelihoods(Reading(decoder), [(ids, 5), (changed, 5)], 16, 64, CPU)
    assert [likelihood.greedy for likelihood in found] == [True, False]


def test_equal_inputs_are_computed_once(decoder):
    reading = Reading(decoder)
    log_likelihoods(reading, [([1, 2, token], 1) for token in range(4)], 8, 64, CPU)
    assert reading.read == [(1, 2)]


def test_choices_read_their_context_once_and_the_head_where_it_is_needed(decoder):
    context = requests(1, 34, 33)[0][0][:33]
    asked = [(context + choice, len(choice)) for choice in ([1, 2, 3], [4, 5], [6, 7, 8, 9])]
    reading = Reading(decoder)
    found = log_likelihoods(reading, asked, 64, 4096, CPU)
    assert reading.read == [(1, 32), (3, 4)] and reading.scored == [0, 9]
    for likelihood, (tokens, scored) in zip(found, asked, strict=True):
        assert likelihood.nats == pytest.approx(plain_loop(decoder, tokens, scored, 64)[0], abs=2e-5)


def test_bfloat16_is_close(decoder):
    asked = requests(8, 20, 3)
    exact = log_likelihoods(Reading(decoder), asked, 24, 256, CPU)

    with torch.autocast("cpu", torch.bfloat16):
        close = log_likelihoods(Reading(decoder), asked, 24, 256, CPU)
    assert max(abs(a.nats - b.nats) for a, b in zip(exact, close, strict=True)) < 0.15
    assert any(a.nats != b.nats for a, b in zip(exact, close, strict=True))
