"""What the 2019 replication (ConnorJL/GPT2) did otherwise than is usual today: each difference as a switch.

A switch is a few fields of `TrainConfig` as its 1.5B had them, and its sentence says where that stands in its code.
"""

from gpt2lib.config import ConfigError, nearest

SWITCHES = {
    # optimizers.py and 1.5B.json: 2.5e-4 times max(RMS(parameter), 1e-3), where the paper's relative rate is 1e-2
    "small rate": {"learning_rate": 2.5e-4},
    # main.py calls train() for 10,000 steps at a time, and each call, like each pre-emption, begins the data anew
    "restart": {"reading": {"restart_every": 10_000}},
    # inputs.py never looks at which host it runs on, 64 of a v3-512
    "same on hosts": {"reading": {"hosts": 64}},
    # inputs.py: shuffle(1000 * stitch) of files that are read in their order; stitch is 2 for long documents
    "small buffer": {"reading": {"buffer": 2000}},
    # inputs.py: one window of 1,024 tokens from 42 documents in a row
    "stitch": {"reading": {"stitch": 42}},
    # openwebtext_longbiased: 70% of the windows from documents of 512 tokens and more
    "long documents": {"reading": {"long_share": 0.7, "long_tokens": 512}},
    # models/gpt2/gpt2.py drops entries of wte, also as the output matrix, and of wpe
    "matrix dropout": {"model": {"embd_pdrop": 0.1, "embd_pdrop_on": "matrices"}},
    # 1.5B.json
    "dropout": {"model": {"attn_pdrop": 0.1, "resid_pdrop": 0.1}},
    # before commit aac4b8e of July 2019, when its models were trained, and since
    "init": {"init": "2019"},
    "new init": {"init": "2019-newinit"},
    # optimizers.py: of all variables, biases and norms too
    "decay": {"weight_decay": 0.01},
    # there is none in its code
    "no clipping": {"clip_norm": None},
    # PrettyBig.json, whose optimizer is Adam
    "adam moments": {"optimizer_options": {"beta_2": 0.98, "epsilon": 1e-9}},
}
# Those of the 1.5B as it was trained; "new init" came later, and its optimizer was not Adam.
ALL = tuple(name for name in SWITCHES if name not in ("new init", "adam moments"))


def switched(config: dict, switches, **others) -> dict:
    """The fields of a `TrainConfig` with some switches on.

    Args:
        config: the fields before.
        switches: names in SWITCHES.
        others: name of a switch, with `_` for blanks -> the fields it sets instead, such as fewer hosts.

    Raises: ConfigError for a switch that there is not.
    """
    config = dict(config)
    others = {name.replace("_", " "): fields for name, fields in others.items()}
    for name in (*switches, *others):
        if name not in SWITCHES:
            raise ConfigError(f"there is no switch `{name}`; {nearest(name, SWITCHES)}")
    for name in switches:
        for key, value in others.get(name, SWITCHES[name]).items():
            config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    return config
