"""Training a detector.

In reading order: `engine` is the loop, `finite` checks its losses and gradients, `accounting` counts and reports them;
`recipes` holds optimizers and schedules, `settings` what the flags of train.py mean; `run` is a run that can be saved
and resumed, `log` what it writes down, `checkpoint` the files that hold a model; `foreign_weights` reads the files of
torchvision and of the original.
"""
