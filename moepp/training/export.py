"""`python run.py export RUN`: a finished run as a folder that plain transformers runs, with a model card."""

import shutil
from pathlib import Path
from typing import Any

from moepp.errors import UsageError
from moepp.models.decoder import Decoder
from moepp.models.settings import DecoderConfig
from moepp.records import TOKENIZER, write_json
from moepp.retrofit import folders, modeling
from moepp.training.loading import LoadedRun, load_run

CODE = Path(modeling.__file__).with_name("modeling_decoder.py")
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, moe-plus-plus]
---
# {name}

A mixture-of-experts language model with zero-computation experts (MoE++), exported from a training run.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

Needs transformers 5.24 or newer; the one file of code beside the weights needs nothing else. Routing drops no slots.

## The run

| | |
|---|---|
{rows}

## Results

| metric | value |
|---|---|
{results}
"""


def export_run(source: Path, format: str = "hf", out: Path | None = None) -> Path:
    """The folder written: `out`, else `export-<format>` in the run's own. Raises UsageError for a run that the format
    cannot hold, and for a folder of other files.
    """
    run = load_run(source)
    folder = out or run.path / f"export-{format}"
    refuse_other_files(folder)
    if run.config.model.name == "hf":
        write_foreign(run, folder, format)
    elif run.config.model.name == "decoder" and format == "hf":
        write_decoder(run, folder)
    else:
        raise UsageError(f"format={format} holds no model.name={run.config.model.name}; format=hf holds the decoder")
    write_tokenizer(run, folder)
    (folder / "README.md").write_text(card(run, folder), "utf-8")
    return folder


def refuse_other_files(folder: Path) -> None:
    """An export may be written again; a run, or somebody's README.md, must not be written over."""
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if found and ("config.json" not in found or "config.yaml" in found):
        raise UsageError(f"{folder} holds other files; name a folder that is new, or that of an earlier export")


def write_foreign(run: LoadedRun, folder: Path, format: str) -> None:
    """A model of transformers with its adapters merged, with new experts or without."""
    from moepp.retrofit.model import without_adapters

    model = without_adapters(run.model.hf)
    if hasattr(model.config, "moepp"):
        folders.export(model, folder, format)
    elif format == "hf":
        model.save_pretrained(folder)
    else:
        raise UsageError(f"format={format} is of models with new experts, which this run has not: use format=hf")


def write_decoder(run: LoadedRun, folder: Path) -> None:
    from safetensors.torch import save_file

    config, end = run.config.model, run.end_of_text
    refuse_what_the_code_lacks(config)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in run.model.state_dict().items()}
    kept = {name: value for name, value in state.items() if ".control." not in name or name.endswith("bias_N")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    stem = CODE.stem
    described = decoder_keys(run.model) | {
        "architectures": ["MoEPlusPlusForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{stem}.MoEPlusPlusConfig",
            "AutoModelForCausalLM": f"{stem}.MoEPlusPlusForCausalLM",
        },
        "model_type": "moepp",
        "dtype": "float32",
        "max_position_embeddings": run.config.data.seq_len,
        "bos_token_id": end,
        "eos_token_id": end,
    }
    write_json(folder / "config.json", described)
    shutil.copyfile(CODE, folder / CODE.name)


def refuse_what_the_code_lacks(config: DecoderConfig) -> None:
    """The one file of code has the routers and gates that released models use."""
    known = {
        "router": ("linear", "two_layer"), "selection": ("top_k", "sigmoid"),
        "gate": ("softmax", "renormalized", "released"), "expert_groups": (1,),
    }  # fmt: skip
    for key, names in known.items():
        if getattr(config, key) not in names:
            has = ", ".join(map(str, names))
            raise UsageError(f"format=hf has no model.{key}={getattr(config, key)}: its code has {has}")
    if others := [kind for kind, count in config.experts.others.items() if count]:
        raise UsageError(f"format=hf has no experts.others.{others[0]}: its code has constant, copy and zero experts")


def decoder_keys(model: Decoder) -> dict[str, Any]:
    """The decoder's config in the words of transformers, and whether a control, registered ones too, has a bias."""
    config = model.config
    moe = dict(zip(config.moe_blocks, config.moe_configs, strict=True))
    blocks = [moe[b].experts.built_in if b in moe else {"dense": config.dense_width} for b in range(config.layers)]
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.num_kv_heads,
        "layers": blocks,
        "shared_experts": config.experts.shared,
        "num_experts_per_tok": config.top_k,
        "gate_scale": config.gate_options.get("scale", 1.0),
        "choice_bias": any(name.endswith("control.bias_N") for name, _ in model.named_buffers()),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    } | {
        name: getattr(config, name)
        for name in (
            "router", "selection", "gate", "logits_norm", "zero_computation_bias", "gating_residual",
            "multiply_by_top_k", "rope_theta",
        )
    }  # fmt: skip


def write_tokenizer(run: LoadedRun, folder: Path) -> None:
    """The run's own, in the layout of transformers."""
    if not (run.path / TOKENIZER).is_file():
        return  # tokens that were prepared elsewhere
    shutil.copyfile(run.path / TOKENIZER, folder / TOKENIZER)
    end = run.tokenizer.id_to_token(run.end_of_text)
    keys = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "model_max_length": run.config.data.seq_len}
    write_json(folder / "tokenizer_config.json", keys | {"bos_token": end, "clean_up_tokenization_spaces": False})


def card(run: LoadedRun, folder: Path) -> str:
    """What the run was made of and found, for whoever meets the folder alone."""
    config, made = run.config, run.provenance
    data, tokens = made.get("data", {}), config.trainer.steps * config.data.batch_size * config.data.seq_len
    git = made.get("git") or {}
    experts = ", ".join(f"{count} {kind}" for kind, count in config.model.experts.by_kind().items() if count)
    facts = {
        "run": f"{run.path.parent.name}/{run.path.name}",
        "model": config.model.path or config.model.name,
        "experts of a layer": f"{experts}; {config.model.top_k} for every token",
        "corpus": data.get("corpus", config.data.corpus),
        "training": f"{config.trainer.steps:,} steps, {tokens:,} tokens in sequences of {config.data.seq_len:,}",
        "seed": config.seed,
        "optimizer": f"{config.optim.name}, learning rate {config.optim.lr:g}",
        "code": git.get("sha", "installed package") + (" with changes" if git.get("dirty") else ""),
        "versions": ", ".join(f"{name} {version}" for name, version in made.get("versions", {}).items()),
        "begun": made.get("started", "unknown"),
    }
    return CARD.format(
        name=config.name,
        folder=folder,
        rows="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        results="\n".join(f"| {name} | {value:.6g} |" for name, value in run.final.items()),
    )
