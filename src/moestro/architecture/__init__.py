"""What a model is made of, and how much of it there is: plain values, checked without torch and transformers.

Recipes are planned and refused by these records alone. What turns them into a model belongs in `moestro.models`.
"""
