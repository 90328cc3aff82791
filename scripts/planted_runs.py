"""Bugs of run folders: steps too many, two owners, a start or a finish that cannot be repeated."""

from planted_bug import Bug

BUGS = [
    Bug(
        "runs: a step more after the last",
        "training/train.py",
        "if resume is not None and step_of(resume) == steps:",
        "if False:",
        "test_run_folder",
    ),
    Bug(
        "runs: checkpoints from beyond the last step",
        "training/resume.py",
        "if step_of(path) > steps]",
        "if False]",
        "test_run_folder::test_a_checkpoint_from_beyond_the_last_step_is_refused",
    ),
    Bug(
        "runs: a budget as planned",
        "compare.py",
        "(*the_plan.differences, *unequally_trained(the_plan, results))",
        "the_plan.differences",
        "test_compare::test_budgets_are_checked_by_what_was_trained",
    ),
    Bug(
        "runs: two owners",
        "training/owner.py",
        "return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "return None",
        "test_run_folder::test_a_second_process_on_a_run_is_refused",
    ),
    Bug(
        "runs: a comparison of two owners",
        "compare.py",
        "with owned(folder):",
        "with nullcontext(folder.mkdir(exist_ok=True)):",
        "test_run_folder::test_a_second_process_on_a_comparison_is_refused",
    ),
    Bug(
        "runs: leftovers of a start taken for others' files",
        "training/runs.py",
        "names - LEFT_BY_A_START",
        "names - {LOCK}",
        "test_run_folder::test_what_a_start_leaves_is_no_other_run",
    ),
    Bug(
        "runs: unfinished checkpoints stay",
        "training/resume.py",
        "shutil.rmtree(path)",
        "pass",
        "test_run_folder::test_unfinished_checkpoints_go",
    ),
    Bug(
        "runs: damaged weights of a finished run",
        "training/finish.py",
        "verify(model, advice)",
        "pass",
        "test_run_folder::test_a_damaged_finished_run_is_one_line",
    ),
]
