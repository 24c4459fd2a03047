// int8 activations with AVX2 and FMA: bytes for few tokens, 16-bit integers for many.
#include "../int8.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

#include "int16_tile.h"
#include "int8_shuffle.h"

namespace slab {
namespace {

constexpr Int16Kernels wide = {quantise_pairs, quantise_factors, tile_of_pairs};

// `few` against `wide`, on a Zen 3 with one thread, 11008x4096: with int4 values and rank 1 it
// takes .83 of the time at 8 tokens and 1.0 at 11, with int8 values 1.09 at 8; with rank 2 they
// meet at 5 or 6, with rank 4 at 4. `wide` takes a half to five sixths of the exact product's time
// from 4 tokens on.
constexpr int kFewTerms = 17;

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
