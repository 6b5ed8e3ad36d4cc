"""Which accelerator is there, quiet start-up, and compiling a function for the backend in use."""

import contextlib
import importlib.util
import os
import platform


def setup() -> str:
    """Choose and import the backend without its start-up messages, and `describe()` it, before keras is imported.

    KERAS_BACKEND decides, as everywhere in Keras; where it is not set and there is no TensorFlow, JAX.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    if importlib.util.find_spec(backend) is None:
        raise RuntimeError(f"the backend {backend} is not installed; run: pip install {backend}, or set KERAS_BACKEND")
    with _silent_stderr():
        import keras

        keras.random.uniform((1,), seed=0)  # the first operation starts the devices, with messages of its own
    return describe()


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
    """One sentence: the backend, its version, and the devices that it will use."""
    import keras

    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        devices = jax.devices()
        kind, version = devices[0].device_kind if devices[0].platform != "cpu" else "CPU", jax.__version__
    else:
        import tensorflow as tf

        devices = tf.config.list_physical_devices("GPU") or tf.config.list_physical_devices("CPU")
        kind, version = devices[0].device_type, tf.__version__
    where = f"{len(devices)} x {kind}" if kind != "CPU" else f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
    return f"Keras {keras.__version__} on {backend} {version}, {where}"


def compiled(model, function):
    """`function(*tensors)` compiled, reading the variables of `model` as they are at each call.

    Under JAX the variables travel as arguments: a traced closure would bake their values into the program.
    """
    import keras

    if keras.backend.backend() == "jax":
        import jax

        @jax.jit
        def run(values, *args):
            with keras.StatelessScope(state_mapping=list(zip(model.variables, values, strict=True))):
                return function(*args)

        return lambda *args: run([v.value for v in model.variables], *args)

    import tensorflow as tf

    return tf.function(function, autograph=False, jit_compile=False, reduce_retracing=True)
