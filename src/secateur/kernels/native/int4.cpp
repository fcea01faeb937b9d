#include "int4.h"

#include <algorithm>
#include <type_traits>

#include "threads.h"
#include "vectors.h"

namespace {

// A vector of 32-bit words holds eight weights a lane: those of lane l are neighbors, 8 l to 8 l + 7.
constexpr int NIBBLES = 8, BLOCK = NIBBLES * LANES;
// Activations of a block: for each nibble of the words a vector of its inputs, and what is added to the products.
constexpr int LAID = (NIBBLES + 1) * LANES;
constexpr int CHUNK = 32;  // rows of a task

int64_t blocks_of(const Int4& w) { return (w.cols + BLOCK - 1) / BLOCK; }
int64_t groups_of(const Int4& w) { return w.cols / w.group; }
int64_t scales_of(const Int4& w) { return std::max<int64_t>(groups_of(w), blocks_of(w) * BLOCK / w.group); }

// The nibble goes to the top of the mantissa of a number from 1 to 2: 1 + nibble / 16, without a conversion. Sixteen times
// the sum of products is then too large by (24 + zero) / 16 of the sum of activations, which is where sums begin.
template <int K>
vec fraction(uvec words) {
    constexpr int UP = 19 - 4 * K;
    const uvec moved = UP >= 0 ? words << (UP >= 0 ? UP : 0) : words >> (UP < 0 ? -UP : 0);
#if defined(__AVX512F__) && LANES == 16
    return reinterpret_cast<vec>(_mm512_ternarylogic_epi32(
        reinterpret_cast<__m512i>(moved), _mm512_set1_epi32(15 << 19), _mm512_set1_epi32(127 << 23), 0xea));
#else
    return reinterpret_cast<vec>((moved & (15u << 19)) | (127u << 23));
#endif
}

void lay_out(const Int4& w, const float* x, float* out) {
    const float factor = w.zero ? -1.0f / 16 : -24.0f / 16;
    for (int64_t first = 0; first < w.cols; first += BLOCK, out += LAID)
        for (int lane = 0; lane < LANES; lane++) {
            float total = 0;
            for (int k = 0; k < NIBBLES; k++) {
                const int64_t c = first + lane * NIBBLES + k;
                const float v = c < w.cols ? x[c] : 0;
                out[k * LANES + lane] = v, total += v;
            }
            out[NIBBLES * LANES + lane] = factor * total;
        }
}

// Numbers of the groups in a block, each in its lanes.
template <int GROUPS, class Number>
vec lanes(const Number* of) {
    vec found = vec{} + float(of[0]);
    ivec lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    for (int g = 1; g < GROUPS; g++) found = lane < g * (LANES / GROUPS) ? found : vec{} + float(of[g]);
    return found;
}

// Where rows begin: the last ones are copied, for whole blocks are read.
struct Rows {
    const Int4& w;
    int64_t safe, groups, row_bytes, bytes, scales;  // from row `safe` on, copies of so many bytes and scales
    uint8_t* values;
    float* scale;
    int8_t* zero;
    Rows(const Int4& w, float* scratch)
        : w(w), safe(w.rows - over(w)), groups(groups_of(w)), row_bytes(w.cols / 2), bytes(blocks_of(w) * BLOCK / 2),
          scales(scales_of(w)) {
        const int64_t count = w.rows - safe;
        scale = scratch, values = reinterpret_cast<uint8_t*>(scratch + count * scales);
        zero = reinterpret_cast<int8_t*>(values + count * bytes);
        for (int64_t i = 0; i < count; i++) {
            const int64_t r = safe + i;
            std::copy(w.values + r * row_bytes, w.values + (r + 1) * row_bytes, values + i * bytes);
            std::fill(values + i * bytes + row_bytes, values + (i + 1) * bytes, uint8_t(0));
            std::copy(w.scale + r * groups, w.scale + (r + 1) * groups, scale + i * scales);
            std::fill(scale + i * scales + groups, scale + (i + 1) * scales, 0.0f);
            if (!w.zero) continue;
            std::copy(w.zero + r * groups, w.zero + (r + 1) * groups, zero + i * scales);
            std::fill(zero + i * scales + groups, zero + (i + 1) * scales, int8_t(0));
        }
    }
    // Rows from whose end on there may be less than is read.
    static int64_t over(const Int4& w) {
        const int64_t more = blocks_of(w) * BLOCK - w.cols;
        return std::min<int64_t>(w.rows, (more + w.cols - 1) / w.cols);
    }
    static int64_t floats(const Int4& w) { return over(w) * (scales_of(w) * 5 / 4 + 1 + blocks_of(w) * BLOCK / 8); }
    const uint8_t* values_of(int64_t r) const {
        return r < safe ? w.values + r * row_bytes : values + (r - safe) * bytes;
    }
    const float* scale_of(int64_t r) const {
        return r < safe ? w.scale + r * groups : scale + (r - safe) * scales;
    }
    const int8_t* zero_of(int64_t r) const {
        return r < safe ? w.zero + r * groups : zero + (r - safe) * scales;
    }
};

// R rows times N tokens that were laid out, from row `first` on; the last row again where there are no more.
template <int N, int R, int GROUPS, bool ZERO>
void multiply(const Int4& w, const Rows& rows, int64_t first, const float* x, float (&out)[R][N]) {
    const int64_t blocks = blocks_of(w), stride = blocks * LAID;
    const int shared = GROUPS > 1 ? 1 : std::max(1, w.group / BLOCK);  // blocks of a group
    const uint8_t* values[R];
    const float* scale[R];
    const int8_t* zero[R];
    vec acc[R][N];
    for (int r = 0; r < R; r++) {
        const int64_t row = std::min(first + r, w.rows - 1);
        values[r] = rows.values_of(row), scale[r] = rows.scale_of(row), zero[r] = ZERO ? rows.zero_of(row) : nullptr;
        for (int t = 0; t < N; t++) acc[r][t] = vec{};
    }
    for (int64_t b = 0; b < blocks; b++, x += LAID) {
        uvec words[R];
        vec own[R][N];
        const int64_t at = GROUPS > 1 ? b * GROUPS : b / shared;
        for (int r = 0; r < R; r++) {
            memcpy(&words[r], values[r] + b * (BLOCK / 2), sizeof words[r]);
            __builtin_prefetch(values[r] + b * (BLOCK / 2) + 2048);
            for (int t = 0; t < N; t++) {
                own[r][t] = numbers(x + t * stride + NIBBLES * LANES);
                if constexpr (ZERO) own[r][t] *= 24 + lanes<GROUPS>(zero[r] + at);
            }
        }
        const auto step = [&](auto nibble) {
            constexpr int K = decltype(nibble)::value;
            vec given[N];
            for (int t = 0; t < N; t++) given[t] = numbers(x + t * stride + K * LANES);
            for (int r = 0; r < R; r++) {
                const vec f = fraction<K>(words[r]);
                for (int t = 0; t < N; t++) own[r][t] += f * given[t];
            }
        };
        step(std::integral_constant<int, 0>()), step(std::integral_constant<int, 1>());
        step(std::integral_constant<int, 2>()), step(std::integral_constant<int, 3>());
        step(std::integral_constant<int, 4>()), step(std::integral_constant<int, 5>());
        step(std::integral_constant<int, 6>()), step(std::integral_constant<int, 7>());
        for (int r = 0; r < R; r++) {
            const vec s = lanes<GROUPS>(scale[r] + at);
            for (int t = 0; t < N; t++) acc[r][t] += s * own[r][t];
        }
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < N; t++) out[r][t] = 16 * sum(acc[r][t]);
}

template <int N, int GROUPS, bool ZERO>
void vectors(const Int4& w, const Rows& rows, const float* x, float* y, int32_t threads) {
    constexpr int R = LANES == 8 && N <= 2 ? 8 : 4;  // so many chains of sums that none waits for itself
    parallel((w.rows + CHUNK - 1) / CHUNK, threads, [&](int64_t chunk) {
        const int64_t last = std::min<int64_t>((chunk + 1) * CHUNK, w.rows);
        for (int64_t first = chunk * CHUNK; first < last; first += R) {
            float out[R][N];
            multiply<N, R, GROUPS, ZERO>(w, rows, first, x, out);
            for (int64_t r = first; r < std::min(first + R, last); r++)
                for (int t = 0; t < N; t++) {
                    const float found = out[r - first][t] + (w.bias ? w.bias[r] : 0);
                    y[t * w.rows + r] = w.activation == RELU && found < 0 ? 0 : found;
                }
        }
    });
}

template <int N, int GROUPS>
void vectors(const Int4& w, const Rows& rows, const float* x, float* y, int32_t threads) {
    if (w.zero) return vectors<N, GROUPS, true>(w, rows, x, y, threads);
    vectors<N, GROUPS, false>(w, rows, x, y, threads);
}

template <int N>
void vectors(const Int4& w, const float* x, float* y, float* scratch, int32_t threads) {
    const int64_t stride = blocks_of(w) * LAID;
    for (int t = 0; t < N; t++) lay_out(w, x + t * w.cols, scratch + t * stride);
    const Rows rows(w, scratch + N * stride);
    if (BLOCK >= 4 * w.group) return vectors<N, LANES == 16 ? 4 : 1>(w, rows, scratch, y, threads);
    if (BLOCK >= 2 * w.group) return vectors<N, LANES >= 8 ? 2 : 1>(w, rows, scratch, y, threads);
    vectors<N, 1>(w, rows, scratch, y, threads);
}

uint32_t pattern(float v) {
    uint32_t found;
    memcpy(&found, &v, 4);
    return found;
}
uint32_t rounded(float v) {  // to the upper half of its bits
    const uint32_t bits = pattern(v);
    return bits + 0x7fff + (bits >> 16 & 1);
}

}  // namespace

extern "C" {

int64_t scratch_int4(const Int4* w, int64_t n) { return n * blocks_of(*w) * LAID + Rows::floats(*w); }

void int4_vector(const Int4* w, const float* x, int64_t n, float* y, float* scratch, int32_t threads) {
    if (n == 1) vectors<1>(*w, x, y, scratch, threads);
    if (n == 2) vectors<2>(*w, x, y, scratch, threads);
    if (n == 3) vectors<3>(*w, x, y, scratch, threads);
    if (n == 4) vectors<4>(*w, x, y, scratch, threads);
}

void int4_floats(const Int4* w, int64_t first, int64_t last, void* out, int32_t bfloat16, int32_t threads) {
    const int64_t groups = groups_of(*w), pairs = w->group / 2;
    parallel((last - first + CHUNK - 1) / CHUNK, threads, [&](int64_t chunk) {
        const int64_t begin = first + chunk * CHUNK, end = std::min<int64_t>(begin + CHUNK, last);
        for (int64_t i = begin * groups; i < end * groups; i++) {
            const uint8_t* values = w->values + i * pairs;
            const float scale = w->scale[i];
            const int32_t zero = 8 + (w->zero ? w->zero[i] : 0);
            uint32_t* words = static_cast<uint32_t*>(out) + (i - first * groups) * pairs * (bfloat16 ? 1 : 2);
            if (bfloat16)
                for (int64_t k = 0; k < pairs; k++) {
                    const int32_t both = values[k];
                    const uint32_t low = rounded(scale * float((both & 15) - zero));
                    const uint32_t high = rounded(scale * float((both >> 4) - zero));
                    words[k] = low >> 16 | (high & 0xffff0000u);
                }
            else
                for (int64_t k = 0; k < pairs; k++) {
                    words[2 * k] = pattern(scale * float((values[k] & 15) - zero));
                    words[2 * k + 1] = pattern(scale * float((values[k] >> 4) - zero));
                }
        }
    });
}
}
