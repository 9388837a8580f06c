"""What a report says of its registration: when it was made, what it says, and what deviates from it."""

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from moepp.config import lies_in
from moepp.records import read_json
from moepp.reports.results import Run, SweepResults
from moepp.statistics.seeds import spans
from moepp.statistics.wording import several
from moepp.sweeps.registration import plan_path
from moepp.sweeps.spec import Exclusions, Primary

ONLY_WHEN_FROZEN = ("data.digest", "init_weights", "model.architecture")
FROM_ITS_FOLDER = (  # of a model of transformers, likewise once a run is frozen
    "model.experts", "model.top_k", "model.gating_residual", "model.vocab_size", "data.tokenizer", "data.vocab_size",
)  # fmt: skip


def registered(results: SweepResults) -> dict[str, Any] | None:
    """The plan.json of the sweep at this scale, below the working directory."""
    return read_json(plan_path(results.name, results.scale, results.overrides, results.size))


def stamp(plan: Mapping[str, Any] | None) -> str:
    """For the first line: whether it was said beforehand."""
    if plan is None:
        return "Not registered beforehand."
    after = " after the start" if plan["when"] == "after the start" else " before it ran"
    return f"Registered{after}, on {plan['registered'][:10]}."


def what_was_registered(plan: Mapping[str, Any]) -> list[str]:
    code, tested = plan["code"], "primary" in plan
    sha = f"{code.get('sha', 'unknown')[:12]}{' with changes' if code.get('dirty') else ''}"
    rules = [f"{name} {value}" for name, value in plan["exclusions"].items() if value is not None]
    return [
        f"Registered {plan['registered']}, {plan['when']}, at commit {sha}.",
        *(f"Prediction: {said}" for said in plan.get("predictions", ())),
        *([_primary(plan["primary"])] if tested else []),
        f"Arms: {', '.join(plan['arms'])}; seeds {spans(plan['seeds'])}.",
        *([f"Test: {plan['test']}."] if tested else []),
        f"Excluded: {', '.join(rules) or 'no finished run'}.",
        *([_power(plan["power"])] if tested else []),
    ]


def _primary(primary: Mapping[str, Any]) -> str:
    sides = " minus ".join(", ".join(primary[side]) for side in ("arms", "minus"))
    smallest = f"; the smallest difference that matters: {primary['smallest']}" if primary["smallest"] else ""
    return f"Primary contrast: {primary['name']} ({sides}){smallest}."


def _power(power: Mapping[str, Any]) -> str:
    least = power["detectable"]
    seen = f"{least['primary']:.4f} in the primary, {least['secondary']:.4f} in others" if least["primary"] else "none"
    return (
        f"Smallest difference seen with {power['power']:.0%} probability, from a deviation of {power['sd']:.4f}"
        f" ({power['sd_from']}) and {several(power['pairs'], 'pair')}: {seen}."
    )


def deviations(
    plan: Mapping[str, Any], results: SweepResults, primary: Primary | None, exclusions: Exclusions
) -> list[str]:
    """`results` are those of all finished runs, excluded ones too."""
    return [
        *_arms_and_seeds(plan, results),
        *_settings(plan, results),
        *_rules(plan, primary, exclusions),
        *_begun_before(plan, results),
    ] or ["Nothing deviates."]


def _arms_and_seeds(plan: Mapping[str, Any], results: SweepResults) -> list[str]:
    wanted = [(arm, seed) for arm in plan["arms"] for seed in plan["seeds"]]
    run = [(arm, seed) for arm, by_seed in results.runs.items() for seed in by_seed]
    named = {"Registered, but without a result": wanted, "With a result, but not registered": run}
    said = []
    for words, pairs in named.items():
        other = set(run if pairs is wanted else wanted)
        extra: dict[str, list[int]] = {}
        for arm, seed in (pair for pair in pairs if pair not in other):
            extra.setdefault(arm, []).append(seed)
        said += [f"{words}: {arm}, seeds {spans(seeds)}." for arm, seeds in extra.items()]
    return said


def _settings(plan: Mapping[str, Any], results: SweepResults) -> list[str]:
    found: dict[tuple[str, str], list[int]] = {}
    for arm in plan["arms"]:
        settings = plan["config"] | plan["arms"][arm]["differs"]
        for seed, run in results.runs.get(arm, {}).items():
            for key, value in _deviating(settings, run).items():
                found.setdefault((arm, f"{key} {value}"), []).append(seed)
    return [f"{arm}: {what} (seeds {spans(seeds)})." for (arm, what), seeds in found.items()]


def _deviating(settings: Mapping[str, Any], run: Run) -> dict[str, str]:
    """What the schema has gained or lost since counts for nothing."""
    filled = (*ONLY_WHEN_FROZEN, *(FROM_ITS_FOLDER if run.config.get("model.name") == "hf" else ()))
    compared = {key: value for key, value in settings.items() if not lies_in(key, filled)}
    return {
        key: f"was registered as {value}, and is {run.config[key]}"
        for key, value in compared.items()
        if key in run.config and run.config[key] != value
    }


def _rules(plan: Mapping[str, Any], primary: Primary | None, exclusions: Exclusions) -> list[str]:
    asked, rules = plan.get("primary", {}), asdict(exclusions)
    then = {**_asked(asked.get("name"), asked.get("smallest")), **plan["exclusions"]}
    now = {**(_asked(primary.contrast, primary.smallest) if primary else _asked(None, None)), **rules}
    return [f"The {k} was registered as {then.get(k)}, and is {v}." for k, v in now.items() if then.get(k) != v]


def _asked(contrast: str | None, smallest: float | None) -> dict[str, Any]:
    return {"primary contrast": contrast, "smallest difference that matters": smallest}


def _begun_before(plan: Mapping[str, Any], results: SweepResults) -> list[str]:
    at = datetime.fromisoformat(plan["registered"]).timestamp() * 1000
    early = [
        f"{arm} s{seed}"
        for arm in plan["arms"]
        for seed, run in results.runs.get(arm, {}).items()
        if seed in plan["seeds"] and run.first_ms < at
    ]
    return [f"{several(len(early), 'run')} began before the registration: {', '.join(early)}."] if early else []
