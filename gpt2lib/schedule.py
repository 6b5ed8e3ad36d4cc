"""Learning rates as functions of the step, counted from 0."""

import math

import keras
from keras import ops


@keras.saving.register_keras_serializable("gpt2lib")
class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up from 0, cosine down to 0: the schedule of the 2019 replication (ConnorJL/GPT2, `optimizers.py`).

    `rate(s) = lr * s / W` for s < W; `lr * (1 + cos(pi * (s - W) / (T - W))) / 2` for W <= s <= T; 0 after, with
    W = `warmup_steps`, T = `max_steps`. The very first step therefore has rate 0 when there is a warm-up.
    """

    def __init__(self, learning_rate, warmup_steps, max_steps):
        if not 0 <= warmup_steps < max_steps:
            raise ValueError(f"warmup_steps must lie in [0, max_steps), got {warmup_steps} of {max_steps}")
        self.learning_rate, self.warmup_steps, self.max_steps = learning_rate, warmup_steps, max_steps

    def __call__(self, step):
        step = ops.cast(step, "float32")
        warmup = step / max(self.warmup_steps, 1)
        progress = (step - self.warmup_steps) / (self.max_steps - self.warmup_steps)
        cosine = 0.5 * (1 + ops.cos(math.pi * ops.clip(progress, 0.0, 1.0)))
        return self.learning_rate * ops.where(step < self.warmup_steps, warmup, cosine)

    def get_config(self):
        return {"learning_rate": self.learning_rate, "warmup_steps": self.warmup_steps, "max_steps": self.max_steps}


@keras.saving.register_keras_serializable("gpt2lib")
class Warmup(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up from 0, constant after: `rate(s) = lr * min(s / W, 1)`, W = `warmup_steps`; W = 0: always lr."""

    def __init__(self, learning_rate, warmup_steps=0):
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
        self.learning_rate, self.warmup_steps = learning_rate, warmup_steps

    def __call__(self, step):
        share = ops.cast(step, "float32") / self.warmup_steps if self.warmup_steps else 1.0
        return self.learning_rate * ops.minimum(ops.convert_to_tensor(share, "float32"), 1.0)

    def get_config(self):
        return {"learning_rate": self.learning_rate, "warmup_steps": self.warmup_steps}
