"""Faults that people make in kernels like these, each with the test that has to go red, and what it has to say.

A fault is an edit of one function. `test_planted.py` plants each in a process of its own, runs the named test (all its
cases, unless one is named) and compares the end of its traceback with the text.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

from mutation.faults import Mutant, functions

ROOT = Path(__file__).resolve().parents[1]


class Fault(NamedTuple):
    """In `file`, `old` (which stands there once) becomes `new`; then `test` fails, and says something like `text`."""

    name: str
    file: str
    old: str
    new: str
    test: str
    text: str
    compiled: bool = False
    """Whether the test looks at machine code, so that the fault has to be in a copy of the package."""

    def mutant(self) -> Mutant:
        """The function with the fault in it; ValueError if the table no longer fits the file."""
        source = (ROOT / self.file).read_text(encoding="utf-8")
        if source.count(self.old) != 1:
            raise ValueError(
                f"{self.name}: {self.old!r} stands {source.count(self.old)} times in {self.file}, not once"
            )
        changed = source.replace(self.old, self.new)
        before, after = (dict(functions(ast.parse(text))) for text in (source, changed))
        (function,) = (name for name, node in after.items() if ast.dump(node) != ast.dump(before[name]))
        return Mutant(self.file, function, before[function].lineno, "planted", self.old, self.new, changed)


EXACT, SPLIT, INT32 = "test_exact.py::", "test_split_k.py::", "test_beyond_int32.py::"
CONTRACT = "test_contract.py::test_row"
POINTER, BOX, TILES = (f"kernels/{name}.py" for name in ("conv_pointer", "conv_box", "tiles"))
STEM, MAX_POOL, ADD = (f"kernels/{name}.py" for name in ("stem", "max_pool", "add_relu"))
AVERAGE, HEAD, LINEAR = (f"kernels/{name}.py" for name in ("global_avg_pool", "avg_pool_linear", "linear"))
RACE = "no barrier and arrival in between"

FAULTS = [
    # A mask that is off by one.
    Fault("a filter too many", POINTER, "mask_k = offs_k < K", "mask_k = offs_k <= K",
          EXACT + "test_conv_epilogue", "loads outside mean_ptr: element 40 of 40"),
    Fault("a pixel too many", POINTER, "mask_m = offs_m < M", "mask_m = offs_m <= M",
          EXACT + "test_conv_epilogue", "loads outside x_ptr"),
    Fault("a pixel too few", POINTER, "mask_m = offs_m < M", "mask_m = offs_m < M - 1",
          EXACT + "test_conv_epilogue", "never stores y_ptr"),
    Fault("a row too many", POINTER, "(h < H) & (w >= 0) & (w < W) & mask_m\n", "(w >= 0) & (w < W) & mask_m\n",
          EXACT + "test_windows_read_no_neighbours", "loads outside x_ptr"),
    Fault("a row before the first", POINTER, "(h >= 0) & (h < H) & (w >= 0) & (w < W) & mask_m\n",
          "(h >= -1) & (h < H) & (w >= 0) & (w < W) & mask_m\n",
          EXACT + "test_no_tap_is_skipped_in_the_padding", "loads outside x_ptr"),
    Fault("an image too many in a box", BOX, "[h, w, n, c], [row", "[h, w, n + 1, c], [row",
          EXACT + "test_every_legal_box_is_exact", "loads outside x_desc"),
    Fault("a filter too many in a box", BOX, "[r * s, k, c], [", "[r * s, k + 1, c], [",
          EXACT + "test_conv_epilogue", "loads outside w_desc"),
    Fault("a column too many in a pool", MAX_POOL, "(w0 + s < W)", "(w0 + s <= W)",
          EXACT + "test_max_pool", "loads outside x_ptr"),
    Fault("a pixel too many in a mean", AVERAGE, "offs_p < PIXELS", "offs_p <= PIXELS",
          EXACT + "test_global_avg_pool", "loads outside x_ptr"),
    Fault("a channel too many in a product", LINEAR, "mask_c = offs_c < C", "mask_c = offs_c <= C",
          EXACT + "test_linear", "loads outside x_ptr"),
    Fault("an element too many", ADD, "offs < NUMEL", "offs <= NUMEL",
          EXACT + "test_add_relu", "loads outside x_ptr: element 2730 of 2730"),
    Fault("an element too few", ADD, "offs < NUMEL", "offs < NUMEL - 1",
          EXACT + "test_add_relu", "never stores y_ptr"),
    Fault("a share too many", TILES, "range(1, SPLIT_K)", "range(1, SPLIT_K + 1)",
          SPLIT + "test_any_number_of_shares_is_exact", r"loads workspace_ptr.*, which nobody has stored"),
    Fault("a window too many in the stem", STEM, "[rows, n, q, WINDOW]", "[rows, n, q + 1, WINDOW]",
          "test_stem.py::test_stem", "loads outside x_desc"),
    # Strides in the wrong places.
    Fault("rows and columns swapped", POINTER, "(n * H + h0) * row + w0.to(tl.int64) * C",
          "(n * H + w0) * row + h0.to(tl.int64) * C",
          EXACT + "test_conv_epilogue", "loads outside x_ptr"),
    Fault("strides of a descriptor swapped", BOX, "[h, w, n, c], [row, c, image, 1]",
          "[h, w, n, c], [c, row, image, 1]",
          EXACT + "test_every_legal_box_is_exact", "loads outside x_desc"),
    Fault("parities swapped", BOX, "[row, c, 2 * row, 2 * c, 1]", "[2 * row, c, 2 * row, 2 * c, 1]",
          EXACT + "test_one_image_at_stride_2", "loads outside x_desc"),
    Fault("strides of the images swapped", STEM, '"stride_h": x.stride(2), "stride_w": x.stride(3)',
          '"stride_h": x.stride(3), "stride_w": x.stride(2)',
          "test_stem.py::test_stem", "pack_kernel, program .* loads outside x_ptr"),
    # A load under a mask that does not say what stands where the mask is false.
    Fault("no other= for pixels", POINTER, "mask=inside, other=0.0)", "mask=inside)",
          EXACT + "test_windows_read_no_neighbours", "loads x_ptr under a mask without other="),
    Fault("no other= for variances", TILES, "tl.load(var_ptr + offs_k, mask=mask_k, other=1.0)",
          "tl.load(var_ptr + offs_k, mask=mask_k)",
          EXACT + "test_conv_epilogue", "loads var_ptr under a mask without other="),
    Fault("no mask at all", TILES, "tl.load(mean_ptr + offs_k, mask=mask_k, other=0.0)", "tl.load(mean_ptr + offs_k)",
          EXACT + "test_conv_epilogue", "loads outside mean_ptr"),
    # Arithmetic.
    Fault("ReLU by a maximum", TILES, "tl.where(x < 0, 0.0, x)", "tl.maximum(x, 0.0)",
          EXACT + "test_relu_of_special_values", "assert same"),
    Fault("approximate root", TILES, "tl.div_rn(1.0, tl.sqrt_rn(var + eps))", "tl.rsqrt(var + eps)",
          "test_codegen.py::test_divisions_and_square_roots_are_correctly_rounded", r"assert re.findall.* == \[\]",
          compiled=True),
    Fault("sums in bfloat16", POINTER, "acc = tl.dot(a, b, acc, input_precision=PRECISION)\n    if SPLIT_K",
          "acc = tl.dot(a, b, acc, input_precision=PRECISION).to(tl.bfloat16).to(tl.float32)\n    if SPLIT_K",
          "test_accuracy.py::test_error_bound", "normal"),
    Fault("a sum of products in bfloat16", LINEAR, "acc = tl.dot(a, b, acc, input_precision=PRECISION)",
          "acc = tl.dot(a, b, acc, input_precision=PRECISION).to(tl.bfloat16).to(tl.float32)",
          "test_accuracy.py::test_error_bound[linear-pointer-bfloat16]", "normal"),
    Fault("a mean that is not rounded between two layers", HEAD,
          "PIXELS.to(tl.float32)).to(x_ptr.dtype.element_ty).to(tl.float32)", "PIXELS.to(tl.float32))",
          EXACT + "test_a_mean_is_rounded_before_the_linear_layer", "differ, first"),
    # Offsets that leave int32.
    Fault("an int32 offset", ADD, "tl.program_id(0).to(tl.int64) * BLOCK", "tl.program_id(0) * BLOCK",
          INT32 + "test_add_relu", "crash"),
    Fault("an int32 row", POINTER, "row = W.to(tl.int64) * C", "row = W * C",
          INT32 + "test_conv_pointer", "differ, first"),
    # Programs that do not wait for each other.
    Fault("a race between shares", TILES,
          'tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1', "split == SPLIT_K - 1",
          SPLIT + "test_any_number_of_shares_is_exact", f"loads workspace_ptr.*, which program .* stored: {RACE}"),
    Fault("no barrier before the arrival", TILES, "    tl.debug_barrier()\n", "",
          SPLIT + "test_any_number_of_shares_is_exact", f"loads workspace_ptr.*, which program .* stored: {RACE}"),
    Fault("a relaxed arrival", TILES, 'sem="acq_rel"', 'sem="relaxed"',
          SPLIT + "test_any_number_of_shares_is_exact", f"loads workspace_ptr.*, which program .* stored: {RACE}"),
    Fault("shares from a stale cache", TILES,
          'acc += tl.load(shares + i * (BLOCK_M * BLOCK_K) + offs, cache_modifier=".cg")',
          "acc += tl.load(shares + i * (BLOCK_M * BLOCK_K) + offs)",
          SPLIT + "test_a_barrier_stands_between_the_share_and_its_announcement", "assert loads in of_each",
          compiled=True),
    Fault("shares on top of each other", TILES, "tl.store(shares + split * (BLOCK_M * BLOCK_K) + offs, acc)",
          "tl.store(shares + offs, acc)",
          SPLIT + "test_any_number_of_shares_is_exact", f"stores workspace_ptr.*, which program .* stored: {RACE}"),
    Fault("the first writes, too", BOX, "        if not last:\n            return\n", "",
          SPLIT + "test_any_number_of_shares_is_exact", f"stores y_desc.*, which program .* stored: {RACE}"),
    Fault("tiles of the stem overlap", STEM, "(offs_j < HALF - 1) &", "(offs_j < HALF) &",
          "test_stem.py::test_stem", f"stores y_ptr.*, which program .* stored: {RACE}"),
    # Memory that nobody writes, or that is another's.
    Fault("an unwritten tail", MAX_POOL, "cdiv(c, block_c),)", "(c // block_c),)",
          EXACT + "test_max_pool", "never stores y_ptr"),
    Fault("tiles of the stem leave a gap", STEM, "(offs_j < HALF - 1) &", "(offs_j < HALF - 2) &",
          "test_stem.py::test_stem", "never stores y_ptr"),
    Fault("no marks of rows that are not finite", STEM, "    tl.store(marks_ptr + n * ROWS + row, mark)\n", "",
          "test_stem.py::test_stem", r"loads marks_ptr\[0, 0\], which nobody has stored"),
    Fault("a result without a mask", MAX_POOL, "mask=mask_m[:, None] & mask_c[None, :])",
          "mask=mask_c[None, :] & (offs_m >= 0)[:, None])",
          EXACT + "test_max_pool", "stores outside y_ptr"),
    Fault("a result into the residual", POINTER, "tl.store(y_ptr + offs_y, acc", "tl.store(res_ptr + offs_y, acc",
          EXACT + "test_conv_epilogue[residual-pointer-float32]", r"stores res_ptr\[0, 0, 0, 0\], an input"),
    Fault("a channel tail that reads the next tap", POINTER,
          "(w_filter + tap * C)[None, :] + offs_c[:, None], mask=mask_c[:, None]",
          "(w_filter + tap * C)[None, :] + offs_c[:, None],"
          " mask=(offs_c < C + tl.where(tap < R * S - 1, BLOCK_C, 0))[:, None]",
          EXACT + "test_tails_of_tiles_read_no_neighbours", "differ, first"),
    Fault("a channel tail of a box that reads the next tap", BOX,
          "[r * s, k, c], [c, r * s * c, 1]", "[r * s, k, -(-c // block_c) * block_c], [c, r * s * c, 1]",
          EXACT + "test_tails_of_tiles_read_no_neighbours", "loads outside w_desc"),
    Fault("a tail of taps that reads the next filter", POINTER, "mask_c = offs_c < R * S * C", "mask_c = offs_c >= 0",
          EXACT + "test_windows_read_no_neighbours", "loads outside w_ptr"),
    Fault("a tail of channels that reads the next class", HEAD, "mask_c = offs_c < C", "mask_c = offs_c >= 0",
          EXACT + "test_avg_pool_linear", "loads outside w_ptr"),
    # What is round the kernels.
    Fault("a configuration that exceeds shared memory", "resnet_triton/config/conv.py",
          "return shared_memory(config, shape) <= device.shared_memory", "return True",
          "test_config.py::test_illegal", "assert not is_legal"),
    Fault("pixels of several sides as rows of a product", "resnet_triton/config/conv.py",
          "if has_several_sides(config.box) and not config.swap:", "if False:",
          "test_config.py::test_illegal", "assert not is_legal"),
    Fault("a bound that forgets the stages", "resnet_triton/config/conv.py",
          "tiles = config.num_stages * (config.block_m", "tiles = (config.block_m",
          "test_config.py::test_legality_follows_the_shared_memory", r"assert not is_legal.*KNOWN\[89\]"),
    Fault("a stale statistic in a graph", "resnet_triton/graphs/fingerprint.py",
          "for d in (m._parameters, m._buffers)]",
          "for d in (m._parameters,)]",
          "test_fingerprint.py::test_other_edits_show_at_the_next_call[buffer]", "assert torch.equal"),
    Fault("a stale statistic in a frozen model", "resnet_triton/convert.py",
          "    for module in ours:\n        runner.forget(module)\n    return model",
          "    return model",
          "test_snapshot.py::test_a_frozen_model_is_a_snapshot_of_its_batch_norms", "assert close"),
    Fault("a silent fallback", "resnet_triton/ops/dispatch.py",
          "raise NotImplementedError(f'kernels=\"triton\" cannot run this call: {obstacle}')",
          'return Choice("torch", obstacle)',
          CONTRACT + "[residual: mixed dtypes: a wider residual does not widen the result: kernels]",
          "expected NotImplementedError"),
    Fault("a fallback that is not counted", "resnet_triton/ops/registry.py", '        count(self.name, "torch")\n', "",
          CONTRACT + "[residual: mixed dtypes: a wider residual does not widen the result: torch]",
          r"assert \(names, backends\) == \(set\(\), {.torch.}\)"),
    Fault("a fallback where the kernel should run", "resnet_triton/ops/registry.py",
          'if self.choose(*args).backend == "torch":', 'if self.choose(*args).backend != "":',
          EXACT + "test_operator_launches_its_kernel_once", "assert dispatch.calls - before"),
]  # fmt: skip
