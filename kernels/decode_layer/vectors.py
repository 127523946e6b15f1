"""What the programs of `layer.py` do with one token's vectors: wait for them, fetch them, normalise them.

A vector that is multiplied lies in shared memory from 0 on, in whole chunks, each block of features a row as the tensor
cores read it; one that is added and normalised lies in registers as `normalise_row` has it. The tensor cores read behind
the back of whoever wrote, so a fence follows each writing.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from triode.kernels.decode_layer.plan import BLOCK_FEATURES, CHUNK_FEATURES

# Triton 3.7 calls it as given first; before, it had another name.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
CHUNK = gl.constexpr(CHUNK_FEATURES)
BLOCK = gl.constexpr(BLOCK_FEATURES)
PART = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
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
    CHUNKS: gl.constexpr = x.shape[0]
    for chunk in gl.static_range(CHUNKS):
        x.index(chunk).store(gl.zeros([CHUNK // BLOCK, BLOCK], x.dtype, PART))


@gluon.jit
def as_blocks(x, FIRST: gl.constexpr, SIZE: gl.constexpr):
    """A part of the vector, each block of features a row."""
    return x.index(FIRST // CHUNK)._reinterpret(x.dtype, [SIZE // BLOCK, BLOCK], x.layout)


@gluon.jit
def ask_for(x, ptr, FIRST: gl.constexpr, SIZE: gl.constexpr, FEATURES: gl.constexpr):
    """Begin to copy a part of a vector."""
    block = gl.arange(0, SIZE // BLOCK, gl.SliceLayout(1, PART))
    at = FIRST + block[:, None] * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, PART))[None, :]
    async_copy.async_copy_global_to_shared(as_blocks(x, FIRST, SIZE), ptr + at, mask=at < FEATURES)


@gluon.jit
def fetch(x, ptr, FEATURES: gl.constexpr):
    """Copy a vector to shared memory: a part for each power of two that the number of its chunks is the sum of."""
    CHUNKS: gl.constexpr = (FEATURES + CHUNK - 1) // CHUNK
    for power in gl.static_range(6):
        if CHUNKS // 2**power % 2 == 1:
            ask_for(x, ptr, CHUNKS // 2 ** (power + 1) * 2 ** (power + 1) * CHUNK, CHUNK * 2**power, FEATURES)
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()
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
    as_blocks(x, 0, PADDED).store((normal * weight).to(x.dtype).reshape([PADDED // BLOCK, BLOCK]))
    fence_async_shared()
    barrier()


@gluon.jit
def halves(acc, scratch, HALF: gl.constexpr):
    """The first rows of sums, and as many behind them, for the same threads."""
    sums = scratch._reinterpret(gl.float32, [acc.shape[0], 8], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    sums.store(acc)
    return sums.slice(0, HALF).load(ROW), sums.slice(HALF, HALF).load(ROW)
