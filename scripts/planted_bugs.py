"""Plant known bugs one by one and demand that the tests go red: a test suite is only as good as what it catches.

Each bug is one exact replacement in one source file. It is made in a copy; the named test files run against that copy,
stop at the first failure, and must fail by a test (not by an import error). Prints one line per bug; exit 1 if one
survives.

    python scripts/planted_bugs.py [--only TEXT] [--jobs 2]
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import pytest
from planted_bug import Bug

ROOT = Path(__file__).parent.parent
OUTPUT = "output"
"""Name of the file that receives what pytest prints."""
FORKED = get_context("forkserver")
"""Start processes from one that has imported what every test imports, which takes longer than most tests."""
FORKED.set_forkserver_preload(["torch", "transformers.trainer", "scipy.stats", "datasets", "pytest", "hypothesis"])


BUGS = [
    Bug(
        "weights not permuted with their edges",
        "models/layers.py",
        "top_k_weights[token, slot, None]",
        "top_k_weights[token, 0, None]",
        "test_layers",
    ),
    Bug(
        "balance counts the first choice only",
        "routing.py",
        "    return counts.index_add_(0, cell, chosen(routing, batch).flatten())",
        "    first = chosen(routing, batch) * (torch.arange(routing.expert.shape[1]) == 0)\n"
        "    return counts.index_add_(0, cell, first.flatten())",
        "test_aux_losses",
    ),
    Bug("padding counted in the load", "routing.py", "if batch.valid is not None:", "if False:", "test_aux_losses"),
    Bug(
        "padding counted in losses",
        "losses/per_sequence.py",
        "value if batch.valid is None else value.masked_fill(~batch.valid, 0.0)",
        "value",
        "test_aux_losses",
    ),
    Bug(
        "no gradient to the router",
        "routers.py",
        "weight = affinity.gather(-1, expert)",
        "weight = affinity.detach().gather(-1, expert)",
        "test_layers",
    ),
    Bug(
        "idle last expert dropped",
        "models/layers.py",
        "for expert, (gate_up, down) in enumerate(weights):",
        "for expert, (gate_up, down) in list(enumerate(weights))[: int(top_k_index.max())]:",
        "test_layers",
    ),
    Bug("shared expert forgotten", "models/layers.py", "return routed + shared if", "return routed if", "test_layers"),
    Bug(
        "bias leaks into the weights",
        "routers.py",
        "weight = affinity.gather(-1, expert)",
        "weight = (affinity if bias is None else affinity + bias).gather(-1, expert)",
        "test_routers",
    ),
    Bug(
        "accumulation counted twice",
        "adapters/batch.py",
        "everything = own.sum() if items is None else",
        "everything = own.sum() if True else",
        "test_trainer",
    ),
    Bug(
        "sequence boundaries ignored",
        "adapters/batch.py",
        "torch.arange(rows, device=tokens.device).repeat_interleave(length)",
        "torch.zeros(rows * length, dtype=torch.long, device=tokens.device)",
        "test_aux_losses",
    ),
    Bug("weights not renormalised", "routers.py", "if rule.renormalise:", "if False:", "test_routers"),
    Bug("scale forgotten", "routers.py", "weight=weight * rule.scale", "weight=weight", "test_routers"),
    Bug("groups ignored", "routers.py", "if rule.num_groups > 1:", "if False:", "test_routers"),
    Bug(
        "group score is its best expert only",
        "routers.py",
        "topk(min(2, grouped.shape[-1]), dim=-1)",
        "topk(1, dim=-1)",
        "test_routers",
    ),
    Bug(
        "a banned expert may be chosen",
        "routers.py",
        "if banned is not None:",
        "if False:",
        "test_routers",
    ),
    Bug(
        "router logits in the autocast dtype",
        "models/layers.py",
        "        with torch.autocast(hidden.device.type, enabled=False):\n"
        "            logits = F.linear(hidden.float(), self.weight.float())",
        "        logits = F.linear(hidden.float(), self.weight.float())",
        "test_layers",
    ),
    Bug(
        "convex mix not normalised",
        "models/layers.py",
        "share = (logits[:, :1] - logits[:, 1:]).sigmoid()",
        "share = logits[:, :1].sigmoid()",
        "test_layers",
    ),
    Bug(
        "shared experts summed under the convex mix",
        "models/layers.py",
        "self.mix(tokens, routed, shared / self.num_shared)",
        "self.mix(tokens, routed, shared)",
        "test_layers",
    ),
    Bug(
        "statistics counted again in recomputation",
        "adapters/layer_losses.py",
        "if record.recomputed:",
        "if False:",
        "test_aux_losses",
    ),
    Bug("bias moves the wrong way", "balance.py", "bias + rate", "bias - rate", "test_aux_losses"),
    Bug("z-loss not squared", "losses/balance.py", ".logsumexp(-1).square()", ".logsumexp(-1)", "test_aux_losses"),
    Bug(
        "lagged load not saved",
        "adapters/layer_losses.py",
        'kept = {"load": self.lagged_load, ',
        "kept = {",
        "test_aux_losses",
    ),
    Bug(
        "sub-layers averaged, not summed, in a block",
        "adapters/aux_losses.py",
        "len({layer.block for layer in handles})",
        "len(handles)",
        "test_aux_losses",
    ),
    Bug(
        "labels not shifted in the chunked loss",
        "models/modeling.py",
        "hidden_states[:, :-1], labels[:, 1:]",
        "hidden_states[:, :-1], labels[:, :-1]",
        "test_models_training",
    ),
    Bug(
        "ignored labels counted in the chunked loss",
        "models/chunked_cross_entropy.py",
        "total += (sums.log() + top - label_logit).where(counts, 0.0).sum()",
        "total += (sums.log() + top - label_logit).sum()",
        "test_chunked_cross_entropy",
    ),
    Bug(
        "norm of a sub-layer forgotten",
        "models/modeling.py",
        "hidden = norm(before if self",
        "hidden = (before if self",
        "test_siblings",
    ),
    Bug(
        "tied embeddings counted twice",
        "architecture/counting.py",
        "(1 if model.tie_word_embeddings else 2)",
        "2",
        "test_counting",
    ),
    Bug(
        "padded rows' gradient misplaced",
        "models/grouped_padded.py",
        "weight_of_row = _take(weight.to(rows.dtype).view(-1, 1), pair_of_row, row_of_pair)",
        "weight_of_row = _take(weight.to(rows.dtype).view(-1, 1), token_of_row, row_of_pair)",
        "test_grouped_padded",
    ),
    Bug(
        "held-out loss charged to the document before",
        "evaluation.py",
        'document = batch["document"][:, 1:].flatten()',
        'document = batch["document"][:, :-1].flatten()',
        "test_evaluation",
    ),
    Bug(
        "training mode left on in evaluation",
        "evaluation.py",
        "    model.eval()\n",
        "",
        "test_evaluation",
    ),
    Bug(
        "initial weights depend on what else there is",
        "training/initialise.py",
        "        torch.manual_seed(stable_hash(seed, name))\n",
        "",
        "test_initialise",
    ),
    Bug(
        "difference has the wrong sign",
        "statistics.py",
        "    by_seed = a - b",
        "    by_seed = b - a",
        "test_statistics",
    ),
    Bug(
        "a corrupt checkpoint is trusted",
        "training/checkpoints.py",
        "require(digest(path) == expected,",
        "require(True,",
        "test_runs.py::test_corrupt_checkpoint_is_an_error",
    ),
    Bug(
        "orthogonality sees padding",
        "losses/outputs.py",
        "return None if everything else chosen(record.routing, record.batch) > 0",
        "return None",
        "test_losses_specialise",
    ),
    Bug(
        "variance over a token's experts, not over tokens",
        "losses/scores.py",
        'if form == "row":',
        "if True:",
        "test_losses_specialise",
    ),
    Bug(
        "outputs of neighbouring rows, not of one token's experts",
        "models/grouped_padded.py",
        "rows.index_select(0, row_of_pair.flatten()).view",
        "rows[: row_of_pair.numel()].view",
        "test_attach",
    ),
    Bug(
        "outputs weighted already",
        "adapters/tap.py",
        "torch.ones_like(weight).view(-1, 1)",
        "weight.reshape(-1, 1)",
        "test_attach",
    ),
    Bug(
        "a tap left on the experts",
        "adapters/tap.py",
        "            del experts.forward\n",
        "            pass\n",
        "test_attach",
    ),
    Bug(
        "a token without experts counts as one of the first",
        "adapters/layers.py",
        "edge = weight != 0 if",
        "edge = None if",
        "test_attach",
    ),
    Bug(
        "losses on weights added whole to every micro-batch",
        "adapters/layer_losses.py",
        "return value * share.sum()",
        "return value",
        "test_attach_gradients",
    ),
    Bug(
        "the model's own balance loss counted too",
        "adapters/native.py",
        "c.output_router_logits = False",
        "pass",
        "test_attach_gradients",
    ),
    Bug(
        "LoRA on the router counts as frozen",
        "adapters/applicability.py",
        "for module in (layer.router, *wrappers)",
        "for module in (layer.router,)",
        "test_attach_gradients",
    ),
    Bug(
        "the prompt is not masked",
        "adapters/layer_losses.py",
        "if self.aux.mask_prompt and",
        "if False and",
        "test_attach_gradients",
    ),
    Bug(
        "warm-up forgotten",
        "adapters/aux_losses.py",
        "(ramp if name in late else 1.0)",
        "1.0",
        "test_attach_gradients",
    ),
    Bug(
        "GRPO's accumulation ignored",
        "adapters/trainers.py",
        "if batch.items is None and scaled:",
        "if False:",
        "test_attach_trl",
    ),
    Bug(
        "TRL's balance loss counted too",
        "adapters/trainers.py",
        "trainer.aux_loss_enabled = False",
        "pass",
        "test_attach_trl",
    ),
    Bug(
        "a disabled expert masked after selection",
        "perturbations.py",
        "return proposal.select(banned=among(routing.expert, largest(routing, count), num_experts))",
        "return replace(routing, weight=routing.weight.masked_fill(largest(routing, count), 0.0))",
        "test_reroute",
    ),
    Bug(
        "disabled by selection score instead of weight",
        "perturbations.py",
        "banned=among(routing.expert, largest(routing, count), num_experts)",
        "banned=among(routing.expert, torch.arange(top_k).expand_as(routing.expert) < count, num_experts)",
        "test_perturbations",
    ),
    Bug(
        "unused slots disabled",
        "perturbations.py",
        "torch.zeros_like(used).scatter(-1, slot, True) & used",
        "torch.zeros_like(used).scatter(-1, slot, True)",
        "test_perturbations",
    ),
    Bug(
        "replaced by an expert that was chosen",
        "perturbations.py",
        ".masked_fill(taken, -1)",
        "",
        "test_perturbations",
    ),
    Bug(
        "random choices depend on padding",
        "randomness.py",
        "+ place) * valid",
        "+ place)",
        "test_perturbations",
    ),
    Bug(
        "random choices alike in all layers",
        "perturbations.py",
        'f"{seed} {layer.name}"',
        'f"{seed}"',
        "test_perturbations",
    ),
    Bug(
        "banned experts count in their group's score",
        "adapters/selection.py",
        'best = func(scores.masked_fill(self.banned.view(scores.shape), float("-inf")), *args, **kwargs)',
        "best = func(scores, *args, **kwargs)",
        "test_reroute",
    ),
    Bug(
        "a group with one banned expert comes last",
        "adapters/selection.py",
        "type(best)((summable(best.values), best.indices))",
        "best",
        "test_reroute",
    ),
    Bug(
        "noise applied twice",
        "adapters/selection.py",
        "return result + F.pad(added",
        "return result + F.pad(2 * added",
        "test_reroute",
    ),
    Bug(
        "noise on every product of the router",
        "adapters/selection.py",
        "if self.noise is None or self.product != len(self.widths) - 1:",
        "if self.noise is None or width > 16:",
        "test_reroute",
    ),
    Bug(
        "noise in units of LoRA's part of the logits",
        "adapters/reroute.py",
        "listening.widths.index(listening.widths[-1])",
        "len(listening.widths) - 1",
        "test_reroute",
    ),
    Bug(
        "weights compared with those of disabled experts",
        "adapters/selection.py",
        "self._compares = func in (torch.max, Tensor.max)",
        "self._compares = False",
        "test_reroute",
    ),
    Bug(
        "an unknown rule disables nothing, silently",
        "adapters/reroute.py",
        "if selection.banned is not None:",
        "if False:",
        "test_reroute",
    ),
    Bug(
        "a rule out of experts takes any",
        "adapters/selection.py",
        "self.lacking = self.lacking.to(lacking.device) | lacking",
        "pass",
        "test_reroute",
    ),
    Bug(
        "the block run again with its cache",
        "adapters/reroute.py",
        "chooser = self.block if None in places else self.router",
        "chooser = self.block",
        "test_reroute",
    ),
    Bug(
        "hooks hear of the second run",
        "adapters/reroute.py",
        "with unheard(chooser), hearing",
        "with hearing",
        "test_reroute",
    ),
    Bug(
        "shared experts keep the old weights",
        "adapters/reroute.py",
        "old.copy_(new)",
        "pass",
        "test_reroute",
    ),
    Bug(
        "a reroute stays installed",
        "adapters/reroute.py",
        "        tap.reroute = None\n        for handle in handles:",
        "        for handle in handles[1:]:",
        "test_reroute",
    ),
    Bug(
        "a reroute reported but not run",
        "adapters/tap.py",
        "tap.run(hidden_states, routing.expert, routing.weight, *args), None",
        "tap.run(hidden_states, top_k_index, top_k_weights, *args), None",
        "test_reroute",
    ),
    Bug("the screening seed in the interval", "sweep.py", "if self.seed in seeds:", "if False:", "test_sweep"),
    Bug(
        "a failed screening run tried again",
        "training/failures.py",
        "read_record(FailedRun, note) if note.exists() else None",
        "None",
        "test_sweep",
    ),
    Bug("one recipe's rate for all", "sweep.py", "rates[r.name]", "min(rates.values())", "test_sweep"),
    Bug(
        "dtype decided anew for what is added",
        "compare.py",
        "recorded_dtype(undecided[0], earlier[0]) if earlier else undecided[0]",
        "undecided[0]",
        "test_sweep",
    ),
    Bug(
        "the lowest rate is no edge",
        "report/sentences.py",
        "at_the_edge(found, min)",
        "[]",
        "test_report_learning_rates",
    ),
    Bug(
        "every robustness test in all layers",
        "inspection/robustness.py",
        "dict.fromkeys(test.scope.layers, perturbation(test, seed))",
        "dict.fromkeys([layer.name for layer in layers], perturbation(test, seed))",
        "test_robustness",
    ),
    Bug(
        "second sub-layers called first",
        "inspection/places.py",
        "blocks[:i].count(blocks[i])",
        "blocks[i:].count(blocks[i]) - 1",
        "test_robustness",
    ),
    Bug(
        "no norm between sub-layers",
        "models/modeling.py",
        'hidden = norm(before if self.composition == "parallel" else stream)',
        "hidden = norm(stream) if stream is before else stream",
        "test_composition",
    ),
    Bug(
        "one router for both sub-layers",
        "models/modeling.py",
        "in shared.get(config.composition, ())",
        'in shared.get(config.composition, ("router.weight",))',
        "test_composition",
    ),
    Bug(
        "router B reads what A read",
        "models/modeling.py",
        'if self.composition == "tied" and isinstance(sub_layer, SparseMoE):',
        "if isinstance(sub_layer, SparseMoE):",
        "test_composition",
    ),
    Bug(
        "the residual of sub-layer B is the stream before A",
        "models/modeling.py",
        "stream = stream + sub_layer(hidden)\n",
        "stream = before + sub_layer(hidden)\n",
        "test_composition",
    ),
    Bug(
        "shares of the convex mix sum to more than one",
        "models/layers.py",
        "torch.lerp(shared.to(routed.dtype), routed, share.to(routed.dtype))",
        "shared.to(routed.dtype) + share.to(routed.dtype) * routed",
        "test_composition",
    ),
    Bug(
        "parallel sub-layers in series",
        "models/modeling.py",
        'before if self.composition == "parallel" else stream',
        "stream",
        "test_composition",
    ),
    Bug(
        "tied sub-layers choose anew",
        "models/modeling.py",
        "of_first = hidden if of_first is None else of_first",
        "of_first = hidden",
        "test_composition",
    ),
    Bug(
        "a tie lost on load",
        "models/modeling.py",
        "else dict(self._tied_weights_keys)",
        'else dict(self._tied_weights_keys if self.device.type != "meta" else {})',
        "test_composition",
    ),
    Bug(
        "a tie lost where embeddings are untied",
        "models/modeling.py",
        "super().get_expanded_tied_weights_keys(True) if all_submodels else dict(self._tied_weights_keys)",
        "super().get_expanded_tied_weights_keys(all_submodels)",
        "test_composition",
    ),
    Bug(
        "residual writes counted as two per block",
        "models/configuration.py",
        "sum(1 + len(block) for block in self.sub_layers)",
        "2 * len(self.sub_layers)",
        "test_models",
    ),
    Bug(
        "experts' writes start as large as the rest",
        "models/modeling.py",
        'std=written if name == "down_proj" else std',
        "std=std",
        "test_models",
    ),
    Bug(
        "a shared pool counted per sub-layer",
        "architecture/counting.py",
        'if model.composition == "shared-pool":',
        "if False:",
        "test_counting",
    ),
    Bug(
        "a shared router starts as the later sub-layer's",
        "training/initialise.py",
        " or module in borrowers",
        "",
        "test_initialise",
    ),
    Bug(
        "embeddings decayed",
        "training/trainer.py",
        " if name not in embeddings]",
        "]",
        "test_trainer.py::test_matrices_alone_are_decayed",
    ),
    Bug(
        "a variant undone by the next",
        "training/controls.py",
        ' or recipe.model.composition != "serial"',
        "",
        "test_controls",
    ),
]


def every_bug() -> Iterator[Bug]:
    """Yield the bugs of this file and those of every module beside it that is named `planted_AREA`."""
    yield from BUGS
    for path in sorted(Path(__file__).parent.glob("planted_*.py")):
        if path.stem not in (Path(__file__).stem, "planted_bug"):
            yield from import_module(path.stem).BUGS


def plant(bug: Bug) -> tuple[bool, str]:
    """(caught?, what happened) for one bug."""
    with tempfile.TemporaryDirectory() as place:
        for folder in ("src", "tests", "scripts", "docs", "benchmarks", "examples"):
            shutil.copytree(ROOT / folder, Path(place) / folder, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / file, place)
        path = Path(place) / "src" / "moestro" / bug.file
        text = path.read_text()
        if text.count(bug.right) != 1:
            return False, f"the line to break stands {text.count(bug.right)} times in {bug.file}, not once"
        path.write_text(text.replace(bug.right, bug.wrong))
        module, _, rest = bug.tests.partition("::")
        target = f"tests/{module.removesuffix('.py')}.py" + (f"::{rest}" if rest else "")
        run = FORKED.Process(target=run_tests, args=(Path(place), target))
        run.start()
        run.join()
        said = (Path(place) / OUTPUT).read_text().splitlines() or ["no output"]
        failed = [line for line in said if line.startswith("FAILED")]
        if run.exitcode == 1 and failed:
            return True, failed[0].removeprefix("FAILED ").partition(" - ")[0]
        return False, f"pytest ended with {run.exitcode}: {said[-1]}"


def run_tests(place: Path, target: str) -> None:
    """Run one test file against the copy of the package in `place`, in a process of its own; exit as pytest does."""
    os.chdir(place)
    os.environ |= {"PYTHONPATH": str(place / "src"), "OMP_NUM_THREADS": "1"}
    sys.path.insert(0, str(place / "src"))
    with open(OUTPUT, "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", target])
        sys.stdout.flush()
        os._exit(code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="bugs whose name holds this text")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    bugs = [bug for bug in every_bug() if options.only in bug.name]
    start, survivors = time.perf_counter(), 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for bug, (caught, what) in zip(bugs, pool.map(plant, bugs), strict=True):
            survivors += not caught
            print(f"{'caught  ' if caught else 'SURVIVED'}  {bug.name}: {what}", flush=True)
    print(f"{len(bugs) - survivors} of {len(bugs)} planted bugs caught in {time.perf_counter() - start:.0f} s")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
