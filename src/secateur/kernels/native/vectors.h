// Vectors of LANES floats and of BYTES small integers, and what sparse kernels need beyond arithmetic: values of any kind
// as floats, values expanded to the lanes that a mask names, and dot products of bytes. The rest is plain C++.
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
#ifndef BYTES
#if defined(__AVX512VBMI2__) && defined(__AVX512VNNI__)
#define BYTES 64
#elif defined(__AVX2__)
#define BYTES 32
#else
#define BYTES 16
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

// a b + c, rounded once wherever the processor does that: what lies half way then does not depend on a compiler.
inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// Lane l takes number place[l] of the two vectors one after the other.
inline vec chosen(vec a, vec b, ivec place) {
#if defined(__clang__)
    vec found;
    for (int lane = 0; lane < LANES; lane++) found[lane] = place[lane] & LANES ? b[place[lane] & (LANES - 1)] : a[place[lane] & (LANES - 1)];
    return found;
#else
    return __builtin_shuffle(a, b, place);
#endif
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
// Lane l takes packed[ones below l]; -128 marks lanes that the mask does not name.
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

// 64 columns of a row as floats: the values that the mask names, in their places, and zeros; `values` moves past them.
template <class Value>
inline void spread(const Value*& values, uint64_t mask, vec (&out)[64 / LANES]) {
    for (int i = 0; i < 64 / LANES; i++) {
        const uint32_t part = uint32_t(mask >> i * LANES) & ((1u << LANES) - 1);
        out[i] = expand(numbers(values), part);
        values += __builtin_popcount(part);
    }
}

#if defined(__AVX2__) && BYTES == 32
// For each mask of eight columns, where in a register its values lie: eight places in one word, 128 for columns not kept.
template <int FIRST>
struct Bytes {
    uint64_t of[256];
    constexpr Bytes() : of() {
        for (int mask = 0; mask < 256; mask++)
            for (int column = 0, next = FIRST; column < 8; column++)
                of[mask] |= uint64_t(mask >> column & 1 ? next++ : 128) << 8 * column;
    }
};
alignas(64) static constexpr Bytes<0> LOWER{};
alignas(64) static constexpr Bytes<8> UPPER{};
#endif

typedef int8_t bytes __attribute__((vector_size(BYTES)));
typedef int8_t bytes_any __attribute__((vector_size(BYTES), aligned(1), may_alias));
typedef int32_t dots __attribute__((vector_size(BYTES)));

// BYTES columns of a row: the values that the mask names, in their places, and zeros; `values` moves past them.
inline bytes expand(const int8_t*& values, const uint8_t* mask) {
#if defined(__AVX512VBMI2__) && BYTES == 64
    uint64_t bits;
    memcpy(&bits, mask, 8);
    const __m512i packed = _mm512_loadu_si512(values);
    values += __builtin_popcountll(bits);
    return reinterpret_cast<bytes>(_mm512_maskz_expand_epi8(bits, packed));
#elif defined(__AVX2__) && BYTES == 32
    __m128i half[2];
    for (int h = 0; h < 2; h++) {  // of a half, eight values each from where theirs begin; a place past 127 gives zero
        const unsigned low = mask[2 * h], high = mask[2 * h + 1];
        const int8_t* next = values + __builtin_popcount(low);
        const __m128i place = _mm_set_epi64x(int64_t(UPPER.of[high]), int64_t(LOWER.of[low]));
        int64_t first, second;
        memcpy(&first, values, 8);
        memcpy(&second, next, 8);
        half[h] = _mm_shuffle_epi8(_mm_set_epi64x(second, first), place);
        values = next + __builtin_popcount(high);
    }
    return reinterpret_cast<bytes>(_mm256_set_m128i(half[1], half[0]));
#else
    bytes out;
    for (int column = 0; column < BYTES; column++) {
        const bool kept = mask[column / 8] >> column % 8 & 1;
        out[column] = kept ? *values : int8_t(0);
        values += kept;
    }
    return out;
#endif
}

// Activations are stored with so much added, for instructions that take one factor without a sign.
#if defined(__AVX512VNNI__) && BYTES == 64
constexpr int OFFSET = 128;
#else
constexpr int OFFSET = 0;
#endif

// sums[i] + the four products of weights and activations that lie there; neither holds -128, before OFFSET is added.
inline dots dot(dots sums, bytes weights, bytes activations) {
    const bytes &a = weights, &b = activations;
#if defined(__AVX512VNNI__) && BYTES == 64
    return reinterpret_cast<dots>(_mm512_dpbusd_epi32(
        reinterpret_cast<__m512i>(sums), reinterpret_cast<__m512i>(b), reinterpret_cast<__m512i>(a)));
#elif defined(__AVX2__) && BYTES == 32
    const __m256i left = reinterpret_cast<__m256i>(a), right = reinterpret_cast<__m256i>(b);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(left), _mm256_sign_epi8(right, left));  // at most 32258
    return sums + reinterpret_cast<dots>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
    for (int i = 0; i < BYTES; i++) sums[i / 4] += int(a[i]) * int(b[i]);
    return sums;
#endif
}

// The four bytes of a word, again and again.
inline bytes repeated(uint32_t word) {
    typedef uint32_t words __attribute__((vector_size(BYTES)));
    return reinterpret_cast<bytes>(words{} + word);
}

inline int64_t total(dots v) {
    int64_t found = 0;
    for (int lane = 0; lane < BYTES / 4; lane++) found += v[lane];
    return found;
}

// A tile of LANES vectors, turned: lane j of vector i goes to lane i of vector j. Blocks of H x H change places, from
// half of the tile down to single numbers.
template <int H = LANES / 2>
inline void transpose(vec (&tile)[LANES]) {
    ivec low, high;  // of two vectors one after the other: what the first keeps and takes, and the second
    for (int lane = 0; lane < LANES; lane++) {
        low[lane] = lane & H ? LANES + lane - H : lane;
        high[lane] = lane & H ? LANES + lane : lane + H;
    }
    for (int i = 0; i < LANES; i++)
        if (!(i & H)) {
            const vec a = tile[i], b = tile[i + H];
            tile[i] = chosen(a, b, low);
            tile[i + H] = chosen(a, b, high);
        }
    if constexpr (H > 1) transpose<H / 2>(tile);
}

template <int N = LANES, class Vector>
inline float sum(Vector v) {
    if constexpr (N == 1) {
        return v[0];
    } else {
        typedef float half __attribute__((vector_size(N * 2)));
        half low, high;
        memcpy(&low, &v, sizeof low);
        memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
        return sum<N / 2>(low + high);
    }
}
