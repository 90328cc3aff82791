"""Train several runs at once, each in a process of its own.

`choice` says how many fit the machine, `workers` is the parent's side and `process` that of a worker. A worker process
lives for many runs, because importing torch and transformers takes as long as a small run. Ctrl-C reaches the parent
alone, which passes it on. A worker ends at once when the parent is killed, so that the same command finds every run
unlocked.
"""
