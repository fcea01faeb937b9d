// The kernels against plain loops, on heap blocks of exactly the documented sizes: a sanitizer then sees every read and
// write past one. Not part of a library; tests/kernels/test_sanitizers.py compiles and runs it.
#include "int4.cpp"
#include "sparse.cpp"

#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>

namespace {

const float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
std::mt19937 generator(1);
int failures = 0;

float uniform() { return std::uniform_real_distribution<float>(-1, 1)(generator); }

// A heap block of exactly `count` items, `skew` bytes from where they would lie; NaN at first, so that nothing is left.
template <class T>
struct Block {
    std::unique_ptr<char[]> memory;
    T* items;
    explicit Block(int64_t count, int64_t skew = 0) : memory(new char[count * sizeof(T) + skew]) {
        memset(memory.get(), 0xff, count * sizeof(T) + skew);
        items = reinterpret_cast<T*>(memory.get() + skew);
    }
    T& operator[](int64_t i) { return items[i]; }
};

struct Case {
    int64_t rows, cols;
    int32_t group, panel, kind, activation;
    int64_t nonzeros;
    std::vector<double> dense;
    Block<char> values{0};
    Block<uint32_t> start{0};
    Block<uint8_t> col{0}, bits{0};
    Block<uint32_t> quad{0};
    Block<float> scale{0}, bias{0};

    // Kept: of a thousand. Every third row keeps nothing where that is less than all.
    Case(int64_t rows, int64_t cols, int32_t group, int32_t panel, int32_t kind, int32_t activation, int kept)
        : rows(rows), cols(cols), group(group), panel(panel), kind(kind), activation(activation), dense(rows * cols) {
        const int64_t panels = (cols + panel - 1) / panel, runs = rows * panels;
        std::vector<bool> mask(rows * cols);
        for (int64_t i = 0; i < rows * cols; i++)
            mask[i] = kept == 1000 || (i / cols % 3 != 1 && int(generator() % 1000) < kept);
        nonzeros = std::count(mask.begin(), mask.end(), true);
        const int64_t size = kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1;
        values = Block<char>(nonzeros * size + SLACK);
        start = Block<uint32_t>(runs + 1);
        col = Block<uint8_t>(nonzeros);
        bits = Block<uint8_t>(runs * panel / 8, 1);
        memset(bits.items, 0, runs * panel / 8);
        scale = Block<float>(rows);
        bias = Block<float>(rows);
        for (int64_t r = 0; r < rows; r++) scale[r] = 0.01f + 0.001f * float(r % 7), bias[r] = uniform();
        uint32_t next = 0;
        int64_t run = 0;
        for (int64_t first = 0; first < rows; first += group)
            for (int64_t p = 0; p < panels; p++)
                for (int64_t r = first; r < std::min<int64_t>(rows, first + group); r++, run++) {
                    start[run] = next;
                    for (int64_t c = p * panel; c < std::min<int64_t>(cols, (p + 1) * panel); c++)
                        if (mask[r * cols + c]) keep(run, r, c, next++);
                }
        start[runs] = next;
        if (kind == INT8_DYNAMIC) find_quads(runs);
    }

    void find_quads(int64_t runs) {
        std::vector<uint32_t> head(rows + runs + 1), words;
        std::vector<uint8_t> places;
        const int64_t panels = (cols + panel - 1) / panel;
        for (int64_t run = 0; run < runs; run++) {
            const int64_t of_group = run / (group * panels) * group, full = std::min<int64_t>(group, rows - of_group);
            const int64_t r = of_group + (run - of_group * panels) % full;
            int last = -1;
            for (uint32_t k = start[run]; k < start[run + 1]; k++) {
                const int8_t value = reinterpret_cast<int8_t*>(values.items)[k];
                if (col[k] / 4 != last) words.push_back(0), places.push_back(uint8_t(last = col[k] / 4));
                words.back() |= uint32_t(uint8_t(value)) << 8 * (col[k] % 4);
                head[r] += uint32_t(value);
            }
            head[rows + run + 1] = uint32_t(words.size());
        }
        places.resize((places.size() + 3) / 4 * 4);
        quad = Block<uint32_t>(int64_t(head.size() + words.size() + places.size() / 4));
        std::copy(head.begin(), head.end(), quad.items);
        std::copy(words.begin(), words.end(), quad.items + head.size());
        std::copy(places.begin(), places.end(), reinterpret_cast<uint8_t*>(quad.items + head.size() + words.size()));
    }

    void keep(int64_t run, int64_t r, int64_t c, uint32_t at) {
        const int64_t place = c % panel;
        col[at] = uint8_t(place);
        bits[run * panel / 8 + place / 8] |= uint8_t(1 << place % 8);
        if (kind >= INT8) {
            const int8_t v = int8_t(int(generator() % 255) - 127);
            reinterpret_cast<int8_t*>(values.items)[at] = v, dense[r * cols + c] = v;
        } else {
            float v = uniform();
            uint32_t pattern;
            memcpy(&pattern, &v, 4);
            const uint16_t upper = uint16_t(pattern >> 16);
            if (kind == BFLOAT16) {
                pattern &= 0xffff0000u;
                memcpy(&v, &pattern, 4);
                memcpy(values.items + 2 * at, &upper, 2);
            } else {
                memcpy(values.items + 4 * at, &v, 4);
            }
            dense[r * cols + c] = v;
        }
    }

    // with: 1 columns, 2 bits, 4 scale and bias, 8 quads.
    Matrix matrix(int with) {
        return {rows, cols, group, panel, kind, activation, values.items, start.items, with & 1 ? col.items : nullptr,
                with & 2 ? bits.items : nullptr, with & 8 ? quad.items : nullptr,
                with & 4 ? scale.items : nullptr, with & 4 ? bias.items : nullptr};
    }

    double finished(double sum, int64_t row, int with) {
        if (with & 4) sum = sum * scale[row] + bias[row];
        return activation == RELU ? std::max(sum, 0.0) : sum;
    }
};

void expect(float found, double right, double size, const char* what, const Case& c, int64_t n, int32_t threads) {
    if (std::fabs(found - right) <= 1e-5 * (size + 1)) return;  // false where it is not a number
    if (failures++ < 10)
        std::printf("%s %g x %g, group %d, panel %d, kind %d, %g tokens, %d threads: %g is not %g\n", what,
                    double(c.rows), double(c.cols), c.group, c.panel, c.kind, double(n), threads, found, right);
}

void multiplied(Case& c, int64_t n, int with, bool many, int32_t threads) {
    const Matrix w = c.matrix(with);
    Block<float> x(n * c.cols), y(n * c.rows), scratch(many ? scratch_linear(&w, n) : scratch_vector(&w, n));
    for (int64_t i = 0; i < n * c.cols; i++) x[i] = c.kind == INT8_DYNAMIC ? float(int(generator() % 255) - 127) : uniform();
    if (c.kind == INT8_DYNAMIC)  // whole numbers with a scale of one lose nothing in int8
        for (int64_t t = 0; t < n; t++) x[t * c.cols] = 127;
    (many ? sparse_linear : sparse_vector)(&w, x.items, n, y.items, scratch.items, threads);
    for (int64_t t = 0; t < n; t++)
        for (int64_t r = 0; r < c.rows; r++) {
            double sum = 0, size = 0;
            const double* weight = c.dense.data() + r * c.cols;
            const float* token = x.items + t * c.cols;
            for (int64_t k = 0; k < c.cols; k++) {
                const double term = weight[k] * token[k];
                sum += term, size += term < 0 ? -term : term;
            }
            expect(y[t * c.rows + r], c.finished(sum, r, with), size, many ? "linear" : "vector", c, n, threads);
        }
}

// An image of high x wide, without padding or stride; columns are channel, then kernel row, then kernel column.
void convolved(int64_t count, int64_t channels, int64_t high, int64_t wide, int side, bool copied, int32_t threads) {
    const int64_t area = side * side;
    Case c(13, channels * area, 5, 64, copied ? FLOAT32 : BFLOAT16, RELU, 300);
    const Matrix w = c.matrix(1 | 4);
    Convolution about{nullptr, count, channels, high * wide, high - side + 1, wide - side + 1, wide, copied, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    const int64_t block = block_convolution(&about);
    if (!copied && (about.out_h - 1) * wide + about.out_w < block) return;
    Block<uint32_t> offset(c.cols);
    for (int64_t k = 0; k < c.cols; k++) offset[k] = uint32_t(k / area * about.length + k / side % side * wide + k % side);
    about.offset = offset.items;
    Block<float> x(count * channels * high * wide), y(count * c.rows * about.out_h * about.out_w);
    Block<float> scratch(scratch_convolution(&about));
    for (int64_t i = 0; i < count * channels * high * wide; i++) x[i] = uniform();
    sparse_convolution(&w, &about, x.items, y.items, scratch.items, threads);
    const int64_t outputs = about.out_h * about.out_w;
    for (int64_t at = 0; at < count * c.rows * outputs; at++) {
        const int64_t image = at / outputs / c.rows, r = at / outputs % c.rows;
        const int64_t h = at % outputs / about.out_w, v = at % about.out_w;
        double sum = 0, size = 0;
        for (int64_t k = 0; k < c.cols; k++) {
            const int64_t row = (image * channels + k / area) * high + h + k / side % side;
            const double term = c.dense[r * c.cols + k] * x[row * wide + v + k % side];
            sum += term, size += std::fabs(term);
        }
        expect(y[at], c.finished(sum, r, 1 | 4), size, copied ? "copied" : "in place", c, high * wide, threads);
    }
}

// Weights of 4 bits: products of one to four tokens, and the weights themselves.
void of_4_bits(int64_t rows, int64_t cols, int32_t group, bool zeros, int32_t threads) {
    const int64_t groups = cols / group;
    Block<uint8_t> values(rows * cols / 2, 1);
    Block<float> scale(rows * groups), bias(rows);
    Block<int8_t> zero(rows * groups, 1);
    for (int64_t i = 0; i < rows * cols / 2; i++) values[i] = uint8_t(generator());
    for (int64_t i = 0; i < rows * groups; i++) scale[i] = 0.5f + uniform() / 4, zero[i] = int8_t(int(generator() % 16) - 8);
    for (int64_t r = 0; r < rows; r++) bias[r] = uniform();
    const Int4 w{rows, cols, group, zeros ? RELU : NONE, values.items, scale.items, zeros ? zero.items : nullptr, bias.items};
    const Case about(1, 1, 1, 64, FLOAT32, NONE, 1000);
    const auto weight = [&](int64_t r, int64_t c) {
        const int nibble = values[(r * cols + c) / 2] >> 4 * (c % 2) & 15;
        return double(scale[(r * cols + c) / group]) * (nibble - 8 - (zeros ? zero[(r * cols + c) / group] : 0));
    };
    for (int64_t n = 1; n <= 4; n++) {
        Block<float> x(n * cols), y(n * rows), scratch(scratch_int4(&w, n));
        for (int64_t i = 0; i < n * cols; i++) x[i] = uniform();
        int4_vector(&w, x.items, n, y.items, scratch.items, threads);
        for (int64_t i = 0; i < n * rows; i++) {
            double right = bias[i % rows], size = 0;
            for (int64_t c = 0; c < cols; c++) {
                right += weight(i % rows, c) * x[i / rows * cols + c];
                size += 16 * scale[(i % rows * cols + c) / group] * std::fabs(x[i / rows * cols + c]);
            }
            expect(y[i], zeros ? std::max(right, 0.0) : right, size, "4 bits", about, n, threads);
        }
    }
    const int64_t first = rows / 3, last = rows - rows / 4;
    Block<float> floats((last - first) * cols);
    Block<uint16_t> halves((last - first) * cols);
    int4_floats(&w, first, last, floats.items, 0, threads);
    int4_floats(&w, first, last, halves.items, 1, threads);
    for (int64_t i = 0; i < (last - first) * cols; i++) {
        const double right = weight(first + i / cols, i % cols);
        expect(floats[i], right, 0, "floats", about, rows, threads);
        expect(number(bfloat16{halves[i]}), right, std::fabs(right) * 400 - 1, "halves", about, rows, threads);
    }
}

}  // namespace

int main() {
    for (int32_t group : {32, 64, 128, 256})
        for (int64_t rows : {1, 2, 7, 35})
            for (int64_t groups : {1, 3, 4})
                for (bool zeros : {false, true}) of_4_bits(rows, group * groups, group, zeros, 1 + rows % 2);
    const int64_t shapes[][2] = {{1, 1}, {1, 300}, {67, 1}, {3, 64}, {5, 65}, {17, 127}, {66, 257}};
    for (auto& shape : shapes)
        for (int32_t kind = FLOAT32; kind <= INT8_DYNAMIC; kind++)
            for (int kept : {0, 20, 500, 1000}) {
                const int32_t panel = 64 * (1 + int32_t(generator() % 4)), group = 1 + int32_t(generator() % 64);
                Case c(shape[0], shape[1], group, panel, kind, kept == 500 ? RELU : NONE, kept);
                for (int32_t threads = 1; threads <= (kept == 500 ? 2 : 1); threads++) {
                    for (int64_t n = 1; n <= 4; n++)
                        for (int with : {1, 2 | 4}) multiplied(c, n, with, false, threads);
                    for (int64_t n : {1, 6, 17, 35, 70}) multiplied(c, n, n % 2 ? 1 : 3 | 4, true, threads);
                    if (kind == INT8_DYNAMIC)
                        for (int64_t n : {1, 6, 35, 70, 130}) multiplied(c, n, n % 2 ? 2 | 8 : 2 | 4 | 8, true, threads);
                }
            }
    Case full(70, 70, 64, 64, FLOAT32, NONE, 1000);  // a full group and full blocks
    multiplied(full, 128, 1, true, 1);
    for (int32_t threads = 1; threads <= 2; threads++)
        for (bool copied : {true, false})
            for (int side : {1, 2, 3})
                for (int64_t wide : {3, 5, 8, 13})
                    convolved(1 + wide % 2, 1 + wide % 7, wide + side % 2, wide, side, copied, threads);
    if (failures) std::printf("%d differences\n", failures);
    return failures != 0;
}
