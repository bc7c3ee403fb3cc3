"""What can go wrong around the kernels, what happens then, and the tests of it: a table, for the report."""

from __future__ import annotations

from typing import NamedTuple


class Robust(NamedTuple):
    """A trouble, what becomes of it, and the test (`FILE::FUNCTION`) that makes it."""

    trouble: str
    outcome: str
    test: str


PROCESSES = "test_robust_processes.py::"
FILES, PREDICT, THREADS = "test_robust_files.py::", "test_robust_predict.py::", "test_robust_threads.py::"
ROBUST = (
    Robust("many threads call a model that is edited, moved, refreshed",
           "each answer is one of before or of after; the memory that a move leaves must last until the calls end, as "
           "for any PyTorch model",
           THREADS + "test_threads_call_a_model_that_is"),
    Robust("fork while another thread is in a call", "no lock is inherited",
           THREADS + "test_a_fork_while_another_thread_is_in_a_call"),
    Robust("a model sent to a spawned process", "answers there as here",
           THREADS + "test_a_model_goes_to_a_process_that_is_spawned"),
    Robust("tensors on another GPU than the current one", "launched under the guard of their device (stand-in)",
           THREADS + "test_kernels_are_launched_under_the_guard_of_their_tensors_device"),
    Robust("a thread that has not used the GPU before", "it has a context before tensor maps are made (stand-in)",
           THREADS + "test_a_thread_asks_the_runtime_for_a_context_before_it_launches_anything"),
    Robust("a capture that CUDA cannot end", "the shape goes on without a graph, PyTorch as if nothing was (stand-in)",
           "test_runner.py::test_pytorch_knows_when_a_capture_is_over"),
    Robust("a frozen model on several streams", "its snapshot is finished before another stream may read it (stand-in)",
           "test_snapshot.py::test_a_snapshot_is_finished_before_another_stream_may_read_it"),
    Robust("out of memory, or Ctrl-C, in a call, a capture or a replay", "torch's error; the model stays usable",
           THREADS + "test_a_call_that_fails_half_way_leaves_the_model_usable"),
    Robust("out of memory in an operator", "torch's error",
           THREADS + "test_memory_that_runs_out_inside_an_operator_is_torchs_error"),
    Robust("a disk that becomes full during any write", "the old file or the new one, never half of one",
           FILES + "test_a_failed_write_leaves_the_old_file"),
    Robust("a full disk in a benchmark", "results are printed, the fault is one line",
           FILES + "test_a_disk_that_becomes_full_costs_no_results"),
    Robust("Ctrl-C, no time or failures before anything is timed", "earlier results stay, the exit code is not 0",
           FILES + "test_earlier_results_stay_until_something_is_timed"),
    Robust("Triton, torchvision, a GPU, a device or a home folder that is not there, in every command",
           "one line, exit code 2, before any work", "test_ask.py::test_every_command_asks_first"),
    Robust("empty, foreign, repeated or failed results in `compare`", "never a pass; each row is named",
           "test_bench_results.py::test_what_compares_nothing_does_not_pass"),
    Robust("a folder that may not be written to", "named before the work begins",
           "test_ask.py::test_every_command_asks_first"),
    Robust("a Triton cache that cannot be written", "`doctor` warns, with the remedy",
           FILES + "test_doctor_warns_of_a_full_disk_and_of_no_folder"),
    Robust("a damaged table of tuned tiles", "one warning of one line, then the heuristic",
           "test_choice.py::test_a_hostile_table_is_one_short_warning_that_says_what_to_do"),
    Robust("a folder, a device or a loop of links in place of such a table", "the same",
           "test_choice.py::test_what_is_no_file_is_ignored"),
    Robust("two tuners of one table at once", "no entry is lost", FILES + "test_two_tuners_of_one_table_lose_nothing"),
    Robust("bombs, truncated and empty files, folders, pipes in place of an image", "one line, exit code 2, no waiting",
           PREDICT + "test_hostile_images_are_refused"),
    Robust("16-bit, CMYK, palette, transparent, animated images", "seen as they look",
           PREDICT + "test_unusual_images_come_out_as_they_look"),
    Robust("a broken image among others in `predict`", "it is named, the others go on, exit code 2",
           "test_cli.py::test_a_bad_image_is_named_and_the_others_go_on"),
    Robust("Ctrl-C, or nobody who reads on, in `predict`", "what was classified has been printed; no traceback",
           PROCESSES + "test_predictions_come_as_a_stream_that_can_be_stopped"),
    Robust("a thousand images in `predict`", "less than 100 MB more than 32 images take",
           PROCESSES + "test_memory_does_not_grow_with_the_number_of_images"),
    Robust("images turned by EXIF", "turned upright", PREDICT + "test_every_orientation_is_pillows"),
    Robust("a download that breaks off, or fails", "no file stays; the next one works",
           PREDICT + "test_a_failed_download_leaves_nothing_and_the_next_one_works"),
    Robust("Ctrl-C or SIGTERM in `bench`", "what was measured is kept, no process stays",
           PROCESSES + "test_a_benchmark_that_is_stopped_keeps_what_was_measured"),
    Robust("the same in `codegen`", "no process stays, no half report",
           PROCESSES + "test_compiling_ahead_of_time_can_be_stopped"),
    Robust("a compiler of the tuner dies", "another takes its place",
           PROCESSES + "test_a_compiler_that_dies_is_replaced"),
    Robust("a benchmark killed", "its workers end",
           "test_bench_race.py::test_workers_do_not_outlive_a_conductor_that_was_killed"),
    Robust("Ctrl-C in `tune`", "what was timed is kept",
           "test_tune.py::test_an_interrupt_between_timings_leaves_what_was_done"),
    Robust("a tuner killed", "its compilers end", "test_tune.py::test_compilers_end_with_a_killed_parent"),
)  # fmt: skip
