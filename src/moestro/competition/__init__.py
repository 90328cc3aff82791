"""Competition: experts answer some tokens all together, the strongest win them, and the router learns who that was.

Pure functions of responses, and the settings that choose among them; `moestro.adapters.compete` lets the experts of a
model answer.

Paper: Nguyen et al. 2025, arXiv:2505.13380 (CompeteSMoE), and its first version, Pham et al. 2024, arXiv:2402.02526.
"""
