"""How fast this machine reads memory, for the doctor and for benchmarks."""


def measure_reading(num_threads: int) -> float:
    """Bytes a second by the compiled step's threads.

    Raises:
        NativeUnavailable: there is no compiled step here.
    """
    # Imported here, because torch takes seconds.
    from triode.kernels.native.library import load_library
    from triode.models.bandwidth import read_bandwidth

    return read_bandwidth(load_library(lambda _: None), num_threads)
