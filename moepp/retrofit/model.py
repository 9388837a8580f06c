"""A model of transformers as a `CausalLM` (models/protocol.py): what training, generation and evaluation ask for.

Shape suffixes: B batch, S sequence, V vocabulary, T tokens, K slots of a token, N experts of a layer, L MoE layers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moepp import register
from moepp.errors import UsageError, refused_at
from moepp.layers.balance import combine_layers, load_balance_loss, router_losses, selection_counts
from moepp.layers.moe import MoEStats
from moepp.layers.router import Routing
from moepp.layers.settings import ExpertCounts, MoEConfig
from moepp.models.budget import expected_ffn_per_token
from moepp.models.cross_entropy import widened
from moepp.models.foreign import RetrofitConfig, architecture_of, folder_of
from moepp.models.protocol import ModelOutput
from moepp.models.sampling import continue_ids
from moepp.models.settings import DecoderConfig
from moepp.retrofit.calibration import calibrate, wake
from moepp.retrofit.folders import load as load_folder
from moepp.retrofit.modeling import (
    NEW_OF_EXPERTS,
    ROUTER_NAMES,
    PlusPlusRouter,
    blocks,
    experts_hidden,
    own_experts,
    plus_plus,
    slots,
)
from moepp.retrofit.modeling_form import INDEPENDENT
from moepp.retrofit.observe import are_probabilities, first_answer
from moepp.retrofit.recognise import recognise
from moepp.retrofit.surgery import retrofit, router_width
from moepp.retrofit.upcycle import aligned, upcycle


class LayerWatch(nn.Module):
    """Hears what one MoE block's router and experts are told and say. Without parameters: it has no place in a state.

    Whoever trains on several micro-batches to a step puts the step's counts into `step_counts`, as with a MoELayer.
    """

    def __init__(self, router: nn.Module, experts: nn.Module, config: MoEConfig):
        super().__init__()
        self.config, self.bank = config, (experts,)  # whose parameters are not this module's
        self.step_counts: tuple[Tensor, int] | None = None
        self.heard: list[Tensor | None] | None = None  # logits and ids, while a forward listens
        self.probabilities: bool | None = None  # whether the router answers with these; found at the first answer
        if isinstance(router, PlusPlusRouter):
            router.logits.register_forward_hook(self._logits)
        else:
            router.register_forward_hook(self._router)
        experts.register_forward_pre_hook(self._experts, with_kwargs=True)

    def _logits(self, module: nn.Module, args: Any, logits: Tensor) -> None:
        if self.heard is not None:
            self.heard[0] = widened(logits.flatten(0, -2))

    def _router(self, module: nn.Module, args: Any, output: Any) -> None:
        """Of probabilities the logarithm: logits but for a number per token, which only the z-loss would see."""
        if self.heard is None:
            return
        said = widened(first_answer(output).flatten(0, -2))
        if self.probabilities is None:
            self.probabilities = are_probabilities(said)
        if self.probabilities and self.config.balance.z_loss:
            said = f"{type(module).__name__} answers with probabilities, not logits"
            raise UsageError(f"model.balance.z_loss={self.config.balance.z_loss:g}: {said}: set it to 0")
        self.heard[0] = said.clamp(min=torch.finfo(said.dtype).tiny).log() if self.probabilities else said

    def _experts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.heard is not None:
            self.heard[1] = (*args, *kwargs.values())[1].flatten(0, -2)

    def expert_forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """The block's experts on any routing: what throughput.py times."""
        return self.bank[0](x_TD, routing.expert_TK, routing.gate_TK)

    def stats(self, score: str, training: bool) -> MoEStats:
        (logits_TN, expert_TK), config = self.heard, self.config
        independent = INDEPENDENT.get(score)
        probs_TN = F.normalize(independent(logits_TN), p=1, dim=-1) if independent else logits_TN.softmax(-1)
        chosen_N = selection_counts(expert_TK, config.experts.total).sum(0)
        counts = self._balanced(chosen_N, len(probs_TN), training)
        balance = config.balance
        weighted = balance.z_loss or balance.entropy_loss
        return MoEStats(
            logits_TN=logits_TN,
            balance_loss=load_balance_loss(probs_TN, *counts, config.experts, balance),
            chosen_N=chosen_N,
            dropped=chosen_N.new_zeros(()),
            dropped_ffn=chosen_N.new_zeros(()),
            recomputed=None,
            entropy=torch.special.entr(probs_TN.detach()).sum(-1).mean(),
            router_loss=router_losses(logits_TN, probs_TN, balance) if weighted else None,
            carried=logits_TN,
        )

    def _balanced(self, chosen_N: Tensor, tokens: int, training: bool) -> tuple[Tensor, int]:
        """The slots of each expert in the batch that is balanced (`balance.over`), and its tokens."""
        over = self.config.balance.over
        if over == "step" and training and self.step_counts is not None:
            return self.step_counts
        if over == "micro_batch" or not dist.is_initialized():
            return chosen_N, tokens
        chosen_N = chosen_N.clone()
        dist.all_reduce(chosen_N)
        return chosen_N, tokens * dist.get_world_size()


@register.model("hf")
class TransformersModel(nn.Module):
    """A causal language model of transformers, with what `config.retrofit` adds to it.

    With a `seed` it has the weights of `config.path`, and new experts by the seed; with None it has unset ones, for
    what is loaded into it, and `config.architecture` is enough. `hf` is the model itself.
    """

    def __init__(self, config: DecoderConfig, seed: int | None = 0):
        super().__init__()
        asked = config.retrofit
        architecture = config.architecture or architecture_of(config.path)
        load = partial(with_experts, skeleton if seed is None else partial(pretrained, config.path), asked, seed)
        self.hf = load(architecture)
        compares = seed is not None and asked.loss != "cross_entropy"
        self.original = [load(architecture).requires_grad_(False)] if compares else []  # in no state
        add_experts(self.hf, asked, seed)
        found = blocks(self.hf)
        with refused_at(f"model.path={config.path} with what model.retrofit adds"):
            self.config = replace(config, architecture=architecture, **counts_of(self.hf, found))
        self.watches = nn.ModuleList(LayerWatch(*block, self.config) for block in found.values())
        self.score = score_of(found) if config.balance.beta else "softmax"
        self.sizes = sizes_of(self.hf, found)
        choose_trained(self.hf, asked)
        if config.activation_checkpointing:
            self.hf.activation_checkpointing_enable({"use_reentrant": False})

    def forward(
        self,
        ids_BS: Tensor,
        caches: list["Cache"] | None = None,
        targets_BS: Tensor | None = None,
        at: tuple[Tensor, Tensor] | None = None,
    ) -> ModelOutput:
        """As the decoder's: with `caches`, the ids that follow those already cached; the logits [Q, V] `at` those rows
        and positions alone, where they are named.
        """
        if self.training and self.config.retrofit.own_after:
            ids_BS = self._own_text(ids_BS)
        with self._listening() as heard:
            logits_BSV = caches[0].logits(self.hf, ids_BS) if caches else self.hf(ids_BS, use_cache=False).logits
            stats = [watch.stats(self.score, self.training) for watch in heard]
        if targets_BS is None:
            return ModelOutput(stats, logits=logits_BSV if at is None else logits_BSV[at])
        logits_BVS = widened(logits_BSV).transpose(1, 2)
        if torch.is_grad_enabled():
            output = ModelOutput(stats, cross_entropy=F.cross_entropy(logits_BVS, targets_BS))
            if self.original:
                output.divergence = self._divergence(ids_BS, logits_BSV, self.config.retrofit.loss)
            return output
        nats_BS = F.cross_entropy(logits_BVS, targets_BS, reduction="none")
        output = ModelOutput(stats, cross_entropy=nats_BS.mean(), nats_BS=nats_BS)
        output.right_BS = logits_BVS.argmax(1) == targets_BS
        if self.original:
            output.divergence = self._divergence(ids_BS, logits_BSV, "forward_kl")
        return output

    @contextmanager
    def _listening(self) -> Iterator[list[LayerWatch]]:
        for watch in self.watches:
            watch.heard = [None, None]
        try:
            yield [*self.watches]
        finally:
            for watch in self.watches:
                watch.heard = None

    def _own_text(self, ids_BS: Tensor) -> Tensor:
        """The beginning of each sequence, continued by the model; the same for the same sequences and weights."""
        kept = self.config.retrofit.own_after
        generator = torch.Generator(ids_BS.device).manual_seed(int(ids_BS.sum()))
        own_BS = self.generate(ids_BS[:, :kept], ids_BS.shape[1] - kept, temperature=1.0, generator=generator)
        return own_BS.clone()  # an inference tensor cannot be part of a graph

    def _divergence(self, ids_BS: Tensor, logits_BSV: Tensor, loss: str) -> Tensor:
        """From the original model, mean over tokens, in nats."""
        with torch.no_grad():
            original = self.original[0].to(ids_BS.device).eval()
            wanted = widened(original(input_ids=ids_BS, use_cache=False).logits).log_softmax(-1).flatten(0, 1)
        said = widened(logits_BSV).log_softmax(-1).flatten(0, 1)
        pair = (said, wanted) if loss == "forward_kl" else (wanted, said)
        return F.kl_div(*pair, reduction="batchmean", log_target=True)

    def balance_loss(self, output: ModelOutput) -> Tensor:
        """beta * L_b over all layers (Eq. 9), and the mean of their z-loss and entropy loss; 0 without MoE layers."""
        if not output.stats:
            return torch.zeros((), device=self.hf.device)
        balance = combine_layers([layer.balance_loss for layer in output.stats], self.config.balance)
        others = [layer.router_loss for layer in output.stats if layer.router_loss is not None]
        return balance + torch.stack(others).mean() if others else balance

    def step_control(self, chosen_LN: Tensor, tokens: int) -> None:
        """Nothing: `balance.control` is refused for these models."""

    def active_parameters(self, ffn_per_token: float | None = None) -> int:
        used = self.config.top_k if ffn_per_token is None else ffn_per_token
        experts = self.sizes["ffn_experts"]
        return round(self.sizes["all"] - experts * (1 - min(1.0, used / self.config.experts.ffn)))

    def forward_flops(self, seq_len: int, ffn_per_token: float | None = None) -> dict[str, float]:
        """Two per parameter that a token is multiplied with, and the causal half of the attention scores."""
        used = expected_ffn_per_token(self.config) if ffn_per_token is None else ffn_per_token
        sizes, shape = self.sizes, self.hf.config.get_text_config()
        return {
            "attention_scores": 2 * shape.num_hidden_layers * seq_len * shape.hidden_size,
            "ffn_experts": 2 * sizes["ffn_experts"] * used / self.config.experts.ffn,
            "others": 2 * (sizes["all"] - sizes["ffn_experts"] - sizes["looked_up"]),
        }

    def reset_parameters(self, seed: int = 0) -> None:
        """The weights of `config.path` again, and new experts by the seed."""
        self.load_state_dict(type(self)(self.config, seed).state_dict())

    def expert_cases(self, ids_BS: Tensor) -> list[tuple[LayerWatch, Tensor, Routing]]:
        """Every MoE block with the tokens [T, D] that its experts see and the routing for them."""
        seen: list[tuple[LayerWatch, Tensor, Routing]] = []

        def remember(watch: LayerWatch, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x_TD, expert_TK, gate_TK, *_ = (given.flatten(0, -2) for given in (*args, *kwargs.values()))
            seen.append((watch, x_TD, Routing(expert_TK, gate_TK, x_TD.new_empty(len(x_TD), 0))))

        hooks = [w.bank[0].register_forward_pre_hook(partial(remember, w), with_kwargs=True) for w in self.watches]
        self.hf(input_ids=ids_BS, use_cache=False)
        for hook in hooks:
            hook.remove()
        return seen

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Offsets by the quantile that `config.retrofit.share` names, on ids [B, S] and those of all other devices; of
        silent experts alone.
        """
        calibrate(self.hf, batches, self.config.retrofit.share, parallel=self)

    def wake(self, fraction: float) -> None:
        wake(self.hf, fraction)

    def caches(self) -> list["Cache"]:
        """Empty, for `forward`."""
        return [Cache()]

    def generate(
        self,
        ids_BS: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`ids_BS` with `max_new_tokens` more ids, [B, S + max_new_tokens]; greedy at temperature 0, else sampled."""
        cache = Cache()

        def last_logits(ids_BS: Tensor) -> Tensor:
            return cache.logits(self.hf, ids_BS)[:, -1]

        return continue_ids(self, last_logits, ids_BS, max_new_tokens, temperature, generator)


class Cache:
    """What all layers of a model of transformers have seen, as the family keeps it."""

    def __init__(self) -> None:
        self.seen: Any = None

    def logits(self, model: nn.Module, ids_BS: Tensor) -> Tensor:
        output = model(ids_BS, cache=self.seen, use_cache=True)
        self.seen = output.cache
        return output.logits

    def select(self, row_B: Tensor) -> None:
        """Goes on with these rows, which may be there several times."""
        self.seen.reorder_cache(row_B)


def with_experts(
    load: Callable[..., nn.Module], asked: RetrofitConfig, seed: int | None, architecture: Mapping[str, Any]
) -> nn.Module:
    """The family's model, upcycled where it is dense and that is asked for; the same each time."""
    model = load(architecture)
    if not asked.upcycle or blocks(model):
        return aligned(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        return upcycle(model, asked.upcycle, min(2, asked.upcycle))


def pretrained(path: str, architecture: Mapping[str, Any]) -> nn.Module:
    """In float32, as training wants its weights."""
    cls = causal(architecture)[0]
    if "moepp" in architecture:
        return load_folder(folder_of(path), dtype=torch.float32)
    return cls.from_pretrained(folder_of(path), dtype=torch.float32)


def skeleton(architecture: Mapping[str, Any]) -> nn.Module:
    """The same without weights."""
    cls, config = causal(architecture)
    return (plus_plus(cls) if "moepp" in architecture else cls)._from_config(config, dtype=torch.float32)


def causal(architecture: Mapping[str, Any]) -> tuple[Any, Any]:
    """The class of causal language models and the config that config.json means. Raises UsageError without one."""
    transformers = imported()
    kind, mapping = architecture["model_type"], transformers.AutoModelForCausalLM._model_mapping
    if kind not in transformers.CONFIG_MAPPING:
        raise UsageError(f"transformers {transformers.__version__} knows no model_type {kind}")
    config = transformers.CONFIG_MAPPING[kind].from_dict(dict(architecture))
    if type(config) not in mapping:
        raise UsageError(f"model_type={kind} has no causal language model in transformers, which is needed")
    return mapping[type(config)], config


def imported() -> Any:
    try:
        import transformers
    except ImportError:
        raise UsageError('models of transformers need it: pip install "moepp[hf]"') from None
    transformers.utils.logging.disable_progress_bar()  # a run has its own
    return transformers


def add_experts(model: nn.Module, asked: RetrofitConfig, seed: int | None) -> None:
    """New experts as asked for, drawn by the seed. Raises UsageError for a model that has some, or can have none."""
    if not asked.adds:
        return
    counts = {"zero": asked.zero, "copy": asked.copy, "constant": asked.constant}
    options = {"gating_residual": asked.gating_residual, "scaled_copy": asked.scaled_copy}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed or 0)
        loaded = seed is not None
        retrofit(model, **counts, **options, init=asked.init if loaded else "silent", verify=loaded)


def counts_of(model: nn.Module, found: Mapping[str, tuple[nn.Module, nn.Module]]) -> dict[str, Any]:
    """What the config says of experts: as many as the model has."""
    if not found:
        none = ExpertCounts(ffn=1, zero=0, copy=0, constant=0)
        return {"experts": none, "top_k": 1, "layers": 1, "moe_every": 0, "gating_residual": False}
    added = getattr(model.config, "moepp", {"zero": 0, "copy": 0, "constant": 0, "gating_residual": False})
    router, experts = next(iter(found.values()))
    counts = ExpertCounts(own_experts(router), added["zero"], added["copy"], added["constant"])
    kept = {"top_k": slots(router), "gating_residual": added["gating_residual"]}
    return {"experts": counts, "hidden": experts_hidden(experts), **kept}


def score_of(found: Mapping[str, tuple[nn.Module, nn.Module]]) -> str:
    """What the routers' scores are: of independent ones the balance loss takes each token's shares of their sum."""
    forms = (r.form if hasattr(r, "form") else recognise(r, router_width(r)) for r, _ in found.values())
    return next((form.score for form in forms), "softmax")


def sizes_of(model: nn.Module, found: Mapping[str, tuple[nn.Module, nn.Module]]) -> dict[str, int]:
    """Parameters: all, those of the family's own experts, and those of an embedding that is only looked up."""
    experts = [experts for _, experts in found.values()]
    own = [p for bank in experts for name, p in bank.named_parameters() if name not in NEW_OF_EXPERTS]
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is table.weight
    sizes = {"all": sum(p.numel() for p in model.parameters()), "ffn_experts": sum(p.numel() for p in own)}
    return sizes | {"looked_up": 0 if tied else table.weight.numel()}


def choose_trained(model: nn.Module, asked: RetrofitConfig) -> None:
    """Which parameters learn."""
    if asked.train == "all":
        return
    model.requires_grad_(False)
    for router, experts in blocks(model).values():
        router.requires_grad_(True)
        for name, parameter in experts.named_parameters():
            parameter.requires_grad_(asked.train == "experts" or name in NEW_OF_EXPERTS)
    if asked.train == "lora":
        add_adapters(model, asked.lora_rank)


def add_adapters(model: nn.Module, rank: int) -> None:
    """Low-rank adapters on every linear layer of attention and dense blocks, in place; a family's own kinds of linear
    layers, such as grouped ones, have none.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UsageError("model.retrofit.train=lora needs peft: pip install peft") from None
    inside = tuple(prefix for path in blocks(model) for prefix in insides(path))
    head = model.get_output_embeddings()
    linear = [name for name, m in model.named_modules() if type(m).forward is nn.Linear.forward]
    outside = [name for name in linear if not name.startswith(inside) and model.get_submodule(name) is not head]
    learnt = [p for p in model.parameters() if p.requires_grad]  # which peft would freeze
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=outside), model)
    for parameter in learnt:
        parameter.requires_grad_(True)


def insides(path: str) -> list[str]:
    """What paths inside a MoE block begin with; of a whole layer that is one, its router's and its experts'."""
    if path.rpartition(".")[2].isdecimal():
        return [f"{path}.{name}." for name in (*ROUTER_NAMES, "experts")]
    return [f"{path}."]


def without_adapters(model: nn.Module) -> nn.Module:
    """The model with its adapters added to the weights, in place."""
    for path, module in list(model.named_modules()):
        if hasattr(module, "merge") and hasattr(module, "get_base_layer"):
            module.merge()
            model.set_submodule(path, module.get_base_layer())
    return model
