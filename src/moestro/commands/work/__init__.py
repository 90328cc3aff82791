"""The work of the commands, after their flags are checked. These modules import torch and transformers."""
