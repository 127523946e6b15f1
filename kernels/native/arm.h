// The instructions of ARM's processors that the compiler's vector types do not spell: NEON's, or SVE's where the vectors'
// length is known when compiling.
//
// What a build may use follows from its flags (`isa.py`): products of bytes, of bfloat16, and of small matrices.
#pragma once

#include <arm_neon.h>
#if defined(__ARM_FEATURE_SVE)
#include <arm_sve.h>
#endif

#include <cstdint>

namespace triode {

#if defined(__ARM_FEATURE_SVE)
static_assert(__ARM_FEATURE_SVE_BITS, "-msve-vector-bits says how long the vectors are");
#define TRIODE_SVE(type) typedef type __attribute__((arm_sve_vector_bits(__ARM_FEATURE_SVE_BITS)))
TRIODE_SVE(svfloat32_t) ArmFloats;
TRIODE_SVE(svint32_t) ArmWords;
TRIODE_SVE(svint8_t) ArmSigned;
TRIODE_SVE(svuint8_t) ArmUnsigned;
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
TRIODE_SVE(svbfloat16_t) ArmHalves;
#endif
#undef TRIODE_SVE
#else
typedef float32x4_t ArmFloats;
typedef int32x4_t ArmWords;
typedef int8x16_t ArmSigned;
typedef uint8x16_t ArmUnsigned;
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
typedef bfloat16x8_t ArmHalves;
#endif
#endif

// What to call with the registers that there are.
#if defined(__ARM_FEATURE_SVE)
#define TRIODE_ARM(sve, neon) sve
#else
#define TRIODE_ARM(sve, neon) neon
#endif

inline ArmFloats arm_splat(float x) {
    return TRIODE_ARM(svdup_f32(x), vdupq_n_f32(x));
}

inline ArmFloats arm_multiply_add(ArmFloats a, ArmFloats b, ArmFloats c) {
    return TRIODE_ARM(svmla_x(svptrue_b32(), c, a, b), vfmaq_f32(c, a, b));
}

// acc + the sum of four products of signed bytes.
inline ArmWords arm_dot_signed(ArmWords acc, ArmSigned a, ArmSigned b) {
#if defined(__ARM_FEATURE_SVE)
    return svdot_s32(acc, a, b);
#elif defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(acc, a, b);
#else
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
    return vaddq_s32(acc, vpaddq_s32(low, vpaddlq_s16(vmull_high_s8(a, b))));
#endif
}

#if defined(__ARM_FEATURE_MATMUL_INT8)
// The same of bytes without a sign and signed ones.
inline ArmWords arm_dot_mixed(ArmWords acc, ArmUnsigned a, ArmSigned b) {
    return TRIODE_ARM(svusdot_s32(acc, a, b), vusdotq_s32(acc, a, b));
}

// In each 16 bytes: two rows of eight of `a` times two of `b`, as words (a0 b0, a0 b1, a1 b0, a1 b1).
inline ArmWords arm_square_mixed(ArmWords acc, ArmUnsigned a, ArmSigned b) {
    return TRIODE_ARM(svusmmla_s32(acc, a, b), vusmmlaq_s32(acc, a, b));
}
#endif

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
// acc + the sum of two products of bfloat16.
inline ArmFloats arm_dot_halves(ArmFloats acc, ArmHalves a, ArmHalves b) {
    return TRIODE_ARM(svbfdot_f32(acc, a, b), vbfdotq_f32(acc, a, b));
}

// In each 16 bytes: two rows of four of `a` times two of `b`, as floats (a0 b0, a0 b1, a1 b0, a1 b1). Each is, to the
// bit, what two `arm_dot_halves` give (Arm ARM, BFMatMulAdd).
inline ArmFloats arm_square_halves(ArmFloats acc, ArmHalves a, ArmHalves b) {
    return TRIODE_ARM(svbfmmla_f32(acc, a, b), vbfmmlaq_f32(acc, a, b));
}
#endif

#undef TRIODE_ARM

}  // namespace triode
