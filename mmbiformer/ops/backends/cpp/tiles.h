// Tiles in float32: what the attentions share. Logits lie token by token, columns side by side.
// Tokens in memory may be bfloat16; they are converted where they are read and written.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t GROUP = 4;  // rows that share what is loaded for a product
constexpr int64_t SLACK = 8;  // tokens by which the last group of a product may overshoot

template <int64_t N>
struct Lanes {
    typedef float Floats __attribute__((vector_size(4 * N)));
    typedef float Anywhere __attribute__((vector_size(4 * N), aligned(4), may_alias));
    typedef int32_t Ints __attribute__((vector_size(4 * N)));
};
using Four = Lanes<4>::Floats;
using Eight = Lanes<8>::Floats;
#ifdef __AVX512F__
using Wide = Lanes<16>::Floats;  // as wide as the processor can
#else
using Wide = Eight;
#endif

template <class V>
constexpr int64_t lanes = sizeof(V) / sizeof(float);

template <class V>
inline V load(const float *p) {
    return *reinterpret_cast<const typename Lanes<lanes<V>>::Anywhere *>(p);
}

template <class V>
inline void store(float *p, V x) {
    *reinterpret_cast<typename Lanes<lanes<V>>::Anywhere *>(p) = x;
}

// A bfloat16: the upper half of a float.
struct Half {
    uint16_t bits;
};
typedef uint16_t Halves __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint32_t Bits __attribute__((vector_size(32)));

inline Eight load_eight(const float *p) { return load<Eight>(p); }

inline Eight load_eight(const Half *p) {
    const Halves halves = *reinterpret_cast<const Halves *>(p);
    return (Eight)(__builtin_convertvector(halves, Bits) << 16);
}

inline void store_eight(float *p, Eight x) { store(p, x); }

// Rounds to the nearest, ties to even; NaN stays NaN.
inline void store_eight(Half *p, Eight x) {
    const Bits bits = (Bits)x, rounded = bits + 0x7fff + (bits >> 16 & 1);
    const Bits upper = (x == x ? rounded : bits | 0x400000) >> 16;
    *reinterpret_cast<Halves *>(p) = __builtin_convertvector(upper, Halves);
}

// e^x for x <= 0, as 2^n e^r with |r| <= log(2) / 2 and the polynomial of Cephes' expf for e^r.
// Below -87 it is 0; NaN stays NaN.
template <class V>
inline V exponential(V x) {
    using Ints = typename Lanes<lanes<V>>::Ints;
    const V bounded = x < -87.0f ? V{} - 87.0f : x;
    const V shifted = bounded * 1.44269504f + 12582912.0f;  // plus 1.5 * 2^23: a whole number
    const V n = shifted - 12582912.0f;
    const V r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    V y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    y *= (V)(((Ints)shifted << 23) + 0x3f800000);  // n is in the low bits of `shifted`
    return x < -87.0f ? V{} : y;
}

using Offsets = std::vector<int64_t>;

// Fetches a head's tokens early: loading them takes longer than using them.
template <class T>
void prefetch(const T *x, const int64_t *offsets, int64_t count, int64_t dim) {
    for (int64_t j = 0; j < count; j++)
        for (int64_t c = 0; c < dim; c += 64 / sizeof(T)) __builtin_prefetch(x + offsets[j] + c);
}

// A head's tokens as floats, and where they are.
struct Tokens {
    const float *x;
    const int64_t *offsets;
};

// As they are, or as rows of a tile.
inline Tokens floats(const float *x, const int64_t *offsets, int64_t, int64_t, float *,
                     const Offsets &) {
    return {x, offsets};
}

inline Tokens floats(const Half *x, const int64_t *offsets, int64_t count, int64_t dim, float *tile,
                     const Offsets &rows) {
    for (int64_t j = 0; j < count; j++)
        for (int64_t c = 0; c < dim; c += 8)
            store(tile + rows[j] + c, load_eight(x + offsets[j] + c));
    return {tile, &rows[0]};
}

#define MIX(a, b, ...) __builtin_shuffle(a, b, Lanes<8>::Ints{__VA_ARGS__})

void transpose(Eight (&x)[8]) {
    Eight pairs[8], fours[8];
    for (int64_t i = 0; i < 8; i += 2) {
        pairs[i] = MIX(x[i], x[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        pairs[i + 1] = MIX(x[i], x[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int64_t i = 0; i < 8; i += 4)
        for (int64_t n = 0; n < 2; n++) {
            const Eight a = pairs[i + n], b = pairs[i + n + 2];
            fours[i + 2 * n] = MIX(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
            fours[i + 2 * n + 1] = MIX(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int64_t i = 0; i < 4; i++) {
        x[i] = MIX(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        x[i + 4] = MIX(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

// A head's tokens, times a factor, as columns (dim, pitch); columns left over are zeros.
template <class T>
void read_columns(const T *x, const int64_t *offsets, int64_t count, int64_t dim, float factor,
                  int64_t pitch, float *to) {
    for (int64_t r = 0; r < pitch; r += 8)
        for (int64_t c = 0; c < dim; c += 8) {
            Eight block[8];
            for (int64_t i = 0; i < 8; i++)
                block[i] = r + i < count ? load_eight(x + offsets[r + i] + c) * factor : Eight{};
            transpose(block);
            for (int64_t i = 0; i < 8; i++) store(to + (c + i) * pitch + r, block[i]);
        }
}

template <class V, int64_t N, int64_t TOKENS>
void multiply(const float *x, const int64_t *offsets, int64_t count, const float *columns,
              int64_t dim, int64_t pitch, float *out) {
    for (int64_t j = 0; j < count; j += TOKENS) {
        const float *tokens[TOKENS];
        for (int64_t i = 0; i < TOKENS; i++) tokens[i] = x + offsets[std::min(j + i, count - 1)];
        V total[TOKENS][N] = {};
        for (int64_t c = 0; c < dim; c++) {
            V part[N];
#pragma GCC unroll 2
            for (int64_t n = 0; n < N; n++) part[n] = load<V>(columns + c * pitch + n * lanes<V>);
#pragma GCC unroll 8
            for (int64_t i = 0; i < TOKENS; i++)
#pragma GCC unroll 2
                for (int64_t n = 0; n < N; n++) total[i][n] += tokens[i][c] * part[n];
        }
#pragma GCC unroll 8
        for (int64_t i = 0; i < TOKENS; i++)
#pragma GCC unroll 2
            for (int64_t n = 0; n < N; n++)
                store(out + (j + i) * pitch + n * lanes<V>, total[i][n]);
    }
}

// out (tokens, pitch) = x . columns (dim, pitch), for a head's tokens anywhere in memory.
void multiply(const float *x, const int64_t *offsets, int64_t count, const float *columns,
              int64_t dim, int64_t queries, int64_t pitch, float *out) {
    int64_t q = 0;
    for (; q + 2 * lanes<Wide> <= pitch; q += 2 * lanes<Wide>)
        multiply<Wide, 2, lanes<Wide> / 2>(x, offsets, count, columns + q, dim, pitch, out + q);
    for (; q + 16 <= pitch; q += 16)
        multiply<Eight, 2, 4>(x, offsets, count, columns + q, dim, pitch, out + q);
    if (queries - q > 4)
        multiply<Eight, 1, 8>(x, offsets, count, columns + q, dim, pitch, out + q);
    else if (queries > q)
        multiply<Four, 1, 8>(x, offsets, count, columns + q, dim, pitch, out + q);
}

// Channels from `c` on, N registers at a time; returns the first that is left over.
template <class V, int64_t N>
int64_t add_weighted(const float *weights, int64_t next_token, int64_t next_row, const float *x,
                     const int64_t *offsets, int64_t count, float *out, const int64_t *out_offsets,
                     int64_t rows, int64_t dim, int64_t c) {
    for (; c + N * lanes<V> <= dim; c += N * lanes<V>)
        for (int64_t r = 0; r < rows; r += GROUP) {
            V total[GROUP][N] = {};
            const float *weight = weights + r * next_row;
            for (int64_t j = 0; j < count; j++, weight += next_token) {
                const float *token = x + offsets[j] + c;
                V part[N];
#pragma GCC unroll 2
                for (int64_t n = 0; n < N; n++) part[n] = load<V>(token + n * lanes<V>);
#pragma GCC unroll 4
                for (int64_t i = 0; i < GROUP; i++)
#pragma GCC unroll 2
                    for (int64_t n = 0; n < N; n++) total[i][n] += weight[i * next_row] * part[n];
            }
#pragma GCC unroll 4
            for (int64_t i = 0; i < GROUP; i++) {
                if (r + i >= rows) break;
                float *row = out + out_offsets[r + i] + c;  // only now: regions may be listed twice
#pragma GCC unroll 2
                for (int64_t n = 0; n < N; n++)
                    store(row + n * lanes<V>, load<V>(row + n * lanes<V>) + total[i][n]);
            }
        }
    return c;
}

// out[r] += sum of weights[j * next_token + r * next_row] x[j], both tokens anywhere in memory.
void add_weighted(const float *weights, int64_t next_token, int64_t next_row, const float *x,
                  const int64_t *offsets, int64_t count, float *out, const int64_t *out_offsets,
                  int64_t rows, int64_t dim) {
    int64_t c = add_weighted<Wide, 2>(weights, next_token, next_row, x, offsets, count, out,
                                      out_offsets, rows, dim, 0);
    c = add_weighted<Eight, 2>(weights, next_token, next_row, x, offsets, count, out, out_offsets,
                               rows, dim, c);
    add_weighted<Eight, 1>(weights, next_token, next_row, x, offsets, count, out, out_offsets, rows,
                           dim, c);
}

// Turns a tile's logits into the softmax's numerators, in place. The largest logit of each query
// and its sum continue those of the blocks before, whose results must be multiplied by `factor`.
template <class V>
void weigh(float *logits, int64_t count, int64_t pitch, float *largest, float *sum, float *factor) {
    V top = load<V>(largest);
    for (int64_t j = 0; j < count; j++) {
        const V x = load<V>(logits + j * pitch);
        top = top < x ? x : top;  // skips NaN, whose exponential will be NaN
    }
    const V base = top == -INFINITY ? V{} : top;  // all logits are -inf so far
    const V less = exponential(load<V>(largest) - base);
    V total = load<V>(sum) * less;
    for (int64_t j = 0; j < count; j++) {
        const V weight = exponential(load<V>(logits + j * pitch) - base);
        store(logits + j * pitch, weight);
        total += weight;
    }
    store(largest, top);
    store(sum, total);
    store(factor, less);
}

}  // namespace
