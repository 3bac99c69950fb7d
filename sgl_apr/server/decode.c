// Decode attention on a CPU: one query token per row, keys and values read where they lie in the cache.
// Nothing is gathered first: with scattered slots that copy costs more than the attention itself.
#include <math.h>
#include <omp.h>
#include <stdint.h>

#define AHEAD 8 // tokens: slots are scattered, so the processor cannot guess the next one

int apr_threads(void) { return omp_get_max_threads(); }

// query, out: [rows, heads, group, dim | vdim]; keys, values: [slots, heads, dim | vdim]; slots: [requests, stride].
// scratch: threads * group * longest floats.
void apr_decode(const float *query, float *out, const float *keys, const float *values, const int32_t *slots,
                int64_t stride, const int64_t *requests, const int64_t *lengths, int64_t rows, int64_t heads,
                int64_t group, int64_t dim, int64_t vdim, float scale, float *scratch, int64_t longest) {
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t r = 0; r < rows; r++)
    for (int64_t h = 0; h < heads; h++) {
      const int32_t *slot = slots + requests[r] * stride;
      const int64_t n = lengths[r];
      const float *q = query + (r * heads + h) * group * dim;
      float *o = out + (r * heads + h) * group * vdim;
      float *weights = scratch + omp_get_thread_num() * group * longest;

      for (int64_t t = 0; t < n; t++) {
        const float *key = keys + ((int64_t)slot[t] * heads + h) * dim;
        if (t + AHEAD < n) __builtin_prefetch(keys + ((int64_t)slot[t + AHEAD] * heads + h) * dim);
        for (int64_t g = 0; g < group; g++) {
          float sum = 0;
          for (int64_t d = 0; d < dim; d++) sum += q[g * dim + d] * key[d];
          weights[g * longest + t] = sum * scale;
        }
      }
      for (int64_t g = 0; g < group; g++) {
        float *w = weights + g * longest, most = w[0], sum = 0;
        for (int64_t t = 1; t < n; t++) most = w[t] > most ? w[t] : most;
        for (int64_t t = 0; t < n; t++) sum += w[t] = expf(w[t] - most);
        for (int64_t t = 0; t < n; t++) w[t] /= sum;
      }
      for (int64_t i = 0; i < group * vdim; i++) o[i] = 0;
      for (int64_t t = 0; t < n; t++) {
        const float *value = values + ((int64_t)slot[t] * heads + h) * vdim;
        if (t + AHEAD < n) __builtin_prefetch(values + ((int64_t)slot[t + AHEAD] * heads + h) * vdim);
        for (int64_t g = 0; g < group; g++) {
          const float w = weights[g * longest + t];
          for (int64_t d = 0; d < vdim; d++) o[g * vdim + d] += w * value[d];
        }
      }
    }
}
