"""Competition: experts answer some tokens all together, the strongest win them, and the router learns who that was.

Pure functions of responses, and the settings that choose among them; `moestro.adapters.compete` lets the experts of a
model answer.

Paper: Nguyen et al. 2025, arXiv:2505.13380 (CompeteSMoE), and its first version, Pham et al. 2024, arXiv:2402.02526.
"""

from moestro.competition.inference import by_competition as by_competition
from moestro.competition.inference import sample_statistics as sample_statistics
from moestro.competition.presets import PRESETS as PRESETS
from moestro.competition.responses import RESPONSES as RESPONSES
from moestro.competition.responses import Response as Response
from moestro.competition.responses import responses as responses
from moestro.competition.scaling import ResponseStatistics as ResponseStatistics
from moestro.competition.scaling import scaled as scaled
from moestro.competition.schedule import competes_in_step as competes_in_step
from moestro.competition.schedule import competing_tokens as competing_tokens
from moestro.competition.settings import Compete as Compete
from moestro.competition.winners import preferences as preferences
from moestro.competition.winners import shares as shares
from moestro.competition.winners import strongest as strongest
from moestro.competition.winners import to_winners as to_winners
from moestro.competition.winners import used_slots as used_slots
