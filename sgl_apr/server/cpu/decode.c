// Decode attention on a CPU: one query token per row. Keys and values are read from the cache without gathering them
// first, because with scattered slots the copy costs more than the attention.
//
// The work is split into pieces: up to PIECE slots of a request, and the rows that attend to them. A piece computes a
// part for each query of these rows: the sum of the weighted values, the highest score, the sum of the weights. The
// parts of a query are merged at the end, by their highest scores.
#include <math.h>
#include <stdint.h>

#define TILE 8               // sums that are kept in registers at once; divides PIECE
#define PREFETCH_DISTANCE 8  // tokens: slots are scattered, so the processor cannot predict the next one
#define MAX_NARROW 3         // with at most this many queries, the lanes run over a key instead of over the queries
#define PARALLEL_MERGE 65536 // numbers to merge that are worth waking the other threads
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

typedef float lanes __attribute__((vector_size(4 * LANES))); // one number for each of LANES queries
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); // LANES numbers of a row

typedef struct {
  int64_t request, first, last; // slots `first` to `last` of a request, which all these rows share
  int64_t member, rows, part;   // members[member], ... are the rows of queries; their parts are `part`, `part + 1`, ...
} Piece;

typedef struct {
  const float *query, *keys, *values;
  const int32_t *slots;
  float *parts;
  const int64_t *members;
  int64_t stride, heads, group, dim, vdim;
  float scale;
} Batch;

static const float *query_of(const Batch *b, const Piece *p, int64_t head, int64_t i) {
  const int64_t row = b->members[p->member + i / b->group];
  return b->query + ((row * b->heads + head) * b->group + i % b->group) * b->dim;
}

static float *part_of(const Batch *b, const Piece *p, int64_t head, int64_t i) {
  const int64_t part = p->part + i / b->group;
  return b->parts + ((part * b->heads + head) * b->group + i % b->group) * (b->vdim + 2);
}

static void prefetch(const float *row, int64_t size) {
  for (int64_t i = 0; i < size; i += 16) __builtin_prefetch(row + i); // a cache line
}

static inline float total(lanes of) {
  float sum = 0;
  for (int l = 0; l < LANES; l++) sum += of[l];
  return sum;
}

// Sums `count` times LANES numbers of each value for few queries.
static inline __attribute__((always_inline)) void add_values(float weights[][PIECE], const float *values, const int32_t *slot, int64_t n,
                                                             int64_t step, int count, float **part, int64_t column, int queries) {
  lanes sum[MAX_NARROW][TILE / 2] = {0};
  for (int64_t t = 0; t < n; t++) {
    const loose *value = (const loose *)(values + slot[t] * step);
    for (int i = 0; i < queries; i++)
      for (int k = 0; k < count; k++) sum[i][k] += value[k] * weights[i][t];
  }
  for (int i = 0; i < queries; i++)
    for (int k = 0; k < count; k++) *(loose *)(part[i] + column + k * LANES) = sum[i][k];
}

// Computes a piece for few queries, one key at a time: the lanes run over the numbers of a key. Inlined, so that `queries` is
// known and the sums are registers.
static inline __attribute__((always_inline)) void narrow(const Batch *b, const Piece *p, int64_t head, int queries,
                                                         int64_t dim, int64_t vdim) {
  const int64_t n = p->last - p->first, step = b->heads * dim, vstep = b->heads * vdim;
  const int32_t *slot = b->slots + p->request * b->stride + p->first;
  const float *keys = b->keys + head * dim, *values = b->values + head * vdim, *query[MAX_NARROW];
  float weights[MAX_NARROW][PIECE], *part[MAX_NARROW];
  for (int i = 0; i < queries; i++) query[i] = query_of(b, p, head, i), part[i] = part_of(b, p, head, i);

  for (int64_t t = 0; t < n; t++) {
    const float *key = keys + slot[t] * step;
    if (t + PREFETCH_DISTANCE < n) prefetch(keys + slot[t + PREFETCH_DISTANCE] * step, dim);
    prefetch(values + slot[t] * vstep, vdim);
    for (int i = 0; i < queries; i++) {
      lanes sum = {0};
      int64_t d = 0;
      for (; d + LANES <= dim; d += LANES) sum += *(const loose *)(query[i] + d) * *(const loose *)(key + d);
      float score = total(sum);
      for (; d < dim; d++) score += query[i][d] * key[d];
      weights[i][t] = score * b->scale;
    }
  }
  for (int i = 0; i < queries; i++) {
    float *w = weights[i], highest = w[0], sum = 0;
    for (int64_t t = 1; t < n; t++) highest = w[t] > highest ? w[t] : highest;
    for (int64_t t = 0; t < n; t++) sum += w[t] = expf(w[t] - highest);
    part[i][vdim] = highest, part[i][vdim + 1] = sum;
  }
  int64_t v = 0;
  for (; v + TILE / 2 * LANES <= vdim; v += TILE / 2 * LANES) add_values(weights, values + v, slot, n, vstep, TILE / 2, part, v, queries);
  for (; v + LANES <= vdim; v += LANES) add_values(weights, values + v, slot, n, vstep, 1, part, v, queries);
  for (int i = 0; v < vdim && i < queries; i++) {
    for (int64_t c = v; c < vdim; c++) part[i][c] = 0;
    for (int64_t t = 0; t < n; t++)
      for (int64_t c = v; c < vdim; c++) part[i][c] += weights[i][t] * values[slot[t] * vstep + c];
  }
}

// The sizes of heads that are usual are known when this is compiled.
static inline __attribute__((always_inline)) void narrow_heads(const Batch *b, const Piece *p, int64_t head, int queries) {
  if (b->dim == 32 && b->vdim == 32) narrow(b, p, head, queries, 32, 32);
  else if (b->dim == 64 && b->vdim == 64) narrow(b, p, head, queries, 64, 64);
  else if (b->dim == 128 && b->vdim == 128) narrow(b, p, head, queries, 128, 128);
  else narrow(b, p, head, queries, b->dim, b->vdim);
}

static void few(const Batch *b, const Piece *p, int64_t head) {
  const int64_t queries = p->rows * b->group;
  if (queries == 1) narrow_heads(b, p, head, 1);
  else if (queries == 2) narrow_heads(b, p, head, 2);
  else narrow_heads(b, p, head, 3);
}

// Sums `count` numbers of each value, from `column` on. Inlined, so that `count` is known and the sums are registers.
static inline __attribute__((always_inline)) void weigh(const lanes *weights, const float **value, int64_t n,
                                                        int64_t column, int count, float **part, int64_t queries) {
  lanes sum[TILE] = {0};
  for (int64_t t = 0; t < n; t++)
    for (int i = 0; i < count; i++) sum[i] += value[t][column + i] * weights[t];
  for (int64_t l = 0; l < queries; l++)
    for (int i = 0; i < count; i++) part[l][column + i] = sum[i][l];
}

// Computes a piece for the queries from `first` on. The lanes run over the queries, so each number of a key or value is
// read once for all of them.
static void wide(const Batch *b, const Piece *p, int64_t head, int64_t first) {
  const int64_t n = p->last - p->first, left = p->rows * b->group - first, dim = b->dim, vdim = b->vdim;
  const int64_t queries = left < LANES ? left : LANES;
  const int32_t *slot = b->slots + p->request * b->stride + p->first;
  const float *key[PIECE + TILE], *value[PIECE];
  lanes query[dim], weights[PIECE], highest, sum = {0};
  float *part[LANES];
  for (int64_t l = 0; l < LANES; l++) { // an idle lane repeats the first query
    const int64_t i = first + (l < queries ? l : 0);
    const float *from = query_of(b, p, head, i);
    part[l] = part_of(b, p, head, i);
    for (int64_t d = 0; d < dim; d++) query[d][l] = from[d] * b->scale;
  }
  for (int64_t t = 0; t < n; t++) {
    key[t] = b->keys + (slot[t] * b->heads + head) * dim;
    value[t] = b->values + (slot[t] * b->heads + head) * vdim;
  }
  for (int64_t t = n; t < n + TILE; t++) key[t] = key[n - 1]; // fills the last tile

  for (int64_t t = 0; t < n; t += TILE) {
    lanes score[TILE] = {0};
    for (int64_t i = t; i < t + TILE && i < n; i++) {
      if (i + TILE < n) prefetch(key[i + TILE], dim);
      prefetch(value[i], vdim);
    }
    for (int64_t d = 0; d < dim; d++)
      for (int i = 0; i < TILE; i++) score[i] += key[t + i][d] * query[d];
    for (int i = 0; i < TILE; i++) weights[t + i] = score[i];
  }
  highest = weights[0];
  for (int64_t t = 1; t < n; t++)
    for (int l = 0; l < LANES; l++) highest[l] = weights[t][l] > highest[l] ? weights[t][l] : highest[l];
  for (int64_t t = 0; t < n; t++) weights[t] -= highest;
  for (float *w = (float *)weights, *end = (float *)(weights + n); w < end; w++) *w = expf(*w);
  for (int64_t t = 0; t < n; t++) sum += weights[t];

  int64_t column = 0;
  for (; column + TILE <= vdim; column += TILE) weigh(weights, value, n, column, TILE, part, queries);
  for (; column < vdim; column++) weigh(weights, value, n, column, 1, part, queries);
  for (int64_t l = 0; l < queries; l++) part[l][vdim] = highest[l], part[l][vdim + 1] = sum[l];
}

// Merges the parts of one query. `parts` are those of its head, `size` numbers from one to the next; `indices` are those of its row.
static void merge(const float *parts, int64_t size, const int64_t *indices, int64_t count, int64_t vdim, float *out) {
  float highest = parts[indices[0] * size + vdim], sum = 0;
  for (int64_t i = 1; i < count; i++) {
    const float other = parts[indices[i] * size + vdim];
    highest = other > highest ? other : highest;
  }
  for (int64_t v = 0; v < vdim; v++) out[v] = 0;
  for (int64_t i = 0; i < count; i++) {
    const float *part = parts + indices[i] * size, weight = expf(part[vdim] - highest);
    sum += weight * part[vdim + 1];
    for (int64_t v = 0; v < vdim; v++) out[v] += weight * part[v];
  }
  for (int64_t v = 0; v < vdim; v++) out[v] /= sum;
}

// query: [queries, heads, group, dim]; out: [rows, heads, group, vdim]; keys, values: [slots, heads, dim | vdim];
// slots: [requests, stride]. The query of a row is in the same place, and queries after them are for pieces alone.
// parts: [begin[rows], heads, group, vdim + 2]; those of row r are indices[begin[r]], ..., indices[begin[r + 1] - 1].
void apr_decode(const float *query, float *out, const float *keys, const float *values, const int32_t *slots,
                float *parts, const Piece *pieces, const int64_t *members, const int64_t *indices, const int64_t *begin,
                int64_t stride, int64_t count, int64_t rows, int64_t heads, int64_t group, int64_t dim, int64_t vdim,
                float scale) {
  const Batch b = {query, keys, values, slots, parts, members, stride, heads, group, dim, vdim, scale};
  const int64_t each = heads * group;
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t p = 0; p < count; p++)
    for (int64_t h = 0; h < heads; h++)
      if (pieces[p].rows * group <= MAX_NARROW) few(&b, pieces + p, h);
      else
        for (int64_t i = 0; i < pieces[p].rows * group; i += LANES) wide(&b, pieces + p, h, i);

#pragma omp parallel for collapse(2) if (begin[rows] * each * vdim > PARALLEL_MERGE)
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < each; i++)
      merge(parts + i * (vdim + 2), each * (vdim + 2), indices + begin[r], begin[r + 1] - begin[r], vdim,
            out + (r * each + i) * vdim);
}
