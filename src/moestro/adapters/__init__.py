"""Attaching to models: records from their MoE layers, and auxiliary losses into their gradient."""

from moestro.adapters.aux_losses import AuxLosses as AuxLosses
from moestro.adapters.callback import RoutingCallback as RoutingCallback
from moestro.adapters.layers import moe_layers as moe_layers
from moestro.adapters.meter import RoutingMeter as RoutingMeter
from moestro.adapters.parameters import freeze as freeze
from moestro.adapters.parameters import parameter_groups as parameter_groups
from moestro.adapters.reroute import reroute as reroute
from moestro.adapters.watch import observe as observe
