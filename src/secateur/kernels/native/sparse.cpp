#include "sparse.h"

#include <algorithm>
#include <limits>

#include "threads.h"
#include "vectors.h"

namespace {

// Tokens of a full block: of floats, and of bytes, of which more fit into the first-level cache.
constexpr int TOKENS = 64, SMALL = LANES == 16 ? 128 : 64;

int64_t panels_of(const Matrix& w) { return (w.cols + w.panel - 1) / w.panel; }
int64_t groups_of(const Matrix& w) { return (w.rows + w.group - 1) / w.group; }

// One group of rows: which rows, and its first run.
struct Group {
    int64_t first, rows, run;
    Group(const Matrix& w, int64_t g)
        : first(g * w.group), rows(std::min<int64_t>(w.group, w.rows - first)), run(first * panels_of(w)) {}
};

struct alignas(64) Sums {
    float of[64 * std::max(TOKENS, SMALL)];
};

// What one index of `col` stands for: a value, which is multiplied with floats,
template <class Value>
struct Single {
    static constexpr int COLUMNS = 1, BLOCK = TOKENS;
    typedef vec sum;
    const Value* value;
    const uint32_t* start;
    const uint8_t* col;
    explicit Single(const Matrix& w) : value(static_cast<const Value*>(w.values)), start(w.start), col(w.col) {}
    sum first(int64_t) const { return sum{}; }
    float factor(uint32_t k) const { return number(value[k]); }
    static sum add(sum sums, float factor, const float* x) { return sums + factor * numbers(x); }
};
// or the values of four columns, which are multiplied with bytes, four to a token in the place of a float.
struct Quad {
    static constexpr int COLUMNS = 4, BLOCK = SMALL;
    typedef dots sum;
    const uint32_t *total, *start, *value;
    const uint8_t* col;
    explicit Quad(const Matrix& w) : total(w.quad), start(total + w.rows), value(start + w.rows * panels_of(w) + 1) {
        col = reinterpret_cast<const uint8_t*>(value + start[w.rows * panels_of(w)]);
    }
    sum first(int64_t row) const { return sum{} - OFFSET * int32_t(total[row]); }
    bytes factor(uint32_t k) const { return repeated(value[k]); }
    static sum add(sum sums, bytes factor, const float* x) {
        return dot(sums, factor, *reinterpret_cast<const bytes_any*>(x));
    }
};

// Whether a few tokens read by bits, and many by quads, become int8. Sums stay below 2^31 up to so many columns.
bool dynamic(const Matrix& w) { return w.kind == INT8_DYNAMIC && w.bits && w.cols <= 1 << 16; }
bool by_quads(const Matrix& w) { return dynamic(w) && w.quad; }

// Where a panel's columns, or quads of them, lie: one after the other, or anywhere.
struct Packed {
    static constexpr bool QUADS = true;
    template <int V>
    static const float* column(const float* base, const uint32_t*, uint8_t c) {
        return base + size_t(c) * (V * LANES);
    }
};
struct Scattered {
    static constexpr bool QUADS = false;
    template <int V>
    static const float* column(const float* base, const uint32_t* table, uint8_t c) {
        return base + table[c];
    }
};

// A convolution's columns that were copied together: it knows no quads.
struct Copied : Packed {
    static constexpr bool QUADS = false;
};

// One panel of a group for one block of activations, added to sums[row][V * LANES]; the first panel begins them.
template <int V, class Unit, class Where>
void multiply(const Matrix& w, const Group& g, int64_t p, const float* base, const uint32_t* table, float* sums) {
    typedef typename Unit::sum sum;
    typedef sum sum_any __attribute__((may_alias));
    constexpr int SIZE = sizeof(sum) / sizeof(float), N = V * LANES / SIZE;
    const Unit units(w);
    const uint32_t* start = units.start + g.run + p * g.rows;
    for (int64_t r = 0; r < g.rows; r++, start++) {
        sum acc[N];
        sum_any* sum_r = reinterpret_cast<sum_any*>(sums + r * (V * LANES));
        for (int v = 0; v < N; v++) acc[v] = p ? sum_r[v] : units.first(g.first + r);
        for (uint32_t k = start[0], end = start[1]; k < end; k++) {
            const float* x = Where::template column<V>(base, table, units.col[k]);
            const auto factor = units.factor(k);
            for (int v = 0; v < N; v++) acc[v] = Unit::add(acc[v], factor, x + v * SIZE);
        }
        for (int v = 0; v < N; v++) sum_r[v] = acc[v];
    }
}

template <int V, class Unit, class Where>
void multiply(const Matrix& w, const Group& g, int64_t p, const float* base, const uint32_t* table, float* sums,
              int64_t width) {
    if (width == V * LANES) return multiply<V, Unit, Where>(w, g, p, base, table, sums);
    if constexpr (V * LANES < Unit::BLOCK) multiply<V + 1, Unit, Where>(w, g, p, base, table, sums, width);
}

// The same for any kind and width.
template <class Where>
void multiply(const Matrix& w, const Group& g, int64_t p, const float* base, const uint32_t* table, float* sums,
              int64_t width) {
    if constexpr (Where::QUADS)
        if (by_quads(w)) return multiply<1, Quad, Where>(w, g, p, base, table, sums, width);
    if (w.kind == FLOAT32) multiply<1, Single<float>, Where>(w, g, p, base, table, sums, width);
    if (w.kind == BFLOAT16) multiply<1, Single<bfloat16>, Where>(w, g, p, base, table, sums, width);
    if (w.kind >= INT8) multiply<1, Single<int8_t>, Where>(w, g, p, base, table, sums, width);
}

inline float finish(const Matrix& w, int64_t row, float sum) {
    if (w.scale) sum *= w.scale[row];
    if (w.bias) sum += w.bias[row];
    return w.activation == RELU ? (sum > 0 || sum != sum ? sum : 0.0f) : sum;
}

// The flat positions that a convolution computes; those between two rows of the output are not kept.
int64_t positions_of(const Convolution& c) { return (c.out_h - 1) * c.pitch + c.out_w; }

// One line of an image, of `channels` as they come.
void lay_out(const Convolution& c, const float* channels, int64_t line, float* out) {
    const int64_t phases = c.phase_h * c.phase_w, phase = line % phases;
    const int64_t down = phase / c.phase_w - c.pad_h, right = phase % c.phase_w - c.pad_w;
    const float* channel = channels + line / phases * c.in_h * c.in_w;
    // Of a row, the places whose input is inside: from the first to before the last.
    const int64_t first = right < 0 ? std::min((c.stride_w - 1 - right) / c.stride_w, c.pitch) : 0;
    const int64_t inside = (c.in_w - right + c.stride_w - 1) / c.stride_w;
    const int64_t last = std::max(first, std::min(inside, c.pitch)), height = c.length / c.pitch;
    for (int64_t h = 0; h < height; h++, out += c.pitch) {
        const int64_t from = h * c.stride_h + down;
        if (from < 0 || from >= c.in_h) {
            std::fill(out, out + c.pitch, 0.0f);
            continue;
        }
        const float* row = channel + from * c.in_w + right;
        std::fill(out, out + first, 0.0f);
        if (c.stride_w == 1)
            std::copy(row + first, row + last, out + first);
        else if (c.stride_w == 2)
            for (int64_t w = first; w < last; w++) out[w] = row[2 * w];
        else
            for (int64_t w = first; w < last; w++) out[w] = row[c.stride_w * w];
        std::fill(out + last, out + c.pitch, 0.0f);
    }
    std::fill(out, out + c.length - height * c.pitch, 0.0f);
}

// Floats of all lines, where they are made.
int64_t laid_of(const Convolution& c) { return c.laid ? c.count * c.lines * c.length : 0; }

// What a task of a convolution holds: the sums of its rows, and a panel of its inputs.
struct alignas(64) Piece {
    static constexpr int ROWS = 256;
    float sums[ROWS * TOKENS], panel[256 * TOKENS];
};

// panel[column][position]: what each column reads for a block of positions, one after the other; zero past the end.
void gather(const float* from, const float* end, const uint32_t* offset, int64_t columns, int64_t width, float* panel) {
    for (int64_t c = 0; c < columns; c++, panel += width) {
        const float* in = from + offset[c];
        if (end - in >= width)
            for (int64_t t = 0; t < width; t += LANES)
                *reinterpret_cast<vec*>(panel + t) = *reinterpret_cast<const vec_any*>(in + t);
        else
            std::fill(std::copy(in, end, panel), panel + width, 0.0f);
    }
}

// All positions of one row.
void finish(const Matrix& w, int64_t row, float* sums, int64_t width) {
    const float scale = w.scale ? w.scale[row] : 1.0f, bias = w.bias ? w.bias[row] : 0.0f;
    for (int64_t i = 0; i < width; i++) sums[i] = sums[i] * scale + bias;
    if (w.activation == RELU)
        for (int64_t i = 0; i < width; i++) sums[i] = sums[i] <= 0 ? 0.0f : sums[i];
}

// Tokens in a block: whole vectors, and as few too many in all blocks together as can be.
int64_t block_of(int64_t n, int64_t most = TOKENS) {
    const int64_t blocks = std::max<int64_t>(1, (n + most - 1) / most);
    return std::max<int64_t>(1, ((n + blocks - 1) / blocks + LANES - 1) / LANES) * LANES;
}

int64_t block_of(const Matrix& w, int64_t n) { return block_of(n, by_quads(w) ? SMALL : TOKENS); }

// packed[column][token] of one block; columns past the end and tokens past the last are zero.
void pack(const float* x, int64_t n, int64_t cols, int64_t first, int64_t last, int64_t width, float* packed) {
    for (int64_t c = first; c < last; c += LANES) {
        int64_t t = 0;
        if (c + LANES <= cols)
            for (; t + LANES <= n && t < width; t += LANES) {
                vec tile[LANES];
                for (int k = 0; k < LANES; k++) tile[k] = *reinterpret_cast<const vec_any*>(x + (t + k) * cols + c);
                transpose(tile);
                for (int k = 0; k < LANES; k++) *reinterpret_cast<vec*>(packed + (c + k) * width + t) = tile[k];
            }
        for (; t < width; t++)
            for (int64_t i = c; i < c + LANES; i++)
                packed[i * width + t] = t < n && i < cols ? x[t * cols + i] : 0.0f;
    }
}

vec finish(const Matrix& w, int64_t row, vec sums) {
    if (w.scale) sums *= *reinterpret_cast<const vec_any*>(w.scale + row);
    if (w.bias) sums += *reinterpret_cast<const vec_any*>(w.bias + row);
    if (w.activation == RELU) sums = reinterpret_cast<vec>(reinterpret_cast<ivec>(sums) & ~(sums <= 0));
    return sums;
}

// Sums of products of integers [rows][width], as floats, each times the scale of its token.
void to_floats(float* sums, int64_t rows, int64_t width, const float* scale) {
    typedef ivec ivec_any __attribute__((may_alias));
    for (int64_t r = 0; r < rows; r++)
        for (int64_t t = 0; t < width; t += LANES, sums += LANES) {
            const ivec whole = *reinterpret_cast<const ivec_any*>(sums);
            *reinterpret_cast<vec*>(sums) = __builtin_convertvector(whole, vec) * numbers(scale + t);
        }
}

// y[token][row] of one block from sums[row][token].
void unpack(const Matrix& w, const Group& g, const float* sums, int64_t n, int64_t width, float* y) {
    y += g.first;
    for (int64_t t = 0; t < n; t += LANES) {
        const int64_t tokens = std::min<int64_t>(LANES, n - t);
        int64_t r = 0;
        for (; r + LANES <= g.rows; r += LANES) {
            vec tile[LANES];
            for (int k = 0; k < LANES; k++) tile[k] = *reinterpret_cast<const vec*>(sums + (r + k) * width + t);
            transpose(tile);
            for (int k = 0; k < tokens; k++)
                *reinterpret_cast<vec_any*>(y + (t + k) * w.rows + r) = finish(w, g.first + r, tile[k]);
        }
        for (; r < g.rows; r++)
            for (int k = 0; k < tokens; k++) y[(t + k) * w.rows + r] = finish(w, g.first + r, sums[r * width + t + k]);
    }
}

int64_t padded(const Matrix& w) { return panels_of(w) * w.panel; }

constexpr int AHEAD = 1536;  // bytes: what comes from memory is asked for before it is needed

template <int N, class Value>
void vector_bits(const Matrix& w, const Group& g, const float* x, int64_t stride, float (*out)[N]) {
    const Value* values = static_cast<const Value*>(w.values);
    const int words = w.panel / 64;
    const uint32_t* start = w.start + g.run;
    const uint8_t* bits = w.bits + g.run * words * 8;
    vec acc[64][N];
    for (int64_t r = 0; r < g.rows; r++)
        for (int t = 0; t < N; t++) acc[r][t] = vec{};
    for (int64_t p = 0; p < panels_of(w); p++) {
        const float* base = x + p * w.panel;
        for (int64_t r = 0; r < g.rows; r++, start++) {
            const Value* value = values + *start;
            vec own[N][2];  // two chains of sums: one would wait for itself
            for (int t = 0; t < N; t++) own[t][0] = acc[r][t], own[t][1] = vec{};
            for (int word = 0; word < words; word++, bits += 8) {
                __builtin_prefetch(reinterpret_cast<const char*>(value) + AHEAD);
                if (sizeof(Value) == 4) __builtin_prefetch(reinterpret_cast<const char*>(value) + AHEAD + 64);
                uint64_t mask;
                memcpy(&mask, bits, 8);
                vec a[64 / LANES];
                spread(value, mask, a);
                for (int i = 0; i < 64 / LANES; i++)
                    for (int t = 0; t < N; t++)
                        own[t][i & 1] += a[i] * numbers(base + t * stride + word * 64 + i * LANES);
            }
            for (int t = 0; t < N; t++) acc[r][t] = own[t][0] + own[t][1];
        }
    }
    for (int64_t r = 0; r < g.rows; r++)
        for (int t = 0; t < N; t++) out[r][t] = sum(acc[r][t]);
}

template <int N, class Value>
void vector_columns(const Matrix& w, const Group& g, const float* x, int64_t stride, float (*out)[N]) {
    const Value* values = static_cast<const Value*>(w.values);
    const uint32_t* start = w.start + g.run;
    for (int64_t p = 0; p < panels_of(w); p++) {
        const float* base = x + p * w.panel;
        for (int64_t r = 0; r < g.rows; r++, start++) {
            float own[N][4] = {};
            uint32_t k = start[0];
            const uint32_t end = start[1];
            for (; k + 4 <= end; k += 4)
                for (int i = 0; i < 4; i++) {
                    const float a = number(values[k + i]);
                    for (int t = 0; t < N; t++) own[t][i] += a * base[t * stride + w.col[k + i]];
                }
            for (; k < end; k++)
                for (int t = 0; t < N; t++) own[t][0] += number(values[k]) * base[t * stride + w.col[k]];
            for (int t = 0; t < N; t++) out[r][t] = (p ? out[r][t] : 0) + own[t][0] + own[t][1] + own[t][2] + own[t][3];
        }
    }
}

template <int N, class Value>
void vector_group(const Matrix& w, int64_t index, const float* x, float* y) {
    const Group g(w, index);
    float sums[64][N];
    if (!w.bits)
        vector_columns<N, Value>(w, g, x, padded(w), sums);
    else
        vector_bits<N, Value>(w, g, x, padded(w), sums);
    for (int64_t r = 0; r < g.rows; r++)
        for (int t = 0; t < N; t++) y[t * w.rows + g.first + r] = finish(w, g.first + r, sums[r][t]);
}

// Activations as int8: x[t] is about scale[t] * of[t * padded], and there is nothing finite where x is not.
struct Quantized {
    int8_t* of;
    float scale[4];
};

float quantize(const float* x, int64_t cols, int64_t padded, int8_t* out) {
    int32_t largest = 0;  // sizes are in the order of their patterns, and those of what is not finite come last
    for (int64_t i = 0; i < cols; i++) {
        int32_t pattern;
        memcpy(&pattern, x + i, 4);
        largest = std::max(largest, pattern & 0x7fffffff);
    }
    float most;
    memcpy(&most, &largest, 4);
    const bool finite = largest < 0x7f800000, any = finite && most > 1e-30f;
    const float inverse = any ? 127 / most : 0;
    for (int64_t i = 0; i < cols; i++) {
        const float shifted = fused(x[i], inverse, 12582912.0f);  // 1.5 * 2^23: the lowest bits are the integer
        int32_t pattern;
        memcpy(&pattern, &shifted, 4);
        out[i] = int8_t(pattern + OFFSET);
    }
    std::fill(out + cols, out + padded, int8_t(0));
    return any ? most / 127 : finite ? 0 : std::numeric_limits<float>::quiet_NaN();
}

template <int N>
void dynamic_group(const Matrix& w, int64_t index, const Quantized& x, float* y) {
    const Group g(w, index);
    const int64_t stride = padded(w);
    const bytes one = bytes{} + int8_t(1);
    dots acc[64][N], weights[64];  // and the sum of a row's weights, where OFFSET has to be taken back
    for (int64_t r = 0; r < g.rows; r++) {
        weights[r] = dots{};
        for (int t = 0; t < N; t++) acc[r][t] = dots{};
    }
    const uint32_t* start = w.start + g.run;
    const uint8_t* bits = w.bits + g.run * w.panel / 8;
    for (int64_t p = 0; p < panels_of(w); p++) {
        const int8_t* base = x.of + p * w.panel;
        for (int64_t r = 0; r < g.rows; r++, start++) {
            const int8_t* value = static_cast<const int8_t*>(w.values) + *start;
            dots own[N], own_weights = weights[r];
            for (int t = 0; t < N; t++) own[t] = acc[r][t];
            for (int at = 0; at < w.panel; at += BYTES, bits += BYTES / 8) {
                __builtin_prefetch(value + AHEAD);
                const bytes a = expand(value, bits);
                if (OFFSET) own_weights = dot(own_weights, a, one);
                for (int t = 0; t < N; t++)
                    own[t] = dot(own[t], a, *reinterpret_cast<const bytes_any*>(base + t * stride + at));
            }
            for (int t = 0; t < N; t++) acc[r][t] = own[t];
            weights[r] = own_weights;
        }
    }
    for (int64_t r = 0; r < g.rows; r++)
        for (int t = 0; t < N; t++) {
            const int64_t found = total(acc[r][t]) - OFFSET * total(weights[r]);
            y[t * w.rows + g.first + r] = finish(w, g.first + r, float(found) * x.scale[t]);
        }
}

template <int N>
void vectors(const Matrix& w, const float* x, float* y, int32_t threads) {
    parallel(groups_of(w), threads, [&](int64_t g) {
        if (w.kind == FLOAT32) vector_group<N, float>(w, g, x, y);
        if (w.kind == BFLOAT16) vector_group<N, bfloat16>(w, g, x, y);
        if (w.kind >= INT8) vector_group<N, int8_t>(w, g, x, y);
    });
}

template <int N>
void dynamic_vectors(const Matrix& w, const float* x, float* y, float* scratch, int32_t threads) {
    Quantized quantized{reinterpret_cast<int8_t*>(scratch), {}};
    for (int t = 0; t < N; t++)
        quantized.scale[t] = quantize(x + t * w.cols, w.cols, padded(w), quantized.of + t * padded(w));
    parallel(groups_of(w), threads, [&](int64_t g) { dynamic_group<N>(w, g, quantized, y); });
}

}  // namespace

extern "C" {

int64_t scratch_linear(const Matrix* w, int64_t n) {
    const int64_t width = block_of(*w, n), tokens = (n + width - 1) / width * width;
    return by_quads(*w) ? tokens * (padded(*w) / 2 + 1) : tokens * padded(*w);
}

void sparse_linear(const Matrix* w, const float* x, int64_t n, float* y, float* scratch, int32_t threads) {
    const int64_t width = block_of(*w, n), blocks = (n + width - 1) / width, panels = panels_of(*w);
    int64_t cols = w->cols, panel = w->panel;
    const float* scale = nullptr;
    if (by_quads(*w)) {  // a quad of bytes takes the place of a float from here on
        const int64_t all = padded(*w);
        int8_t* small = reinterpret_cast<int8_t*>(scratch);
        float* scales = scratch + blocks * width * (all / 4);
        std::fill(scales + n, scales + blocks * width, 0.0f);
        parallel(n, threads, [&](int64_t t) { scales[t] = quantize(x + t * w->cols, w->cols, all, small + t * all); });
        x = scratch, scale = scales, scratch = scales + blocks * width;
        cols = all / 4, panel /= 4;
    }
    parallel(blocks * panels, threads, [&](int64_t i) {
        const int64_t b = i / panels, p = i % panels;
        pack(x + b * width * cols, n - b * width, cols, p * panel, (p + 1) * panel, width,
             scratch + b * width * panels * panel);
    });
    const int64_t groups = groups_of(*w);
    parallel(blocks * groups, threads, [&](int64_t i) {
        const int64_t b = i / groups;
        const Group g(*w, i % groups);
        Sums sums;
        const float* block = scratch + b * width * panels * panel;
        for (int64_t p = 0; p < panels; p++) multiply<Packed>(*w, g, p, block + p * panel * width, nullptr, sums.of, width);
        if (scale) to_floats(sums.of, g.rows, width, scale + b * width);
        unpack(*w, g, sums.of, std::min(width, n - b * width), width, y + b * width * w->rows);
    });
}

int64_t scratch_vector(const Matrix* w, int64_t n) { return n * padded(*w); }

void sparse_vector(const Matrix* w, const float* x, int64_t n, float* y, float* scratch, int32_t threads) {
    if (dynamic(*w)) {
        if (n == 1) dynamic_vectors<1>(*w, x, y, scratch, threads);
        if (n == 2) dynamic_vectors<2>(*w, x, y, scratch, threads);
        if (n == 3) dynamic_vectors<3>(*w, x, y, scratch, threads);
        if (n == 4) dynamic_vectors<4>(*w, x, y, scratch, threads);
        return;
    }
    for (int64_t t = 0; t < n; t++) {
        std::copy(x + t * w->cols, x + (t + 1) * w->cols, scratch + t * padded(*w));
        std::fill(scratch + t * padded(*w) + w->cols, scratch + (t + 1) * padded(*w), 0.0f);
    }
    if (n == 1) vectors<1>(*w, scratch, y, threads);
    if (n == 2) vectors<2>(*w, scratch, y, threads);
    if (n == 3) vectors<3>(*w, scratch, y, threads);
    if (n == 4) vectors<4>(*w, scratch, y, threads);
}

int64_t block_convolution(const Convolution* c) { return block_of(positions_of(*c)); }

int64_t scratch_convolution(const Convolution* c) { return laid_of(*c); }

void sparse_convolution(const Matrix* w, const Convolution* c, const float* x, float* y, float* scratch,
                        int32_t threads) {
    const int64_t positions = positions_of(*c), width = block_of(positions), blocks = (positions + width - 1) / width;
    const int64_t groups = groups_of(*w), panels = panels_of(*w);
    if (c->laid) {
        const int64_t channels = c->lines / (c->phase_h * c->phase_w) * c->in_h * c->in_w;
        parallel(c->count * c->lines, threads, [&](int64_t i) {
            lay_out(*c, x + i / c->lines * channels, i % c->lines, scratch + i * c->length);
        });
        x = scratch;
    }
    const float* end = x + c->count * c->lines * c->length;
    // A task has one block of positions and as many groups of rows as it has room for the sums of.
    const int64_t share = (c->count * blocks * groups + threads - 1) / std::max(threads, 1);
    const int64_t most = std::max<int64_t>(1, std::min(int64_t(Piece::ROWS / w->group), share));
    const int64_t pieces = (groups + most - 1) / most;
    parallel(c->count * blocks * pieces, threads, [&](int64_t i) {
        const int64_t image = i / pieces / blocks, due = i / pieces % blocks * width;
        // Where it can, the last block starts early and leaves those positions to their own block.
        const int64_t first = std::max<int64_t>(0, std::min(due, positions - width));
        const float* from = x + image * c->lines * c->length + first;
        const int64_t begin = i % pieces * most, last = std::min(begin + most, groups);
        Piece piece;
        for (int64_t p = 0; p < panels; p++) {
            const uint32_t* table = c->offset + p * w->panel;
            if (c->copied) gather(from, end, table, std::min<int64_t>(w->panel, w->cols - p * w->panel), width, piece.panel);
            for (int64_t g = begin; g < last; g++) {
                float* sums = piece.sums + (g - begin) * w->group * width;
                if (c->copied)
                    multiply<Copied>(*w, Group(*w, g), p, piece.panel, nullptr, sums, width);
                else
                    multiply<Scattered>(*w, Group(*w, g), p, from, table, sums, width);
            }
        }
        for (int64_t r = begin * w->group; r < std::min(last * w->group, w->rows); r++) {
            float* sum = piece.sums + (r - begin * w->group) * width;
            finish(*w, r, sum, width);
            float* out = y + (image * w->rows + r) * c->out_h * c->out_w;
            for (int64_t at = due; at < std::min(first + width, positions);) {
                const int64_t h = at / c->pitch, row = std::min(first + width, (h + 1) * c->pitch);
                const int64_t inside = std::min(row, h * c->pitch + c->out_w);
                if (at < inside) std::copy(sum + at - first, sum + inside - first, out + h * c->out_w + at - h * c->pitch);
                at = row;
            }
        }
    });
}

void sparse_use_pool(void* pool) { gomp_parallel = reinterpret_cast<GompParallel>(pool); }

int32_t sparse_lanes(void) { return LANES; }

const char* sparse_isa(void) {
#if BYTES == 64 && defined(__AVX512VNNI__)
    return "avx512vnni";
#elif defined(__AVX512F__)
    return "avx512";
#elif defined(__AVX2__)
    return "avx2";
#elif defined(__ARM_NEON)
    return "neon";
#else
    return "portable";
#endif
}
}
