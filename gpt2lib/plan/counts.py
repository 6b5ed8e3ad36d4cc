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


def state_bytes(config: TrainConfig) -> dict[str, int]:
    """Bytes of the parameters, of the optimizer's slots and of the gradients of a run, on one device that has them all.

    Adam has two numbers for each parameter, Adafactor a row and a column of a matrix (Shazeer and Stern 2018).
    """
    shape = config.model_config()
    d, layers, low = shape.n_embd, shape.n_layer, config.dtype == "bfloat16"
    matrices = [(shape.n_vocab, d), (shape.n_ctx, d)]
    matrices += layers * [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]
    vectors = shape.n_params - sum(map(math.prod, matrices))
    norms = (4 * layers + 2) * d
    in_float32 = norms if low else shape.n_params
    parameters = 4 * in_float32 + 2 * (shape.n_params - in_float32)
    if config.optimizer == "adamw":
        slots = 8 * shape.n_params
    else:
        slots = 4 * (sum(map(sum, matrices)) + vectors)
        slots += 4 * shape.n_params * bool(config.optimizer_options.get("beta1"))
        slots += 4 * (shape.n_params - norms) * (low and config.optimizer_options.get("rounding") == "master")
    return {"parameters": parameters, "slots": slots, "gradients": 4 * shape.n_params}
