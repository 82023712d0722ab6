"""What an encoder is good for: nearest neighbours, linear probe, fine-tuning, and how they are evaluated.

May import report, models, data, augment, layers, losses and core, but neither engine nor deepspeed: a task
says what a step is, and the engine takes it.
"""
