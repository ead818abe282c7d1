"""Training a detector.

`engine` is the loop, `recipes` its optimizers and schedules, `run` resumes and logs, `checkpoint` saves and loads,
`foreign_weights` reads the weights of torchvision and the whole pickled models of the original.
"""
