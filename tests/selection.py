"""Which cases of long products ``make test`` runs; with ``ATTNPRUNE_ALL=1``, as in ``make test-all``, all of them."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

ALL = os.environ.get("ATTNPRUNE_ALL") == "1"
ALIKE = {
    "DeiT": "ViT", "DINOv2": "ViT", "Roberta": "Bert", "TorchvisionViT": "MHA", "TimmAttention": "Timm",
    "Between": "Decoder", "Packed": "Latent", "Sight": "ViT", "Streams": "Seq2Seq", "Own": "Latent",
}  # fmt: skip
"""Families that another one stands for, as the same forward of ours runs both, or both run expanded; of the last five
``test_stages.py`` runs some configurations."""
LIKE = ("AST", "CLIPText", "Seq2Seq")
"""Families that others stand for where nothing but the dtype, or the file, is another."""
FEW: Mapping[str, int] = {
    **{
        f"tests/test_laws.py::test_{law}": 4
        for law in (
            "all_or_nothing",
            "shapes",
            "nothing_else_moves",
            "empty_plan_changes_no_bit",
            "deterministic",
            "plans",
            "any_plan",
        )
    },
    "tests/test_auto.py::test_it_is_the_model_that_our_own_loader_gives": 2,
    "tests/test_calibrate.py::test_every_family_is_calibrated_merged_resumed_and_left_alone": 5,
    "tests/test_checkpoint.py::test_round_trip_is_bit_exact": 4,
    "tests/test_cli.py::test_plan_and_prune_are_those_of_the_library": 5,
    "tests/test_closed_form.py::test_exact_at_full_rank": 5,
    "tests/test_closed_form.py::test_a_model_computes_what_its_maps_say": 5,
    "tests/test_compat.py::test_exact": 8,
    "tests/test_compat.py::test_files": 3,
    "tests/test_compat.py::test_files_of_two_prunings": 5,
    "tests/test_deploy.py::test_torch_export_with_dynamic_batch_and_length": 2,
    "tests/test_elsewhere.py::test_pruning": 4,
    "tests/test_elsewhere.py::test_the_default_device_does_not_matter": 6,
    "tests/test_errors.py::test_wrong_call": 90,
    "tests/test_exact.py::test_exact": 18,
    "tests/test_exact.py::test_exact_in_every_layout": 5,
    "tests/test_exact.py::test_exact_in_float32": 4,
    "tests/test_expanded.py::test_check_family": 2,
    "tests/test_expanded.py::test_exact": 10,
    "tests/test_fused.py::test_every_order_is_found_and_pruned_exactly": 10,
    "tests/test_fused.py::test_hosts_of_transformers": 5,
    "tests/test_generation.py::test_generation": 2,
    "tests/test_hf.py::test_compiled_without_graph_breaks": 2,
    "tests/test_interrupts.py::test_faults": 8,
    "tests/test_latent.py::test_generation_and_files": 3,
    "tests/test_peft.py::test_recovery_lowers_the_loss_and_leaves_a_plain_model": 5,
    "tests/test_proof.py::test_hosts_that_differ_in_what_they_hold_share_no_proof": 6,
    "tests/test_pruner.py::test_a_malformed_state_is_refused_and_changes_nothing": 12,
    "tests/test_pruner.py::test_training_goes_on_as_if_the_rows_had_been_zero": 10,
    "tests/test_scorers.py::test_memory_between_batches": 4,
    "tests/test_scorers.py::test_torch_pruning_importances": 16,
    "tests/test_speech.py::test_models_of_sound_are_pruned_completely_and_exactly": 4,
    "tests/test_stages.py::test_configuration": 7,
    "tests/test_stream.py::test_files_take_a_plan_as_models_do": 5,
    "tests/test_torch_pruning.py::test_models_of_transformers_load_from_their_directory": 1,
    "tests/test_threads.py::test_no_garbage_is_collected_while_frames_of_threads_are_read": 1,
    "tests/test_windows.py::test_scores_of_a_batch_are_those_of_its_samples": 7,
    "tests/test_windows.py::test_the_default_with_data_prunes_them": 10,
}
"""Of tests that take long, how many of their cases ``make test`` runs."""
Case = TypeVar("Case", bound=Hashable)


def telling(names: Iterable[str]) -> list[str]:
    """Without those that others stand for (:data:`LIKE`), or all of them."""
    return [name for name in names if ALL or name not in LIKE]


def examples(number: int) -> int:
    """How many random cases hypothesis draws of a law that every family is tried for: an eighth, or all."""
    return number if ALL else -(-number // 8)


def few(cases: Sequence[Case], name: str) -> Sequence[Case]:
    """As many cases of a test as :data:`FEW` says, evenly spread; of another test others, so that all are met.

    >>> "".join(few("abcdefghijk", "tests/test_laws.py::test_shapes"))
    'bdgj'
    """
    count = FEW.get(name, len(cases))
    if count >= len(cases):
        return cases
    start = list(FEW).index(name)
    return [cases[i] for i in sorted((start + step * len(cases) // count) % len(cases) for step in range(count))]


def spread(*axes: Iterable[Case], strength: int = 1) -> list[tuple[Case, ...]]:
    """Combinations of one value of each axis: every value at least once (or every pair of values), or all of them.

    >>> found = spread("abc", "xy")
    >>> ALL or found == [("a", "x"), ("b", "y"), ("c", "x")]
    True
    """
    product = list(itertools.product(*axes))
    return product if ALL else covering({case: dict(enumerate(case)) for case in product}, strength)


def covering(cases: Mapping[Case, Mapping[object, Hashable]], strength: int) -> list[Case]:
    """Few of the cases, which meet every combination of values of any ``strength`` axes; each time the case with most.

    Args:
        cases: by case, its value on each axis.
        strength: 1 for every value of every axis, 2 for every pair of values of two axes.

    >>> pairs = covering({case: dict(enumerate(case)) for case in itertools.product("ab", "cd", "ef")}, 2)
    >>> ["".join(case) for case in pairs]
    ['ace', 'adf', 'bcf', 'bde']
    """
    met = {case: set(itertools.combinations(values.items(), strength)) for case, values in cases.items()}
    times: Counter[object] = Counter()
    missing = set().union(*met.values())
    chosen: set[Case] = set()
    while missing:
        best = max(cases, key=lambda case: (len(met[case] & missing), -sum(times[one] for one in met[case])))
        chosen.add(best)
        missing -= met[best]
        times.update(met[best])
    return [case for case in cases if case in chosen]
