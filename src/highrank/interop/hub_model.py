"""`highrank merge`: base and adapter as one plain model folder, which any Hugging Face tool loads.

What is written is read again and compared with the adapted model, both computed in fp32, so that the difference is the
rounding of W' to the folder's dtype and nothing else. With y the logits of the adapted model, ŷ those of the folder and
y0 those of the base, on every position of some of the task's texts (of some sentences, where they are gone),
`fidelity.json` holds

    max_logit_difference   max |ŷ - y|
    argmax_agreement       share of positions where ŷ and y have their maximum at the same token
    error                  ‖ŷ - y‖ / ‖y - y0‖, the part of what training changed that rounding undoes or drowns
    update_lost            share of Σ |ΔW| in entries whose rounded W' is the rounded W
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from highrank.base.errors import UserError
from highrank.base.files import write_atomic
from highrank.config.run_config import Run
from highrank.data.batches import collate
from highrank.data.encoding import Encoded, encode_question, give_tokens
from highrank.data.images import noise
from highrank.data.task import Example, LabelledImage, LabelledText, Record, reading
from highrank.interop.card import model_card
from highrank.model.backbones import DTYPES, Backbone
from highrank.model.encoder_decoder import everywhere
from highrank.model.quantised import dequantise_model
from highrank.model.whole_model import no_merged_weight
from highrank.train.saved import check_new, load_run, read_run, update_lost, written_whole

MOST_ERROR = 0.1
"""Greatest `error` of a folder that is written without being asked to."""
NUM_TEXTS = 8
SENTENCES = (
    "Water boils at 100 degrees Celsius at the level of the sea.",
    "She asked whether the train to the coast had already left.",
    "What is the capital of the country in which the river ends?",
    "If 12 apples cost 6 dollars, then 30 apples cost 15 dollars.",
    "The committee read the report, praised it, and did nothing.",
    "A triangle with equal sides has three equal angles.",
    "He fixed the old clock with a paper clip and some patience.",
    "In winter the days are short and the nights are cold.",
)


def merge_run(
    folder: Path | str, out: Path | str, dtype: str | None = None, accept: bool = False, words: Sequence[str] = ()
) -> Path:
    """Writes a run's base and adapter as one model folder, in `dtype` (default: the base's); returns it.

    With it come the tokenizer, `fidelity.json` and a model card. `accept` takes a loss of fidelity.

    Raises:
        UserError: if `out` exists and is not empty, the method has no merged weight, or the merged model is not the
            adapted one by more than `MOST_ERROR`.
    """
    out_folder = check_new("merge", out)
    run, dtype = check_mergeable(folder, dtype, words)
    _, backbone, adapters = load_run(folder, words)
    dequantise_model(backbone.model)
    model = backbone.model.float().eval()
    texts = some_texts(run, backbone)
    y = logits(model, texts)
    with adapters.disabled():
        y0 = logits(model, texts)
    lost = update_lost(adapters.merging(), DTYPES[dtype])
    backbone.model = adapters.unload()
    write_merged(
        "merge",
        out_folder,
        backbone,
        texts,
        (y, y0),
        {"dtype": dtype, "update_lost": lost},
        accept,
        lambda facts: model_card(run, Path(folder), "transformers", facts),
    )
    return out_folder


def check_mergeable(folder: Path | str, dtype: str | None, words: Sequence[str]) -> tuple[Run, str]:
    """Returns a run that can be merged and the dtype of its model folder, before any weight is loaded.

    Raises:
        UserError: if the method has no merged weight, a quantised base leaves open into which base, or for an unknown dtype.
    """
    run, kind = read_run(folder, words), read_run(folder).model.get("quantize")
    if not run.method.mergeable:
        raise no_merged_weight(run.method)
    if kind and not any(word.startswith("model.quantize=") for word in words):
        exact = run.method.exact_base(run.method_cfg)
        unquantised = "" if exact else "model.quantize=null for the unquantised weights, or "
        raise UserError(
            f"merge: a run on a quantised base says into which base it is merged, got model.quantize={kind}; add "
            f"{unquantised}model.quantize={kind} for the dequantised ones"
        )
    return run, check_dtype("merge", dtype or run.model["dtype"])


def check_dtype(part: str, dtype: str) -> str:
    """Returns the dtype of a model folder; raises UserError for an unknown one."""
    if dtype not in DTYPES:
        raise UserError(f"{part}: --dtype is one of {', '.join(DTYPES)}, got --dtype {dtype}")
    return dtype


def write_merged(
    part: str,
    out: Path,
    backbone: Backbone,
    texts: Sequence[Encoded],
    y_and_base: tuple[Sequence[Tensor], Sequence[Tensor]],
    facts: Mapping[str, Any],
    accept: bool,
    card: Callable[[dict[str, Any]], str],
) -> None:
    """Writes a model that holds W' in fp32 as a folder in `facts["dtype"]`, reads it again and compares it.

    Raises:
        UserError: if it is not the model that gave the first logits by more than `MOST_ERROR`.
    """
    dtype, model = facts["dtype"], backbone.model
    with written_whole(part, out) as ready:
        model.to(DTYPES[dtype]).save_pretrained(ready)
        backbone.tokenizer.save_pretrained(ready)
        again = type(model).from_pretrained(ready, dtype=torch.float32, use_safetensors=True).eval()
        y, y0 = y_and_base
        fidelity = {**facts, **compare(y, logits(again, texts), y0), "texts": len(texts)}
        if not fidelity["error"] <= MOST_ERROR and not accept:  # nan is refused too
            raise UserError(
                f"{part}: rounding to {dtype} must keep what training changed, got error={fidelity['error']:.2f} > "
                f"{MOST_ERROR} (argmax agreement {fidelity['argmax_agreement']:.3f}); use --dtype float32, or accept it "
                "with --accept"
            )
        write_atomic(ready / "fidelity.json", json.dumps(fidelity, indent=1).encode())
        write_atomic(ready / "README.md", card({"dtype": dtype, "fidelity": listed(fidelity)}).encode())


def listed(fidelity: Mapping[str, Any]) -> str:
    """Returns the measures of a fidelity report in one line of a model card."""
    return ", ".join(f"{key} {value:.3g}" for key, value in fidelity.items() if isinstance(value, float))


def some_texts(run: Run, backbone: Backbone) -> list[Encoded]:
    """Returns the first test prompts, or images, of the run's task, encoded; where its data is gone, `SENTENCES` or noise."""
    task = run.make_task()
    give_tokens(task, run.protocol, backbone.tokenizer)
    try:
        with reading(task):
            records = [record for examples in task.test().values() for record in examples][:NUM_TEXTS]
    except UserError as error:
        what = "noise" if task.kind == "classify_images" else "general sentences"
        print(f"compared on {what}, for the task's own are gone ({error})", file=sys.stderr)
        records = list(_others(task.kind))
    return [encode_question(record, run.protocol, backbone.tokenizer) for record in records]


def _others(kind: str) -> Iterator[Record]:
    """Yields what a task of a kind could ask."""
    if kind == "classify_images":
        yield from (LabelledImage("", image, 0, "") for image in noise(NUM_TEXTS))
        return
    yield from (Example("", text, "", "") if kind == "generate" else LabelledText("", text, 0.0) for text in SENTENCES)


@torch.no_grad()
def logits(model: Any, texts: Sequence[Encoded]) -> list[Tensor]:
    """Returns, per text, the logits (positions, outputs) in fp32 on the CPU."""
    tensors = []
    for text in texts:
        batch = {k: v.to(model.device) for k, v in collate([text], 0).items() if k != "labels"}
        tensors.append(model(**everywhere(model, batch)).logits.float().cpu().flatten(0, -2))
    return tensors


def compare(y: Sequence[Tensor], other: Sequence[Tensor], base: Sequence[Tensor] | None = None) -> dict[str, float]:
    """Returns max_logit_difference and argmax_agreement of two models' logits and, given the base's, error."""
    a, b = torch.cat(list(y)), torch.cat(list(other))
    measures = {
        "max_logit_difference": float((a - b).abs().max()),
        "argmax_agreement": float((a.argmax(-1) == b.argmax(-1)).double().mean()),
    }
    if base is not None:
        changed = float((a - torch.cat(list(base))).double().norm())
        difference = float((a - b).double().norm())
        measures["error"] = difference / changed if changed else float(difference > 0)
    return measures
