// Bi-directional cross-attention of latents and tokens in float32, forward and backward.
//
// A tile is some tokens and all latents of one head. Its logits lie token by token, latents side by
// side. A token's softmax is over the latents, so it is complete in its tile; a latent's is over the
// tokens and continues from tile to tile. Tokens are cut into parts of one length, so that sums have
// one order, whatever the number of threads.

#include "tiles.h"

#include <memory>

// Rows (batch, count, channels); strides in floats, channels are adjacent.
struct Rows {
    float *data;
    int64_t image, row;
};

// The arguments of a call; bidirectional.py has the same fields in the same order. The references
// (r) make the logits, the values (v) the outputs.
struct Exchange {
    int64_t batch, heads, dim, value_dim, latents, tokens, threads;
    Rows latent_r, latent_v, token_r, token_v;
    Rows latent_out, token_out;
    float *stats;  // (batch, heads, 2, latents): the largest logits and 1 / the softmax's sums
    Rows latent_grad, token_grad;  // of the outputs
    Rows latent_r_grad, latent_v_grad, token_r_grad, token_v_grad;
    float scale;
};

namespace {

constexpr int64_t TILE = 64;   // tokens
constexpr int64_t PART = 512;  // tokens

int64_t parts(const Exchange &p) { return std::max<int64_t>(1, (p.tokens + PART - 1) / PART); }

// A head's rows from `first` on.
void list(Offsets &offsets, const Rows &rows, int64_t image, int64_t first, int64_t count) {
    offsets.resize(count);
    for (int64_t i = 0; i < count; i++) offsets[i] = image * rows.image + (first + i) * rows.row;
}

// Lists of rows in scratch memory, one after the other.
Offsets adjacent(int64_t count, int64_t dim) {
    Offsets offsets(count);
    for (int64_t i = 0; i < count; i++) offsets[i] = i * dim;
    return offsets;
}

// What one part of the tokens adds to the sums of a head's latents.
struct Sums {
    float *largest, *sum, *values;  // (pitch), (pitch), (latents, value_dim)
};

// A thread's lists and tiles. `pitch` is the number of latents, rounded up to whole registers.
struct Tiles {
    int64_t pitch;
    Offsets latent_r, latent_v, latent_grad, token_r, token_v, token_out, token_grad;
    Offsets token_r_grad, token_v_grad, rows, value_rows;
    std::vector<float> refs, values, grads, logits, weights, slopes, token_slopes, factor, shift;

    explicit Tiles(const Exchange &p)
        : pitch((p.latents + 7) / 8 * 8),
          rows(adjacent(p.latents, p.dim)),
          value_rows(adjacent(p.latents, p.value_dim)),
          refs(p.dim * pitch),
          values(p.value_dim * pitch),
          grads(p.value_dim * pitch),
          logits((TILE + SLACK) * pitch),
          weights((TILE + SLACK) * pitch),
          slopes((TILE + SLACK) * pitch),
          token_slopes((TILE + SLACK) * pitch),
          factor(pitch),
          shift(pitch) {}

    // The logits of some tokens; columns beyond the latents are -inf.
    void multiply_refs(const Exchange &p, const float *token_r, int64_t count) {
        multiply(token_r, &this->token_r[0], count, &refs[0], p.dim, pitch, pitch, &logits[0]);
        for (int64_t j = 0; j < count; j++)
            std::fill_n(&logits[j * pitch + p.latents], pitch - p.latents, -INFINITY);
    }
};

float total(Eight x) {
    float sum = 0;
    for (int64_t i = 0; i < 8; i++) sum += x[i];
    return sum;
}

// The numerators of a token's softmax over the latents; returns 1 / their sum.
float weigh_token(const float *logits, int64_t pitch, float *weights) {
    Eight top = load<Eight>(logits);
    for (int64_t i = 8; i < pitch; i += 8) {
        const Eight x = load<Eight>(logits + i);
        top = top < x ? x : top;
    }
    float largest = -INFINITY;
    for (int64_t i = 0; i < 8; i++) largest = std::max(largest, top[i]);
    if (largest == -INFINITY) largest = 0;
    Eight sum = {};
    for (int64_t i = 0; i < pitch; i += 8) {
        const Eight weight = exponential(load<Eight>(logits + i) - largest);
        store(weights + i, weight);
        sum += weight;
    }
    return 1 / total(sum);
}

void forward_part(const Exchange &p, int64_t image, int64_t head, int64_t first, int64_t end,
                  const Sums &sums, Tiles &t) {
    const float *latent_v = p.latent_v.data + head * p.value_dim;
    const float *token_r = p.token_r.data + head * p.dim;
    const float *token_v = p.token_v.data + head * p.value_dim;
    float *token_out = p.token_out.data + head * p.value_dim;
    list(t.latent_r, p.latent_r, image, 0, p.latents);
    list(t.latent_v, p.latent_v, image, 0, p.latents);
    read_columns(p.latent_r.data + head * p.dim, &t.latent_r[0], p.latents, p.dim, p.scale, t.pitch,
                 &t.refs[0]);
    std::fill_n(sums.largest, t.pitch, -INFINITY);
    std::fill_n(sums.sum, t.pitch, 0.0f);
    std::fill_n(sums.values, p.latents * p.value_dim, 0.0f);
    for (int64_t start = first; start < end; start += TILE) {
        const int64_t count = std::min(TILE, end - start);
        list(t.token_r, p.token_r, image, start, count);
        list(t.token_v, p.token_v, image, start, count);
        list(t.token_out, p.token_out, image, start, count);
        t.multiply_refs(p, token_r, count);
        for (int64_t j = 0; j < count; j++) {
            float *weights = &t.weights[j * t.pitch];
            const float share = weigh_token(&t.logits[j * t.pitch], t.pitch, weights);
            for (int64_t i = 0; i < t.pitch; i += 8) store(weights + i, load<Eight>(weights + i) * share);
            std::fill_n(token_out + t.token_out[j], p.value_dim, 0.0f);
        }
        add_weighted(&t.weights[0], 1, t.pitch, latent_v, &t.latent_v[0], p.latents, token_out,
                     &t.token_out[0], count, p.value_dim);
        for (int64_t i = 0; i < t.pitch; i += 8)
            weigh<Eight>(&t.logits[i], count, t.pitch, sums.largest + i, sums.sum + i, &t.factor[i]);
        if (start > first)
            for (int64_t i = 0; i < p.latents; i++)
                for (int64_t c = 0; c < p.value_dim; c++)
                    sums.values[i * p.value_dim + c] *= t.factor[i];
        add_weighted(&t.logits[0], t.pitch, 1, token_v, &t.token_v[0], count, sums.values,
                     &t.value_rows[0], p.latents, p.value_dim);
    }
}

// Joins the sums of all parts, in their order.
void finish(const Exchange &p, int64_t image, int64_t head, const Sums *sums, int64_t count) {
    float *stats = p.stats + (image * p.heads + head) * 2 * p.latents;
    for (int64_t i = 0; i < p.latents; i++) {
        float largest = -INFINITY, sum = 0;
        for (int64_t n = 0; n < count; n++) largest = std::max(largest, sums[n].largest[i]);
        float *out = p.latent_out.data + image * p.latent_out.image + i * p.latent_out.row +
                     head * p.value_dim;
        std::fill_n(out, p.value_dim, 0.0f);
        for (int64_t n = 0; n < count; n++) {
            const float factor = std::exp(sums[n].largest[i] - largest);
            const float *values = sums[n].values + i * p.value_dim;
            sum += factor * sums[n].sum[i];
            for (int64_t c = 0; c < p.value_dim; c++) out[c] += factor * values[c];
        }
        for (int64_t c = 0; c < p.value_dim; c++) out[c] /= sum;
        stats[i] = largest;
        stats[p.latents + i] = 1 / sum;
    }
}

// Turns a token's logits into its weight for each latent, and the products of gradients and values
// into the gradients of its logits; `weights` become those of the latents for the token.
void differentiate_token(const Exchange &p, int64_t j, const float *top, const float *share,
                         Tiles &t) {
    float *logits = &t.logits[j * t.pitch], *weights = &t.weights[j * t.pitch];
    float *slopes = &t.slopes[j * t.pitch];
    const float *token_slopes = &t.token_slopes[j * t.pitch];
    const float token_share = weigh_token(logits, t.pitch, weights);
    Eight sum = {};
    for (int64_t i = 0; i < t.pitch; i += 8) {
        const Eight weight = load<Eight>(weights + i) * token_share;
        store(weights + i, weight);
        sum += weight * load<Eight>(token_slopes + i);
    }
    const float token_shift = total(sum);
    for (int64_t i = 0; i < t.pitch; i += 8) {
        const Eight weight = exponential(load<Eight>(logits + i) - load<Eight>(top + i)) *
                             load<Eight>(share + i);
        const Eight slope = weight * (load<Eight>(slopes + i) - load<Eight>(&t.shift[i]));
        const Eight token_slope =
            load<Eight>(weights + i) * (load<Eight>(token_slopes + i) - token_shift);
        store(logits + i, weight);
        store(slopes + i, (slope + token_slope) * p.scale);
    }
}

// Adds the gradients of a head's latents to `refs` (latents, dim) and `values` (latents, value_dim).
void backward_part(const Exchange &p, int64_t image, int64_t head, int64_t first, int64_t end,
                   float *refs, float *values, Tiles &t) {
    const float *latent_r = p.latent_r.data + head * p.dim;
    const float *latent_v = p.latent_v.data + head * p.value_dim;
    const float *latent_grad = p.latent_grad.data + head * p.value_dim;
    const float *token_r = p.token_r.data + head * p.dim;
    const float *token_v = p.token_v.data + head * p.value_dim;
    const float *token_grad = p.token_grad.data + head * p.value_dim;
    float *token_r_grad = p.token_r_grad.data + head * p.dim;
    float *token_v_grad = p.token_v_grad.data + head * p.value_dim;
    const float *largest = p.stats + (image * p.heads + head) * 2 * p.latents;
    const float *shares = largest + p.latents;
    list(t.latent_r, p.latent_r, image, 0, p.latents);
    list(t.latent_v, p.latent_v, image, 0, p.latents);
    list(t.latent_grad, p.latent_grad, image, 0, p.latents);
    read_columns(latent_r, &t.latent_r[0], p.latents, p.dim, p.scale, t.pitch, &t.refs[0]);
    read_columns(latent_v, &t.latent_v[0], p.latents, p.value_dim, 1, t.pitch, &t.values[0]);
    read_columns(latent_grad, &t.latent_grad[0], p.latents, p.value_dim, 1, t.pitch, &t.grads[0]);
    std::fill_n(refs, p.latents * p.dim, 0.0f);
    std::fill_n(values, p.latents * p.value_dim, 0.0f);
    std::vector<float> top(t.pitch), share(t.pitch);  // columns beyond the latents weigh nothing
    std::copy_n(largest, p.latents, &top[0]);
    std::copy_n(shares, p.latents, &share[0]);
    for (int64_t i = 0; i < p.latents; i++) {
        const float *out = p.latent_out.data + image * p.latent_out.image + i * p.latent_out.row +
                           head * p.value_dim;
        Eight sum = {};
        for (int64_t c = 0; c < p.value_dim; c += 8)
            sum += load<Eight>(out + c) * load<Eight>(latent_grad + t.latent_grad[i] + c);
        t.shift[i] = total(sum);
    }
    for (int64_t start = first; start < end; start += TILE) {
        const int64_t count = std::min(TILE, end - start);
        list(t.token_r, p.token_r, image, start, count);
        list(t.token_v, p.token_v, image, start, count);
        list(t.token_grad, p.token_grad, image, start, count);
        list(t.token_r_grad, p.token_r_grad, image, start, count);
        list(t.token_v_grad, p.token_v_grad, image, start, count);
        t.multiply_refs(p, token_r, count);
        multiply(token_v, &t.token_v[0], count, &t.grads[0], p.value_dim, t.pitch, t.pitch,
                 &t.slopes[0]);
        multiply(token_grad, &t.token_grad[0], count, &t.values[0], p.value_dim, t.pitch, t.pitch,
                 &t.token_slopes[0]);
        for (int64_t j = 0; j < count; j++) {
            differentiate_token(p, j, &top[0], &share[0], t);
            std::fill_n(token_r_grad + t.token_r_grad[j], p.dim, 0.0f);
            std::fill_n(token_v_grad + t.token_v_grad[j], p.value_dim, 0.0f);
        }
        add_weighted(&t.slopes[0], 1, t.pitch, latent_r, &t.latent_r[0], p.latents, token_r_grad,
                     &t.token_r_grad[0], count, p.dim);
        add_weighted(&t.logits[0], 1, t.pitch, latent_grad, &t.latent_grad[0], p.latents,
                     token_v_grad, &t.token_v_grad[0], count, p.value_dim);
        add_weighted(&t.slopes[0], t.pitch, 1, token_r, &t.token_r[0], count, refs, &t.rows[0],
                     p.latents, p.dim);
        add_weighted(&t.weights[0], t.pitch, 1, token_grad, &t.token_grad[0], count, values,
                     &t.value_rows[0], p.latents, p.value_dim);
    }
}

// Adds up the gradients of all parts, in their order.
void add_parts(const float *parts, int64_t count, int64_t next, int64_t latents, int64_t dim,
               const Rows &to, int64_t image, int64_t head) {
    for (int64_t i = 0; i < latents; i++) {
        float *out = to.data + image * to.image + i * to.row + head * dim;
        std::fill_n(out, dim, 0.0f);
        for (int64_t n = 0; n < count; n++)
            for (int64_t c = 0; c < dim; c++) out[c] += parts[n * next + i * dim + c];
    }
}

}  // namespace

// A thread takes an image, a head and a part of the tokens; then it joins the parts of a head.
extern "C" void bidirectional_forward(const Exchange *exchange) {
    const Exchange &p = *exchange;
    const int64_t count = parts(p), pitch = (p.latents + 7) / 8 * 8;
    const int64_t size = 2 * pitch + p.latents * p.value_dim;
    const std::unique_ptr<float[]> memory(new float[p.batch * p.heads * count * size]);
    std::vector<Sums> sums(p.batch * p.heads * count);
    for (size_t i = 0; i < sums.size(); i++) {
        float *own = &memory[i * size];
        sums[i] = {own, own + pitch, own + 2 * pitch};
    }
#pragma omp parallel num_threads(p.threads)
    {
        Tiles tiles(p);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < p.batch * p.heads * count; i++) {
            const int64_t part = i % count, head = i / count % p.heads;
            forward_part(p, i / count / p.heads, head, p.tokens * part / count,
                         p.tokens * (part + 1) / count, sums[i], tiles);
        }
#pragma omp for
        for (int64_t i = 0; i < p.batch * p.heads; i++)
            finish(p, i / p.heads, i % p.heads, &sums[i * count], count);
    }
}

// As forward.
extern "C" void bidirectional_backward(const Exchange *exchange) {
    const Exchange &p = *exchange;
    const int64_t count = parts(p), size = p.latents * (p.dim + p.value_dim);
    const std::unique_ptr<float[]> memory(new float[p.batch * p.heads * count * size]);
#pragma omp parallel num_threads(p.threads)
    {
        Tiles tiles(p);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < p.batch * p.heads * count; i++) {
            const int64_t part = i % count, head = i / count % p.heads;
            float *refs = &memory[i * size];
            backward_part(p, i / count / p.heads, head, p.tokens * part / count,
                          p.tokens * (part + 1) / count, refs, refs + p.latents * p.dim, tiles);
        }
#pragma omp for
        for (int64_t i = 0; i < p.batch * p.heads; i++) {
            const float *refs = &memory[i * count * size];
            add_parts(refs, count, size, p.latents, p.dim, p.latent_r_grad, i / p.heads,
                      i % p.heads);
            add_parts(refs + p.latents * p.dim, count, size, p.latents, p.value_dim,
                      p.latent_v_grad, i / p.heads, i % p.heads);
        }
    }
}
