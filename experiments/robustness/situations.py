"""Situations in which a stranger's run may go wrong, and whether the tests of each hold: a table of verdicts.

python experiments/robustness/situations.py [--write]
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

SITUATIONS: dict[str, dict[str, str]] = {
    "Own data": {
        "The data was moved or deleted after training: load, merge, export, analyse": "train/test_own_data.py::test_without_its_data_it_loads_merges_exports_and_is_analysed",
        "The same with a plugin whose fields are required": "train/test_own_data.py::test_so_does_any_plugin_with_required_fields",
        "Evaluation without its data: one error before any weight loads": "train/test_own_data.py::test_evaluation_names_the_file_that_is_gone_before_any_weight_loads",
        "Evaluation from where the data is now": "train/test_own_data.py::test_evaluation_takes_the_data_from_where_it_is_now",
        "`null`, NaN, 1e400, lists, lone surrogates in a text field": "tasks/test_tasks.py::test_what_is_no_text_is_refused_by_file_row_and_field",
        "The same in every task's files": "tasks/test_tasks.py::test_so_it_is_in_every_task",
        "Choices `true` and `false`": "tasks/test_tasks.py::test_choices_are_compared_as_the_file_writes_them",
        "Umlauts, spaces, `=`, `,`, quotes and brackets in paths": "config/test_words.py::test_a_run_with_such_names_is_trained_and_evaluated",
        "The same in a sweep's folder": "config/test_words.py::test_a_sweeps_folder_is_parsed_by_the_rule_of_a_runs",
        "Chats: loss on the assistant's turns alone": "data/test_chat.py::test_the_loss_is_on_what_the_assistant_says",
        "A chat template that will not do": "data/test_chat.py::test_a_template_that_will_not_do_is_told_before_training",
        "Packed rows: the loss and the gradients of rows of their own": "train/test_packing.py::test_loss_and_gradients_are_those_of_rows_of_their_own",
        "A model that lets packed examples meet": "train/test_packing.py::test_a_model_that_lets_them_meet_is_refused",
    },
    "Models": {
        "A decoder classifier whose padding id is not its tokenizer's": "model/test_backbones.py::test_a_model_pads_with_its_tokenizers_token",
        "An encoder asked for texts": "model/test_model_types.py::test_a_model_that_sees_the_future_is_refused_when_it_loads",
        "Padding that moves a model's answers": "model/test_model_types.py::test_a_batch_is_cut_into_prompts_of_one_length",
        "Training rows longer than the model's positions": "train/test_context_length.py::test_training_rows_beyond_the_positions_are_left_out_and_counted",
        "Prompts longer than the model's positions": "train/test_context_length.py::test_prompts_that_do_not_fit_are_refused_before_training",
        "Models that also see": "model/test_model_types.py::test_the_plan_of_a_model_that_also_sees_is_that_of_its_language_model",
        "A router's matrix": "model/test_model_types.py::test_a_weight_matrix_makes_no_linear_layer",
        "Experts in one parameter": "model/test_model_types.py::test_a_run_adapts_experts_and_merges_them",
        "A map that cuts across heads": "model/test_model_types.py::test_a_map_that_cuts_across_heads_is_refused",
        "A model that writes into what a layer gave it": "model/test_model_types.py::test_a_layer_that_is_written_into_gives_a_copy_away_and_no_other_does",
        "HyperAdapt's small updates on a 16-bit base": "model/test_kernels.py::test_small_updates_of_hyperadapt_reach_a_16_bit_output",
    },
    "Training": {
        "One step in one piece, in micro-batches, in two processes": "train/test_steps.py::test_a_step_is_the_same_however_it_is_cut",
        "The same after memory ran out": "train/test_out_of_memory.py::test_auto_microbatch_takes_the_same_steps_in_smaller_parts",
        "An epoch's last step with one row": "train/test_steps.py::test_a_step_with_one_row_left_counts_in_full",
        "A loss that leaves the finite numbers": "train/test_divergence.py::test_a_run_that_diverges",
        "The same at the last step": "train/test_divergence.py::test_a_last_step_that_leaves_the_finite_numbers_saves_nothing",
        "The same in a sweep": "train/test_divergence.py::test_a_sweep_records_it_and_goes_on",
        "Held-out rows that are all too long": "tasks/test_evaluation.py::test_held_out_rows_that_are_all_too_long_are_found_before_training",
        "What is allowed and seldom meant": "train/test_plan_warnings.py::test_warnings",
        "A search's best rate at an edge": "train/test_plan_warnings.py::test_a_search_whose_best_rate_is_at_the_edge_says_so",
        "A signal while several processes ask each other": "train/test_devices.py::test_a_signal_that_comes_while_the_processes_ask_is_kept_for_the_next_time",
        "Several processes go on after a stop": "train/test_devices.py::test_a_stopped_run_of_two_processes_goes_on_as_if_it_had_not_been",
    },
    "Afterwards": {
        "A base whose unadapted weights are others": "model/test_adapters.py::test_a_base_whose_unadapted_weights_differ_is_refused",
        "PEFT's BOFT with two butterfly factors": "interop/test_peft.py::test_butterfly_factors_multiply_as_in_peft",
        "A prediction that is no number": "tasks/test_evaluation.py::test_a_prediction_that_is_no_number_is_wrong_and_counted",
        "A reader of the output that stops reading": "run/test_runs.py::test_output_that_nobody_reads_on_ends_quietly",
    },
}
"""By part: what may happen, and the test of what is right then."""


class Verdicts:
    """Counts how the tests of each situation ended."""

    def __init__(self) -> None:
        self.ended: dict[str, Counter[str]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.ended.setdefault(report.nodeid.partition("[")[0], Counter())[report.outcome] += 1

    def of(self, test: str) -> str:
        """Returns what is said of a situation."""
        found = self.ended.get(f"tests/{test}", Counter())
        if found["failed"] or not found["passed"]:
            return "**fault**" if found["failed"] else "not tried"
        return "ok" if found["passed"] == 1 else f"ok ({found['passed']} cases)"


def table(found: Verdicts) -> str:
    """Returns the verdicts as Markdown."""
    lines = []
    for part, rows in SITUATIONS.items():
        lines += ["", f"## {part}", "", "| situation | verdict | test |", "| --- | --- | --- |"]
        lines += [f"| {said} | {found.of(test)} | `{test.partition('::')[0]}` |" for said, test in rows.items()]
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write situations.md beside this file")
    given = parser.parse_args(words)
    found = Verdicts()
    tests = [f"{ROOT / 'tests' / test}" for rows in SITUATIONS.values() for test in rows.values()]
    status = int(pytest.main(["-n0", "-q", "--rootdir", str(ROOT), *tests], plugins=[found]))
    text = table(found)
    print(text)
    if given.write:
        head = "# Situations\n\nMade by `python experiments/robustness/situations.py --write`: the tests of each situation, run.\n"
        Path(__file__).with_suffix(".md").write_text(head + text + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
