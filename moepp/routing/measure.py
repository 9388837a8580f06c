"""What the routing studies measure: every trained model of an arm, or a released checkpoint, over the same texts."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from moepp.data.tokenizer import encode, token_bytes
from moepp.evaluation.checkpoints import Checkpoint, load_checkpoint
from moepp.reports.experiment import Context
from moepp.routing import sources
from moepp.routing import traces as routing
from moepp.routing.loads import ExpertLoad
from moepp.routing.scores import RoutingScores
from moepp.routing.tagged import TaggedText, align
from moepp.routing.texts import Text
from moepp.routing.tokens import TokenUse

EXAMPLES = {"smoke": 6, "laptop": 300, "gpu": 1000, "paper": 1_000_000}  # of each task
SUBJECT_EXAMPLES = {"smoke": 6, "laptop": 30, "gpu": 300, "paper": 1_000_000}  # of each subject of MMLU
WORDS = {"smoke": 300, "laptop": 100_000, "gpu": 1_000_000, "paper": 10_000_000}


def expert_loads(context: Context, sweep: str, arm: str) -> tuple[dict[str, ExpertLoad], str]:
    """Load by model ("seed 0", ..., or the name of the released checkpoint) over task texts, and what these are."""
    loads, texts, about = {}, None, ""
    for name, checkpoint in _checkpoints(context, sweep, arm):
        if texts is None:
            texts, about = _task_texts(context, checkpoint)
        loads[name] = routing.expert_load(checkpoint.model, texts, _trace(checkpoint, texts))
    return loads, about


def score_distributions(
    context: Context, sweep: str, arms: tuple[str, ...], task: str
) -> tuple[dict[str, dict[str, RoutingScores]], str]:
    """Routing scores by arm and model over the texts of one task where it is given, else over held-out documents."""
    scores: dict[str, dict[str, RoutingScores]] = {}
    texts, about = None, ""
    for arm in arms:
        for name, checkpoint in _checkpoints(context, sweep, arm):
            if texts is None:
                texts, about = _task_texts(context, checkpoint)
                texts = [text for text in texts if text.group == task] or texts
            found = routing.routing_scores(checkpoint.model, _trace(checkpoint, texts))
            scores.setdefault(arm, {})[name] = found
    return scores, f"{about} Shown here: {', '.join(dict.fromkeys(text.group for text in texts))}."


def token_uses(context: Context, sweep: str, arm: str) -> tuple[dict[str, TokenUse], str]:
    """FFN experts of every token by model, with its string, its word's tag and its part of the word."""
    uses, texts, labels, about = {}, None, None, ""
    for name, checkpoint in _checkpoints(context, sweep, arm):
        if texts is None:
            tagged, about = sources.tagged_texts(checkpoint, context.path("pos"), _amount(context, "words", WORDS))
            texts, labels = _labelled(checkpoint, tagged)
        ffn, nats = routing.ffn_and_nats(checkpoint.model, texts, _trace(checkpoint, texts))
        uses[name] = TokenUse(ffn_T=np.concatenate(ffn), nats_T=np.concatenate(nats), **labels)
    return uses, about


def _checkpoints(context: Context, sweep: str, arm: str) -> Iterator[tuple[str, Checkpoint]]:
    weights = context.path("weights")
    if weights is not None:
        yield weights.name, load_checkpoint(weights)
        return
    for seed, directory in context.run_directories(sweep, arm).items():
        yield f"seed {seed}", load_checkpoint(Path(directory))


def _trace(checkpoint: Checkpoint, texts: list[Text]) -> Iterator[routing.Trace]:
    return routing.trace(checkpoint.model, texts, checkpoint.prefix, checkpoint.context, checkpoint.autocast)


def _task_texts(context: Context, checkpoint: Checkpoint) -> tuple[list[Text], str]:
    limits = _amount(context, "limit", EXAMPLES), _amount(context, "subject_limit", SUBJECT_EXAMPLES)
    return sources.task_texts(checkpoint, context.path("tasks_dir"), *limits)


def _amount(context: Context, option: str, by_scale: dict[str, int]) -> int:
    return int(context.options.get(option) or by_scale[context.scale])


def _labelled(checkpoint: Checkpoint, tagged: list[TaggedText]) -> tuple[list[Text], dict[str, np.ndarray]]:
    """Tokenised texts, and for their tokens in order the text, string, tag and part of the word."""
    tokenizer = checkpoint.require_tokenizer()
    pending, texts = iter(tagged), []
    labels: dict[str, list] = {"text_T": [], "string_T": [], "tag_T": [], "part_T": []}
    strings: dict[int, str] = {}
    for text, encoding in encode(tokenizer, [source.text for source in tagged]):
        source = next(t for t in pending if t.text == text)
        words, parts = align(np.array(encoding.offsets), source)
        texts.append(Text(np.array(encoding.ids), token_bytes(text, encoding.offsets), group=""))
        labels["text_T"] += [len(texts) - 1] * len(parts)
        strings |= {token: _string(tokenizer, token) for token in set(encoding.ids) - strings.keys()}
        labels["string_T"] += [strings[token] for token in encoding.ids]
        labels["tag_T"] += [source.tags[word] if word >= 0 else "" for word in words]
        labels["part_T"] += parts
    return texts, {name: np.array(values) for name, values in labels.items()}


def _string(tokenizer: Tokenizer, token: int) -> str:
    """A token as text, its blank shown; bytes that are no character alone as the tokenizer spells them.

    Decoders that write blanks as U+2581 drop the first one of a text, so there the spelling says whether it has one.
    """
    spelling = tokenizer.id_to_token(token)
    if "\u2581" in spelling:
        return spelling.replace("\u2581", "␣")
    text = tokenizer.decode([token], skip_special_tokens=False)
    return spelling if "\ufffd" in text or not text.strip() else text.replace(" ", "␣")
