"""How Hugging Face PEFT writes a method's adapters: what a method says so that `highrank export` and `import` know it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PeftForm:
    """PEFT's name of a method, and its names of the fields and tensors."""

    type: str
    """PEFT's peft_type, e.g. LORA."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Our field -> PEFT's option."""
    values: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    """Our field -> {our value: PEFT's}, for a field whose values go by other names there."""
    absent: Mapping[str, Any] = field(default_factory=dict)
    """PEFT's option -> what a file without it means: it was written before there was the option."""
    computed: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    """PEFT's option -> what our config gives it, where that is more than the field's own value."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Options that the method needs; they tell it from another method of the same type."""
    ignored: tuple[str, ...] = ()
    """Options of this type that change nothing of a trained adapter: its start, or what acts in training alone."""
    tensors: Mapping[str, str] = field(default_factory=dict)
    """Our tensor -> PEFT's, of one module; none for a method whose update is no weight."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Our tensor -> the shape that PEFT gives it, with at most one -1, where that is another."""
    frozen: Callable[[Any], Mapping[str, Tensor]] | None = None
    """Makes PEFT's frozen tensors of one module, by its names, from our adapter; those of a file read must be equal."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """Frozen tensor common to all adapters -> PEFT's name of it; a file may have it once more for every weight."""
    factors: tuple[str, str] | None = None
    """Our names of a low-rank pair, (n, r) and (r, k), if pairs on slices of a matrix can be joined to one."""
    converted: Callable[[Any, Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None
    """For a method that PEFT has only as a case of another: makes that one's tensors of an adapter and ours."""
    one_way: bool = False
    """Whether an adapter so written is read back as another method."""
    also_reads: tuple[str, ...] = ()
    """Other types that are read as this method."""
    linear_only: bool = False
    """Whether PEFT adapts `nn.Linear` alone, and no GPT-2 `Conv1D`."""
    scales_bias: Callable[[Any], bool] = lambda cfg: False
    """Whether PEFT's layer changes a bias too for our config: then it agrees on weights without one alone."""
    since: str = ""
    """PEFT's version from which on a file of this type means what it says; it must have been written by this one or later."""
    read: Callable[[Mapping[str, Any], Mapping[str, Tensor]], Mapping[str, Any]] | None = None
    """Corrects our fields, as PEFT's config has them, by PEFT's tensors or by what PEFT does without a value."""
    lacks: Callable[[Any], str] = lambda cfg: ""
    """What our config asks for that PEFT does not compute, as `<rule>, got <field>=<value>`; empty if there is nothing."""

    def options(self, cfg: Any) -> dict[str, Any]:
        """Returns PEFT's options for our config."""
        options = {}
        for ours, theirs in self.fields.items():
            value = getattr(cfg, ours)
            options[theirs] = self.values[ours][value] if ours in self.values else value
        return options | {theirs: compute(cfg) for theirs, compute in self.computed.items()} | dict(self.fixed)
