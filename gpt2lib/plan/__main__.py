"""`python -m gpt2lib.plan SIZE`: does it fit, and how fast would it be?"""

import argparse
import sys

from gpt2lib.config import ConfigError
from gpt2lib.plan import PlanError, libtpu, plan


def main(arguments=None) -> int:
    """Print a plan; 0: it fits, 1: it does not, 2: there is no plan."""
    parser = argparse.ArgumentParser(prog="python -m gpt2lib.plan", description=__doc__)
    parser.add_argument("size", help="of the model, such as 117M or 1.5B")
    parser.add_argument("--topology", default="v3-8", help="a TPU slice, such as v3-8, v5e-1, v6e-8")
    parser.add_argument("--optimizer", default="adafactor", help="adafactor or adamw")
    parser.add_argument("--dtype", default="mixed_bfloat16", help="float32, mixed_bfloat16 or bfloat16")
    parser.add_argument("--batch-per-device", type=int, default=1, help="sequences that a device computes at once")
    parser.add_argument("--accumulate", type=int, default=1, help="how often it does so in a step")
    parser.add_argument("--loss-chunk", type=int, help="tokens whose logits are held at once")
    parser.add_argument("--remat", action="store_true", help="compute blocks again for their gradients")
    parser.add_argument("--sharded", action="store_true", help="cut parameters and optimizer state over the devices")
    parser.add_argument("--tokens", type=float, default=1e9, help="how many tokens to train on, for the hours")
    parser.add_argument("--price", type=float, help="of one chip for an hour, for the cost")
    options = vars(parser.parse_args(arguments))
    tokens, price = options.pop("tokens"), options.pop("price")
    if libtpu():
        what = f"{options['size']} for {options['topology']}"
        print(f"compiling {what}: a minute for 117M, several for 1.5B", file=sys.stderr)
    try:
        made = plan(**options)
    except (ConfigError, PlanError) as error:
        print(error, file=sys.stderr)
        return 2
    print(made.sentence())
    if not made.fits:
        return 1
    print(
        f"{made.seconds:.4f} s a step of {made.tokens:,} tokens, {made.tokens / made.seconds:,.0f} tokens/s at best, "
        f"MFU {made.mfu(made.seconds):.0%}; {made.hours(tokens):,.1f} hours for {tokens:.3g} tokens"
        + (f", which cost {made.cost(tokens, price):,.0f}" if price else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
