// Routed attention, forward and backward; library.py compiles it with GCC.
//
// A tile is some queries of one region and one head, and a block of their routed keys. Its logits
// lie key by key, queries side by side. Keys and values are read in place, one number for all
// queries at a time, and only queries are transposed. Maps are float32 or bfloat16; sums and
// gradients are float32. Lists of tokens leave out what is beyond the
// edge of a map, so nothing needs a mask.

#include "tiles.h"

// A map (batch, height, width, channels); strides in elements, channels are adjacent.
struct Map {
    void *data;
    int64_t image, row, col;
    template <class T>
    T *at(int64_t channel) const {
        return static_cast<T *>(data) + channel;
    }
};

// The size of a map and that of its regions, in tokens.
struct Grid {
    int64_t height, width, h, w;
    int64_t cols() const { return (width + w - 1) / w; }
    int64_t regions() const { return (height + h - 1) / h * cols(); }
};

// The arguments of a call. launch.py has the same fields in the same order.
struct Problem {
    int64_t batch, heads, dim, value_dim, topk;
    int64_t threads, groups, parts;
    int64_t half;                 // whether q, k, v, out and grad_out are bfloat16
    Grid queries, keys;
    const int64_t *routes;        // (batch, query regions, topk)
    Map q, k, v, out, stats;      // stats: by head, the largest logits and 1 / the softmax's sums
    Map grad_out, grad_q, grad_k, grad_v;
    int64_t part_k, part_v;       // floats from one part's gradients to the next part's
    float scale;
};

namespace {

constexpr int64_t QUERIES = 32;  // at most, in a tile
constexpr int64_t KEYS = 128;

// The tokens of a region that are on the map.
struct Region {
    int64_t y, x, height, width;
    Region(const Grid &grid, int64_t number)
        : y(number / grid.cols() * grid.h),
          x(number % grid.cols() * grid.w),
          height(std::min(grid.h, grid.height - y)),
          width(std::min(grid.w, grid.width - x)) {}
};

// The offsets of the tokens of some regions in a map.
void list(Offsets &offsets, const Map &map, const Grid &grid, int64_t image, const int64_t *regions,
          int64_t count) {
    offsets.clear();
    for (int64_t i = 0; i < count; i++) {
        const Region region(grid, regions[i]);
        for (int64_t y = region.y; y < region.y + region.height; y++)
            for (int64_t x = region.x; x < region.x + region.width; x++)
                offsets.push_back(image * map.image + y * map.row + x * map.col);
    }
}

// A thread's lists and tiles.
struct Scratch {
    Offsets q, k, v, out, stats, grad_out, grad_q, grad_k, grad_v, rows, value_rows;
    std::vector<float> queries, grads, logits, slopes, result;
    std::vector<float> k_tile, v_tile, q_tile, grad_tile;  // where bfloat16 is converted

    explicit Scratch(const Problem &p)
        : queries(p.dim * QUERIES),
          grads(p.value_dim * QUERIES),
          logits((KEYS + SLACK) * QUERIES),
          slopes((KEYS + SLACK) * QUERIES),
          result(QUERIES * p.value_dim),
          k_tile(p.half ? KEYS * p.dim : 0),
          v_tile(p.half ? KEYS * p.value_dim : 0),
          q_tile(p.half ? QUERIES * p.dim : 0),
          grad_tile(p.half ? QUERIES * p.value_dim : 0) {
        for (int64_t r = 0; r < std::max(QUERIES, KEYS); r++) {
            rows.push_back(r * p.dim);
            value_rows.push_back(r * p.value_dim);
        }
    }
};

template <class T>
void forward_region(const Problem &p, int64_t image, int64_t region, int64_t first_head,
                    int64_t end_head, Scratch &s) {
    const int64_t *routes = p.routes + (image * p.queries.regions() + region) * p.topk;
    list(s.q, p.q, p.queries, image, &region, 1);
    list(s.out, p.out, p.queries, image, &region, 1);
    list(s.stats, p.stats, p.queries, image, &region, 1);
    list(s.k, p.k, p.keys, image, routes, p.topk);
    list(s.v, p.v, p.keys, image, routes, p.topk);
    const int64_t queries = s.q.size(), keys = s.k.size();
    const int64_t tokens = p.queries.height * p.queries.width;
    float largest[QUERIES], sum[QUERIES], factor[QUERIES];
    for (int64_t head = first_head; head < end_head; head++) {
        const T *q = p.q.at<T>(head * p.dim), *k = p.k.at<T>(head * p.dim);
        const T *v = p.v.at<T>(head * p.value_dim);
        for (int64_t first = 0; first < queries; first += QUERIES) {
            const int64_t rows = std::min(QUERIES, queries - first), pitch = (rows + 7) / 8 * 8;
            read_columns(q, &s.q[first], rows, p.dim, p.scale, pitch, &s.queries[0]);
            std::fill(s.result.begin(), s.result.end(), 0.0f);
            std::fill_n(largest, QUERIES, -INFINITY);
            std::fill_n(sum, QUERIES, 0.0f);
            for (int64_t start = 0; start < keys; start += KEYS) {
                const int64_t count = std::min(KEYS, keys - start);
                float *logits = &s.logits[0];
                prefetch(k, &s.k[start], count, p.dim);
                prefetch(v, &s.v[start], count, p.value_dim);
                const Tokens key = floats(k, &s.k[start], count, p.dim, &s.k_tile[0], s.rows);
                multiply(key.x, key.offsets, count, &s.queries[0], p.dim, rows, pitch, logits);
                if (rows <= 4)
                    weigh<Four>(logits, count, pitch, largest, sum, factor);
                else
                    for (int64_t r = 0; r < rows; r += 8)
                        weigh<Eight>(logits + r, count, pitch, largest + r, sum + r, factor + r);
                if (start)
                    for (int64_t r = 0; r < rows; r++)
                        for (int64_t c = 0; c < p.value_dim; c++)
                            s.result[s.value_rows[r] + c] *= factor[r];
                const Tokens value =
                    floats(v, &s.v[start], count, p.value_dim, &s.v_tile[0], s.value_rows);
                add_weighted(logits, pitch, 1, value.x, value.offsets, count, &s.result[0],
                             &s.value_rows[0], rows, p.value_dim);
            }
            for (int64_t r = 0; r < rows; r++) {
                T *out = p.out.at<T>(head * p.value_dim) + s.out[first + r];
                const float share = 1 / sum[r], *result = &s.result[s.value_rows[r]];
                for (int64_t c = 0; c < p.value_dim; c += 8)
                    store_eight(out + c, load<Eight>(result + c) * share);
                float *stats = p.stats.at<float>(2 * head * tokens) + s.stats[first + r];
                stats[0] = largest[r];
                stats[tokens] = share;
            }
        }
    }
}

// Turns a tile's logits into weights, and the products of gradients and values into gradients of
// the logits.
template <class V>
void differentiate(float *logits, float *slopes, int64_t count, int64_t pitch, const float *largest,
                   const float *shares, const float *shifts, float scale) {
    const V top = load<V>(largest), share = load<V>(shares), shift = load<V>(shifts);
    for (int64_t j = 0; j < count; j++, logits += pitch, slopes += pitch) {
        const V weight = exponential(load<V>(logits) - top) * share;
        store(logits, weight);
        store(slopes, weight * (load<V>(slopes) - shift) * scale);
    }
}

template <class T>
void backward_region(const Problem &p, int64_t image, int64_t region, int64_t first_head,
                     int64_t end_head, int64_t part, Scratch &s) {
    const int64_t *routes = p.routes + (image * p.queries.regions() + region) * p.topk;
    list(s.q, p.q, p.queries, image, &region, 1);
    list(s.out, p.out, p.queries, image, &region, 1);
    list(s.stats, p.stats, p.queries, image, &region, 1);
    list(s.grad_out, p.grad_out, p.queries, image, &region, 1);
    list(s.grad_q, p.grad_q, p.queries, image, &region, 1);
    list(s.k, p.k, p.keys, image, routes, p.topk);
    list(s.v, p.v, p.keys, image, routes, p.topk);
    list(s.grad_k, p.grad_k, p.keys, image, routes, p.topk);
    list(s.grad_v, p.grad_v, p.keys, image, routes, p.topk);
    const int64_t queries = s.q.size(), keys = s.k.size();
    const int64_t tokens = p.queries.height * p.queries.width;
    float largest[QUERIES] = {}, shares[QUERIES] = {}, shifts[QUERIES] = {};
    for (int64_t head = first_head; head < end_head; head++) {
        const T *q = p.q.at<T>(head * p.dim), *k = p.k.at<T>(head * p.dim);
        const T *v = p.v.at<T>(head * p.value_dim), *out = p.out.at<T>(head * p.value_dim);
        const T *grad_out = p.grad_out.at<T>(head * p.value_dim);
        float *grad_q = p.grad_q.at<float>(head * p.dim);
        float *grad_k = p.grad_k.at<float>(head * p.dim + part * p.part_k);
        float *grad_v = p.grad_v.at<float>(head * p.value_dim + part * p.part_v);
        for (int64_t first = 0; first < queries; first += QUERIES) {
            const int64_t rows = std::min(QUERIES, queries - first), pitch = (rows + 7) / 8 * 8;
            read_columns(q, &s.q[first], rows, p.dim, p.scale, pitch, &s.queries[0]);
            read_columns(grad_out, &s.grad_out[first], rows, p.value_dim, 1, pitch, &s.grads[0]);
            for (int64_t r = 0; r < rows; r++) {
                Eight shift = {};
                for (int64_t c = 0; c < p.value_dim; c += 8)
                    shift += load_eight(out + s.out[first + r] + c) *
                             load_eight(grad_out + s.grad_out[first + r] + c);
                shifts[r] = 0;
                for (int64_t i = 0; i < 8; i++) shifts[r] += shift[i];
                const float *stats = p.stats.at<float>(2 * head * tokens) + s.stats[first + r];
                largest[r] = stats[0];
                shares[r] = stats[tokens];
                std::fill_n(grad_q + s.grad_q[first + r], p.dim, 0.0f);
            }
            const Tokens query = floats(q, &s.q[first], rows, p.dim, &s.q_tile[0], s.rows);
            const Tokens grad = floats(grad_out, &s.grad_out[first], rows, p.value_dim,
                                       &s.grad_tile[0], s.value_rows);
            for (int64_t start = 0; start < keys; start += KEYS) {
                const int64_t count = std::min(KEYS, keys - start);
                float *logits = &s.logits[0], *slopes = &s.slopes[0];
                prefetch(k, &s.k[start], count, p.dim);
                prefetch(v, &s.v[start], count, p.value_dim);
                prefetch(grad_k, &s.grad_k[start], count, p.dim);
                prefetch(grad_v, &s.grad_v[start], count, p.value_dim);
                const Tokens key = floats(k, &s.k[start], count, p.dim, &s.k_tile[0], s.rows);
                const Tokens value =
                    floats(v, &s.v[start], count, p.value_dim, &s.v_tile[0], s.value_rows);
                multiply(key.x, key.offsets, count, &s.queries[0], p.dim, rows, pitch, logits);
                multiply(value.x, value.offsets, count, &s.grads[0], p.value_dim, rows, pitch,
                         slopes);
                if (rows <= 4)
                    differentiate<Four>(logits, slopes, count, pitch, largest, shares, shifts,
                                        p.scale);
                else
                    for (int64_t r = 0; r < rows; r += 8)
                        differentiate<Eight>(logits + r, slopes + r, count, pitch, largest + r,
                                             shares + r, shifts + r, p.scale);
                add_weighted(slopes, pitch, 1, key.x, key.offsets, count, grad_q,
                             &s.grad_q[first], rows, p.dim);
                add_weighted(slopes, 1, pitch, query.x, query.offsets, rows, grad_k,
                             &s.grad_k[start], count, p.dim);
                add_weighted(logits, 1, pitch, grad.x, grad.offsets, rows, grad_v,
                             &s.grad_v[start], count, p.value_dim);
            }
        }
    }
}

// A thread takes a query region and a group of its heads.
template <class T>
void run_forward(const Problem &p) {
    const int64_t regions = p.queries.regions();
#pragma omp parallel num_threads(p.threads)
    {
        Scratch scratch(p);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < p.batch * regions * p.groups; i++) {
            const int64_t group = i % p.groups, number = i / p.groups;
            forward_region<T>(p, number / regions, number % regions, p.heads * group / p.groups,
                              p.heads * (group + 1) / p.groups, scratch);
        }
    }
}

// A thread takes an image, a group of its heads, and all query regions or a part of them. Each part
// has gradients of keys and values of its own, so every sum has one order.
template <class T>
void run_backward(const Problem &p) {
    const int64_t regions = p.queries.regions();
#pragma omp parallel num_threads(p.threads)
    {
        Scratch scratch(p);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < p.batch * p.groups * p.parts; i++) {
            const int64_t part = i % p.parts, group = i / p.parts % p.groups;
            for (int64_t r = regions * part / p.parts; r < regions * (part + 1) / p.parts; r++)
                backward_region<T>(p, i / p.parts / p.groups, r, p.heads * group / p.groups,
                                   p.heads * (group + 1) / p.groups, part, scratch);
        }
    }
}

}  // namespace

// Whether every route is the number of a region.
extern "C" int routes_exist(const Problem *problem) {
    const Problem &p = *problem;
    const int64_t regions = p.keys.regions();
    const int64_t *end = p.routes + p.batch * p.queries.regions() * p.topk;
    return std::all_of(p.routes, end, [=](int64_t i) { return 0 <= i && i < regions; });
}

extern "C" void forward(const Problem *problem) {
    problem->half ? run_forward<Half>(*problem) : run_forward<float>(*problem);
}

extern "C" void backward(const Problem *problem) {
    problem->half ? run_backward<Half>(*problem) : run_backward<float>(*problem);
}
