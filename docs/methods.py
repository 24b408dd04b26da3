"""Orders the methods by what their update can be: `python docs/methods.py` writes docs/methods.md from the methods' files.

Formula, largest rank and count are the methods' own; which method holds another as a special case is listed below, each
with the test that shows it.
"""

import ast
import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from highrank.base.errors import UserError
from highrank.base.registry import load
from highrank.base.source import Source
from highrank.config.words import compose_run
from highrank.find.catalogue import method_facts, parts
from highrank.model.backbones import empty_model, model_config
from highrank.train.plan import count

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = {
    "Rows and columns of W, scaled": ("hyperadapt", "ia3"),
    "Hadamard products": ("hira", "hilora", "boha", "abba", "loha"),
    "Products of thin matrices": ("lora", "lora_xs", "dora", "delora", "vera", "miss"),
    "Grids, blocks, single entries": ("gralora", "lokr", "diablo", "c3a", "mora", "shira"),
    "In another basis": ("svft", "fourierft", "randlora"),
    "Rotations of the inputs": ("oft", "boft"),
    "Sums, and W itself": ("sum", "full"),
    "No weight": ("bitfit", "layernorm", "bottleneck", "compacter", "prompt_tuning", "p_tuning", "prefix"),
}
CASES = (
    ("hyperadapt", "hira", "r = 2", "test_identities.py::test_hyperadapt_is_hira_with_A_a_minus1_and_B_b_1"),
    ("ia3", "hyperadapt", "one side is 1", "test_ia3.py::test_it_is_hyperadapt_with_the_other_side_1"),
    ("lora", "hira", "R = 1", "test_identities.py::test_hira_with_R_1_is_lora_with_scaling_1"),
    ("hira", "boha", "one block", "test_boha.py::test_one_block_is_hira"),
    ("hira", "hilora", "r2 = 0", "test_identities.py::test_hilora_with_r2_0_is_hira"),
    ("lora", "hilora", "r1 = 0", "test_identities.py::test_hilora_with_r1_0_is_lora"),
    ("abba", "lora", "rank r1 r2", "test_abba.py::test_abba_is_lora_of_rank_r1_r2"),
    ("loha", "abba", "r1 = r2", "test_loha.py::test_loha_is_abba_with_equal_ranks"),
    ("lora", "loha", "a product of ones", "test_loha.py::test_lora_is_loha_with_a_first_product_of_ones"),
    ("lora", "dora", "m = ‖V‖", "test_identities.py::test_dora_with_m_the_norm_of_V_is_lora"),
    ("lora", "gralora", "K = 1", "test_gralora.py::test_K_1_is_lora"),
    (
        "diablo",
        "gralora",
        "full blocks",
        "test_diablo.py::test_gralora_of_full_rank_blocks_with_its_diagonal_alone_is_diablo",
    ),
    ("lora", "lokr", "w1 a number", "test_lokr.py::test_a_split_of_one_is_lora_or_full"),
    ("full", "diablo", "one block", "test_diablo.py::test_one_block_reaches_every_update"),
    ("full", "c3a", "blocks of 1", "test_c3a.py::test_with_blocks_of_one_it_is_any_update"),
    ("miss", "lora", "plain, A = [I … I]", "test_miss.py::test_plain_is_lora_with_a_row_of_unit_matrices"),
    ("lora_xs", "lora", "A or B frozen", "test_lora_xs.py::test_is_lora_between_singular_vectors"),
    ("hilora", "sum", "hira and lora", "test_sum.py::test_hira_and_lora_are_hilora"),
    ("delora", "lora", "start = zeros", "test_delora.py::test_from_zeros_it_is_a_scaled_lora"),
    ("vera", "randlora", "r ≥ n < k, one basis", "test_randlora.py::test_with_one_basis_on_a_wide_weight_it_is_vera"),
    ("oft", "boft", "exact, m = 1, s = 1", "test_oft.py::test_exact_is_boft_with_one_factor"),
    (
        "compacter",
        "bottleneck",
        "sums of Kronecker products",
        "test_compacter.py::test_compacter_is_bottleneck_with_sums_of_kronecker_products",
    ),
    ("ia3", "boft", "side = out, R = 0", "test_identities.py::test_boft_with_R_0_is_ia3_and_hyperadapt_with_b_1"),
)
"""Method, the method that holds it, when, the test."""
FIELDS = {"sum": {"parts": ["hyperadapt", "lora"]}}
"""Fields that have no default."""
HEAD = """# Methods, by what their update can be

W (n, k) is one adapted weight, ΔW = W' - W. Each method is one file in `methods/`, which says more: shapes, start, source,
differences from other code. `highrank methods` lists the fields with their defaults. This page is made from those files by
`python docs/methods.py`, and a test compares them.

An arrow below goes from a method to one that holds it as a special case. Each is a test in `tests/methods/`.

"""
COLUMNS = """
The last columns: what trains with the default fields, on SmolLM2-135M with `placement=fc_qkv` (150 weights); whether the model
is the base's at the start; whether W' can take W's place afterwards; and the type in Hugging Face PEFT that `highrank export`
and `import` know it as.
"""


def said(name: str) -> str:
    """Returns what a method's file says of it."""
    return ast.get_docstring(ast.parse((ROOT / "methods" / f"{name}.py").read_text())) or ""


def formula(text: str) -> str:
    """Returns the first line of the formula."""
    first = next(line for line in text.splitlines() if line.startswith("    "))
    return re.split(r",? {3,}", first.strip())[0].rstrip(",").replace("|", "\\|")


def rank(text: str) -> str:
    """Returns the largest rank of ΔW, as the file says it; empty for a method without a ΔW."""
    words = " ".join(text.split())
    bound = re.search(r"rank\(ΔW\) (?:<=|=) ((?:\([^()]*(?:\([^()]*\))?[^()]*\)|[^.,;:()])+)", words)
    return bound[1].strip() if bound else ""


@functools.cache
def default_model() -> Any:
    return empty_model(model_config(compose_run([]).model, None), "generate", 2)


def trainable(name: str) -> tuple[int, int]:
    """Returns what trains and what is frozen beside the base, with default fields, on the default model."""
    model, method = default_model(), cast(Any, load("methods", name))
    views = method.family.views_in(model, "fc_qkv", "all", "auto", None)
    try:
        params = count(model, views, method, method.config(**FIELDS.get(name, {})))
    except UserError:  # BitFit: this model has no biases
        return 0, 0
    return params.trainable, params.frozen_extra


def row(name: str) -> str:
    method: Any = load("methods", name)
    text, (numbers, frozen) = said(name), trainable(name)
    peft = getattr(method.peft, "type", "")
    beside = f", {frozen:,} frozen" if frozen else ""
    exact = getattr(method, "exact_at_init", "is the base's at the start" in " ".join(text.split()))
    return (
        f"| [`{name}`](../methods/{name}.py) | {formula(text)} | {rank(text)} | {numbers:,}{beside} | {'yes' if exact else 'no'} | "
        f"{'yes' if method.mergeable else 'no'} | {peft} |"
    )


def drawn() -> str:
    """Returns the special cases as a Mermaid flowchart."""
    lines = [f'    {inner} -- "{when}" --> {outer}' for inner, outer, when, _ in CASES]
    return "```mermaid\nflowchart LR\n" + "\n".join(lines) + "\n```\n"


def own_page(name: str) -> str:
    """Returns a method's own page, in Markdown: what `highrank methods NAME` prints, and what it holds and is held by."""
    source = Source(f"highrank.methods.{name}")
    fields = source.fields(source.config)
    heading, _, rest = source.doc.partition("\n")
    before, after = parts(rest)
    out = [f"# {heading.rstrip('.')}\n", before, "\n## Fields\n\n"]
    rows = [
        (f"`{f.name}`", f"`{f.type}`", f"`{f.default}`" if f.default else "to be given", f.meaning, "; ".join(f.rules))
        for f in fields
    ]
    out.append(table(["field", "type", "default", "meaning", "values"], rows) if rows else "It has none.\n")
    inner = [
        f"- [`{one}`]({one}.py) is a special case of it: {when} (`{test}`).\n"
        for one, it, when, test in CASES
        if it == name
    ]
    outer = [
        f"- It is a special case of [`{it}`]({it}.py): {when} (`{test}`).\n"
        for one, it, when, test in CASES
        if one == name
    ]
    if inner or outer:
        out += ["\n## Special cases\n\n", *outer, *inner]
    facts = [
        (fact, f"`{value}`" if value.startswith("highrank ") else value) for fact, value in method_facts(name, fields)
    ]
    out += ["\n## With these defaults\n\n", table(["", ""], facts)]
    cited = re.sub(r"arXiv\s+(\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", after)
    out += ["\n## Where it is from\n\n", cited, f"\nThe code: `highrank.methods.{name}`.\n"]
    return "".join(out)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns rows as a Markdown table."""
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page() -> str:
    parts = [HEAD, drawn(), COLUMNS]
    for title, names in FAMILIES.items():
        head = (
            "| method | what it computes | rank(ΔW) at most | trains | starts at W | merges | PEFT |\n"
            + "| --- " * 7
            + "|\n"
        )
        parts.append(f"\n## {title}\n\n{head}" + "\n".join(row(name) for name in names) + "\n")
    return "".join(parts)


if __name__ == "__main__":
    (ROOT / "docs" / "methods.md").write_text(page())
