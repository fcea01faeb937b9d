// Vectors of LANES floats, and the two things that sparse kernels need beyond arithmetic: values of any kind as
// floats, and values expanded to the lanes that a mask names. Everything else of the kernels is plain C++.
#pragma once
#include <cstdint>
#include <cstring>

#ifndef LANES
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float vec_any __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the bit masks are read as words");

struct bfloat16 {
    uint16_t bits;
};

inline float number(float v) { return v; }
inline float number(int8_t v) { return v; }
inline float number(bfloat16 v) {
    uint32_t bits = uint32_t(v.bits) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// Small integers to lanes of 32 bits: compilers make single moves of the general form.
inline ivec widened(const int8_t* p) {
#if defined(__AVX512F__) && LANES == 16
    return reinterpret_cast<ivec>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__) && LANES == 8
    return reinterpret_cast<ivec>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    typedef int8_t byte __attribute__((vector_size(LANES)));
    byte raw;
    memcpy(&raw, p, sizeof raw);
    return __builtin_convertvector(raw, ivec);
#endif
}
inline uvec widened(const uint16_t* p) {
#if defined(__AVX512F__) && LANES == 16
    return reinterpret_cast<uvec>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__) && LANES == 8
    return reinterpret_cast<uvec>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    typedef uint16_t half __attribute__((vector_size(LANES * 2)));
    half raw;
    memcpy(&raw, p, sizeof raw);
    return __builtin_convertvector(raw, uvec);
#endif
}

inline vec numbers(const float* p) { return *reinterpret_cast<const vec_any*>(p); }
inline vec numbers(const bfloat16* p) { return reinterpret_cast<vec>(widened(&p->bits) << 16); }
inline vec numbers(const int8_t* p) { return __builtin_convertvector(widened(p), vec); }

#if defined(__AVX512F__) && LANES == 16
inline vec expand(vec packed, uint32_t mask) {
    return reinterpret_cast<vec>(_mm512_maskz_expand_ps(__mmask16(mask), reinterpret_cast<__m512>(packed)));
}
#elif LANES <= 8
// Lane l takes packed[ones below l]; 128 marks lanes that the mask does not name.
struct Places {
    int8_t of[1 << LANES][LANES];
    constexpr Places() : of() {
        for (int mask = 0; mask < 1 << LANES; mask++)
            for (int lane = 0, next = 0; lane < LANES; lane++) of[mask][lane] = mask >> lane & 1 ? int8_t(next++) : -128;
    }
};
alignas(64) static constexpr Places PLACES{};
inline vec expand(vec packed, uint32_t mask) {
    const ivec place = widened(PLACES.of[mask]);
#if defined(__AVX2__) && LANES == 8
    const __m256 moved = _mm256_permutevar8x32_ps(reinterpret_cast<__m256>(packed), reinterpret_cast<__m256i>(place));
    return reinterpret_cast<vec>(_mm256_blendv_ps(moved, _mm256_setzero_ps(), reinterpret_cast<__m256>(place)));
#else
#if defined(__clang__)
    vec moved;
    for (int lane = 0; lane < LANES; lane++) moved[lane] = packed[place[lane] & (LANES - 1)];
#else
    const vec moved = __builtin_shuffle(packed, place & (LANES - 1));
#endif
    return reinterpret_cast<vec>(reinterpret_cast<ivec>(moved) & ~(place >> 31));
#endif
}
#else  // wide vectors without their instruction: for tests of the template on other processors
inline vec expand(vec packed, uint32_t mask) {
    vec out = {};
    for (int lane = 0, next = 0; lane < LANES; lane++)
        if (mask >> lane & 1) out[lane] = packed[next++];
    return out;
}
#endif

// Four floats, for transposing: every processor here has them.
typedef float quad __attribute__((vector_size(16)));
typedef int32_t iquad __attribute__((vector_size(16)));
inline quad load4(const float* p) {
    quad q;
    memcpy(&q, p, sizeof q);
    return q;
}
inline void store4(float* p, quad q) { memcpy(p, &q, sizeof q); }

inline void transpose(quad (&q)[4]) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SPARSE_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#endif
#endif
#ifndef SPARSE_SHUFFLE
#define SPARSE_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, iquad{i, j, k, l})
#endif
    const quad a = SPARSE_SHUFFLE(q[0], q[1], 0, 4, 1, 5), b = SPARSE_SHUFFLE(q[0], q[1], 2, 6, 3, 7);
    const quad c = SPARSE_SHUFFLE(q[2], q[3], 0, 4, 1, 5), d = SPARSE_SHUFFLE(q[2], q[3], 2, 6, 3, 7);
    q[0] = SPARSE_SHUFFLE(a, c, 0, 1, 4, 5);
    q[1] = SPARSE_SHUFFLE(a, c, 2, 3, 6, 7);
    q[2] = SPARSE_SHUFFLE(b, d, 0, 1, 4, 5);
    q[3] = SPARSE_SHUFFLE(b, d, 2, 3, 6, 7);
}

inline float sum(vec v) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += v[lane];
    return total;
}
