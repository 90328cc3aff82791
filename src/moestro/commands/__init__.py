"""One file per command of the command line: its flags, its help, and every check that the flags alone allow.

Nothing here imports torch, transformers, numpy or scipy at its top. Once the flags are right, a command imports what
it runs from `moestro.commands.work`.
"""
