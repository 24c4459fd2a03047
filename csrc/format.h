// Bit layout of a packed weight, shared by every native backend. Plain C++17, usable in host and
// device code.
//
// A group is 4 consecutive inputs of one output row; 2 of them are kept (stored values), 2 are
// pruned. The nibble of a group is i0 | i1 << 2 with kept positions i0 < i1, so only six nibbles
// are legal. The pruned positions form a 2:4 pattern themselves: its nibble follows from the first
// by bit operations alone (complement_nibbles).
#pragma once

#if defined(__CUDACC_RTC__)  // NVRTC, which is in every CUDA torch, has no standard headers
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#endif

#if defined(__CUDACC__)
#define SLAB_HD __host__ __device__
#else
#define SLAB_HD
#endif

namespace slab {

constexpr int kGroup = 4;          // inputs that a 2:4 group covers
constexpr int kPatterns = 6;       // legal nibbles
constexpr uint8_t kPadNibble = 4;  // positions 0 and 1, of groups that hold zeros only

enum ValueType : int { kFp16 = 0, kBf16 = 1, kInt8 = 2, kInt4 = 3 };

constexpr SLAB_HD bool is_integer(int values) { return values == kInt8 || values == kInt4; }

// The pruned patterns of eight kept ones. 4 and E are each other's complement and differ by an XOR
// of A; 8 and D, and C and 9, differ by 5. Bit 3 xor bit 1, which is t, tells which of the two it
// is, and A - 5 t never borrows. On a GPU this is two shifts, two LOP3 and one multiply-add.
constexpr SLAB_HD uint32_t complement_nibbles(uint32_t m) {
  const uint32_t t = ((m >> 3) ^ (m >> 1)) & 0x11111111u;
  return m ^ (0xAAAAAAAAu - 5u * t);
}

// The legal nibbles are numbered in ascending (i0, i1): 01 02 03 12 13 23 are 0 to 5. The pruned
// pattern of id is 5 - id.
constexpr SLAB_HD uint32_t pattern_nibble(int id) {
  return id == 0 ? 0x4u : id == 1 ? 0x8u : id == 2 ? 0xCu : id == 3 ? 0x9u : id == 4 ? 0xDu : 0xEu;
}
// The number of a pattern, or -1 for an illegal nibble.
constexpr SLAB_HD int pattern_id(uint32_t nibble) {
  return nibble == 0x4u   ? 0
         : nibble == 0x8u ? 1
         : nibble == 0xCu ? 2
         : nibble == 0x9u ? 3
         : nibble == 0xDu ? 4
         : nibble == 0xEu ? 5
                          : -1;
}
constexpr SLAB_HD int first_position(uint32_t nibble) { return int(nibble & 3u); }
constexpr SLAB_HD int second_position(uint32_t nibble) { return int(nibble >> 2 & 3u); }

namespace detail {
constexpr bool complement_holds() {
  for (int id = 0; id < kPatterns; ++id) {
    const uint32_t kept = pattern_nibble(id), pruned = complement_nibbles(kept) & 0xFu;
    if (pattern_id(kept) != id || pattern_id(pruned) != kPatterns - 1 - id) return false;
    const uint32_t seen = 1u << first_position(kept) | 1u << second_position(kept) |
                          1u << first_position(pruned) | 1u << second_position(pruned);
    if (seen != 0xFu) return false;
  }
  return true;
}
}  // namespace detail
static_assert(detail::complement_holds(),
              "the complement of each of the six patterns holds the other two positions");

}  // namespace slab
