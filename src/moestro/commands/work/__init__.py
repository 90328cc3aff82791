"""What the commands do once their words are checked. These modules import torch and transformers."""
