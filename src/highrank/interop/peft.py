"""Adapter folders of Hugging Face PEFT (0.21), both ways: `highrank export` writes one, `highrank import` reads one.

What PEFT calls a method, its fields and its tensors stands in the method's file, as `peft`. HyperAdapt is written as HiRA of
rank 2, hira_B = [a, -1] and hira_A = [bᵀ; 1ᵀ], so that W ⊙ (1 + BA) = W ⊙ (a bᵀ).

PEFT adapts modules whole. Adapters on row slices of a fused matrix become one low-rank pair on all its rows: their
factors (n_i, r) on a block diagonal, their factors (r, k) on top of each other. Every module of such an adapter gets the
largest rank, filled up with zeros, because PEFT's HiRA does not heed rank_pattern.

Read back, a P_TUNING adapter is prompt_tuning and a projected prefix is prefix: the same function, trained otherwise.
Every other option that PEFT would compute with, and that has no counterpart here, is refused by name.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from torch import Tensor

from highrank import configs
from highrank.base.console import say
from highrank.base.errors import UserError, suggest
from highrank.base.files import sha256, write_atomic
from highrank.base.registry import available, load
from highrank.config.run_config import Run
from highrank.config.words import compose_run, spelled
from highrank.interop.card import model_card
from highrank.model.adapters import Adapters
from highrank.model.backbones import Backbone, empty_model, head_modules, model_config
from highrank.model.peft_form import PeftForm
from highrank.model.placement import EXPERTS, WeightView, is_transposed, resolve, row_index, weight_of
from highrank.model.transformers_internals import is_encoder_decoder
from highrank.model.weight_adapters import WeightAdapters
from highrank.model.whole_model import WholeModelAdapters
from highrank.train.build import adapted_views, build_model
from highrank.train.plan import count
from highrank.train.results import RunDirectory
from highrank.train.saved import check_new, check_plain, load_run, read_run, written_whole

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


def export_run(folder: Path | str, out: Path | str, words: Sequence[str] = ()) -> Path:
    """Writes a run's adapter as a folder that PEFT loads; returns it.

    Raises:
        UserError: if `out` exists and is not empty, or PEFT cannot express the adapter.
    """
    out_folder = check_new("export", out)
    run = check_run(folder, words)
    config, tensors = adapter_of(folder, words)
    with written_whole("export", out_folder) as ready:
        write_adapter(ready, config, tensors)
        write_atomic(ready / "README.md", model_card(run, Path(folder), "peft").encode())
    return out_folder


def check_run(folder: Path | str, words: Sequence[str] = ()) -> Run:
    """Returns a run whose adapter PEFT can express, before any weight is loaded.

    Raises:
        UserError: if it cannot.
    """
    run = read_run(folder, words)
    check_plain("export", run, folder)
    check_expressible(run, *_without_weights(run))
    return run


def beyond_peft(run: Run) -> str:
    """Returns why PEFT cannot load the adapter of a run; "" if it can."""
    try:
        check_expressible(run, *_without_weights(run))
    except UserError as error:
        return str(error).removeprefix("export: ").partition("; ")[0]
    return ""


def _without_weights(run: Run) -> tuple[Any, list[WeightView]]:
    """Returns the model of a run on the meta device, and the weights in it that are adapted."""
    task = run.make_task()
    meta = empty_model(model_config(run.model, run.core.path), task.kind, task.num_labels)
    return meta, adapted_views(run, meta)


def adapter_of(folder: Path | str, words: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns adapter_config.json of a run and the tensors of its adapter_model.safetensors."""
    run, backbone, adapters = load_run(folder, words)
    config, tensors = to_peft(adapters)
    return config | base_facts(run, backbone), tensors


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes what PEFT loads into a folder."""
    write_atomic(folder / WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write_atomic(folder / CONFIG, json.dumps(config, indent=1, sort_keys=True).encode())


def base_facts(run: Run, backbone: Backbone) -> dict[str, Any]:
    """Returns what adapter_config.json tells of the base model and what it does."""
    source = backbone.source
    return {
        "task_type": task_type(backbone.model.config, run.make_task().kind),
        "base_model_name_or_path": source.location if source.kind in ("path", "random") else run.model["hub"],
        "revision": run.model["revision"],
        "inference_mode": True,
    }


def task_type(config: Any, kind: str) -> str | None:
    """Returns PEFT's name of what a model does in a kind of task; None for images, which it has none for."""
    if kind != "generate":
        return None if kind == "classify_images" else "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if is_encoder_decoder(config) else "CAUSAL_LM"


def check_expressible(run: Run, model: Any, views: Sequence[WeightView]) -> None:
    """Raises UserError unless PEFT has a type that computes what the run's adapter does; `model` may hold no weights."""
    form, name = run.method.peft, run.method.name
    merges = run.method.mergeable
    instead = f"; {'`highrank merge RUN --out DIR` writes the adapted model instead' if merges else 'keep the run'}"
    if form is None:
        raise UserError(f"export: PEFT has no type for this method, got method={name}{instead}")
    if lacking := form.lacks(run.method_cfg):
        raise UserError(f"export: {lacking}{instead}")
    if experts := [view.path for view in views if view.part == EXPERTS]:
        raise UserError(f"export: PEFT's {name} adapts linear layers, got the expert {experts[0]}{instead}")
    sliced = [view.name for view in views if view.rows is not None]
    if sliced and form.factors is None:
        raise UserError(f"export: PEFT's {name} adapts a fused matrix whole, got the slice {sliced[0]}{instead}")
    if form.scales_bias(run.method_cfg) and (biased := _biased(model, views)):
        raise UserError(f"export: PEFT's {name} scales a bias too, got {biased[0]} with one{instead}")
    transposed = [view.path for view in views if is_transposed(model.get_submodule(view.path))]
    if transposed and form.linear_only:
        raise UserError(f"export: PEFT's {name} adapts linear layers only, got the Conv1D {transposed[0]}{instead}")


def _biased(model: Any, views: Sequence[WeightView]) -> list[str]:
    """Returns the adapted modules that have a bias."""
    return [view.path for view in views if getattr(model.get_submodule(view.path), "bias", None) is not None]


def to_peft(adapters: Adapters) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns adapter_config.json, less what tells of the base model, and the tensors of adapter_model.safetensors."""
    form: PeftForm = adapters.method.peft
    config: dict[str, Any] = {"peft_type": form.type, **form.options(adapters.cfg)}
    if isinstance(adapters, WholeModelAdapters) and not form.tensors:
        tokens = _virtual_tokens(adapters.module)
        return config, {"prompt_embeddings": tokens.detach().float().cpu().contiguous()}
    if isinstance(adapters, WholeModelAdapters):
        owned = _of_modules(adapters.module)
        tensors = {f"{PREFIX}{path}.{form.tensors[ours]}": owned[path, ours][1] for path, ours in owned}
        config["target_modules"] = sorted({path for path, _ in owned})
        return _with_head(adapters, config, tensors)
    assert isinstance(adapters, WeightAdapters)
    first = adapters.layers[adapters.views[0].path].base
    config |= {
        "target_modules": targets(adapters.model, list(adapters.layers)),
        **({"fan_in_fan_out": True} if is_transposed(first) else {}),
    }
    modules = {path: [view for view in adapters.views if view.path == path] for path in adapters.layers}
    if form.factors is not None:
        most = max(map(len, modules.values()))
        config |= {key: most * config[key] for key in ("r", "lora_alpha") if key in config}
    tensors = {}
    for path, views in modules.items():
        module = _module(adapters, views, form, config.get("r", 0))
        for ours, theirs in form.tensors.items():
            if ours in module:  # fields decide which tensors there are
                tensors[f"{PREFIX}{path}.{theirs}"] = module[ours]
        tensors |= {f"{PREFIX}{path}.{key}": tensor for key, tensor in _frozen(adapters, views[0], form).items()}
    if config.get("save_projection", True):
        tensors |= {f"base_model.{key}": tensor for key, tensor in _shared(adapters, form).items()}
    return _with_head(adapters, config, tensors)


def _with_head(
    adapters: Adapters, config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if adapters.extra:
        config["modules_to_save"] = head_modules(adapters.model)
        named = dict(adapters.model.named_parameters())
        tensors |= {f"{PREFIX}{key}": named[key] for key in adapters.extra}
    return config, {key: _as_saved(tensor) for key, tensor in tensors.items()}


def _as_saved(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous().clone()
    return tensor.float() if tensor.is_floating_point() else tensor


def targets(model: Any, paths: Sequence[str]) -> list[str]:
    """Returns the last names of the adapted modules if no other module has one of them, else their paths."""
    names = {path.rpartition(".")[2] for path in paths}
    alike = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in names}
    return sorted(names) if alike == set(paths) else list(paths)


def _module(adapters: WeightAdapters, views: Sequence[WeightView], form: PeftForm, rank: int) -> Mapping[str, Tensor]:
    """Returns one module's tensors by our names; low-rank pairs are joined to one of the given rank on all rows."""
    parts = [_parameters(adapters, view, form) for view in views]
    if form.factors is None:
        return parts[0]
    left, right = form.factors
    n, k, r = len(weight_of(adapters.layers[views[0].path].base)), views[0].in_features, len(parts[0][right])
    joined = {left: torch.zeros(n, rank), right: torch.zeros(rank, k)}
    if "m" in form.tensors:  # rows without an adapter keep their norm
        joined["m"] = adapters.base_weight(replace(views[0], rows=None)).detach().float().cpu().norm(dim=1)
    for i, (view, part) in enumerate(zip(views, parts, strict=True)):
        rows, columns = row_index(view.rows, n), slice(i * r, (i + 1) * r)
        joined[left][rows, columns], joined[right][columns] = part[left], part[right]
        if "m" in part:
            joined["m"][rows] = part["m"]
    return joined


def _parameters(adapters: WeightAdapters, view: WeightView, form: PeftForm) -> Mapping[str, Tensor]:
    adapter = adapters.by_view[view.name]
    named = [*adapter.named_parameters(), *(adapter.named_buffers() if form.converted else ())]
    parameters = {name: p.detach().float().cpu() for name, p in named}
    shaped = {name: p.view(form.shapes.get(name, p.shape)) for name, p in parameters.items()}
    return form.converted(adapter, shaped) if form.converted else shaped


def _frozen(adapters: WeightAdapters, view: WeightView, form: PeftForm) -> Mapping[str, Tensor]:
    return form.frozen(adapters.by_view[view.name]) if form.frozen else {}


def _shared(adapters: WeightAdapters, form: PeftForm) -> dict[str, Tensor]:
    return {theirs: getattr(adapters.shared, ours) for ours, theirs in form.shared.items()}


def _of_modules(module: Any) -> dict[tuple[str, str], tuple[str, Tensor]]:
    """Returns, per path of a module that is trained and our name of a tensor of it, that one's full name and value."""
    owned = {}
    for name, parameter in module.named_parameters():  # norms.<path, its dots as />.<name>
        _, path, ours = name.split(".")
        owned[path.replace("/", "."), ours] = (name, parameter)
    return owned


def _virtual_tokens(module: Any) -> Tensor:
    """Returns (p, d), or a prefix as (p, 2 L g d_h)."""
    return module.P.permute(3, 0, 1, 2, 4).flatten(1) if module.name == "prefix" else module.embeddings()


def import_adapter(folder: Path | str, out: Path | str, words: Sequence[str] = ()) -> Path:
    """Makes a run directory, which can be evaluated and merged, of a PEFT adapter folder; returns it.

    `words` may name the base model (default: the one in adapter_config.json), the task and the protocol.

    Raises:
        UserError: for an adapter type or option that has no counterpart, or an adapter of another model.
    """
    out_folder, folder = check_new("import", out), Path(folder)
    config = read_config(folder)
    method, fields = read_fields(config)
    cls: Any = load("methods", method)
    form: PeftForm = cls.peft
    tensors = read_tensors(folder, form)
    fields = _corrected(form, fields, tensors)
    given = {word.partition("=")[0] for word in words}
    base = [] if given & {"model", "path"} else _base_words(config)
    chosen = [
        f"method={method}",
        *(f"{k}={spelled(v)}" for k, v in fields.items()),
        *base,
        *words,
        f"run_dir={spelled(str(out))}",
    ]
    run = compose_run(chosen)
    if run.method.family.placed:
        run = compose_run([*chosen, *_placement_words(run, form, tensors)])
    if run.core.start_from is not None:
        raise UserError(
            "import: an imported adapter is what it is, got start_from; give it to the run that goes on from it"
        )
    task = run.make_task()
    if config.get("modules_to_save") and task.kind == "generate":
        raise UserError(
            f"import: only a classifier's new head is read beside adapters, got modules_to_save="
            f"{config['modules_to_save']} for task={task.name}"
        )
    stated = config.get("task_type")
    fits = stated != "SEQ_CLS" if task.kind == "generate" else stated == task_type(None, task.kind)
    if not fits:
        raise UserError(
            f"import: the task must be of the adapter's kind, got task={task.name} ({task.kind}) for "
            f"task_type={stated}; give one with task=<name>"
        )
    if form.scales_bias(run.method_cfg):
        meta = empty_model(model_config(run.model, run.core.path), task.kind, task.num_labels)
        if biased := _biased(meta, adapted_views(run, meta)):
            raise UserError(
                f"import: PEFT's {form.type} scales a bias too, which {method} does not, got {biased[0]} with one"
            )
    backbone, adapters = build_model(run, task)
    adapters.load_state_dict(from_peft(adapters, config, tensors))
    stated_base = config.get("base_model_name_or_path")
    if "model" in given and stated_base not in (
        None,
        run.model["name"],
        run.model.get("hub"),
        backbone.source.location,
    ):
        say(
            f"warning: the adapter names another base, got model={run.model['name']} for base_model_name_or_path={stated_base}"
        )
    with written_whole("import", out_folder) as ready:
        directory = RunDirectory(run, ready)
        directory.open()
        adapters.save(ready / "adapter")
        directory.write(
            status="imported",
            imported={"folder": str(folder), "peft_type": config["peft_type"], "sha256": sha256(folder / WEIGHTS)},
            model={"name": run.model["name"], **vars(backbone.source)},
            params=vars(count(backbone.model, adapters.views, run.method, run.method_cfg)),
        )
    return out_folder


def read_config(folder: Path) -> dict[str, Any]:
    """Returns what adapter_config.json holds."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"import: a PEFT adapter folder holds a readable {CONFIG}, got {folder} ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise UserError(f"import: {CONFIG} must name its peft_type, got none in {folder}")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str | None):
        raise UserError(f"import: a base model is named by a text, got base_model_name_or_path={base} in {folder}")
    return config


def read_tensors(folder: Path, form: PeftForm) -> dict[str, Tensor]:
    """Returns what adapter_model.safetensors holds."""
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"import: weights are read from {WEIGHTS} only, got none in {folder}")
    try:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"import: {WEIGHTS} is damaged, got {error} in {folder}; fetch it again") from error
    for key, tensor in tensors.items():
        places = form.frozen is not None and not key.endswith(tuple(form.tensors.values()))
        if not (tensor.is_floating_point() or places) or not tensor.float().isfinite().all():
            raise UserError(
                f"import: an adapter holds finite numbers, got {key} ({tensor.dtype}) with others in {folder}"
            )
    return tensors


NEUTRAL: tuple[Any, ...] = (None, False, "", "none", {}, [])
HARMLESS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("fan_in_fan_out", "init_weights", "megatron_core", "qalora_group_size", "runtime_config", "modules_to_save"),
    *("token_dim", "num_attention_heads", "num_layers", "prefix_projection", "encoder_reparameterization_type"),
    *("encoder_hidden_size", "encoder_num_layers", "encoder_dropout"),
}
"""Options that say how an adapter came about or where it sits, which the tensors show; or act in training alone."""
ALLOWED = {"init_lora_weights": (True, "gaussian", "orthogonal", "eva"), "num_transformer_submodules": (1,)}
"""Values that leave the base model as it is; PiSSA, OLoRA, CorDA and LoftQ replace its weights."""


def _readers() -> dict[str, dict[str, PeftForm]]:
    """Returns, per PEFT type, the methods that read it and their forms."""
    readers: dict[str, dict[str, PeftForm]] = {}
    for name in available("methods"):
        form = getattr(load("methods", name), "peft", None)
        for kind in () if form is None else (*(() if form.one_way else (form.type,)), *form.also_reads):
            readers.setdefault(kind, {})[name] = form
    return readers


def read_fields(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns the method and its fields that an adapter_config.json describes.

    Raises:
        UserError: naming the type, or the option, that has no counterpart.
    """
    kind, readers = config["peft_type"], _readers()
    if kind not in readers:
        raise UserError(f"import: this PEFT type has no counterpart, got peft_type={kind}{suggest(kind, readers)}")

    def fit(name: str) -> int:
        fixed = readers[kind][name].fixed
        return sum(1 if config.get(key) == value else -1 for key, value in fixed.items())

    method = max(readers[kind], key=fit)
    form = readers[kind][method]
    config = {**form.absent, **config}
    for key, value in config.items():
        same = key in form.fixed and value == form.fixed[key]
        known = same or key in HARMLESS or key in form.ignored or key in form.fields.values()
        if not known and value not in NEUTRAL and value not in ALLOWED.get(key, ()):
            raise UserError(f"import: this option of PEFT's {kind} has no counterpart, got {key}={value}")
    version = str(config.get("peft_version") or 0)
    if _numbers(version) < _numbers(form.since):
        raise UserError(
            f"import: PEFT's {kind} means another function in files before {form.since}, got peft_version={version}; load it "
            "with that version and merge it"
        )
    lacking = [theirs for theirs in form.fields.values() if theirs not in config]
    if lacking:
        raise UserError(f"import: {CONFIG} must hold {', '.join(lacking)}, got peft_type={kind} without")
    return method, {ours: _value(form, ours, config[theirs]) for ours, theirs in form.fields.items()}


def _numbers(version: str) -> list[int]:
    """Returns the numbers of a release, e.g. [0, 18, 0]."""
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def _value(form: PeftForm, ours: str, theirs: Any) -> Any:
    """Returns our value of a field for PEFT's."""
    if ours not in form.values:
        return theirs
    for value, known in form.values[ours].items():
        if known == theirs and type(known) is type(theirs):
            return value
    raise UserError(f"import: this value of PEFT's {form.type} has no counterpart, got {form.fields[ours]}={theirs}")


def _corrected(form: PeftForm, fields: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the fields as the tensors have them, and says so if the config has another number."""
    if form.read is None or not tensors:
        return fields
    corrected = dict(form.read(fields, tensors))
    for key, value in corrected.items():
        if value != fields[key] is not None and form.fields[key] not in form.computed:
            say(
                f"import: PEFT's config says {form.fields[key]}={fields[key]}, it computed with {value}: read as the "
                "tensors have it"
            )
    return corrected


def _base_words(config: Mapping[str, Any]) -> list[str]:
    """Returns the words of the base model that an adapter names: a folder, a model known here, or one on the Hub."""
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not name:
        raise UserError("import: the base model is needed, got no base_model_name_or_path; give model=<name>")
    if Path(name).is_dir():
        return [f"model=hf:{Path(name).resolve().name}", f"path={spelled(name)}"]
    shipped = (Path(configs.__path__[0]) / "model").glob("*.yaml")
    known = [file.stem for file in shipped if OmegaConf.select(OmegaConf.load(file), "hub") == name]
    words = [f"model={known[0]}" if known else f"model=hf:{name}" if "/" in name else f"model={name}"]
    return words + ([f"model.revision={spelled(revision)}"] if revision else [])


def _placement_words(run: Run, form: PeftForm, tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the words that place adapters on exactly the modules that have tensors.

    Raises:
        UserError: if no placement does.
    """
    task = run.make_task()
    meta = empty_model(model_config(run.model, run.core.path), task.kind, task.num_labels)
    wanted = {path for path, _ in _owners(form, tensors).values()}
    every = resolve(meta, "all", "all", "fused", run.core.architecture)
    here = [view for view in every if view.path in wanted]
    beyond = sorted(wanted - {view.path for view in here})
    if beyond:
        raise UserError(
            f"import: an adapted module is a placement part of the base model, got {beyond[0]} in a "
            f"{meta.config.model_type}; is it an adapter of another model?"
        )
    if not here:
        raise UserError(f"import: the adapter holds no {form.type} tensors, got {sorted(tensors)[:3]}")
    parts = sorted({part for view in here for part in view.part.split("+")})
    layers = sorted({view.layer for view in here})
    words = [f"placement=[{','.join(parts)}]"]
    if layers != sorted({view.layer for view in every}):
        words.append(f"layers=[{','.join(map(str, layers))}]")
    placed = resolve(meta, parts, layers, "auto", run.core.architecture)
    if {view.path for view in placed} != wanted:
        lacking = sorted({view.path for view in placed} - wanted)
        raise UserError(f"import: every adapted layer has the same parts, got none for {lacking[0]}")
    return words


def _owners(form: PeftForm, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """Returns, per tensor that belongs to a module, the module's path and our name of the tensor."""
    owners = {}
    for key in tensors:
        for ours, theirs in form.tensors.items():
            if key.startswith(PREFIX) and key.endswith(f".{theirs}"):
                owners[key] = key.removeprefix(PREFIX).removesuffix(f".{theirs}"), ours
    return owners


def from_peft(adapters: Adapters, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns PEFT's tensors under our names and in our shapes.

    Raises:
        UserError: for a tensor that belongs nowhere, or random projections that are not drawn again as saved.
    """
    form: PeftForm = adapters.method.peft
    if isinstance(adapters, WholeModelAdapters) and not form.tensors:
        P: Any = adapters.module.P
        virtual = tensors.get("prompt_embeddings")
        if len(tensors) != 1 or virtual is None or virtual.numel() != P.numel():
            shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
            raise UserError(f"import: the adapter must hold prompt_embeddings for {tuple(P.shape)}, got {shapes}")
        if adapters.method.name == "prefix":
            layers, _, heads, p, width = P.shape
            virtual = virtual.view(p, layers, 2, heads, width).permute(1, 2, 3, 0, 4)
        return {f"{adapters.method.name}.P": virtual.float()}
    names = {view.path: view.name for view in adapters.views}
    owners = _owners(form, tensors)
    state = {}
    if isinstance(adapters, WholeModelAdapters):  # a module that the file lacks stays as the base has it
        owned = _of_modules(adapters.module)
        state = {f"{adapters.method.name}.{name}": value.detach() for name, value in owned.values()}
        for key, owner in owners.items():
            if owner not in owned:
                raise UserError(f"import: {adapters.method.name} trains no such tensor of the base model, got {key}")
            state[f"{adapters.method.name}.{owned[owner][0]}"] = tensors[key].float()
        names = {}
    for key, (path, ours) in owners.items() if names else ():
        name = f"{names[path]}.{ours}"
        parameter = dict(adapters.by_view[names[path]].named_parameters()).get(ours)
        state[name] = tensors[key].float()
        if parameter is None:  # refused with the names that the fields ask for
            continue
        as_theirs = parameter.view(form.shapes.get(ours, parameter.shape)).shape
        if tensors[key].shape == as_theirs:
            state[name] = state[name].view(parameter.shape)
    rest = {key: tensor for key, tensor in tensors.items() if key not in owners}
    drawn = {f"base_model.{key}": tensor for key, tensor in _shared(adapters, form).items()}
    for view in adapters.views:
        frozen = _shared(adapters, form) | dict(
            _frozen(adapters, view, form)
        )  # RandLoRA's bases are there for every weight
        drawn |= {f"{PREFIX}{view.path}.{key}": tensor for key, tensor in frozen.items()}
    for key, tensor in drawn.items():
        saved = rest.pop(key, None)
        if saved is not None and not torch.equal(saved.to(tensor.dtype), tensor.cpu()):
            given = ", ".join(f"{theirs}={config.get(theirs)}" for theirs in form.fields.values())
            raise UserError(
                f"import: {key} must be what {given} gives on this base, got other numbers of shape {tuple(saved.shape)}"
            )
    for key, tensor in rest.items():
        if key.removeprefix(PREFIX) not in adapters.extra:
            raise UserError(
                f"import: only adapters, and the new head of a classifier, are read, got {key}; modules_to_save is "
                f"{config.get('modules_to_save')}"
            )
        state[key.removeprefix(PREFIX)] = tensor.float()
    return state
