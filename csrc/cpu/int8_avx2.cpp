// int8 activations with AVX2 and FMA: bytes for few tokens, 16-bit integers for many.
#include "../int8.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

#include "int16_tile.h"
#include "int8_shuffle.h"

namespace slab {
namespace {

constexpr Int16Kernels wide = {quantise_pairs, tile_of_pairs};

// On a Zen 3, one thread, 11008x4096, `few` takes .81 to .88 of the time of `wide` at 16 tokens with
// int4 values and rank 1, but 1.06 with int8 values, and 1.40 with two planes too. With rank 2 they
// meet at 12 tokens, with rank 4 at 6. `wide` takes less time than the exact product from 8 to 10
// tokens on: .88 at 16, .70 at 64, .64 at 256.
constexpr int kFewTerms = 24;

const Int8Kernels kernels = {"avx2",  false, quantise_for_strips, quantise_v, strips,
                             nullptr, &wide, kFewAtOnce,          kFewTerms,  true};

}  // namespace

const Int8Kernels* int8_kernels_avx2() { return &kernels; }

}  // namespace slab
#else
namespace slab {
const Int8Kernels* int8_kernels_avx2() { return nullptr; }
}  // namespace slab
#endif
