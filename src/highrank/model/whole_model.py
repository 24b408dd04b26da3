"""The contract of methods whose update is no weight: one module for the whole model, plugged into its forward pass.

Virtual tokens go in front of the input embeddings, a prefix goes into the key-value cache, a bias update is added to
what a module returns. The model is called as ever: tokens, masks, labels and logits keep their places, and `generate`
counts positions from behind the virtual tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from highrank.base.errors import UserError
from highrank.model.adapters import Adapters, site_seed
from highrank.model.contract import check_adapter, check_class
from highrank.model.language import some_tokens, write
from highrank.model.peft_form import PeftForm
from highrank.model.placement import WeightView
from highrank.model.sharding import whole
from highrank.model.transformers_internals import bodies_of, by_name, cache_of, is_encoder_decoder
from highrank.model.weights import reading


class WholeModelAdapters(Adapters):
    """One module that adapts the model as one; placement, layers and fused do not apply to it."""

    placed = False
    changes_weights = False

    @classmethod
    def views_in(cls, model: nn.Module, placement: Any, layers: Any, fused: str, architecture: Any) -> list[WeightView]:
        return []

    @classmethod
    def count(
        cls, model: nn.Module, views: Sequence[WeightView], method: Any, cfg: Any, num_base: int
    ) -> tuple[int, int]:
        method.validate(model, cfg)
        return method.num_trainable(model, cfg), 0

    @classmethod
    def matched(cls, model: nn.Module, views: Sequence[WeightView], method: Any, cfg: Any) -> dict[str, int]:
        sites: dict[str, int] = method.sites(model, cfg)
        return sites

    def put_on(self, tokenizer: Any) -> None:
        model, method, cfg = self.model, self.method, self.cfg
        method.validate(model, cfg)
        self.module: WholeModelMethod = method(model, cfg)
        check_adapter(method, self.module, method.num_trainable(model, cfg), "the whole model")
        torch.manual_seed(site_seed(self.seed, method.name))
        self.module.reset_parameters(model, tokenizer)
        self.module.to(next(model.parameters()).device)
        self.by_view[method.name] = self.module
        self.plug()
        if self.num_positions:
            config: Any = model.config
            with (
                reading(f"{method.name}: the model must take virtual tokens, got model_type={config.model_type}"),
                torch.no_grad(),
            ):
                write(model, some_tokens(model, 2), 2)

    @property
    def num_positions(self) -> int:
        return self.module.num_positions

    @property
    def merged(self) -> bool:
        return self.module.merged

    def _merge(self) -> None:
        self.module.merge(self.model)

    def _unmerge(self) -> None:
        self.module.unmerge(self.model)

    def merging(self) -> Iterator[tuple[Tensor, Tensor]]:
        before = {name: parameter.clone() for name, parameter in self.model.named_parameters()}
        self.merge()
        named = dict(self.model.named_parameters())
        yield from ((W, named[name]) for name, W in before.items())

    def _act(self, acts: bool) -> None:
        if acts:
            self.module.plug(self.model)
        else:
            self.module.unplug()

    def unload(self) -> nn.Module:
        if self.by_view:
            self.module.unplug()
            del self.model.highrank_adapter
        return self.model

    def plug(self) -> None:
        self.module.plug(self.model)
        self.model.highrank_adapter = self.module

    @property
    def _embeddings(self) -> Tensor:
        model: Any = self.model
        try:
            embedded = model.get_input_embeddings()
        except NotImplementedError:  # of a model that reads sound, or images and texts
            embedded = model.base_model
        embeddings: Tensor = next(embedded.parameters())
        return embeddings

    @property
    def base_dtype(self) -> str:
        return str(self._embeddings.dtype)

    @torch.no_grad()
    def probe(self) -> dict[str, list[float]]:
        """Returns ‖y‖² and a signed sum of y, the first input embeddings, or filters of patches, times one fixed input."""
        E = whole(self._embeddings).flatten(1)[:1024].double().cpu()
        y = E @ torch.cos(torch.arange(E.shape[1], dtype=torch.float64)) / E.shape[1] ** 0.5
        signs = torch.cos(1.7 * torch.arange(len(E), dtype=torch.float64))
        return {"input embeddings": [float(y.square().sum()), float((signs * y).sum())]}


def no_merged_weight(method: Any) -> UserError:
    """Returns the error of a merge with a method that has nothing to merge."""
    return UserError(
        f"merge: {method.name} has no merged weight, it adds to the model's input or activations; keep its adapter folder"
    )


class WholeModelMethod(nn.Module):
    """A method that adapts the model as one.

    A subclass sets its parameters in `__init__` from the model's shape alone (fp32, whatever the base's dtype), gives
    their start in `reset_parameters`, and acts through `hooks`.
    """

    name: ClassVar[str]
    config: ClassVar[type]
    family: ClassVar[type[Adapters]] = WholeModelAdapters
    default_lr: ClassVar[float] = 1e-3
    no_decay: tuple[str, ...] = ()
    lr_factors: Mapping[str, float] = {}
    examples: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    """Fields that show what the method can do, on a tiny model: the tests run over them, the first where one is enough."""
    mergeable: ClassVar[bool] = False
    """Whether the base can hold what the method learns; such a method has `merge` and `unmerge`."""
    peft: ClassVar[PeftForm | None] = None
    """How Hugging Face PEFT writes its adapters; None if it has no such type."""

    def __init__(self, model: Any, cfg: Any):
        super().__init__()
        self.cfg = cfg
        self.merged = False
        self._handles: list[RemovableHandle] = []

    def reset_parameters(self, model: Any, tokenizer: Any) -> None:
        """Sets the trainable start; called under the adapter's seed. `tokenizer` may be None."""
        raise NotImplementedError

    def hooks(self, model: Any) -> list[RemovableHandle]:
        """Registers what makes the method act on `model`, and returns the handles that take it off."""
        raise NotImplementedError

    @property
    def num_positions(self) -> int:
        """Positions that the model attends to beyond the tokens it is given."""
        return 0

    def plug(self, model: Any) -> None:
        self._handles = self.hooks(model)

    def unplug(self) -> None:
        """Lets the model compute as the base does."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def merge(self, model: Any) -> None:
        """Writes the update into the model's own parameters.

        Raises:
            UserError: if the update is not of that kind.
        """
        raise no_merged_weight(self)

    def unmerge(self, model: Any) -> None:
        """Undoes `merge`, bit for bit."""
        raise NotImplementedError

    @classmethod
    def check_class(cls) -> None:
        """Raises UserError unless the class is what this contract says; called when it registers."""
        check_class(cls, WholeModelMethod, "num_trainable", "sites", "hooks", "reset_parameters")

    @classmethod
    def validate(cls, model: Any, cfg: Any) -> None:
        """Raises UserError if `cfg` does not fit the model, which may be on the meta device."""

    @classmethod
    def exact_base(cls, cfg: Any) -> bool:
        """Whether trained numbers mean something beside this very base alone, no rounding of it."""
        return False

    @classmethod
    def sites(cls, model: Any, cfg: Any) -> dict[str, int]:
        """Returns what is adapted, for the plan: a name and how many."""
        raise NotImplementedError

    @classmethod
    def num_trainable(cls, model: Any, cfg: Any) -> int:
        """Trainable parameters, from the paper's formula; `model` may be on the meta device."""
        raise NotImplementedError


class VirtualTokens(WholeModelMethod):
    """Base of methods that put `cfg.num_virtual_tokens` positions in front of every sequence of a decoder.

    A subclass defines `embeddings`, (p, d). Subclasses that fill the cache instead override `before` and `after`.
    """

    _acting: int | None = None
    """The id of the module whose call is being changed: the first that the model calls, not one inside it."""
    _added = 0
    """Positions put in front of the sequence that is being computed: p at its start, 0 once they are in the cache."""

    @property
    def num_positions(self) -> int:
        return int(self.cfg.num_virtual_tokens)

    def embeddings(self) -> Tensor:
        raise NotImplementedError

    def hooks(self, model: Any) -> list[RemovableHandle]:
        return [
            handle
            for body in bodies_of(model)
            for handle in (
                body.register_forward_pre_hook(self._enter, with_kwargs=True),
                body.register_forward_hook(self._leave, always_call=True),
            )
        ]

    def _enter(
        self, body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        if self._acting is not None:
            return None
        self._acting = id(body)
        given = by_name(body, args, kwargs)
        self._check_cache(given)
        return (), self.before(body, given)

    def _check_cache(self, kwargs: dict[str, Any]) -> None:
        """Raises UserError for a cache that has no room for the virtual positions, or was kept from another call of generate."""
        cache, mask, p = cache_of(kwargs), kwargs.get("attention_mask"), self.cfg.num_virtual_tokens
        if cache is None:
            return
        if getattr(cache, "is_compileable", False):
            raise UserError(
                f"{self.name}: the cache must grow with the virtual tokens, got {type(cache).__name__} of a fixed length; "
                "leave out cache_implementation"
            )
        kept, ids, positions = cache.get_seq_length(), kwargs.get("input_ids"), kwargs.get("position_ids")
        behind = 0
        if mask is not None and mask.dim() == 2 and ids is not None:
            behind = mask.shape[1] - ids.shape[1]
        elif positions is not None and positions.dim() == 2:
            behind = int(positions[:, 0].max())
        if 0 < kept < behind + p:
            raise UserError(
                f"{self.name}: a cache that holds the virtual tokens must hold all the text before the tokens given, got "
                f"{kept - p} tokens of {behind}; call generate without past_key_values"
            )

    def _leave(self, body: Any, args: tuple[Any, ...], output: Any) -> Any:
        if self._acting != id(body):
            return None
        self._acting = None
        return None if output is None else self.after(output)  # None: the call has failed

    def before(self, body: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Returns what `body` is called with instead of `kwargs`."""
        self._added = self.cfg.num_virtual_tokens if is_start(kwargs) else 0
        if self._added:
            ids, embedded = kwargs.pop("input_ids", None), kwargs.get("inputs_embeds")
            embedded = body.get_input_embeddings()(ids) if embedded is None else embedded
            prompt = self.embeddings().to(embedded.dtype).expand(len(embedded), -1, -1)
            kwargs["inputs_embeds"] = torch.cat([prompt, embedded], dim=1)
        return make_room(kwargs, self.cfg.num_virtual_tokens, self._added)

    def after(self, output: Any) -> Any:
        """Takes the virtual positions off the hidden states, so that logits match the tokens given."""
        output.last_hidden_state = output.last_hidden_state[:, self._added :]
        return output

    @classmethod
    def validate(cls, model: Any, cfg: Any) -> None:
        if not model.can_generate():
            raise UserError(
                f"{cls.name}: virtual tokens need a causal language model, got {type(model).__name__}; "
                "try model=smollm2_135m and a text-generating task"
            )
        if is_encoder_decoder(model.config):
            raise UserError(
                f"{cls.name}: virtual tokens stand in front of the text that a decoder goes on with, got an encoder and a "
                f"decoder in one, {model.config.model_type}: use a method that changes weights, such as lora, or a decoder"
            )

    @classmethod
    def sites(cls, model: Any, cfg: Any) -> dict[str, int]:
        return {"virtual tokens": cfg.num_virtual_tokens}


def is_start(kwargs: dict[str, Any]) -> bool:
    """Whether a call of a decoder computes a sequence from its first token on."""
    cache = cache_of(kwargs)
    return cache is None or cache.get_seq_length() == 0


def make_room(kwargs: dict[str, Any], p: int, added: int) -> dict[str, Any]:
    """Returns a decoder's arguments with p more positions to attend to, `added` of them in the present call.

    Raises:
        UserError: for a mask of its own for each position, if positions are added.
    """
    mask, types = kwargs.get("attention_mask"), kwargs.get("token_type_ids")
    if mask is not None:
        if added and mask.dim() != 2:
            raise UserError(
                f"virtual tokens: the mask must be one of tokens, (B, T), got a shape of {tuple(mask.shape)}; method=prefix takes it"
            )
        adds = mask.dim() == 4 and mask.is_floating_point()  # what is added to scores, where 0 is to attend
        kwargs["attention_mask"] = F.pad(mask, (p, 0), value=0 if adds else 1)
    if types is not None and added:
        kwargs["token_type_ids"] = F.pad(types, (added, 0))
    positions = kwargs.get("position_ids")
    if positions is not None:
        first = torch.arange(added, device=positions.device).expand(len(positions), -1)
        kwargs["position_ids"] = torch.cat([first, positions + p], dim=1)
    return kwargs
