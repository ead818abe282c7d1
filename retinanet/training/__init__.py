"""Training a detector.

In reading order: `engine` is the training loop, `finite` checks its losses and gradients, `accounting` counts and
reports steps; `recipes` holds optimizers and schedules, `settings` the flags of train.py; `run` is a run that can be
saved and resumed, with `resume` checking what it resumes from; `log` writes the run's log, `files` writes files safely;
`checkpoint` reads and writes models, `weights` starts a model from them, and `foreign_weights` converts those of
torchvision and of the original.
"""
