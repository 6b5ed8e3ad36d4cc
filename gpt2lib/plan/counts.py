"""What follows from the configuration alone: parameters, operations, bytes."""

import math

from gpt2lib.config import ModelConfig, TrainConfig


def components(shape: ModelConfig) -> dict[str, int]:
    """Parameters of a model by what they belong to. Their sum is `shape.n_params`."""
    d, layers = shape.n_embd, shape.n_layer
    return {
        "wte": shape.n_vocab * d,
        "wpe": shape.n_ctx * d,
        "attention": layers * (4 * d * d + 4 * d),
        "mlp": layers * (8 * d * d + 5 * d),
        "norms": layers * 4 * d + 2 * d,
    }


def model_flops(shape: ModelConfig) -> int:
    """Operations a token that training needs as MFU counts them: 6 for each parameter but those of wpe.

    Two for the forward pass and four for the gradients (Kaplan et al. 2020, arXiv:2001.08361, section 2.1).
    """
    return 6 * (shape.n_params - shape.n_ctx * shape.n_embd)


def training_flops(shape: ModelConfig) -> int:
    """Operations a token of the train step on a TPU: `model_flops` and those of attention, whose kernel skips what is
    masked: two products of the lower triangle forward, five backward.
    """
    return model_flops(shape) + 7 * shape.n_ctx * shape.n_embd * shape.n_layer


def state_bytes(config: TrainConfig, shape: ModelConfig | None = None) -> dict[str, int]:
    """Bytes of the parameters, of the optimizer's slots and of the gradients of a run, on one device that has them all.

    Adam has two numbers for each parameter, in its type; Adafactor a row and a column of a matrix (Shazeer and Stern
    2018).
    """
    shape = shape or config.model_config()
    d, layers, low = shape.n_embd, shape.n_layer, config.dtype == "bfloat16"
    matrices = [(shape.n_vocab, d), (shape.n_ctx, d)]
    matrices += layers * [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]
    vectors = shape.n_params - sum(map(math.prod, matrices))
    norms = (4 * layers + 2) * d
    in_float32 = norms if low else shape.n_params
    parameters = 4 * in_float32 + 2 * (shape.n_params - in_float32)
    if config.optimizer == "adamw":
        slots = 2 * parameters
    else:
        slots = 4 * (sum(map(sum, matrices)) + vectors)
        slots += 4 * shape.n_params * bool(config.optimizer_options.get("beta1"))
        slots += 4 * (shape.n_params - norms) * (low and config.optimizer_options.get("rounding") == "master")
    gradients = 4 * shape.n_params - (config.dtype != "float32") * 2 * 12 * d * d * layers  # of the blocks' matrices
    return {"parameters": parameters, "slots": slots, "gradients": gradients}


def memory(
    config: TrainConfig,
    devices: int,
    shape: ModelConfig | None = None,
    kernel: bool = True,
    room: float = math.inf,
    thrifty: bool = False,
) -> dict[str, int]:
    """Bytes that a train step needs on each device, by what they hold; an estimate.

    state: parameters and slots. Of the others not all exist at a time: blocks (what they keep for their gradients) and
    logits (with their slope) are at their most when the gradients begin, gradients when they end; `total` takes the
    larger of the two. Without a `kernel` for attention its weights are kept as well. Where they do not fit a device's
    `room`, the compiler computes blocks again; where there is much, it is less thrifty. The constants were fitted to
    what it said: `total` is within 15% of that in `reports/plan`. `thrifty`: v6e, with its large fast memory.
    """
    shape = shape or config.model_config()
    d, layers, low = shape.n_embd, shape.n_layer, 4 if config.dtype == "float32" else 2
    tokens = config.batch_size // config.accumulate / devices * shape.n_ctx
    held, cut = state_bytes(config, shape), devices if config.sharded else 1
    state = (held["parameters"] + held["slots"]) / cut
    kept = 13 * low * d
    if not kernel:
        kept += shape.n_head * shape.n_ctx * (4 + 2 * low)
    blocks = tokens * (kept + low * d * layers if config.remat else kept * layers)
    logits = 8 * min(tokens, config.loss_chunk or tokens) * shape.n_vocab
    matrix = (2 if config.dtype == "bfloat16" else 4) * shape.n_vocab * d  # the tied one, of which there are several
    gradients, sums = low * shape.n_params, 4 * shape.n_params * (config.accumulate > 1)
    begin, end = (0, 1.5) if thrifty else (2.45, 3.95)

    def total(blocks):
        most = max(0.9 * (blocks + logits + begin * matrix), 1.02 * gradients + end * matrix)
        return state + most + sums + 12.7e6 * layers

    needed = total(blocks)
    if config.optimizer == "adamw" and config.dtype != "mixed_bfloat16" and needed < 0.69 * room < math.inf:
        needed += 0.615 * gradients
    if needed > 0.9 * room:
        needed = max(min(needed, 0.93 * room), total(tokens * 4.7 * low * d * layers))
    parts = dict(state=state, blocks=blocks, logits=logits, gradients=gradients + sums, total=needed)
    return {name: int(value) for name, value in parts.items()}
