// The logits of tokens that a mask forbids become minus infinity. A mask has one bit for each token, 32 in a word, the
// lowest first. Most words are all ones (free text) or all zeros (a tag has to follow), so these take no look at the bits.
#include <stdint.h>

#define MINUS_INFINITY 0xff800000u // as bits of a float32: -ffast-math has no infinity
#define BITS 32

static void forbid(uint32_t *logits, int64_t count) {
  for (int64_t i = 0; i < count; i++)
    logits[i] = MINUS_INFINITY;
}

// Tokens at and after 32 * `words` are forbidden, as llguidance has it.
void apr_apply_mask(uint32_t *logits, const uint32_t *masks, int64_t rows, int64_t vocab, int64_t words,
                    int64_t logits_stride, int64_t mask_stride) {
  for (int64_t row = 0; row < rows; row++) {
    uint32_t *out = logits + row * logits_stride;
    const uint32_t *mask = masks + row * mask_stride;
    int64_t covered = words * BITS < vocab ? words * BITS : vocab, full = covered / BITS;
    for (int64_t word = 0; word < full; word++) {
      uint32_t bits = mask[word], *group = out + word * BITS;
      if (bits == UINT32_MAX)
        continue;
      if (bits == 0)
        forbid(group, BITS);
      else
        for (int bit = 0; bit < BITS; bit++) // without a branch, so that it becomes vector instructions
          group[bit] = (bits >> bit) & 1 ? group[bit] : MINUS_INFINITY;
    }
    for (int64_t token = full * BITS; token < covered; token++)
      if (!((mask[token / BITS] >> (token % BITS)) & 1))
        out[token] = MINUS_INFINITY;
    forbid(out + covered, vocab - covered);
  }
}
