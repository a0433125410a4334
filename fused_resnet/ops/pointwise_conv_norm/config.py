"""Where the raw output of a 1×1 convolution is not kept.

That takes two more products of [M, K] and [K, K] for K inputs and M pixels, and K·K·N in between, and saves passes
over [M, N]: it pays where K is small beside what the machine computes while it reads a byte.
"""

# The most inputs of such a convolution, by engine; others have not been measured and keep every output.
FAST = {"cpu": 64}
# The most where memory counts for more than time: from here on K·K·N outgrows the passes themselves.
LEAN = 256


def pays(engine: str, memory: str, inputs: int, outputs: int) -> bool:
    """Whether to do without the output of a 1×1 convolution with these channels."""
    return outputs >= 2 * inputs and inputs <= (LEAN if memory == "lean" else FAST.get(engine, 0))
