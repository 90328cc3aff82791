"""The slow, obvious truth in plain loops.

Only tests and documentation use it. It shares no code with the package, works in any dtype (float64 for gradient
checks), and takes weights as plain tensors, so that it can stand beside our layers and transformers' alike.
"""

from moestro.reference.competition import Contest as Contest
from moestro.reference.competition import competing_layer as competing_layer
from moestro.reference.competition import distillation as distillation
from moestro.reference.competition import diversity as diversity
from moestro.reference.competition import respond as respond
from moestro.reference.layers import Choice as Choice
from moestro.reference.layers import ExpertWeights as ExpertWeights
from moestro.reference.layers import SubLayer as SubLayer
from moestro.reference.layers import choose as choose
from moestro.reference.layers import mixed as mixed
from moestro.reference.layers import moe_block as moe_block
from moestro.reference.layers import moe_layer as moe_layer
from moestro.reference.layers import rms_norm as rms_norm
from moestro.reference.layers import swiglu as swiglu
from moestro.reference.losses import load_balance as load_balance
from moestro.reference.losses import mean_scores as mean_scores
from moestro.reference.losses import overlap as overlap
from moestro.reference.losses import router_orthogonality as router_orthogonality
from moestro.reference.losses import router_z as router_z
from moestro.reference.losses import simbal as simbal
from moestro.reference.losses import sparse_scores as sparse_scores
from moestro.reference.losses import squared_projection_on_span as squared_projection_on_span
from moestro.reference.losses import variance as variance
