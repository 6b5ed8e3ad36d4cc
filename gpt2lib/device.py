"""Which accelerator is there, quiet start-up, and compiling a function for the backend in use."""

import contextlib
import functools
import glob
import importlib.util
import json
import os
import platform
import re

from gpt2lib.config import ConfigError


def setup(distributed: bool = False) -> str:
    """Choose and import the backend without its start-up messages, and `describe()` it, before keras is imported.

    KERAS_BACKEND decides, as everywhere in Keras; where it is not set and there is no TensorFlow, JAX. `distributed`:
    this is one of several hosts (JAX): they find each other by Keras' KERAS_DISTRIBUTION_* variables, or by what a TPU
    pod, Slurm or Kubernetes tells JAX.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    if importlib.util.find_spec(backend) is None:
        raise ConfigError(f"the backend {backend} is not installed; run: pip install {backend}, or set KERAS_BACKEND")
    with _silent_stderr():
        import keras

        if distributed:
            if keras.backend.backend() != "jax":
                raise ConfigError("several hosts need the JAX backend; set KERAS_BACKEND=jax")
            keras.distribution.initialize()
        try:
            keras.random.uniform((1,), seed=0)  # the first operation starts the devices, with messages of its own
        except RuntimeError as error:
            raise _in_use(error) from error
    return describe()


def _in_use(error: RuntimeError) -> RuntimeError:
    """The sentence for a TPU that another process holds; any other error as it is."""
    text = str(error)
    if "in use" not in text and "libtpu_lockfile" not in text:
        return error
    holder = re.search(r"pid (\d+)", text)
    who = f"process {holder[1]}" if holder else "another process"
    return ConfigError(f"the TPU is held by {who}: shut that notebook's session down, then restart this one")


@contextlib.contextmanager
def _silent_stderr():
    """Close file descriptor 2 to what libraries write there from C++; Python's own errors still rise."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def describe() -> str:
    """One sentence: the backend, its version, its devices; and what to change where there are better ones.

    A TPU or a GPU that the backend does not see, and a machine that is short of memory, are named with what to do.
    """
    import keras

    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        devices = jax.devices()
        platform_, kind, version = devices[0].platform, devices[0].device_kind, jax.__version__
    else:
        import tensorflow as tf

        devices = tf.config.list_physical_devices("GPU") or tf.config.list_physical_devices("CPU")
        platform_, kind, version = devices[0].device_type.lower(), devices[0].device_type, tf.__version__
    found = f"{len(devices)} x {kind}" if platform_ != "cpu" else f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
    advice = _advice(backend, version, platform_)
    return f"Keras {keras.__version__} on {backend} {version}, {found}{''.join(f'; {a}' for a in advice)}"


def _advice(backend: str, version: str, used: str) -> list[str]:
    """What to change on this machine, where the backend uses devices of the kind `used`: cpu | gpu | tpu."""
    found = []
    if _exists("/dev/accel*") and used != "tpu":
        if backend != "jax":
            found.append(f"a TPU is here that {backend} cannot use: set KERAS_BACKEND=jax before keras is imported")
        else:
            found.append(f"a TPU is here that jax {version} does not see: pip install 'jax[tpu]', then restart")
    elif _exists("/dev/nvidia[0-9]*") and used == "cpu":
        extra = "'tensorflow[and-cuda]'" if backend == "tensorflow" else "'jax[cuda12]'"
        found.append(
            f"a GPU is here that {backend} {version} does not see: pip install {extra}, then restart the session"
        )
    free = free_memory()
    if free is not None and free < 2e9:
        found.append(f"only {free / 1e9:.1f} GB of memory are free: close other notebooks or take a larger machine")
    return found


def _exists(pattern: str) -> bool:
    return bool(glob.glob(pattern))


def free_memory() -> int | None:
    """Bytes of memory that may still be taken; None where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def is_cpu() -> bool:
    """Whether the backend computes on CPUs."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        return jax.default_backend() == "cpu"
    import tensorflow as tf

    return not tf.config.list_logical_devices("GPU")


def is_tpu() -> bool:
    """Whether the backend computes on TPUs."""
    import keras

    if keras.backend.backend() != "jax":
        return False
    import jax

    return jax.default_backend() == "tpu"


def functional(model, function):
    """`f(values of model.variables, *tensors)` of a `function(*tensors)` that reads those variables (JAX).

    A traced closure would bake their values into the program.
    """
    import keras

    def run(values, *args):
        with keras.StatelessScope(state_mapping=list(zip(model.variables, values, strict=True))):
            return function(*args)

    return run


def compiled(model, function, xla: bool = False, state: int | None = None):
    """`function(*tensors)` compiled, reading the variables of `model` as they are at each call.

    Args:
        model: None where the function reads none.
        xla: by XLA in TensorFlow as well, which is better at loops; its own operations are better at large products.
        state: number of an argument that is a structure of tensors and that `function` gives back, changed, as its last
            result: it is changed in its place, and what was given is gone.
    """
    import keras

    if keras.backend.backend() == "jax":
        import jax

        if model is None:
            return jax.jit(function, donate_argnums=() if state is None else state)
        run = jax.jit(functional(model, function), donate_argnums=() if state is None else state + 1)
        return lambda *args: run([v.value for v in model.variables], *args)

    import tensorflow as tf

    def program(function):  # a partial, else TensorFlow takes two of one name for one that is traced again
        function = functools.partial(function)
        return tf.function(function, autograph=False, jit_compile=xla, reduce_retracing=not xla)

    return program(function) if state is None else _in_place(function, state, program)


def _in_place(function, n, program):
    """As `compiled`: only what lies in variables is changed in its place by TensorFlow's XLA."""
    import tensorflow as tf

    def changing(variables, *args):
        values = tf.nest.pack_sequence_as(args[n], [v.value() for v in variables])
        *results, new = function(*args[:n], values, *args[n + 1 :])
        for v, value in zip(variables, tf.nest.flatten(new), strict=True):
            v.assign(value)
        return results

    run = program(changing)

    def call(*args):
        variables = [x if isinstance(x, tf.Variable) else tf.Variable(x) for x in tf.nest.flatten(args[n])]
        args = (*args[:n], tf.nest.map_structure(lambda _: 0, args[n]), *args[n + 1 :])
        return (*run(variables, *args), tf.nest.pack_sequence_as(args[n], variables))

    return call


# --- the devices of a run ---------------------------------------------------------------------------------------------


def places(n: int | None = None, sharded: bool = False):
    """Where a run trains: with JAX the list of its devices, of all hosts; with TensorFlow a `tf.distribute` strategy.

    `n` takes the first so many. ConfigError if there are fewer, or for what the backend cannot do.
    """
    import keras

    if keras.backend.backend() == "jax":
        import jax

        found = jax.devices()
        if n is not None and jax.process_count() > 1:
            raise ConfigError("TrainConfig.devices is for one host; several use all of theirs")
        return _first(found, n)
    import tensorflow as tf

    if sharded:
        raise ConfigError("TrainConfig.sharded needs the JAX backend; set KERAS_BACKEND=jax")
    found = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    chosen = _first(found, n)
    return _mirrored(tuple(d.name for d in chosen)) if len(chosen) > 1 else tf.distribute.get_strategy()


@functools.cache
def _mirrored(devices):
    """One for all runs of a process: the reductions of two strategies would be taken for each other's."""
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(list(devices))


def _first(found, n):
    if n is not None and n > len(found):
        raise ConfigError(f"TrainConfig.devices is {n}, but there are {len(found)}")
    return found[:n]


def on_host():
    """A scope whose JAX arrays are made in the host's memory: a model may be larger than one device."""
    import jax

    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS names the accelerator only
        return contextlib.nullcontext()


def hosts() -> tuple[int, int]:
    """The number of this host, and how many take part in a run."""
    import keras

    if keras.backend.backend() != "jax":
        return 0, 1
    import jax

    return jax.process_index(), jax.process_count()


def from_first_host(array):
    """The array that the first host has; all hosts give one of the same shape."""
    if hosts()[1] == 1:
        return array
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(array)


def json_from_first_host(value):
    """The same for a value that JSON can hold."""
    if hosts()[1] == 1:
        return value
    import numpy as np

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(from_first_host(np.array(len(text), np.int32)))
    return json.loads(bytes(np.asarray(from_first_host(np.resize(text, size)))))


def any_host(flag: bool) -> bool:
    """Whether the flag is up on any host."""
    if hosts()[1] == 1:
        return flag
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(flag)).any())
