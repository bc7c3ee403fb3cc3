"""Faults that people make in kernels like these, each with the test that has to go red, and what it has to say.

`tests/tools/test_planted.py` plants each in a process of its own, runs the named test (all its cases, unless one is
named) and compares the end of its traceback with the text.
"""

from __future__ import annotations

from typing import NamedTuple

from .places import Mutant, change


class Fault(NamedTuple):
    """In `function` of `file`, `old` becomes `new`, as `places.change` has it; then `test` fails, and says `text`."""

    name: str
    file: str
    function: str
    old: str
    new: str
    test: str
    text: str
    compiled: bool = False
    """Whether the test looks at machine code, so that the fault has to be in a copy of the package."""
    nth: int = 0

    def mutant(self) -> Mutant:
        """ValueError if the fault no longer has its place."""
        return change(self.file, self.function, self.old, self.new, self.nth)


EXACT, SPLIT, INT32 = "test_exact.py::", "test_split_k.py::", "test_beyond_int32.py::"
STEM, CONTRACT = "test_stem.py::test_stem", "test_contract.py::test_row"
WIDER_RESIDUAL = CONTRACT + "[residual: mixed dtypes: a wider residual does not widen the result: "
POINTER, BOX = ("conv_pointer.py", "conv_pointer_kernel"), ("conv_box.py", "conv_box_kernel")
DEPTHWISE = ("conv_depthwise.py", "conv_depthwise_kernel")
ADD, MAX_POOL = ("add_relu.py", "add_relu_kernel"), ("max_pool.py", "max_pool_kernel")
AVERAGE, HEAD = ("global_avg_pool.py", "global_avg_pool_kernel"), ("avg_pool_linear.py", "avg_pool_linear_kernel")
LINEAR, STRIP = ("linear.py", "linear_kernel"), ("stem.py", "_strip")
BATCH_NORM, PARTIALS = ("tiles.py", "scale_and_shift"), ("tiles.py", "sum_partials")
CONFIG = "resnet_triton/config/conv.py"
RACE = "no barrier and arrival in between"

FAULTS = [
    # A mask that is off by one.
    Fault("a filter too many", *POINTER, "mask_k = offs_k < K", "mask_k = offs_k <= K",
          EXACT + "test_conv_epilogue", "loads outside w_ptr: element 960 of 960"),
    Fault("a pixel too many", *POINTER, "mask_m = offs_m < M", "mask_m = offs_m <= M",
          EXACT + "test_conv_epilogue", "loads outside x_ptr"),
    Fault("a pixel too few", *POINTER, "mask_m = offs_m < M", "mask_m = offs_m < M - 1",
          EXACT + "test_conv_epilogue", "never stores y_ptr"),
    Fault("a row too many", "conv_pointer.py", "is_inside", "h.to(tl.uint32) < H.to(tl.uint32)",
          "h.to(tl.uint32) <= H.to(tl.uint32)",
          EXACT + "test_windows_read_no_neighbours", "loads outside x_ptr"),
    Fault("a row before the first", "conv_pointer.py", "is_inside", "h.to(tl.uint32) < H.to(tl.uint32)", "h < H",
          EXACT + "test_no_tap_is_skipped_in_the_padding", "loads outside x_ptr"),
    Fault("an image too many in a box", "values.py", "pixel_view", "(h, w, n, c)", "(h, w, n + 1, c)",
          EXACT + "test_every_legal_box_is_exact", "loads outside x_desc"),
    Fault("a filter too many in a box", "values.py", "filter_view", "(r * s, k, c)", "(r * s, k + 1, c)",
          EXACT + "test_conv_epilogue", "loads outside w_desc"),
    Fault("a column too many in a pool", *MAX_POOL, "w0 + s < W", "w0 + s <= W",
          EXACT + "test_max_pool", "loads outside x_ptr"),
    Fault("a column too many of depthwise filters", *DEPTHWISE, "(w >= 0) & (w < W)", "(w >= 0) & (w <= W)",
          EXACT + "test_depthwise", "loads outside x_ptr"),
    Fault("a pixel too many in a mean", *AVERAGE, "offs_p < PIXELS", "offs_p <= PIXELS",
          EXACT + "test_global_avg_pool", "loads outside x_ptr"),
    Fault("a channel too many in a product", *LINEAR, "offs_c < C", "offs_c <= C",
          EXACT + "test_linear", "loads outside x_ptr"),
    Fault("an element too many", *ADD, "offs < numel", "offs <= numel",
          EXACT + "test_add_relu", "loads outside x_ptr: element 2730 of 2730"),
    Fault("an element too few", *ADD, "offs < numel", "offs < numel - 1",
          EXACT + "test_add_relu", "never stores y_ptr"),
    Fault("a window too many in the stem", "stem.py", "stem", "[rows, n, q, WINDOW]", "[rows, n, q + 1, WINDOW]",
          STEM, "loads outside x_desc"),
    # Strides in the wrong places.
    Fault("rows and columns swapped", *POINTER, "x_ptr + (n * H + h0) * row + w0.to(tl.int64) * C",
          "x_ptr + (n * H + w0) * row + h0.to(tl.int64) * C",
          EXACT + "test_conv_epilogue", "loads outside x_ptr"),
    Fault("strides of a descriptor swapped", "values.py", "pixel_view", "(row, c, image, 1)",
          "(c, row, image, 1)",
          EXACT + "test_every_legal_box_is_exact", "loads outside x_desc"),
    Fault("parities swapped", "values.py", "pixel_view", "(row, c, 2 * row, 2 * c, 1)",
          "(2 * row, c, 2 * row, 2 * c, 1)",
          EXACT + "test_one_image_at_stride_2", "loads outside x_desc"),
    Fault("columns of the images at the stride of rows", "stem.py", "pack", "x.stride(3)", "x.stride(2)",
          STEM, "pack_kernel, program .* loads outside x_ptr"),
    # A load under a mask that does not say what stands where the mask is false.
    Fault("no other= for pixels", *POINTER, "tl.load(pointers, mask=inside, other=0.0)",
          "tl.load(pointers, mask=inside)",
          EXACT + "test_windows_read_no_neighbours", "loads x_ptr under a mask without other="),
    Fault("no other= for variances", *BATCH_NORM, "tl.load(var_ptr + ..., mask=..., other=...)",
          "tl.load(var_ptr + ..., mask=...)",
          EXACT + "test_conv_epilogue", "loads var_ptr under a mask without other="),
    Fault("no mask at all", *BATCH_NORM, "tl.load(mean_ptr + ..., mask=mask_k, other=0.0)", "tl.load(mean_ptr + ...)",
          EXACT + "test_conv_epilogue", "loads outside mean_ptr"),
    # Arithmetic.
    Fault("a ReLU that drops NaN", "tiles.py", "relu",
          "tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)", "tl.where(x > 0, x, 0.0)",
          EXACT + "test_relu_of_special_values", "assert same"),
    Fault("approximate root", *BATCH_NORM, "tl.div_rn(1.0, tl.sqrt_rn(...))", "tl.rsqrt(...)",
          "test_codegen.py::test_divisions_and_square_roots_are_correctly_rounded", r"assert re.findall.* == \[\]",
          compiled=True),
    Fault("sums in bfloat16", *POINTER, "tl.dot(a, b, acc, input_precision=...)",
          "tl.dot(a, b, acc, input_precision=...).to(tl.bfloat16).to(tl.float32)",
          "test_accuracy.py::test_error_bound[conv_bn_relu-pointer-float32]", "normal", nth=2),
    Fault("a sum of products in bfloat16", *LINEAR, "tl.dot(a, b, acc, input_precision=...)",
          "tl.dot(a, b, acc, input_precision=...).to(tl.bfloat16).to(tl.float32)",
          "test_accuracy.py::test_error_bound[linear-pointer-bfloat16]", "normal"),
    Fault("a mean that is not rounded between two layers", *HEAD,
          "tl.div_rn(..., ...).to(x_ptr.dtype.element_ty)", "tl.div_rn(..., ...)",
          EXACT + "test_a_mean_is_rounded_before_the_linear_layer", "differ, first"),
    # Offsets that leave int32.
    Fault("an int32 offset", *ADD, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)",
          INT32 + "test_add_relu", "crash"),
    Fault("an int32 row", *POINTER, "W.to(tl.int64)", "W",
          INT32 + "test_conv_pointer", "differ, first"),
    # Programs that do not wait for each other.
    Fault("a race between partials", *PARTIALS, "tl.atomic_add(..., 1, sem=..., scope=...) == SPLIT_K - 1",
          "split == SPLIT_K - 1",
          SPLIT + "test_any_number_of_partials_is_exact", f"loads partials_ptr.*, which program .* stored: {RACE}"),
    Fault("no barrier before the arrival", *PARTIALS, "tl.debug_barrier()", "pass",
          SPLIT + "test_any_number_of_partials_is_exact", f"loads partials_ptr.*, which program .* stored: {RACE}"),
    Fault("a relaxed arrival", *PARTIALS, "'acq_rel'", "'relaxed'",
          SPLIT + "test_any_number_of_partials_is_exact", f"loads partials_ptr.*, which program .* stored: {RACE}"),
    Fault("partials from a stale cache", *PARTIALS, "acc += tl.load(..., cache_modifier='.cg')", "acc += tl.load(...)",
          SPLIT + "test_a_barrier_stands_between_the_share_and_its_announcement", "assert loads in of_each",
          compiled=True),
    Fault("the first partial from a stale cache", *PARTIALS,
          "acc = tl.load(..., cache_modifier='.cg')", "acc = tl.load(..., cache_modifier='')",
          SPLIT + "test_a_barrier_stands_between_the_share_and_its_announcement", "assert loads in of_each",
          compiled=True),
    Fault("partials on top of each other", *PARTIALS, "split * (BLOCK_M * BLOCK_K)", "0",
          SPLIT + "test_any_number_of_partials_is_exact", f"stores partials_ptr.*, which program .* stored: {RACE}"),
    Fault("the first writes, too", *BOX, "if not last: return", "pass",
          SPLIT + "test_any_number_of_partials_is_exact", f"stores y_desc.*, which program .* stored: {RACE}"),
    Fault("tiles of the stem overlap", *STRIP, "offs_j < HALF - 1", "offs_j < HALF",
          STEM, f"stores y_ptr.*, which program .* stored: {RACE}"),
    # Memory that nobody writes, or that is another's.
    Fault("an unwritten tail", "max_pool.py", "max_pool", "cdiv(c, block_c)", "c // block_c",
          EXACT + "test_max_pool", "never stores y_ptr"),
    Fault("tiles of the stem leave a gap", *STRIP, "offs_j < HALF - 1", "offs_j < HALF - 2",
          STEM, "never stores y_ptr"),
    Fault("no marks of rows that are not finite", "stem.py", "pack_kernel", "tl.store(..., mark)", "pass",
          STEM, r"loads marks_ptr\[0, 0\], which nobody has stored"),
    Fault("a result without a mask", *MAX_POOL, "tl.store(..., ..., mask=mask_m[:, None] & mask_c[None, :])",
          "tl.store(..., ..., mask=mask_c[None, :] & (offs_m >= 0)[:, None])",
          EXACT + "test_max_pool", "stores outside y_ptr"),
    Fault("a result into the residual", *POINTER, "tl.store(y_ptr + ..., ..., mask=...)",
          "tl.store(res_ptr + ..., ..., mask=...)",
          EXACT + "test_conv_epilogue[residual-pointer-bfloat16]", r"stores res_ptr\[0, 0, 0, 0\], an input"),
    Fault("a channel tail that reads the next tap", *POINTER,
          "load_filters(w_filter + tap * GROUP_C, offs_c, mask_c, ..., ..., ..., ..., ...)",
          "load_filters(w_filter + tap * GROUP_C, offs_c, offs_c < C + tl.where(tap < R * S - 1, BLOCK_C, 0),"
          " ..., ..., ..., ..., ...)",
          EXACT + "test_tails_of_tiles_read_no_neighbours", "differ, first"),
    Fault("a channel tail of a box that reads the next tap", "values.py", "filter_view",
          "(r * s, k, c)", "(r * s, k, -(-c // block_c) * block_c)",
          EXACT + "test_tails_of_tiles_read_no_neighbours", "loads outside w_desc"),
    Fault("a tail of taps that reads the next filter", *POINTER, "offs_c < R * S * READ_C", "offs_c >= 0",
          EXACT + "test_windows_read_no_neighbours", "loads outside w_ptr"),
    Fault("a tail of channels that reads the next class", *HEAD, "(offs_c < C)[None, :]", "(offs_c >= 0)[None, :]",
          EXACT + "test_avg_pool_linear[(16, 40, 3, 2, 1)-contiguous-float16]", "loads outside w_ptr"),
    Fault("filters of a neighbouring group", "conv_pointer.py", "load_filters",
          "(offs_c // GROUP_C % BLOCK_G)[:, None] == ...", "(offs_c // GROUP_C % BLOCK_G)[:, None] <= ...",
          EXACT + "test_grouped", "differ, first"),
    Fault("a neighbouring group's infinity", *POINTER, "total != total", "total > total",
          EXACT + "test_groups_read_no_neighbours", "assert same"),
    # What is round the kernels.
    Fault("a configuration that exceeds shared memory", CONFIG, "is_legal",
          "shared_memory(..., ...) <= device.shared_memory", "True",
          "test_config.py::test_illegal", "assert not is_legal"),
    Fault("pixels of several sides as rows of a product", CONFIG, "is_legal",
          "has_several_sides(config.box) and not config.swap", "False",
          "test_config.py::test_illegal", "assert not is_legal"),
    Fault("a bound that forgets the stages", CONFIG, "shared_memory",
          "config.num_stages * (config.block_m + ...)", "config.block_m + ...",
          "test_config.py::test_legality_follows_the_shared_memory", r"assert not is_legal.*KNOWN\[89\]"),
    Fault("a stale statistic in a graph", "resnet_triton/graphs/fingerprint.py", "_tables",
          "(m._parameters, m._buffers)", "(m._parameters,)",
          "test_fingerprint.py::test_a_replaced_buffer", "assert torch.equal"),
    Fault("a patch that a graph does not see", "resnet_triton/graphs/fingerprint.py", "Watch.__init__",
          "map(_namespace, classes)", "()",
          "test_patched.py::test_a_patched_class[conv-torchvision]", "Tensor-likes are not close"),
    Fault("a stale statistic in a frozen model", "resnet_triton/convert.py", "refresh", "runner.forget(module)", "pass",
          "test_snapshot.py::test_a_frozen_model_is_a_snapshot_of_its_batch_norms", "assert close"),
    Fault("a silent fallback", "resnet_triton/ops/dispatch.py", "raise_if_required", "raise NotImplementedError(...)",
          "pass", WIDER_RESIDUAL + "kernels]", "expected NotImplementedError"),
    Fault("a fallback that is not counted", "resnet_triton/ops/operation.py", "Operation.run_torch",
          "count(..., 'torch')", "pass",
          WIDER_RESIDUAL + "torch]", r"assert \(names, backends\) == \(set\(\), {.torch.}\)"),
    Fault("a fallback where the kernel should run", "resnet_triton/ops/operation.py", "Operation.compute",
          "choice.backend == 'torch'", "True",
          EXACT + "test_operator_launches_its_kernel_once", "assert dispatch.calls - before"),
]  # fmt: skip
