"""Which tests judge the mutants of which file: the fewest that see all of it, in seconds together."""

from __future__ import annotations

_CONVOLUTION = [
    "test_exact.py::test_conv_epilogue",
    "test_exact.py::test_conv_batch_norm_tensors",
    "test_exact.py::test_filters_that_are_not_square",
    "test_exact.py::test_shortcut_of_two_strides",
    "test_exact.py::test_many_tiles_of_filters_and_channels",
    "test_exact.py::test_conv_relu_of_special_values",
    "test_exact.py::test_no_tap_is_skipped_in_the_padding",
    "test_exact.py::test_infinity_times_zero",
    "test_exact.py::test_tails_of_tiles_read_no_neighbours",
    "test_exact.py::test_windows_read_no_neighbours",
    "test_exact.py::test_batch_norm_of_special_statistics",
    "test_exact.py::test_sums_that_leave_the_range_and_come_back",
    "test_split_k.py::test_only_the_last_share_writes_the_output",
    "test_split_k.py::test_any_number_of_partials_is_exact",
    "test_split_k.py::test_a_shift_that_is_not_finite_is_added_once",
    "test_exact.py::test_random_conv",
]
_BOXES = [
    *_CONVOLUTION,
    "test_exact.py::test_one_image_at_stride_2",
    "test_exact.py::test_every_legal_box_is_exact",
    "test_beyond_int32.py::test_conv_box",
    "test_exact.py::test_shortcut_of_odd_width",
]

_LAUNCH = ["test_launch.py::test_a_launch_is_what_was_asked_for"]

_GLUON = ["test_hopper_conv.py::test_exact", "test_hopper_conv.py::test_any_share_may_be_the_last"]
"""None of them interprets a kernel: after that Gluon compiles nothing in the same process, and every mutant dies."""

_EARLY = "test_hopper_conv.py::test_what_comes_before_the_wait_is_found"
_TF32 = "test_hopper_conv.py::test_factors_are_rounded_to_tf32"

INTERPRETED: dict[str, list[str]] = {
    "add_relu.py": [
        *_LAUNCH,
        "test_exact.py::test_add_relu",
        "test_exact.py::test_relu_of_special_values",
        "test_beyond_int32.py::test_add_relu",
    ],
    "avg_pool_linear.py": [
        *_LAUNCH,
        "test_exact.py::test_avg_pool_linear",
        "test_exact.py::test_a_mean_is_rounded_before_the_linear_layer",
        "test_functional.py::test_avg_pool_linear",
        "test_beyond_int32.py::test_avg_pool_linear",
    ],
    "conv_bn_relu.py": [*_LAUNCH, "test_launch.py::test_a_residual_comes_once", *_BOXES, "test_hopper_conv.py"],
    "conv_box.py": [
        *_LAUNCH,
        "test_launch.py::test_a_residual_comes_once",
        "test_launch.py::test_factors_in_boxes_are_rounded_to_tf32",
        *_BOXES,
    ],
    "conv_depthwise.py": [
        *_LAUNCH,
        "test_exact.py::test_depthwise",
        "test_exact.py::test_depthwise_of_special_values",
        "test_beyond_int32.py::test_conv_depthwise",
        "test_beyond_int32.py::test_filters_of_conv_depthwise",
    ],
    "conv_pointer.py": [
        *_LAUNCH,
        *_CONVOLUTION,
        "test_exact.py::test_grouped",
        "test_exact.py::test_taps_far_from_the_image",
        "test_exact.py::test_groups_read_no_neighbours",
        "test_beyond_int32.py::test_conv_pointer",
        "test_beyond_int32.py::test_filters_of_conv_pointer",
        "test_beyond_int32.py::test_filters_of_a_shortcut",
    ],
    "cost.py": ["test_cost.py"],
    "global_avg_pool.py": [
        *_LAUNCH,
        "test_exact.py::test_global_avg_pool",
        "test_exact.py::test_avg_pool_of_special_values",
        "test_functional.py::test_global_avg_pool",
        "test_beyond_int32.py::test_global_avg_pool",
    ],
    "hopper.py": [*_GLUON, _TF32],
    "hopper_conv.py": [*_GLUON, _EARLY, _TF32],
    "hopper_conv64.py": ["test_hopper_conv.py::test_exact[64"],
    "hopper_few.py": [*(f"{test}[few" for test in _GLUON), _EARLY],
    "hopper_stem.py": ["test_hopper_stem.py"],
    "hopper_stem_pack.py": ["test_hopper_stem.py"],
    "launch.py": ["test_launch.py", "test_hopper_conv.py"],
    "values.py": [
        "test_launch.py",
        "test_exact.py::test_tiles_of_grouped_convolutions",
        "test_config.py::test_boxes_of_two_rows_take_a_column_of_taps_at_a_time",
        "test_config.py::test_neighbours_are_one_step_away",
        "test_stem.py::test_bytes_are_normalised_once_and_padded_with_zero",
        *_BOXES,
    ],
    "linear.py": [
        *_LAUNCH,
        "test_exact.py::test_linear",
        "test_exact.py::test_linear_layouts",
        "test_exact.py::test_infinity_times_zero",
        "test_exact.py::test_sums_that_leave_the_range_and_come_back",
        "test_functional.py::test_linear",
        "test_beyond_int32.py::test_linear",
    ],
    "max_pool.py": [
        *_LAUNCH,
        "test_exact.py::test_max_pool",
        "test_exact.py::test_max_pool_of_special_values",
        "test_functional.py::test_max_pool2d",
        "test_beyond_int32.py::test_max_pool",
    ],
    "stem.py": [
        *_LAUNCH,
        "test_stem.py",
        "test_beyond_int32.py::test_pack",
        "test_beyond_int32.py::test_pack_of_many_images",
        "test_beyond_int32.py::test_stem",
    ],
    "tiles.py": [
        *_CONVOLUTION,
        "test_exact.py::test_activations",
        "test_exact.py::test_relu_of_special_values",
        "test_stem.py::test_statistics_of_every_kind",
        "test_beyond_int32.py::test_conv_pointer",
    ],
}
"""Files, functions, or how a test with its parameters begins.

Each in a process forked for one mutant: in Triton's interpreter, or compiled and simulated where that has none."""

_ROUNDED = "test_codegen.py::test_divisions_and_square_roots_are_correctly_rounded"
_SIXTEEN = "test_codegen.py::test_kernels_bound_by_memory_move_16_bytes_at_a_time"
_BARRIER = "test_split_k.py::test_a_barrier_stands_between_the_share_and_its_announcement"

COMPILED: dict[str, list[str]] = {
    "avg_pool_linear.py:avg_pool_linear_kernel": [_ROUNDED],
    "global_avg_pool.py:global_avg_pool_kernel": [_ROUNDED],
    "max_pool.py:max_pool_kernel": [_SIXTEEN],
    "stem.py:pack_kernel": [_ROUNDED],
    "tiles.py:scale_and_shift": [_ROUNDED],
    "tiles.py:sum_partials": [_BARRIER],
}
"""Of these functions, what has survived the others comes before tests that read machine code."""

EVERY = {
    "test_exact.py::test_grouped": 3,
    "test_exact.py::test_every_legal_box_is_exact": 4,
    "test_stem.py::test_stem": 5,
    "test_stem.py::test_stem_of_resnet18_at_the_chosen_tiles": 11,
    "test_stem.py::test_stem_reads_any_layout": 2,
}
"""Of tests with many cases, every which is taken: steps that share no factor with what the cases vary."""


def chosen(file: str, collected: list[str]) -> list[str]:
    """The collected tests (with parameters) that judge this file in the interpreter."""
    return [name for pattern in INTERPRETED[file] for name in _matching(pattern, collected)]


def reads_code_of(where: str, test: str) -> bool:
    return test.partition("[")[0] in COMPILED[where]


def _matching(pattern: str, collected: list[str]) -> list[str]:
    functions: dict[str, list[str]] = {}
    for name in collected:
        function = name.partition("[")[0]
        if pattern in (function, function.partition("::")[0]) or ("[" in pattern and name.startswith(pattern)):
            functions.setdefault(function, []).append(name)
    return [name for function, names in functions.items() for name in names[:: EVERY.get(function, 1)]]
