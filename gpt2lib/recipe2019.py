"""What the 2019 replication (ConnorJL/GPT2) did otherwise than is usual today: each difference as a switch.

A switch is a few fields of `TrainConfig` as its 1.5B had them, and its sentence says where that stands in its code.
"""

from dataclasses import dataclass

from gpt2lib.config import ConfigError, nearest, size

_CALL = 10_000  # train_steps of one call of train()
_DAY = round(300_000 / 7)  # of the 1.5B's steps: it took a week, on TPUs that may be taken away after 24 hours
SWITCHES = {
    # optimizers.py and 1.5B.json: 2.5e-4 times max(RMS(parameter), 1e-3), where the paper's relative rate is 1e-2
    "small rate": {"learning_rate": 2.5e-4},
    # what 2.5e-4 would have meant with another optimizer: the size of a step itself, whatever the parameter's
    "absolute rate": {"optimizer_options": {"multiply_by_parameter_scale": False}},
    # main.py calls train() for so many steps at a time (the 1.5B for 100,000), and each call, like each pre-emption,
    # begins the data anew
    "restart": {"reading": {"restart_every": _CALL}},
    # inputs.py never looks at which host it runs on, 64 of a v3-512
    "same on hosts": {"reading": {"hosts": 64}},
    # inputs.py: shuffle(1000 * stitch) of files that are read in their order; stitch is 2 for long documents, 42 else
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
# Those of the 1.5B as it was trained: its rate was relative, "new init" came later, and its optimizer was not Adam.
ALL = tuple(name for name in SWITCHES if name not in ("absolute rate", "new init", "adam moments"))


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


@dataclass(frozen=True)
class Run:
    """What its configuration says of one of its runs (117M.json, 345M.json, PrettyBig.json, 1.5B.json, README)."""

    parameters: int
    hosts: int  # each of 8 cores, and each reads by itself
    batch_size: int  # of all hosts
    max_steps: int
    segment: int  # steps after which the data begins anew
    long_share: float  # of the windows, from documents of 512 tokens and more
    n_ctx: int = 1024


RUNS = {
    "117M": Run(size("117M").n_params, 1, 32, 500_000, _CALL, 0.0),
    "345M": Run(size("345M").n_params, 1, 8, 500_000, _CALL, 0.0),
    "PrettyBig": Run(size("PrettyBig").n_params, 32, 256, 604_800, _CALL, 0.7),
    "1.5B": Run(size("1.5B").n_params, 64, 512, 300_000, _DAY, 0.7),
}


def documents_read(run: Run, documents: int, document_tokens: float) -> dict:
    """How often a run read how many distinct documents, by its configuration.

    Each host begins at the same first file in each segment, and takes a window of each 42 documents that follow, or of
    each 2 of the long ones, so all of them read one prefix, `hosts` times a segment.

    Args:
        run: one of RUNS.
        documents: how many there were.
        document_tokens: their mean length.

    Returns: distinct documents (long and other ones), how many of them are long_documents (if there are so many), the
        share that they are of all, passes (how often each was read; a window of 1,024 tokens came of 42, or of 2),
        tokens trained on, tokens in the distinct documents, and epochs, the former over the latter; both also for each
        parameter.
    """
    windows = run.segment * run.batch_size // run.hosts  # that a host draws in a segment
    long, other = round(windows * run.long_share) * 2, round(windows * (1 - run.long_share)) * 42
    distinct = min(long + other, documents)
    trained, there = run.max_steps * run.batch_size * run.n_ctx, distinct * document_tokens
    return {
        "documents": distinct,
        "long_documents": min(long, documents),
        "share": distinct / documents,
        "passes": run.max_steps / run.segment * run.hosts * (long + other) / distinct,
        "tokens": trained,
        "distinct_tokens": there,
        "epochs": trained / there,
        "tokens_per_parameter": trained / run.parameters,
        "distinct_per_parameter": there / run.parameters,
    }
