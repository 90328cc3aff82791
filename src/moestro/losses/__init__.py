"""Auxiliary losses as pure functions of records.

A loss over tokens returns, for every sequence of the batch, a sum over its valid tokens and their number. How these
are weighted into one scalar, so that the gradient does not depend on how a batch is cut, is decided in one place:
`moestro.adapters.aux_losses`. Everything is computed in fp32, under autocast too.
"""

from moestro.losses.balance import balance_against as balance_against
from moestro.losses.balance import balance_per_sequence as balance_per_sequence
from moestro.losses.balance import load_share as load_share
from moestro.losses.balance import router_z as router_z
from moestro.losses.competition import DistillationForm as DistillationForm
from moestro.losses.competition import DiversityForm as DiversityForm
from moestro.losses.competition import distillation as distillation
from moestro.losses.competition import diversity as diversity
from moestro.losses.inner_products import gram as gram
from moestro.losses.outputs import OrthogonalityForm as OrthogonalityForm
from moestro.losses.outputs import orthogonality as orthogonality
from moestro.losses.per_sequence import PerSequence as PerSequence
from moestro.losses.per_sequence import sum_per_sequence as sum_per_sequence
from moestro.losses.scores import VarianceForm as VarianceForm
from moestro.losses.scores import learned_scores as learned_scores
from moestro.losses.scores import mean_scores as mean_scores
from moestro.losses.scores import slot_scores as slot_scores
from moestro.losses.scores import variance as variance
from moestro.losses.scores import variance_per_sequence as variance_per_sequence
from moestro.losses.weights import router_orthogonality as router_orthogonality
from moestro.losses.weights import simbal as simbal
