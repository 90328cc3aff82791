"""moestro's own model family. Importing this module registers it with transformers' `AutoModelForCausalLM`.

Using any name of `moestro`, such as `moestro.AuxLosses`, imports this module too.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moestro.models.autocast_mm import AUTOCAST_MM as AUTOCAST_MM
from moestro.models.autocast_mm import register as register_autocast_mm
from moestro.models.configuration import MoestroConfig as MoestroConfig
from moestro.models.grouped_padded import PADDED_MM as PADDED_MM
from moestro.models.grouped_padded import register as register_padded_mm
from moestro.models.modeling import MoestroForCausalLM as MoestroForCausalLM
from moestro.models.modeling import MoestroModel as MoestroModel
from moestro.models.short_attention import SHORT_SDPA as SHORT_SDPA
from moestro.models.short_attention import register as register_short_sdpa

AutoConfig.register("moestro", MoestroConfig, exist_ok=True)
AutoModel.register(MoestroConfig, MoestroModel, exist_ok=True)
AutoModelForCausalLM.register(MoestroConfig, MoestroForCausalLM, exist_ok=True)
register_padded_mm()
register_autocast_mm()
register_short_sdpa()
