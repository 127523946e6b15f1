// Vectors as wide as the instruction set's registers, on the compiler's own vector types.
//
// A `Vec` holds LANES floats, or LANES words of 32 bits that are two bfloat16 numbers or four bytes each. Only what must
// be one instruction (fused multiply-add, dot products, conversions, reductions) is spelt as an intrinsic. Code here never
// leaves the order of additions to the compiler: it is built without contraction and without fast-math.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include "arm.h"
#endif

namespace triode {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#elif defined(__ARM_FEATURE_SVE)
constexpr int LANES = __ARM_FEATURE_SVE_BITS / 32;
#else
constexpr int LANES = 4;
#endif

// How many vectors the processor holds at a time.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4)));
typedef uint32_t WordVec __attribute__((vector_size(LANES * 4)));
typedef uint16_t ShortVec __attribute__((vector_size(LANES * 2)));

// For what takes registers by reference: as calls they would go through memory.
#define ALWAYS_INLINE inline __attribute__((always_inline))

struct bf16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }

inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

// To nearest, ties to even; NaN stays NaN.
inline void narrow(float x, bf16& out) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out.bits = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : uint16_t(rounded);
}

inline void narrow(float x, float& out) { out = x; }

inline Vec load(const void* from) {
    Vec v;
    memcpy(&v, from, sizeof v);
    return v;
}

inline void store(void* to, Vec v) { memcpy(to, &v, sizeof v); }

// The word at `from` in every lane, its bits untouched.
inline Vec broadcast(const void* from) {
    float x;
    memcpy(&x, from, 4);
#if defined(__AVX512F__)
    return (Vec)_mm512_set1_ps(x);
#elif defined(__AVX2__)
    return (Vec)_mm256_set1_ps(x);
#elif defined(__aarch64__)
    return (Vec)arm_splat(x);
#else
    return Vec{x, x, x, x};
#endif
}

inline Vec splat(float x) { return broadcast(&x); }

inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Vec)arm_multiply_add((ArmFloats)a, (ArmFloats)b, (ArmFloats)c);
#else
    return a * b + c;
#endif
}

// acc + w x, where each word is one number.
inline Vec accumulate(float, Vec acc, Vec w, Vec x) { return multiply_add(w, x, acc); }

// acc + w.low x.low + w.high x.high, where each word is two bfloat16 numbers.
inline Vec accumulate(bf16, Vec acc, Vec w, Vec x) {
#if defined(__AVX512BF16__)
    return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return (Vec)arm_dot_halves((ArmFloats)acc, (ArmHalves)w, (ArmHalves)x);
#else
    WordVec high = WordVec{} + 0xffff0000u;
    Vec low = multiply_add((Vec)((WordVec)w << 16), (Vec)((WordVec)x << 16), acc);
    return multiply_add((Vec)((WordVec)w & high), (Vec)((WordVec)x & high), low);
#endif
}

// What `dot_bytes` takes from bytes of so many bits: where only signed ones can be multiplied, half of 256.
#if defined(__aarch64__) && !defined(__ARM_FEATURE_MATMUL_INT8)
template <int BITS>
constexpr int BYTE_OFFSET = BITS == 8 ? 128 : 0;
#else
template <int BITS>
constexpr int BYTE_OFFSET = 0;
#endif

// acc + the sums of four products, in integers: each word of `w` is four bytes from 0 to 2^BITS - 1, less BYTE_OFFSET, of `x`
// four signed ones.
template <int BITS>
inline IntVec dot_bytes(IntVec acc, WordVec w, WordVec x) {
#if defined(__AVX512VNNI__)
    return (IntVec)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVXVNNI__)
    return (IntVec)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, (__m256i)x);
#elif defined(__AVX512BW__)
    // Pairs of products of 4 bits fit in 16 bits; those of 8 bits do not, and are summed as words of 16 bits.
    if (BITS == 4)
        return acc + (IntVec)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)w, (__m512i)x), _mm512_set1_epi16(1));
    __m512i even = _mm512_srai_epi16(_mm512_slli_epi16((__m512i)x, 8), 8), odd = _mm512_srai_epi16((__m512i)x, 8);
    return acc + (IntVec)_mm512_madd_epi16((__m512i)(w & 0x00ff00ffu), even) +
           (IntVec)_mm512_madd_epi16(_mm512_srli_epi16((__m512i)w, 8), odd);
#elif defined(__AVX2__)
    if (BITS == 4)
        return acc + (IntVec)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)w, (__m256i)x), _mm256_set1_epi16(1));
    __m256i even = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)x, 8), 8), odd = _mm256_srai_epi16((__m256i)x, 8);
    return acc + (IntVec)_mm256_madd_epi16((__m256i)(w & 0x00ff00ffu), even) +
           (IntVec)_mm256_madd_epi16(_mm256_srli_epi16((__m256i)w, 8), odd);
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    return (IntVec)arm_dot_mixed((ArmWords)acc, (ArmUnsigned)w, (ArmSigned)x);
#elif defined(__aarch64__)
    // Flipping the highest bit takes 128 away.
    const WordVec less = BITS == 8 ? w ^ 0x80808080u : w;
    return (IntVec)arm_dot_signed((ArmWords)acc, (ArmSigned)less, (ArmSigned)x);
#else
    for (int byte = 0; byte < 4; byte++)
        acc += (IntVec)(w >> (8 * byte) & 0xff) * ((IntVec)(x << (24 - 8 * byte)) >> 24);
    return acc;
#endif
}

inline ShortVec load_shorts(const uint16_t* from) {
    ShortVec v;
    memcpy(&v, from, sizeof v);
    return v;
}

inline Vec widen_bf16(ShortVec v) { return (Vec)(__builtin_convertvector(v, WordVec) << 16); }

// The same as of single numbers.
inline void narrow(Vec v, bf16* to) {
    const WordVec bits = (WordVec)v, rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const WordVec kept = (bits & 0x7fffffffu) > 0x7f800000u ? WordVec{} + 0x7fc0u : rounded;
    const ShortVec shorts = __builtin_convertvector(kept, ShortVec);
    memcpy(to, &shorts, sizeof shorts);
}

inline void narrow(Vec v, float* to) { store(to, v); }

// Two vectors of numbers that are exact as bfloat16, as one of words.
inline Vec joined(Vec low, Vec high) { return (Vec)((WordVec)low >> 16 | ((WordVec)high & 0xffff0000u)); }

// IEEE half precision.
inline Vec widen_half(ShortVec v) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps((__m256i)v);
#elif defined(__F16C__)
    return (Vec)_mm256_cvtph_ps((__m128i)v);
#else
    const WordVec half = __builtin_convertvector(v, WordVec), sign = (half & 0x8000u) << 16;
    // Exponents differ by 112, which a multiplication adds even to subnormal numbers; what had the largest stays infinite.
    const Vec magnitude = (Vec)((half & 0x7fffu) << 13) * splat(5.192296858534828e+33f);
    const WordVec special = (half & 0x7c00u) == 0x7c00u ? WordVec{} + 0x7f800000u : WordVec{};
    return (Vec)((WordVec)magnitude | special | sign);
#endif
}

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline float sum(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
#endif
}

inline float maximum(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
#endif
}

// e^x within 2 units in the last place; exactly 0 below -87.3, the largest power above 88.3, NaN of NaN.
//
// Cody and Waite's reduction by ln 2 in two parts, then the polynomial of Cephes' expf.
inline Vec exponential(Vec x) {
    const Vec lowest = splat(-87.3f), highest = splat(88.3f), shift = splat(12582912.f);
    Vec y = x < lowest ? lowest : x;
    y = y > highest ? highest : y;
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
    Vec shifted = multiply_add(y, splat(1.44269504f), shift);
    Vec n = shifted - shift;
    Vec r = multiply_add(n, splat(-0.693359375f), y);
    r = multiply_add(n, splat(2.12194440e-4f), r);
    Vec p = splat(1.9875691500e-4f);
    p = multiply_add(p, r, splat(1.3981999507e-3f));
    p = multiply_add(p, r, splat(8.3334519073e-3f));
    p = multiply_add(p, r, splat(4.1665795894e-2f));
    p = multiply_add(p, r, splat(1.6666665459e-1f));
    p = multiply_add(p, r, splat(5.0000001201e-1f));
    p = multiply_add(p, r * r, r + splat(1.f));
    Vec power = (Vec)(((IntVec)shifted << 23) + (IntVec)splat(1.f));
    return x < lowest ? Vec{} : p * power;
}

}  // namespace triode
