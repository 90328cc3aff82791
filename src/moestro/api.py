"""All public names of the package. `moestro` imports this module when the first of them is used."""

from moestro.adapters import AuxLosses as AuxLosses
from moestro.adapters import RoutingCallback as RoutingCallback
from moestro.adapters import RoutingMeter as RoutingMeter
from moestro.adapters import freeze as freeze
from moestro.adapters import observe as observe
from moestro.adapters import parameter_groups as parameter_groups
from moestro.adapters import reroute as reroute
from moestro.architecture.router_rule import RouterRule as RouterRule
from moestro.architecture.sub_layers import Dense as Dense
from moestro.architecture.sub_layers import MoE as MoE
from moestro.competition.settings import Compete as Compete
from moestro.errors import Misuse as Misuse
from moestro.errors import TrainingFailed as TrainingFailed
from moestro.models import MoestroConfig as MoestroConfig
from moestro.models import MoestroForCausalLM as MoestroForCausalLM
from moestro.models import MoestroModel as MoestroModel
from moestro.routing import Batch as Batch
from moestro.routing import Competition as Competition
from moestro.routing import LayerRecord as LayerRecord
from moestro.routing import MoELayer as MoELayer
from moestro.routing import Proposal as Proposal
from moestro.routing import Routing as Routing
