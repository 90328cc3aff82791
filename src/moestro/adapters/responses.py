"""Letting all experts answer some tokens of every pass, to see what competition would choose."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor, nn

from moestro.adapters.meter import SAMPLE
from moestro.adapters.tap import TAP, Tap
from moestro.adapters.watch import Listener, Watch, watch
from moestro.agreement import AgreementFigures, agreement_figures
from moestro.competition.inference import sample_statistics
from moestro.competition.responses import response_of, responses
from moestro.competition.scaling import ResponseStatistics
from moestro.competition.settings import Compete
from moestro.routing import LayerRecord, MoELayer
from moestro.samples import sample_places


class ResponseMeter:
    """Per layer, the responses of all experts to a sample of the tokens of every pass that is not in training.

    Passes run as if nobody looked. Costs all experts for at most `sample` tokens per layer and pass.
    """

    def __init__(self, rule: Compete | None = None, sample: int = SAMPLE) -> None:
        self.rule, self.sample = rule or Compete(), sample
        self._response: dict[str, list[Tensor]] = {}
        self._chosen: dict[str, list[Tensor]] = {}

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[Watch]:
        """Look at every forward pass of `model` until the context ends."""
        with watch(model, Listener(on_layer=self._take)) as watching:
            yield watching

    def _take(self, layer: MoELayer) -> Callable[[LayerRecord], None]:
        self._response[layer.name], self._chosen[layer.name] = [], []
        return self._look  # pyright: ignore[reportAttributeAccessIssue]

    @torch.compiler.disable  # draws, and waits for the device
    @torch.no_grad()
    def _look(self, record: LayerRecord) -> None:
        layer = record.layer
        tap: Tap = getattr(layer.experts, TAP)
        token = sample_places(record, self.sample)
        if tap.watch is None or tap.watch.current is None or tap.watch.current.training or not len(token):
            return

        with torch.random.fork_rng([] if record.hidden.device.type == "cpu" else [record.hidden.device]):
            response = responses(tap.answers, record.hidden[token], layer.num_experts, response_of(self.rule))
        self._response[layer.name].append(response.cpu())
        self._chosen[layer.name].append(record.proposed.expert[token].long().cpu())

    def statistics(self) -> dict[str, ResponseStatistics]:
        """Of each layer that was seen: what brings its responses on one scale."""
        found = {}
        for name, parts in self._response.items():
            if parts:
                k = self._chosen[name][0].shape[1]
                found[name] = sample_statistics(torch.cat(parts), self.rule, k)
        return found

    @property
    def layers(self) -> list[str]:
        """The layers of the model, whether they were seen or not."""
        return list(self._response)

    def chosen(self) -> dict[str, Int[Tensor, "tokens k"]]:
        """Of each layer that was seen: what the router chose for the tokens that were looked at."""
        return {name: torch.cat(parts) for name, parts in self._chosen.items() if parts}

    def figures(self) -> dict[str, AgreementFigures]:
        """Of each layer that was seen."""
        return {
            name: agreement_figures(torch.cat(self._response[name]), chosen, self.rule)
            for name, chosen in self.chosen().items()
        }
