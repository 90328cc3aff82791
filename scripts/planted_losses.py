"""Bugs of losses that harm real weights, or that a log does not show."""

from planted_bug import Bug

BUGS = [
    Bug(
        "losses: the default orthogonality is in squared units of the hidden state",
        "adapters/aux_losses.py",
        'orthogonality_form: OrthogonalityForm = "cosine"',
        'orthogonality_form: OrthogonalityForm = "projection"',
        "test_loss_units",
    ),
    Bug(
        "losses: that of recipes too",
        "training/recipe.py",
        '["cosine", "weighted", "projection", "span"] = "cosine"',
        '["cosine", "weighted", "projection", "span"] = "span"',
        "test_loss_units",
    ),
    Bug(
        "losses: weighted cosines grow with the outputs' length",
        "losses/outputs.py",
        "per_token = (pair * off_diagonal(correlation(products).square())).sum((-2, -1))",
        "per_token = (pair * off_diagonal(products.square())).sum((-2, -1))",
        "test_loss_units",
    ),
    Bug(
        "losses: a term of several passes is the last one's in the log",
        "adapters/aux_losses.py",
        "torch.stack(parts).detach().sum(0) / divisor",
        "torch.stack(parts).detach()[-1] / divisor",
        "test_loss_log",
    ),
    Bug(
        "losses: the log's terms are sums over steps",
        "adapters/loss_log.py",
        "values / (steps * num_ranks())",
        "values / num_ranks()",
        "test_loss_log",
    ),
    Bug(
        "losses: the log forgets to divide what the Trainer divides",
        "adapters/trainers.py",
        "apart.add(task, terms, 1 if scaled else",
        "apart.add(task, terms, 1 if True else",
        "test_loss_log",
    ),
    Bug(
        "losses: nothing is apart in the log",
        "adapters/trainers.py",
        'if "loss" in logs:',
        'if "eval_loss" in logs:',
        "test_loss_log",
    ),
    Bug(
        "losses: a loss that outweighs the task is not warned of",
        "adapters/gradient_ratio.py",
        "MOST = 1.0",
        "MOST = 1e9",
        "test_gradient_ratio",
    ),
    Bug(
        "losses: the measured gradient is accumulated",
        "adapters/gradient_ratio.py",
        "    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)",
        "    loss.backward(retain_graph=True)\n    gradients = [parameter.grad for parameter in parameters]",
        "test_gradient_ratio",
    ),
    Bug(
        "losses: the ratio is that of the first ramp's weight",
        "adapters/gradient_ratio.py",
        "full = getattr(aux, name) / aux.weights[name]",
        "full = 1.0",
        "test_gradient_ratio",
    ),
    Bug(
        "losses: experts' weights keep their dtype under autocast",
        "models/autocast_mm.py",
        "setattr(self, name, weight.to(dtype))",
        "setattr(self, name, weight)",
        "test_experts_dtype",
    ),
    Bug(
        "losses: on CUDA experts run in fp32",
        "training/train.py",
        "AUTOCAST_MM if torch.cuda.is_available()",
        '"grouped_mm" if torch.cuda.is_available()',
        "test_experts_dtype",
    ),
    Bug(
        "losses: outputs kept apart are those of fp32 products",
        "models/grouped_padded.py",
        "autocast = backend in (PADDED_MM, AUTOCAST_MM) and",
        "autocast = backend == PADDED_MM and",
        "test_experts_dtype",
    ),
]
