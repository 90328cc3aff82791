"""Bugs of what is kept between steps: selection biases, statistics, what a log says of them."""

from planted_bug import Bug

BUGS = [
    Bug(
        "state: the bias moves in the model's precision",
        "adapters/selection_bias.py",
        "self.master, own = value, self.own()",
        "self.master, own = value.to(self.own().dtype).float(), self.own()",
        "test_selection_bias",
    ),
    Bug(
        "state: the fp32 bias is not saved",
        "adapters/layer_losses.py",
        'kept["bias"] = self.bias.master',
        'kept["bias"] = None',
        "test_selection_bias",
    ),
    Bug(
        "state: an adapter is saved without the biases",
        "adapters/selection_bias.py",
        "if not saves_adapters(model) or NAMES in model.__dict__:",
        "if True:",
        "test_selection_bias",
    ),
    Bug(
        "state: a resumed model keeps the base model's biases",
        "adapters/selection_bias.py",
        "        if into_model:\n",
        "        if False:\n",
        "test_selection_bias",
    ),
    Bug(
        "state: an attempt that ran out of memory counts",
        "adapters/attempt.py",
        "layer.go_back_to(seen)",
        "pass",
        "test_discarded",
    ),
    Bug(
        "state: an attempt that failed later counts",
        "adapters/trainers.py",
        "elif type(self).begun is not None:",
        "elif False:",
        "test_discarded",
    ),
    Bug(
        "state: a step that the gradient scaler skipped counts",
        "adapters/trainers.py",
        "if self.skipped():",
        "if False:",
        "test_discarded",
    ),
    Bug(
        "state: passes outside the trainer's loss count",
        "adapters/aux_losses.py",
        "elif not self._trainer.computes_loss:",
        "elif False:",
        "test_discarded",
    ),
    Bug(
        "state: confidence of the favourite, whatever was chosen",
        "metrics.py",
        "    score = scores.gather(1, first)[:, 0].masked_fill(~chose, 0.0)",
        "    score = scores.amax(-1).masked_fill(~chose, 0.0)",
        "test_metrics",
    ),
    Bug(
        "state: a slot that is not used agrees with a winner",
        "metrics.py",
        "        if record.proposed.edge is not None:",
        "        if False:",
        "test_metrics",
    ),
    Bug(
        "state: ranks leave rows out",
        "training/recipe.py",
        "if t.micro_batch_tokens is None and t.batch_tokens % (t.sequence_length * ranks):",
        "if False:",
        "test_cut",
    ),
    Bug(
        "state: the logged violation grows as batches are cut",
        "training/trainer.py",
        "max((f.max_vio_data for f",
        "max((f.max_vio_batch for f",
        "test_cut",
    ),
    Bug(
        "state: groups of one are taken for experts",
        "adapters/selection.py",
        "        if self._groups is not None and scores.shape == (self.tokens, self._groups):",
        "        if False:",
        "test_reroute_groups",
    ),
    Bug(
        "state: a choice goes on outside the best groups",
        "adapters/selection.py",
        "        if self._in_best is not None and self.banned is not None:",
        "        if False:",
        "test_reroute_groups",
    ),
]
