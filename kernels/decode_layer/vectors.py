"""What the programs of `layer.py` do with one token's vectors: wait for them, fetch them, normalise them.

A vector that is multiplied lies in shared memory from 0 on, in whole chunks; one that is added and normalised lies in
registers as `normalise_row` has it.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from triode.kernels.decode_layer.plan import CHUNK_FEATURES

# Triton 3.7 calls it as given first; before, it had another name.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
CHUNK = gl.constexpr(CHUNK_FEATURES)
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
LINE = gl.constexpr(gl.BlockedLayout([8], [32], [4], [0]))
ROW = gl.constexpr(gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0]))

ARRIVE = gl.constexpr("""{
.reg .pred first; .reg .b32 thread;
mov.b32 thread, %tid.x;
setp.eq.s32 first, thread, 0;
@first red.release.gpu.global.add.u32 [$1], 1;
mov.b32 $0, thread;
}""")
# Counters only ever grow, and wrap: what is compared is the difference.
WAIT = gl.constexpr("""{
.reg .pred short; .reg .b32 count, missing;
ASK_${:uid}:
ld.acquire.gpu.global.b32 count, [$1];
sub.s32 missing, $2, count;
setp.gt.s32 short, missing, 0;
@short bra ASK_${:uid};
mov.b32 $0, count;
}""")


@gluon.jit
def arrive(counter_ptr):
    """Tell all programs that this one has written its part."""
    barrier()
    gl.inline_asm_elementwise(ARRIVE, "=r,l", [counter_ptr], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_for_all(counter_ptr, target):
    """Wait until so many have arrived. What they wrote is visible then."""
    gl.inline_asm_elementwise(WAIT, "=r,l,r", [counter_ptr, target], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def clear(x):
    """Zeros: what lies behind a vector's end is multiplied with zeros, and must not be NaN."""
    chunks = x._reinterpret(x.dtype, [x.shape[0] // CHUNK, CHUNK], FLAT)
    for chunk in gl.static_range(x.shape[0] // CHUNK):
        chunks.index(chunk).store(gl.zeros([CHUNK], x.dtype, LINE))


@gluon.jit
def ask_for(x, ptr, FIRST: gl.constexpr, SIZE: gl.constexpr, FEATURES: gl.constexpr):
    """Begin to copy a part of a vector."""
    at = FIRST + gl.arange(0, SIZE, LINE)
    part = x._reinterpret(x.dtype, [x.shape[0] // CHUNK, CHUNK], FLAT).index(FIRST // CHUNK)
    async_copy.async_copy_global_to_shared(part._reinterpret(x.dtype, [SIZE], FLAT), ptr + at, mask=at < FEATURES)


@gluon.jit
def fetch(x, ptr, FEATURES: gl.constexpr):
    """Copy a vector to shared memory: a part for each power of two that the number of its chunks is the sum of."""
    CHUNKS: gl.constexpr = (FEATURES + CHUNK - 1) // CHUNK
    for power in gl.static_range(6):
        if CHUNKS // 2**power % 2 == 1:
            ask_for(x, ptr, CHUNKS // 2 ** (power + 1) * 2 ** (power + 1) * CHUNK, CHUNK * 2**power, FEATURES)
    async_copy.commit_group()
    async_copy.wait_group(0)
    barrier()


@gluon.jit
def load_line(ptr, SIZE: gl.constexpr, PADDED: gl.constexpr):
    """A vector of the hidden size; another program may have just written it."""
    at = gl.arange(0, PADDED, LINE)
    return gl.load(ptr + at, mask=at < SIZE, other=0.0, cache_modifier=".cg").to(gl.float32)


@gluon.jit
def store_line(ptr, line, SIZE: gl.constexpr, PADDED: gl.constexpr):
    """Write such a vector."""
    at = gl.arange(0, PADDED, LINE)
    gl.store(ptr + at, line.to(ptr.dtype.element_ty), mask=at < SIZE)


@gluon.jit
def add(x, y, DTYPE: gl.constexpr):
    """The sum of two vectors, rounded as the residual is."""
    return (x + y).to(DTYPE).to(gl.float32)


@gluon.jit
def normalise(x, line, weight, eps, SIZE: gl.constexpr, PADDED: gl.constexpr):
    """Write the norm of a vector to shared memory, with the sums and roundings of `normalise_row`."""
    inverse_rms = gl.rsqrt(gl.sum(line * line, 0) / SIZE + eps)
    normal = (line * inverse_rms).to(x.dtype).to(gl.float32)
    x._reinterpret(x.dtype, [PADDED], FLAT).store((normal * weight).to(x.dtype))


@gluon.jit
def halves(acc, scratch):
    """The upper and the lower rows of sums, for the same threads."""
    HALF: gl.constexpr = acc.shape[0] // 2
    sums = scratch._reinterpret(gl.float32, [2 * HALF, 8], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    sums.store(acc)
    return sums.slice(0, HALF).load(ROW), sums.slice(HALF, HALF).load(ROW)
