"""Bugs of passes: which pass a layer's run belongs to, what its tokens are, and which modules run."""

from planted_bug import Bug

BUGS = [
    Bug(
        "passes: a layer run again joins the latest pass",
        "adapters/watch.py",
        "self.current = self._recomputed() or latest",
        "self.current = self._latest",
        "test_recomputation",
    ),
    Bug(
        "passes: selective checkpointing sees the statistics",
        "adapters/tap.py",
        "if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():",
        "if True:",
        "test_recomputation",
    ),
    Bug(
        "passes: experts in a checkpoint of their own lose what the router returned",
        "adapters/tap.py",
        "if current.open and saved_tensor_hooks() != self._hooks:",
        "if False:",
        "test_recomputation",
    ),
    Bug(
        "passes: a pass dies before its graph",
        "adapters/tap.py",
        "current.live_with(mixed, proposed.weight, proposed.logits)",
        "pass",
        "test_recomputation",
    ),
    Bug(
        "masks: padding that a kernel was given keys for counts as tokens",
        "adapters/masks.py",
        "valid = own & ~(may.all(2) & ~may[:, -1, past:])",
        "valid = own",
        "test_masks",
    ),
    Bug(
        "masks: additive masks are read as numbers of valid tokens",
        "adapters/masks.py",
        "mask > MASKED if mask.is_floating_point() else mask.bool()",
        "mask.bool()",
        "test_masks",
    ),
    Bug(
        "masks: sequences packed by a mask count as one",
        "adapters/masks.py",
        "return Layout(valid.expand(rows, length), starts_at((valid & ~before)[:, 1:].expand(rows, length - 1)))",
        "return Layout(valid.expand(rows, length))",
        "test_masks",
    ),
    Bug(
        "rows: labels per row are lost, and every micro-batch counts whole",
        "adapters/aux_losses.py",
        "by_label=by_label, rows=rows)",
        "by_label=by_label and current.batch.label is not None)",
        "test_rows_and_runs",
    ),
    Bug(
        "rows: several labels of a row count as its tokens'",
        "adapters/watch.py",
        "self.labels_tokens = loss not in (OfRowsLoss, ForQuestionAnsweringLoss)",
        "self.labels_tokens = True",
        "test_rows_and_runs",
    ),
    Bug(
        "runs: only a layer's last run gets a gradient",
        "adapters/layer_losses.py",
        "self.terms = {name: added(self.terms.get(name), value) for name, value in terms.items()}",
        "self.terms = terms",
        "test_rows_and_runs",
    ),
    Bug(
        "silence: a copy made by DataParallel goes unseen",
        "adapters/watch.py",
        'if getattr(model, "_is_replica", False):',
        "if False:",
        "test_silence",
    ),
    Bug(
        "silence: nobody says that the model is in evaluation mode",
        "adapters/aux_losses.py",
        "self._silence.look_at_pass(current, inputs)",
        "pass",
        "test_silence",
    ),
    Bug(
        "passes: gradients are measured through a selective checkpoint, which is then used up",
        "adapters/tap.py",
        "current.selective = current.selective or torch._C._len_torch_dispatch_stack() > 0",
        "pass",
        "test_recomputation",
    ),
]
