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
]
